"""What a user imports: a bundle's model, with a method for each task; PIL images and strings in and out.

from unialign_jax import Pipeline

pipeline = Pipeline.from_bundle("bundles/unialign")
(image,) = pipeline.generate("a red circle on a blue background", seed=7)
(edited,) = pipeline.edit("make the circle green", image)
print(pipeline.caption(edited)[0], pipeline.answer(edited, "What colour is the circle?")[0])
"""

import dataclasses
import functools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unialign_jax import bundle
from unialign_jax.bundle_config import fit_problems
from unialign_jax.conversion.lora import new_name, open_lora, transformer_shapes
from unialign_jax.data.images import fill_size
from unialign_jax.data.streams import encode_question
from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.files import shown
from unialign_jax.inference.conversation import Conversation
from unialign_jax.inference.inputs import (
    Picture,
    check_negatives,
    check_seeds,
    check_text,
    check_texts,
    open_images,
    spread,
)
from unialign_jax.inference.model import Model, Step, default_dtype
from unialign_jax.inference.options import MAX_REFERENCES, PERCEPTION, check_whole, settings, takes_options
from unialign_jax.inference.streaming import TextStep, settled_text
from unialign_jax.inference.weights import Loader, bundle_loader
from unialign_jax.sampling.programs import KEPT, make_guidance
from unialign_jax.sampling.solvers import solver_table
from unialign_jax.training import runs

log = logging.getLogger(__name__)

Images = Image.Image | str | Sequence[Image.Image | str]  # PIL images or paths


