"""Pictures and captions of a run under way: real beside generated, real beside predicted."""

import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unialign_jax import sharding
from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.models.autoencoder import Moments, denormalize, sample_latents
from unialign_jax.sampling.image import sample_image_latents, text_guidance
from unialign_jax.sampling.solvers import solver_table
from unialign_jax.sampling.text import sample_text
from unialign_jax.training.state import Networks
from unialign_jax.training.step import encode_images, encode_texts, has_image_pass

MARGIN, TEXT_SIZE = 8, 12


def make_generate(networks: Networks, eos_id: int, sigmas: np.ndarray):
    """(transformer params, frozen, batch, guidance scale, key) -> uint8 images [B, H, W, 3] for the batch's prompts."""

    def generate(params, frozen, batch, guidance_scale, key):
        null, prompt = encode_texts(networks, frozen, jnp.full_like(batch["prompt_ids"], eos_id), batch["prompt_ids"])
        text = jnp.concatenate([null, prompt])
        latents, conditions = encode_images(networks, frozen, batch, None)
        if conditions is not None:
            conditions = jnp.concatenate([conditions, conditions])

        def velocity(noisy, sigma, _):
            doubled, sigma = jnp.concatenate([noisy, noisy]), jnp.full((len(text),), sigma)
            both = networks.transformer.apply({"params": params}, doubled, text, sigma, conditions).velocity
            return text_guidance(*jnp.split(both, 2), guidance_scale)

        noise = jax.random.normal(key, latents.shape)
        latents = sample_image_latents(velocity, noise, solver_table("euler", sigmas))
        images = networks.autoencoder.apply(
            {"params": frozen["autoencoder"]}, denormalize(latents, networks.autoencoder.config), method="decode"
        )
        return jnp.clip((images + 1) * 127.5 + 0.5, 0, 255).astype(jnp.uint8)

    return generate


def make_describe(networks: Networks, mask_id: int, num_steps: int):
    """(transformer params, frozen, batch, key) -> text ids [B, L]: what the text pass reads off the batch's images."""

    def describe(params, frozen, batch, key):
        pixels = batch["image"].astype(jnp.float32) / 127.5 - 1
        moments = networks.autoencoder.apply({"params": frozen["autoencoder"]}, pixels, method="encode")
        latents = sample_latents(Moments(*moments), None, networks.autoencoder.config)
        sigma = jnp.zeros((latents.shape[0],))

        def logits(ids):
            (text,) = encode_texts(networks, frozen, ids)
            return networks.transformer.apply({"params": params}, latents, text, sigma).text_logits

        keys = jax.random.split(key, latents.shape[0])
        sample = sample_text(
            logits, batch["text_ids"], batch["text_is_target"], keys, num_steps=num_steps, mask_id=mask_id
        )
        return sample.ids

    return describe


class Sampler:
    """Writes `samples/<stream>_<step>.png` and `.md` for the first records of every stream.

    All hosts take part; the first one writes. The programs are compiled once per stream.
    """

    def __init__(self, config, networks: Networks, mesh, streams, tokenizer, workdir):
        self._config, self._mesh, self._tokenizer = config, mesh, tokenizer
        self._directory = Path(workdir) / "samples"
        settings = config.samples
        sigmas = sampling_sigmas(settings.steps, shift=settings.shift)
        replicated = sharding.replicated(mesh)
        self._generate = jax.jit(make_generate(networks, tokenizer.eos_id, sigmas), out_shardings=replicated)
        self._describe = jax.jit(
            make_describe(networks, tokenizer.mask_id, settings.caption_steps), out_shardings=replicated
        )
        self._streams = streams

    def is_written(self, step: int) -> bool:
        return all(self._stem(name, step).with_suffix(".md").exists() for name in self._streams)

    def _stem(self, name: str, step: int) -> Path:
        return self._directory / f"{name}_{step:06d}"

    def write(self, step: int, params, frozen) -> list[Path]:
        """Samples every stream with the transformer's `params`; returns the files written."""
        settings, paths = self._config.samples, []
        for name, stream in self._streams.items():
            examples = [stream[index] for index in range(min(settings.count, len(stream)))]
            keys = {"image", "conditions", "prompt_ids", "text_ids", "text_is_target"} & examples[0].keys()
            batch = {key: np.stack([example[key] for example in examples]) for key in sorted(keys)}
            arrays = jax.device_put(batch, sharding.replicated(self._mesh))
            key = jax.random.fold_in(jax.random.key(self._config.seed), step)
            ids = np.asarray(self._describe(params, frozen, arrays, key))
            generated = None
            if has_image_pass(stream.config.kind):
                generated = np.asarray(self._generate(params, frozen, arrays, settings.guidance_scale, key))
            if jax.process_index() == 0:
                self._directory.mkdir(parents=True, exist_ok=True)
                paths += self._write_stream(self._stem(name, step), batch, generated, ids)
        return paths

    def _write_stream(self, stem, batch, generated, predicted_ids):
        decode = self._tokenizer.decode
        prompts = [decode(ids) for ids in batch["prompt_ids"]]
        real = [decode(ids) for ids in batch["text_ids"]]
        predicted = [decode(ids) for ids in predicted_ids]
        table = ["| | real | predicted |", "|---|---|---|"]
        table += [f"| {i} | {_cell(a)} | {_cell(b)} |" for i, (a, b) in enumerate(zip(real, predicted, strict=True))]
        captions = stem.with_suffix(".md")
        captions.write_text("\n".join(table) + "\n")
        if generated is None:
            return [captions]
        rows = []
        for i, prompt in enumerate(prompts):
            conditions = [("given", image) for image in batch["conditions"][i]] if "conditions" in batch else []
            rows.append((prompt, [*conditions, ("real", batch["image"][i]), ("generated", generated[i])]))
        sheet = stem.with_suffix(".png")
        draw_sheet(rows).save(sheet)
        return [sheet, captions]


def _cell(text):
    return text.replace("|", "\\|").replace("\n", " ")


def draw_sheet(cards, columns=2, smallest=96) -> Image.Image:
    """A sheet of cards, each a prompt above its labelled pictures.

    Args:
      cards: pairs of prompt and [(label, uint8 [H, W, 3])].
      columns: cards side by side.
      smallest: pictures narrower than this are enlarged by whole pixels.
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
