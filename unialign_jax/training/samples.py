"""Images and captions that a run samples while it trains: real beside generated, real beside predicted."""

import hashlib
import logging
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unialign_jax.bundle_config import BundleConfig
from unialign_jax.data.kinds import has_image_pass
from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.models.parameters import storage_dtype
from unialign_jax.parallel import sharding
from unialign_jax.parallel.activations import BATCH_AXES
from unialign_jax.sampling.programs import Programs, make_guidance
from unialign_jax.sampling.solvers import solver_table
from unialign_jax.training.state import Networks

log = logging.getLogger(__name__)

MARGIN, TEXT_SIZE = 8, 12
LEAST_LEVELS = 1.0  # of 255, on average: a change of pictures that is seen
EXAMPLE_KEYS = ("image", "conditions", "prompt_ids", "text_ids", "text_is_target")


def sample_seeds(seed: int, step: int, count: int) -> np.ndarray:
    """The seeds of a run's samples at a step, uint32 [count], each a new one; `Pipeline` takes them too."""
    digests = (hashlib.sha256(f"{seed}/{step}/{number}".encode()).digest() for number in range(count))
    return np.array([int.from_bytes(digest[:4], "little") for digest in digests], np.uint32)


class Sampler:
    """Writes `samples/<stream>_<step>.png` and `.md` for the first records of every stream.

    And `samples/prompts_<step>.png` for the prompts of `samples.prompts`, always of the same seeds. The programs are
    those of inference (`sampling.programs.Programs`), compiled at the first use, on the run's mesh: weights lie as in
    the train step, samples are split as a batch is. All hosts take part; the first one writes.
    """

    def __init__(self, config, networks: Networks, mesh, streams, tokenizer, workdir):
        self._config, self._mesh, self._tokenizer = config, mesh, tokenizer
        self._directory = Path(workdir) / "samples"
        self._streams = streams if config.samples.count else {}
        self._before = None  # what the base of a run of adapters makes, by stream, and of the prompts
        settings = config.samples
        self._table = solver_table("euler", sampling_sigmas(settings.steps, shift=settings.shift))
        transformer = networks.transformer
        # Answers too are written by the program of captions.
        self._own = BundleConfig(transformer=transformer.config).sampling_defaults

        def compute(params):
            return sharding.params_for_compute(params, lambda path: storage_dtype(path, transformer.config.dtype))

        self._compute = jax.jit(compute)
        ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id}
        self._programs = Programs.of(transformer, networks.text_encoder, networks.autoencoder, **ids, mesh=mesh)
        self._replicate = jax.jit(lambda array: array, out_shardings=sharding.replicated(mesh))
        # How many samples the mesh takes at once: a row for each of its parts.
        self._parts = math.prod(mesh.shape[name] for name in BATCH_AXES)

    def is_written(self, step: int) -> bool:
        files = [self._stem(name, step).with_suffix(".md") for name in self._streams]
        files += [self._stem("prompts", step).with_suffix(".png")] if self._config.samples.prompts else []
        return all(file.exists() for file in files)

    def _stem(self, name: str, step: int) -> Path:
        return self._directory / f"{name}_{step:06d}"

    def write(self, step: int, params: dict, frozen: dict, base: Callable[[], dict] | None = None) -> list[Path]:
        """Samples every stream, and the prompts, with the transformer's `params`. Returns the files written.

        Args:
          base: of a run of adapters: gives the transformer without them. Its samples are drawn beside the others, of
            the same seeds at every step, and the log says by how much they differ.
        """
        paths = []
        if not (self._streams or self._config.samples.prompts):
            return paths
        with jax.set_mesh(self._mesh):
            if base is not None and self._before is None:
                self._before = self._all(0, self._compute(base()), frozen)
            made = self._all(step if base is None else 0, self._compute(params), frozen)
        before = self._before or {}
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            for name, (batch, generated, ids) in made.items():
                paths += self._write_stream(self._stem(name, step), batch, generated, ids, before.get(name))
            if before:
                tell_change([(before[name][1:], result[1:]) for name, result in made.items()])
        return paths

    def _all(self, step, params, frozen):
        """{stream: what `_sample` gives}, and the same of "prompts", without real images and texts."""
        made = {name: self._sample(stream, step, params, frozen) for name, stream in self._streams.items()}
        if self._config.samples.prompts:
            made["prompts"] = self._sample_prompts(params, frozen)
        return made

    def sample(self, stream: str, step: int, params: dict, frozen: dict):
        """(examples, images, ids): the stream's first examples, images from their prompts and texts from their images.

        Examples are one batch, images uint8 [count, H, W, 3] (None without an image pass), ids int32 [count, L].

        Args:
          step: gives the samples their seeds, together with the run's (`sample_seeds`).
          params: the transformer's, as the state holds them.
        """
        with jax.set_mesh(self._mesh):
            return self._sample(stream, step, self._compute(params), frozen)

    def _sample(self, stream, step, params, frozen):
        count = min(self._config.samples.count, len(stream))
        stream = stream.with_images()
        examples = [stream[index] for index in range(count)]
        batch = {key: np.stack([example[key] for example in examples]) for key in EXAMPLE_KEYS if key in examples[0]}
        # Rows beyond the count only fill the mesh: copies of the last one, with nothing to decide.
        rows = np.minimum(np.arange(-(-count // self._parts) * self._parts), count - 1)
        is_target = batch["text_is_target"][rows] & (np.arange(len(rows)) < count)[:, None]
        seeds = self._put(sample_seeds(self._config.seed, step, count), rows)
        programs, settings = self._programs, self._config.samples
        latents = programs.encode_images(frozen["autoencoder"], self._put(batch["image"], rows))
        ids = programs.describe(
            {"transformer": params, "text_encoder": frozen["text_encoder"]},
            latents,
            self._put(batch["text_ids"], rows),
            self._put(is_target, np.arange(len(rows))),
            seeds,
            settings.caption_steps,
            temperature=self._own["caption_temperature"],
            threshold=0.9,
            entropy_bound=0.1,
            decoding=self._own["caption_decoding"],
        ).ids
        generated = None
        if has_image_pass(stream.config.kind):
            conditions = None
            if "conditions" in batch:
                conditions = programs.encode_images(frozen["autoencoder"], self._put(batch["conditions"], rows))
            made = self._draw(batch["prompt_ids"], rows, seeds, latents.shape[1:], params, frozen, conditions)
            generated = self._on_host(made, count)
        return batch, generated, self._on_host(ids, count)

    def _sample_prompts(self, params, frozen):
        prompts, config = self._config.samples.prompts, self._config
        batch = {"prompt_ids": np.stack([self._tokenizer.encode(text, config.text_length) for text in prompts])}
        seeds, images = sample_seeds(config.seed, 0, len(prompts)), []
        side = config.image_size // config.autoencoder.downsample_factor
        shape = (side, side, config.autoencoder.latent_channels)
        most = config.samples.count or len(prompts)  # as many at a time as of a stream: by the same program
        for first in range(0, len(prompts), most):
            rows = first + np.arange(-(-most // self._parts) * self._parts)
            rows = np.minimum(rows, len(prompts) - 1)
            made = self._draw(batch["prompt_ids"], rows, self._put(seeds, rows), shape, params, frozen)
            images.append(self._on_host(made, min(most, len(prompts) - first)))
        return batch, np.concatenate(images), None

    def _draw(self, prompt_ids, rows, seeds, latent_shape, params, frozen, conditions=None):
        """Images of the prompts prompt_ids[rows], split over the mesh."""
        programs = self._programs
        empty = np.full_like(prompt_ids, self._tokenizer.eos_id)
        prompt, negative = (
            programs.encode_prompts(frozen["text_encoder"], self._put(texts, rows)) for texts in (prompt_ids, empty)
        )
        guidance = make_guidance(len(rows), self._table, scale=self._config.samples.guidance_scale)
        given = seeds, self._table, prompt, negative, guidance, conditions
        made = programs.sample_images(params, *given, latent_shape=latent_shape)
        return programs.decode_images(frozen["autoencoder"], made)

    def _on_host(self, array, count):
        """The first `count` rows of a split array, on every process."""
        return np.asarray(self._replicate(array))[:count]

    def _put(self, values, rows):
        """values[rows] as a global array; every process has all of `values`, and puts what its devices hold."""
        return jax.make_array_from_callback(
            (len(rows), *values.shape[1:]), sharding.batch_sharding(self._mesh), lambda index: values[rows[index[0]]]
        )

    def _write_stream(self, stem, batch, generated, predicted_ids, before=None):
        """`before`: what `_sample` gave for the base of a run of adapters."""
        decode, paths = self._tokenizer.decode, []
        if generated is not None:
            pictures = {"real": batch.get("image")} | ({"before": before[1]} if before else {})
            pictures["after" if before else "generated"] = generated
            rows = []
            for i, ids in enumerate(batch["prompt_ids"]):
                labelled = [("given", image) for image in batch["conditions"][i]] if "conditions" in batch else []
                labelled += [(label, images[i]) for label, images in pictures.items() if images is not None]
                rows.append((decode(ids), labelled))
            paths.append(stem.with_suffix(".png"))
            draw_sheet(rows).save(paths[-1])
        if predicted_ids is not None:  # last: the sheet is there when the table is
            columns = {"real": batch["text_ids"]} | ({"before": before[2]} if before else {})
            columns["after" if before else "predicted"] = predicted_ids
            table = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
            for i, texts in enumerate(zip(*columns.values(), strict=True)):
                table.append(f"| {i} | {' | '.join(cell(decode(ids)) for ids in texts)} |")
            paths.append(stem.with_suffix(".md"))
            paths[-1].write_text("\n".join(table) + "\n")
        return paths


def tell_change(pairs: list[tuple]) -> None:
    """Logs by how much samples differ, as a warning where it will not be seen.

    Args:
      pairs: ((images, ids) before, (images, ids) after) of each stream; either may be None.
    """
    levels, tokens = [], []
    for (images, ids), (new_images, new_ids) in pairs:
        if images is not None:
            levels.append(np.abs(new_images.astype(np.float32) - images).mean())
        if ids is not None:
            tokens.append((new_ids != ids).mean())
    told = [f"pictures by {np.mean(levels):.2g} of 255 levels"] if levels else []
    told += [f"{100 * np.mean(tokens):.2g}% of the tokens of texts"] if tokens else []
    line = f"samples of the same seeds: the adapters change {' and '.join(told)}"
    if max(levels, default=0) < LEAST_LEVELS and not any(tokens):
        log.warning("%s, which will not be seen: raise optimizer.learning_rate or num_steps", line)
    else:
        log.info("%s", line)


def cell(text: str) -> str:
    """A text that fits a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def draw_sheet(cards: list[tuple], columns: int = 2, smallest: int = 96) -> Image.Image:
    """A sheet of cards, each a prompt above its labelled images.

    Args:
      cards: pairs of prompt and [(label, uint8 [H, W, 3])].
      smallest: images narrower than this are enlarged by a whole factor.
    """
    font = ImageFont.load_default(TEXT_SIZE)
    height, width = cards[0][1][0][1].shape[:2]
    zoom = max(1, -(-smallest // width))
    height, width = height * zoom, width * zoom
    pictures = len(cards[0][1])
    card_width = pictures * (width + MARGIN)
    characters = max(20, int(card_width / (TEXT_SIZE * 0.55)))
    wrapped = [textwrap.wrap(prompt, characters)[:6] or ["(empty prompt)"] for prompt, _ in cards]
    line = TEXT_SIZE + 3
    text_height = line * max(map(len, wrapped))
    card_height = text_height + line + height + 2 * MARGIN
    rows = -(-len(cards) // columns)
    sheet = Image.new("RGB", (columns * (card_width + MARGIN) + MARGIN, rows * card_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (lines, (_, labelled)) in enumerate(zip(wrapped, cards, strict=True)):
        left = MARGIN + (number % columns) * (card_width + MARGIN)
        top = MARGIN + (number // columns) * card_height
        draw.multiline_text((left, top), "\n".join(lines), fill="black", font=font, spacing=3)
        for i, (label, image) in enumerate(labelled):
            x = left + i * (width + MARGIN)
            draw.text((x, top + text_height), label, fill="gray", font=font)
            picture = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, top + text_height + line))
    return sheet