class Pipeline(Model):
    """A bundle ready for every task. Arguments after the first ones are keyword-only; a single prompt or image may
    stand for a list of one. Every method returns a list, in the order of its inputs.

    `help(Pipeline.generate)` lists the options of a task, with ranges and defaults; docs/inference.md explains them.
    Two options take a list where there are several results: `seed`, one number for each image or text (a number s
    stands for s, s + 1, ...), and `negative_prompt`, one text for each prompt.

    Everything is deterministic: an image or text depends on its own seed and inputs. Calls are cut into batches of at
    most `max_batch`, filled up to a power of two, and each shape is compiled once. Guidance, seeds, shift and
    temperature can change without compiling; sizes, the number of steps and the kind of guidance cannot.

    Steps, guidance scale, shift, decoding and temperature that are not given are the bundle's own
    (`config.sampling_defaults`); the released model's are 28 steps (50 with images, 32 of a text), guidance 7, shift 3,
    captions drawn in ancestral order at temperature 1, answers of the likeliest tokens.

    Bad arguments raise ValueError in one line. Prompts that are too long are cut, with a warning that quotes the rest;
    a task that the model was not trained for, and sizes beyond its training's, are warned of once.
    """

    @classmethod
    def from_bundle(
        cls,
        directory: str | os.PathLike,
        *,
        weights: str | None = None,
        verify: bool = True,
        dtype: str | None = None,
        quantize: str | None = None,
        low_memory: bool = False,
        attention: str = "auto",
        max_batch: int = 8,
        reproducible: bool = False,
        kept_shapes: int = KEPT,
        device: jax.Device | None = None,
    ) -> "Pipeline":
        """Opens a bundle, or a training run's newest whole checkpoint; weights are read when a task first needs them.

        Args:
          directory: the bundle, or the run's folder; "demo" is the small model of the shapes world in the package.
          weights: of a run, "raw" or "ema"; None takes the average where the run keeps one, as its own samples do.
          verify: whether to hash the files of a bundle while they are read, once, and to refuse changed ones.
          dtype: of matmuls and of large weights; None is bfloat16, on a CPU float32.
          quantize: "int8" (weights of T5 and the MM-DiT's blocks), "w8a8" or "fp8" (activations too), or None.
          low_memory: keep on the device only the components that the current part of a task reads.
          attention: "auto", or an implementation of models.attention.
          max_batch: the most samples in one forward.
          reproducible: make each image and text in forwards of its own, whatever `max_batch` is: the same seed then
            gives the same bits alone and among others, with and without a callback. Batches are no faster then.
          kept_shapes: of each of its programs, how many stay compiled in memory: those that were called last.
          device: where to run; None is JAX's first device.

        Raises FileNotFoundError or ValueError for a folder that is neither, has no tokenizer or (later too) is damaged.
        """
        options = {"dtype": dtype, "quantize": quantize, "low_memory": low_memory, "attention": attention}
        options |= {"max_batch": max_batch, "reproducible": reproducible, "kept_shapes": kept_shapes, "device": device}
        directory = bundle.locate(directory)
        if not bundle.is_bundle(directory) and runs.is_run(directory):
            return cls.from_run(runs.open_to_sample(directory, weights, verify=verify), **options)
        if weights is not None:
            raise ValueError(f"weights is {shown(weights)}, which a run's folder has, and {directory} is none")
        config = bundle.read_config(directory, verify=verify)
        tokenizer = bundle.read_tokenizer(directory, verify=verify)
        make_loader = functools.partial(bundle_loader, directory, config, verify=verify)
        return cls._with_loader(make_loader, config, tokenizer, str(directory), **options)

    @classmethod
    def from_run(cls, run: runs.Run, **options) -> "Pipeline":
        """A training run's checkpoint, opened by `runs.open_to_sample`; `options` are those of `from_bundle`."""
        return cls._with_loader(functools.partial(Loader, run.leaves), run.config, run.tokenizer, run.name, **options)

    @classmethod
    def _with_loader(cls, make_loader, config, tokenizer, name, **options):
        if problems := fit_problems(config, tokenizer):
            raise ValueError(f"{name}: {problems[0]}: convert the model again with the parts it was trained with")
        device = options.get("device") or jax.devices()[0]
        load = make_loader(
            dtype=options.get("dtype") or default_dtype(device),
            device=device,
            quantize=options.get("quantize"),
            keep_on_host=options.get("low_memory", False),
        )
        return cls(config, load, tokenizer, name=name, **options)

    # Adapters

    def load_lora(self, path: str | os.PathLike, scale: float = 1.0, name: str | None = None) -> str:
        """Adds adapters to the transformer, beside those that are there, and returns the name that they now have.

        The weights are read anew when a task next needs them, and changed on the host, before they are rounded or
        quantised: sampling is as fast and as large as without.

        Args:
          path: a file of PEFT, diffusers, Kohya or `launch/convert.py export-lora`, a folder of PEFT or diffusers, or
            the folder of a training run with `lora.rank`.
          scale: of the change; 1 is as trained, 0 nothing.
          name: by which it is told from others. Adapters of the same name are replaced. None is the file's, or its
            folder's where all files are called so (pytorch_lora_weights.safetensors); with -2 after it where other
            adapters have that name. The same path again replaces what it was.

        Raises FileNotFoundError or ValueError, in one line, for what cannot be read or belongs to another model.
        """
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"scale is {shown(scale)}, expected a finite number")
        lora = open_lora(path, self.config.transformer, transformer_shapes(self.config, self.name))
        for note in lora.notes:
            log.warning("%s", note)
        name = name or self._lora_name(path)
        self._loras = {key: value for key, value in self._loras.items() if key != name} | {name: (lora, float(scale))}
        self._weights.forget("transformer")
        self._adapt()
        return name

    def _lora_name(self, path):
        same = (name for name, (lora, _) in self._loras.items() if os.path.abspath(lora.name) == os.path.abspath(path))
        return next(same, None) or new_name(path, list(self._loras))

    def unload_lora(self, name: str | None = None) -> None:
        """Takes adapters off again, all when None: the weights are then, bit for bit, as before.

        Raises ValueError for a name that is not loaded.
        """
        if name is not None:
            self._check_loaded(name)
        self._loras = {key: value for key, value in self._loras.items() if name is not None and key != name}
        self._weights.forget("transformer")
        self._adapt()

    def choose_loras(self, scales: Mapping[str, float], *, kept: int = 0) -> None:
        """Sets the scales of the adapters that are loaded; those that are not named are off.

        Args:
          kept: how many sets of changed weights stay on the device at most, beside the unchanged, to be chosen again at
            once; 0 has one set there, changed or not. Arrays that no adapter changes are in memory once.

        Raises ValueError for a name that is not loaded.
        """
        for name in scales:
            self._check_loaded(name)
        chosen = {name: (lora, float(scales.get(name, 0.0))) for name, (lora, _) in self._loras.items()}
        if {name: scale for name, (_, scale) in chosen.items()} != self.loras:
            self._loras = chosen
            self._adapt(kept)

    def _check_loaded(self, name):
        if name not in self._loras:
            loaded = ", ".join(self._loras) or "none"
            raise ValueError(f"there is no LoRA {shown(name)}, loaded: {loaded}")

    @property
    def loras(self) -> dict[str, float]:
        """{name: scale} of the adapters, in the order in which they change the weights."""
        return {name: scale for name, (_, scale) in self._loras.items()}

    def _adapt(self, kept=0):
        loras = [(lora, scale) for lora, scale in self._loras.values() if scale]
        key = tuple((name, scale) for name, scale in self.loras.items() if scale)

        def change(path, leaf):
            for lora, scale in loras:
                leaf = lora(path, leaf, scale)
            return leaf

        self._weights.adapt("transformer", change if loras else None, key, kept)

    # Images

    @takes_options("text_to_image")
    def generate(
        self, prompts: str | Sequence[str], *, callback: Callable[[Step], None] | None = None, **options
    ) -> list[Image.Image]:
        """Images of the prompts, `images_per_prompt` of the first, then of the second, and so on.

        Args:
          callback: called with a `Step` after every evaluation of the network; the loop then runs step by step, and
            reads the weights of the modulations in each.

        Each image carries the parameters that made it, as JSON, in `image.info["parameters"]`.
        """
        chosen = self._settings("text_to_image", options)
        prompts = check_texts(prompts, "prompt")
        size = self._size(chosen)
        return self._render("text_to_image", [Picture(prompt, size=size) for prompt in prompts], chosen, callback)

    @takes_options("edit")
    def edit(
        self,
        instructions: str | Sequence[str],
        images: Images,
        *,
        callback: Callable[[Step], None] | None = None,
        **options,
    ) -> list[Image.Image]:
        """The images as the instructions change them; one instruction, or one image, may stand for all.

        An edit has its image's size and aspect, unless `height` or `width` is given, to which the image is cropped. The
        network works at the nearest multiples of 16; beyond 1024 pixels the result is smaller, with a warning.

        Args:
          images: PIL images, or paths of image files.
          callback: as in `generate`.
        """
        return self._edit("edit", instructions, images, callback, options)

    @takes_options("perception")
    def perceive(
        self,
        kind: str,
        images: Images,
        *,
        instruction: str | None = None,
        callback: Callable[[Step], None] | None = None,
        **options,
    ) -> list[Image.Image]:
        """The images as maps: `kind` is "canny", "depth" or "pose". Sizes are as in `edit`.

        Args:
          instruction: replaces the sentence that asks for the kind.
          callback: as in `generate`.
        """
        if instruction is None and isinstance(kind, str):
            instruction = PERCEPTION.get(kind, "")
        return self._edit("perception", instruction, images, callback, options | {"kind": kind})

    def _edit(self, task, instructions, images, callback, options):
        chosen = self._settings(task, options)
        instructions, images = spread(check_texts(instructions, "instruction"), open_images(images), "instructions")
        pictures = []
        for number, (instruction, image) in enumerate(zip(instructions, images, strict=True)):
            if chosen.height is not None or chosen.width is not None:
                size = final = self._size(chosen)
                source = fill_size(image, size[1], size[0])
            else:
                size, final = self._edit_size(image, number)
                source = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            pictures.append(Picture(instruction, size=size, final_size=final, conditions=(source,)))
        return self._render(task, pictures, chosen, callback)

    @takes_options("personalization")
    def personalize(
        self,
        prompts: str | Sequence[str],
        references: Images | Sequence[Images],
        *,
        callback: Callable[[Step], None] | None = None,
        **options,
    ) -> list[Image.Image]:
        """New images of the subjects in the reference images, one to four references a prompt.

        Args:
          references: a list of images for each prompt; of a single prompt, its list.
          callback: as in `generate`.
        """
        chosen = self._settings("personalization", options)
        single = isinstance(prompts, str)
        prompts = check_texts(prompts, "prompt")
        if not isinstance(references, list | tuple):
            references = [references]
        if single and not (len(references) == 1 and isinstance(references[0], list | tuple)):
            references = [references]
        if len(references) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(references)} lists of references: give one to each")
        size = self._size(chosen)
        pictures = []
        for number, (prompt, images) in enumerate(zip(prompts, references, strict=True)):
            count = len(images) if isinstance(images, list | tuple) else 1
            if not 1 <= count <= MAX_REFERENCES:
                raise ValueError(f"prompt {number} has {count} references, expected 1 to {MAX_REFERENCES}")
            images = open_images(images, f"prompt {number}, reference")
            images = [fill_size(image, size[1], size[0]) for image in images]
            # Fewer than the slots are repeated in turn, as in training.
            images = tuple(images[i % len(images)] for i in range(max(len(images), chosen.slots)))
            pictures.append(Picture(prompt, size=size, conditions=images))
        return self._render("personalization", pictures, chosen, callback)

    def conversation(self, image: Image.Image | str, **options) -> Conversation:
        """Several edits of one image in turn, each kept and undoable; `options` are defaults for `edit`."""
        return Conversation(self, open_images(image)[0], options)

    # Texts

    @takes_options("caption")
    def caption(self, images: Images, *, callback: Callable[[TextStep], None] | None = None, **options) -> list[str]:
        """The images described in words.

        Args:
          images: PIL images or paths; their middle square is read, at the bundle's training size.
          callback: called with a `TextStep` after every evaluation of the network; it changes no text and compiles
            nothing.

        `max_tokens` counts the tokens after the `prefix`. Steps that would change nothing cost nothing. Decodings are
        described in `sampling.text`; of a model with text positions the usual one is top_k at temperature 0.
        """
        chosen = self._settings("caption", options)
        images = open_images(images)
        length = self._text_length(chosen)
        given = self.tokenizer.token_ids(check_text(chosen.prefix, "prefix"))
        if len(given) >= length:
            raise ValueError(f"prefix is {len(given)} tokens long, expected at most {length - 1} of a text of {length}")
        self._warn_of_task("caption")
        ids = np.full((len(images), length), self.tokenizer.eos_id, np.int32)
        ids[:, : len(given)] = given
        is_target = np.broadcast_to(np.arange(length) >= len(given), ids.shape)
        first = np.zeros(len(images), np.int32)
        return self._fill_texts(images, ids, is_target, first, chosen, callback)

    @takes_options("vqa")
    def answer(
        self,
        images: Images,
        questions: str | Sequence[str],
        *,
        callback: Callable[[TextStep], None] | None = None,
        **options,
    ) -> list[str]:
        """Answers to questions about the images; one image, or one question, may stand for all.

        The model completes "Q: {question} A: ". Images, callback and options are as in `caption`.
        """
        chosen = self._settings("vqa", options)
        questions, images = spread(check_texts(questions, "question"), open_images(images), "questions")
        length = self._text_length(chosen)
        self._warn_of_task("vqa")
        for number, question in enumerate(questions):
            count = len(self.tokenizer.token_ids(f"Q: {question} A: "))
            if count >= length:
                text = "question %d is %d tokens long, the model reads %d: its middle is left out"
                log.warning(text, number, count, length - 1)
        encoded = [encode_question(question, "", self.tokenizer, length) for question in questions]
        ids, is_target = (np.stack(column) for column in zip(*encoded, strict=True))
        return self._fill_texts(images, ids, is_target, np.argmax(is_target, axis=1), chosen, callback)

    # What the tasks share

    def _settings(self, task, options):
        """The options of a call, with the bundle's own values for those that are not given."""
        own = self.config.sampling_defaults
        if task in ("caption", "vqa"):
            name = {"caption": "caption", "vqa": "answer"}[task]
            own = {key: own[f"{name}_{key}"] for key in ("decoding", "temperature")} | {"steps": own["caption_steps"]}
        elif task != "text_to_image":
            own |= {"steps": own["edit_steps"]}
        return settings(task, options, own)

    def _render(self, task, pictures, chosen, callback):
        """The pictures: texts first, then conditions, latents and pixels, each for all batches."""
        self._require(task, "transformer", "text_encoder", "autoencoder")
        if loras := {name: scale for name, scale in self.loras.items() if scale}:
            chosen.loras = loras  # for the images' parameters
        negatives = check_negatives(chosen.negative_prompt, len(pictures))
        seeds = check_seeds(chosen.seed, len(pictures) * chosen.images_per_prompt)
        pictures = [
            dataclasses.replace(picture, negative=negative)
            for picture, negative in zip(pictures, negatives, strict=True)
            for _ in range(chosen.images_per_prompt)
        ]
        table = solver_table(chosen.solver, sampling_sigmas(chosen.steps, shift=chosen.shift))
        guide = functools.partial(
            make_guidance,
            table=table,
            scale=chosen.guidance_scale,
            rescale=chosen.guidance_rescale,
            interval=chosen.guidance_interval,
            image_scale=chosen.image_guidance_scale if pictures[0].conditions else None,
        )
        is_guided = guide(1) is not None
        self._warn_of_task(task)
        self._warn_of_size([picture.size for picture in pictures])
        prompts = [picture.prompt for picture in pictures]
        # Without guidance the negative prompt is not read, and so T5 need not read it.
        opposed = [picture.negative for picture in pictures] if is_guided else prompts
        rows, embeddings = self._encode_texts([*prompts, *opposed])
        sources = self._encode_conditions(pictures)
        groups = self._batches([(picture.size, len(picture.conditions)) for picture in pictures])
        sampled = []
        for members, padded in groups:
            first = pictures[padded[0]]
            conditions = None
            if first.conditions:
                conditions = jnp.stack(
                    [jnp.stack([sources[id(image)] for image in pictures[i].conditions]) for i in padded]
                )
            arguments = (
                embeddings[[rows[prompts[i]] for i in padded]],
                embeddings[[rows[opposed[i]] for i in padded]],
                guide(len(padded)),
                conditions,
            )
            batch_seeds = jnp.array([seeds[i] for i in padded], jnp.uint32)
            sampled.append(self._sample(batch_seeds, table, arguments, first.size, members, callback))
        self._weights.settle(sampled)

        params = self._weights.get("autoencoder")["autoencoder"]
        decoded = [self.programs.decode_images(params, latents) for latents in sampled]
        images = [None] * len(pictures)
        for (members, _), pixels in zip(groups, decoded, strict=True):
            for i, array in zip(members, np.asarray(pixels), strict=False):
                images[i] = finish(array, task, pictures[i], seeds[i], chosen)
        return images

    def _encode_conditions(self, pictures):
        """{id of a PIL image: its latents [h, w, C]} of all condition images."""
        images = {id(image): image for picture in pictures for image in picture.conditions}
        if not images:
            return {}
        latents = self._encode([np.asarray(image) for image in images.values()])
        return dict(zip(images, latents, strict=True))

    def _fill_texts(self, images, ids, is_target, first, chosen, callback):
        """The texts of ids [B, L] from their places `first` on, with the targets filled in."""
        self._require("a text", "transformer", "text_encoder", "autoencoder")
        if chosen.max_tokens is not None:  # what is beyond stays end-of-text
            check_whole("max_tokens", chosen.max_tokens, 1, ids.shape[1])
            begin = np.argmax(is_target, axis=1)
            is_target = is_target & (np.arange(ids.shape[1]) < (begin + chosen.max_tokens)[:, None])
        seeds = np.array(check_seeds(chosen.seed, len(images)), np.uint32)
        side = self.config.image_size
        latents = self._encode([np.asarray(fill_size(image, side, side)) for image in images])

        def tell(evaluations, members, rows, is_hidden):
            starts = [first[i] for i in members]
            texts = [
                settled_text(self.tokenizer, row[start:], hidden[start:])
                for row, hidden, start in zip(rows, is_hidden, starts, strict=True)
            ]
            callback(TextStep(evaluations, tuple(members), tuple(texts)))

        filled = self._write_texts(latents, ids, is_target, seeds, chosen, tell if callback else None)
        return [self.tokenizer.decode(row[start:]).strip() for row, start in zip(filled, first, strict=True)]

    # Checks

    def _size(self, chosen):
        """The (height, width) that is asked for; a square of the one that is given, or of the training size."""
        self._require("an image", "transformer", "autoencoder")
        for name in ("height", "width"):
            if getattr(chosen, name) is not None:
                self.sizes.check(name, getattr(chosen, name))
        side = self.config.image_size
        return int(chosen.height or chosen.width or side), int(chosen.width or chosen.height or side)

    def _edit_size(self, image, number):
        self._require("an edit", "transformer", "autoencoder")
        working, final = self.sizes.of_edit(image.height, image.width, self.edit_limit)
        if final != (image.height, image.width):
            log.warning(
                "image %d is %d x %d pixels, the largest side is %d unless one is asked for: the edit will be %d x %d",
                number, image.width, image.height, self.edit_limit, final[1], final[0],
            )  # fmt: skip
        return working, final

    def _text_length(self, chosen):
        length = chosen.text_length
        if length is None:
            return self.config.text_length
        positions = self.config.transformer.text_positions if self.config.transformer else 0
        if positions and length > positions:
            raise ValueError(f"text_length is {length}, expected at most {positions}: the model has no more positions")
        return length

    def _warn_of_task(self, task):
        trained = self.config.tasks
        if trained is not None and task not in trained:
            known = ", ".join(trained) or "none"
            self._say_once(f"{self.name} was not trained for {task}, as far as it says (its tasks: {known})")

    def _warn_of_size(self, sizes):
        trained = self.config.image_size
        if max(map(max, sizes)) > trained:
            self._say_once(f"sides beyond {trained} pixels, which the model was trained at, may repeat what they show")


def finish(array: np.ndarray, task: str, picture: Picture, seed: int, chosen: SimpleNamespace) -> Image.Image:
    """uint8 [H, W, 3] -> the image at its final size, with the parameters that made it in `info["parameters"]`."""
    image = Image.fromarray(array)
    height, width = picture.final_size or picture.size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    parameters = {
        "task": task,
        "prompt": picture.prompt,
        **{key: value for key, value in vars(chosen).items() if key != "images_per_prompt"},
        "negative_prompt": picture.negative,
        "seed": seed,
        "height": height,
        "width": width,
        "references": len({id(image) for image in picture.conditions}),  # repeated ones count once
    }
    image.info["parameters"] = json.dumps(parameters)
    return image
