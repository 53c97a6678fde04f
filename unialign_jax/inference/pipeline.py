"""What a user imports: a bundle's model, with a method for each task; PIL images and strings in and out.

from unialign_jax import Pipeline

pipeline = Pipeline.from_bundle("bundles/unialign")
image, = pipeline.generate("a red circle on a blue background", seeds=7)
edited, = pipeline.edit("make the circle green", image)
print(pipeline.caption(edited)[0], pipeline.answer(edited, "What colour is the circle?")[0])
"""

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from unialign_jax import bundle
from unialign_jax.bundle_config import fit_problems
from unialign_jax.data.images import fill_size
from unialign_jax.data.streams import encode_question
from unialign_jax.data.tokenizer import Tokenizer
from unialign_jax.files import shown
from unialign_jax.inference.conversation import Conversation
from unialign_jax.inference.inputs import (
    MAX_TOKENS,
    ImageSettings,
    Picture,
    TextSettings,
    check_seeds,
    check_text,
    check_texts,
    check_whole,
    open_image,
    spread,
)
from unialign_jax.inference.quantization import quantize_module
from unialign_jax.inference.weights import Loader, Weights, bundle_loader
from unialign_jax.models.attention import resolve_implementation
from unialign_jax.models.autoencoder import make_autoencoder
from unialign_jax.models.mmdit import MMDiT
from unialign_jax.models.sizes import ImageSizes
from unialign_jax.models.text_encoder import TextEncoder
from unialign_jax.sampling import image as image_sampler
from unialign_jax.sampling import programs
from unialign_jax.training import runs

log = logging.getLogger(__name__)

# The depth sentence is the released model's own; for the others none is known, so they are written after it.
PERCEPTION = {
    "canny": "Provide a detailed canny edge map of the entire scene.",
    "depth": "Provide a detailed depth map of the entire scene.",
    "pose": "Provide a detailed pose map of the people in the scene.",
}
DTYPES, QUANTIZATIONS = ("bfloat16", "float32"), ("int8", "w8a8")
MAX_REFERENCES = 4
MAX_IMAGES = 2**16  # of one prompt


class Pipeline:
    """A bundle ready for every task. Arguments after the first ones are keyword-only; a single prompt or image may
    stand for a list of one, and what comes back is always a list, in the order of what was given.

    Everything is deterministic: an image or text depends on its own seed and inputs. Calls are cut into batches of at
    most `max_batch`, filled up to a power of two, and each shape is compiled once. Guidance, seeds, shift and
    temperature can change without compiling; sizes, the number of steps and the kind of guidance cannot.

    Steps, guidance scale, shift, decoding and temperature that are not given are the bundle's own
    (`config.sampling_defaults`); the released model's are 28 steps (50 with images, 32 of a text), guidance 7, shift 3,
    captions drawn in ancestral order at temperature 1, answers of the likeliest tokens.

    Bad arguments raise ValueError in one line. Prompts that are too long are cut, with a warning that quotes the rest;
    a task that the model was not trained for, and sizes beyond its training's, are warned of once.
    """

    def __init__(
        self,
        config: bundle.BundleConfig,
        load: Callable[[str], dict],
        tokenizer: Tokenizer,
        *,
        name: str = "the model",
        dtype: str | None = None,
        attention: str = "auto",
        quantize: str | None = None,
        low_memory: bool = False,
        max_batch: int = 8,
        device: jax.Device | None = None,
    ):
        """`from_bundle` is the usual way in. Args: `load` gives a component's parameters, placed and in their dtypes,
        by name, and is called when they are first needed; `name` is for messages.
        """
        self.config, self.tokenizer, self.name = config, tokenizer, name
        self._defaults = config.sampling_defaults
        self._said = set()  # warnings and programs that were told of
        self.max_batch = check_whole("max_batch", max_batch, 1, 2**16)
        for option, value, choices in (("dtype", dtype, DTYPES), ("quantize", quantize, QUANTIZATIONS)):
            if value is not None and value not in choices:
                raise ValueError(f"{option} is {shown(value)}, expected one of {', '.join(choices)}")
        if config.transformer is not None and config.autoencoder is not None:
            self.sizes.check(f"{name}: image_size", config.image_size)
        self.device = device or jax.devices()[0]
        dtype = dtype or default_dtype(self.device)
        self._weights = Weights(load, low_memory)

        with_dtype = lambda part: part and dataclasses.replace(part, dtype=dtype)  # noqa: E731
        if (transformer := with_dtype(config.transformer)) is not None:
            # The flash kernels want heads of 64; the tiny models' are narrower.
            if attention == "auto" and transformer.head_width % 64:
                attention = "xla"
            attention = resolve_implementation(attention, self.device.platform, dtype)
            transformer = dataclasses.replace(transformer, attention=attention, remat="none")
            module = MMDiT(transformer)
            if quantize:
                module = quantize_module(module, quantize)
            self._advance = jax.jit(functools.partial(programs.advance_images, module), static_argnames=("mode",))
            self._sample = jax.jit(
                functools.partial(programs.sample_images, module), static_argnames=("mode", "latent_shape")
            )
        if (text_encoder := with_dtype(config.text_encoder)) is not None:
            text_module = TextEncoder(text_encoder)
            if quantize:
                text_module = quantize_module(text_module, quantize)
            self._encode_prompts = jax.jit(functools.partial(programs.encode_prompts, text_module))
        if transformer is not None and text_encoder is not None:
            self._describe = jax.jit(
                functools.partial(
                    programs.describe, module, text_module, mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id
                ),
                static_argnames=("decoding",),
            )
        if (autoencoder := with_dtype(config.autoencoder)) is not None:
            autoencoder = make_autoencoder(autoencoder)
            self._encode_images = jax.jit(functools.partial(programs.encode_images, autoencoder))
            self._decode_images = jax.jit(functools.partial(programs.decode_images, autoencoder))

    @classmethod
    def from_bundle(
        cls,
        directory,
        *,
        weights: str | None = None,
        verify: bool = True,
        dtype: str | None = None,
        quantize: str | None = None,
        low_memory: bool = False,
        attention: str = "auto",
        max_batch: int = 8,
        device: jax.Device | None = None,
    ) -> "Pipeline":
        """Opens a bundle (a folder written by launch/convert.py), or a training run's newest whole checkpoint; weights
        are read when a task first needs them.

        Args:
          directory: the bundle, or the run's folder; "demo" is the small model of the shapes world in the package.
          weights: of a run, "raw" or "ema"; when None its average, as its own samples, and the raw ones where it keeps
            none.
          verify: whether to hash what is read of a bundle, once and beside the reading, and to refuse what is not as it
            was written.
          dtype: what matmuls compute in and large weights are kept in; bfloat16 when None, float32 on a CPU.
          quantize: "int8" (weights of T5 and the MM-DiT's blocks), "w8a8" (activations too), or None.
          low_memory: keep only the components on the device that the current part of a task reads.
          attention: "auto", or an implementation of models.attention.
          max_batch: the most samples in one forward.
          device: where to run; JAX's first device when None.

        Raises FileNotFoundError or ValueError for a folder that is neither or has no tokenizer, and ValueError, here or
        when they are read, for files that are damaged.
        """
        options = {"dtype": dtype, "quantize": quantize, "low_memory": low_memory, "attention": attention}
        options |= {"max_batch": max_batch, "device": device}
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
    def _with_loader(
        cls,
        make_loader,
        config,
        tokenizer,
        name,
        *,
        dtype=None,
        quantize=None,
        low_memory=False,
        device=None,
        **options,
    ):
        if problems := fit_problems(config, tokenizer):
            raise ValueError(f"{name}: {problems[0]}: convert the model again with the parts it was trained with")
        device = device or jax.devices()[0]
        load = make_loader(
            dtype=dtype or default_dtype(device), device=device, quantize=quantize, keep_on_host=low_memory
        )
        options |= {"dtype": dtype, "quantize": quantize, "low_memory": low_memory, "device": device}
        return cls(config, load, tokenizer, name=name, **options)

    def load(self) -> None:
        """Reads all weights now, not when a task first needs them.

        Raises ValueError when they are damaged.
        """
        for name in ("text_encoder", "transformer", "autoencoder"):
            if getattr(self.config, name) is not None:
                with self._weights.use(name):
                    pass

    def unload(self, component: str) -> None:
        """Frees the weights of a component, such as "transformer"; they are read anew when a task next needs them."""
        self._weights.drop(component)

    # Images

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompts: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        seeds: int | Sequence[int] | None = None,
        images_per_prompt: int = 1,
        solver: str = "euler",
        shift: float | None = None,
        callback: Callable[["Step"], None] | None = None,
    ) -> list[Image.Image]:
        """Images of the prompts, `images_per_prompt` of the first, then of the second, and so on.

        Args:
          negative_prompts: what guidance leads away from; one for all, or one a prompt.
          height, width: pixels, multiples of 16 up to 3072 (`sizes`); the bundle's training size when neither is given,
            and a square when one is.
          steps: steps of the solver (Heun evaluates the network twice in each but the last); the bundle's when None.
          guidance_scale: of the text; 1 switches guidance off, and halves the work. The bundle's when None.
          guidance_interval: the noise levels, 0 to 1, at which guidance acts (arXiv 2404.07724).
          guidance_rescale: 0 to 1, takes back the contrast that guidance adds (arXiv 2305.08891).
          seeds: one for every image; a number s stands for s, s + 1, ...; 0, 1, ... when None.
          solver: "euler", "heun", "dpmpp_2m" or "unipc".
          shift: of the noise levels; the bundle's when None.
          callback: called with a `Step` after every evaluation of the network; the loop then runs step by step, and
            reads the weights of the modulations in each.

        Each image carries what made it, as JSON, in `image.info["parameters"]`.
        """
        settings = self._image_settings(
            "steps",
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            solver=solver,
            shift=shift,
        )
        prompts = check_texts(prompts, "prompt")
        size = self._check_size(height, width)
        pictures = [Picture(prompt, size=size) for prompt in prompts]
        return self._render("generate", pictures, settings, negative_prompts, seeds, images_per_prompt, callback)

    def edit(
        self,
        instructions: str | Sequence[str],
        images,
        *,
        negative_prompts: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        seeds: int | Sequence[int] | None = None,
        images_per_prompt: int = 1,
        solver: str = "euler",
        shift: float | None = None,
        callback: Callable[["Step"], None] | None = None,
    ) -> list[Image.Image]:
        """The images as the instructions change them; one instruction, or one image, may stand for all.

        An edit has its image's size and aspect, unless `height` and `width` say otherwise (then the image is cropped
        to that aspect). The network works at the nearest multiples of 16; an image larger than 1024 pixels is edited
        and returned smaller, with a warning.

        Args, beside those of `generate`:
          images: PIL images, or paths of image files.
          image_guidance_scale: of the image, apart from the text's (InstructPix2Pix, arXiv 2211.09800): higher stays
            closer to it, 1 is neutral; None asks for text guidance alone, which is how the model was trained.
        """
        return self._edit(
            "edit",
            instructions,
            images,
            negative_prompts=negative_prompts,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            seeds=seeds,
            images_per_prompt=images_per_prompt,
            solver=solver,
            shift=shift,
            callback=callback,
        )

    def _edit(
        self,
        task,
        instructions,
        images,
        *,
        negative_prompts="",
        height=None,
        width=None,
        seeds=None,
        images_per_prompt=1,
        callback=None,
        **sampling,
    ):
        settings = self._image_settings("edit_steps", **sampling)
        instructions, images = spread(check_texts(instructions, "instruction"), self._open(images), "instructions")
        pictures = []
        for number, (instruction, image) in enumerate(zip(instructions, images, strict=True)):
            if height is not None or width is not None:
                size = final = self._check_size(height, width)
                source = fill_size(image, size[1], size[0])
            else:
                size, final = self._working_size(image, number)
                source = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
            pictures.append(Picture(instruction, size=size, final_size=final, conditions=(source,)))
        return self._render(task, pictures, settings, negative_prompts, seeds, images_per_prompt, callback)

    def perceive(self, kind: str, images, *, instruction: str | None = None, **options) -> list[Image.Image]:
        """What the images show as maps: `kind` is "canny", "depth" or "pose".

        Args: `instruction` replaces the sentence that asks for the kind; the others are those of `edit`.
        """
        if not isinstance(kind, str) or kind not in PERCEPTION:
            raise ValueError(f"kind is {shown(kind)}, expected one of {', '.join(PERCEPTION)}")
        maps = self._edit("perceive", PERCEPTION[kind] if instruction is None else instruction, images, **options)
        for image in maps:
            parameters = json.loads(image.info["parameters"])
            image.info["parameters"] = json.dumps(parameters | {"kind": kind})
        return maps

    def personalize(
        self,
        prompts: str | Sequence[str],
        references,
        *,
        slots: int = 3,
        negative_prompts: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        seeds: int | Sequence[int] | None = None,
        images_per_prompt: int = 1,
        solver: str = "euler",
        shift: float | None = None,
        callback: Callable[["Step"], None] | None = None,
    ) -> list[Image.Image]:
        """New images of the subjects in the reference images, one to four references a prompt.

        Args, beside those of `edit`:
          references: a list of images for each prompt; of a single prompt, its list.
          slots: fewer references than this are repeated in turn, as in training; 1 repeats none.
        """
        settings = self._image_settings(
            "edit_steps",
            steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            guidance_interval=guidance_interval,
            guidance_rescale=guidance_rescale,
            solver=solver,
            shift=shift,
        )
        single = isinstance(prompts, str)
        prompts = check_texts(prompts, "prompt")
        if not isinstance(references, list | tuple):
            references = [references]
        check_whole("slots", slots, 1, MAX_REFERENCES)
        if single and not (len(references) == 1 and isinstance(references[0], list | tuple)):
            references = [references]
        if len(references) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(references)} lists of references: give one to each")
        size = self._check_size(height, width)
        pictures = []
        for number, (prompt, images) in enumerate(zip(prompts, references, strict=True)):
            count = len(images) if isinstance(images, list | tuple) else 1
            if not 1 <= count <= MAX_REFERENCES:
                raise ValueError(f"prompt {number} has {count} references, expected 1 to {MAX_REFERENCES}")
            images = self._open(images, f"prompt {number}, reference")
            images = [fill_size(image, size[1], size[0]) for image in images]
            images = tuple(images[i % len(images)] for i in range(max(len(images), slots)))
            pictures.append(Picture(prompt, size=size, conditions=images))
        return self._render("personalize", pictures, settings, negative_prompts, seeds, images_per_prompt, callback)

    def conversation(self, image, **options) -> Conversation:
        """Several edits of one image in turn, each kept and undoable; `options` are defaults for `edit`."""
        return Conversation(self, self._open(image)[0], options)

    # Texts

    def caption(
        self,
        images,
        *,
        prefix: str = "",
        max_tokens: int | None = None,
        steps: int | None = None,
        decoding: str | None = None,
        temperature: float | None = None,
        threshold: float = 0.9,
        entropy_bound: float = 0.1,
        text_length: int | None = None,
        seeds: int | Sequence[int] | None = None,
    ) -> list[str]:
        """What the images show, in words.

        Args:
          images: PIL images or paths; their middle square is read, at the bundle's training size.
          prefix: what every caption begins with; the rest is filled in after it.
          max_tokens: the most tokens of a caption after its prefix, exact; the text length when None.
          steps: of the denoising from all masks to none; steps that would change nothing cost nothing. The bundle's
            when None.
          decoding: "ancestral" (the reference's), "confidence", "entropy" or "top_k"; see `sampling.text`. The bundle's
            when None: of a model with text positions top_k, of the released one ancestral.
          temperature: of the token distributions; 0 takes the most likely token. The bundle's when None.
          threshold, entropy_bound: of the decodings "confidence" and "entropy".
          text_length: tokens of the text stream, the bundle's training length when None.
          seeds: as in `generate`.
        """
        settings = self._text_settings("caption", steps, decoding, temperature, threshold, entropy_bound, max_tokens)
        images = self._open(images)
        length = self._check_text_length(text_length)
        given = self.tokenizer.token_ids(check_text(prefix, "prefix"))
        if len(given) >= length:
            raise ValueError(f"prefix is {len(given)} tokens long, expected at most {length - 1} of a text of {length}")
        self._warn_of_task("caption")
        ids = np.full((len(images), length), self.tokenizer.eos_id, np.int32)
        ids[:, : len(given)] = given
        is_target = np.broadcast_to(np.arange(length) >= len(given), ids.shape)
        return [self.tokenizer.decode(row).strip() for row in self._fill_texts(images, ids, is_target, settings, seeds)]

    def answer(
        self,
        images,
        questions: str | Sequence[str],
        *,
        max_tokens: int | None = None,
        steps: int | None = None,
        decoding: str | None = None,
        temperature: float | None = None,
        threshold: float = 0.9,
        entropy_bound: float = 0.1,
        text_length: int | None = None,
        seeds: int | Sequence[int] | None = None,
    ) -> list[str]:
        """Answers to questions about the images; one image, or one question, may stand for all.

        The question is fixed as "Q: {question} A: " and the rest is filled in. The arguments are those of `caption`;
        the likeliest tokens, by top_k at temperature 0, are the default of every bundle that says nothing else.
        """
        settings = self._text_settings("answer", steps, decoding, temperature, threshold, entropy_bound, max_tokens)
        questions, images = spread(check_texts(questions, "question"), self._open(images), "questions")
        length = self._check_text_length(text_length)
        self._warn_of_task("vqa")
        for number, question in enumerate(questions):
            count = len(self.tokenizer.token_ids(f"Q: {question} A: "))
            if count >= length:
                text = "question %d is %d tokens long, the model reads %d: its middle is left out"
                log.warning(text, number, count, length - 1)
        encoded = [encode_question(question, "", self.tokenizer, length) for question in questions]
        ids, is_target = (np.stack(column) for column in zip(*encoded, strict=True))
        first = np.argmax(is_target, axis=1)
        filled = self._fill_texts(images, ids, is_target, settings, seeds)
        return [self.tokenizer.decode(row[start:]).strip() for row, start in zip(filled, first, strict=True)]

    # What the tasks share

    def _image_settings(
        self,
        steps_key,
        *,
        steps=None,
        guidance_scale=None,
        guidance_interval=(0.0, 1.0),
        guidance_rescale=0.0,
        image_guidance_scale=None,
        solver="euler",
        shift=None,
    ) -> ImageSettings:
        """The settings, with the bundle's own for those that are not given; `steps_key` is its name for the steps."""
        own = self._defaults
        return ImageSettings(
            own[steps_key] if steps is None else steps,
            own["guidance_scale"] if guidance_scale is None else guidance_scale,
            guidance_interval,
            guidance_rescale,
            image_guidance_scale,
            solver,
            own["shift"] if shift is None else shift,
        )

    def _text_settings(self, task, steps, decoding, temperature, *rest) -> TextSettings:
        """The settings, with the bundle's own for those that are not given; `task` is "caption" or "answer"."""
        own = self._defaults
        return TextSettings(
            own["caption_steps"] if steps is None else steps,
            own[f"{task}_decoding"] if decoding is None else decoding,
            own[f"{task}_temperature"] if temperature is None else temperature,
            *rest,
        )

    def _render(self, task, pictures, settings, negatives, seeds, per_prompt, callback):
        """The pictures: texts first, then conditions, latents and pixels, each for all batches."""
        self._require(task, "transformer", "text_encoder", "autoencoder")
        check_whole("images_per_prompt", per_prompt, 1, MAX_IMAGES)
        negatives = [negatives] * len(pictures) if isinstance(negatives, str) else negatives
        if not isinstance(negatives, list | tuple):
            raise ValueError(f"negative_prompts is {shown(negatives)}, expected a text or a list of texts")
        for number, negative in enumerate(negatives):
            check_text(negative, f"negative prompt {number}")
        if len(negatives) != len(pictures):
            raise ValueError(f"{len(pictures)} prompts, but {len(negatives)} negative prompts: give one to all or each")
        seeds = check_seeds(seeds, len(pictures) * per_prompt)
        pictures = [
            dataclasses.replace(picture, negative=negative)
            for picture, negative in zip(pictures, negatives, strict=True)
            for _ in range(per_prompt)
        ]
        table = settings.table()
        mode = settings.mode(bool(pictures[0].conditions))
        self._warn_of_task({"generate": "t2i"}.get(task, task))
        self._warn_of_size([picture.size for picture in pictures])
        batches = self._batches([(picture.size, len(picture.conditions)) for picture in pictures])
        prompts = [picture.prompt for picture in pictures]
        # Without guidance the negative prompt is not read, and so T5 need not read it.
        opposed = prompts if mode == "none" else [picture.negative for picture in pictures]
        rows, embeddings = self._encode_texts([*prompts, *opposed])
        sources = self._encode_conditions(pictures)

        sampled = []
        with self._weights.use("transformer") as params:
            for members, padded in batches:
                first = pictures[padded[0]]
                guidance = settings.guidance(len(padded), table)
                conditions = None
                if first.conditions:
                    conditions = jnp.stack(
                        [jnp.stack([sources[id(image)] for image in pictures[i].conditions]) for i in padded]
                    )
                arguments = (
                    embeddings[[rows[prompts[i]] for i in padded]],
                    embeddings[[rows[opposed[i]] for i in padded]],
                    guidance,
                    conditions,
                )
                batch_seeds = jnp.array([seeds[i] for i in padded], jnp.uint32)
                shape = self._latent_shape(first.size)
                if callback is None:
                    what = f"{count_of(len(padded), 'image')} of {first.size[1]} x {first.size[0]} pixels"
                    with self._telling(what, mode, len(first.conditions), len(table.sigma)):
                        latents = self._sample(
                            params["transformer"], batch_seeds, table, *arguments, mode=mode, latent_shape=shape
                        )
                else:
                    latents = self._sample_in_steps(
                        params["transformer"], batch_seeds, table, arguments, mode, shape, members, callback
                    )
                sampled.append(latents)
            self._weights.settle(sampled)
        del params  # in low-memory mode these weights leave before the autoencoder's come

        images = [None] * len(pictures)
        with self._weights.use("autoencoder") as params:
            decoded = [self._decode_images(params["autoencoder"], latents) for latents in sampled]
            for (members, _), pixels in zip(batches, decoded, strict=True):
                for i, array in zip(members, np.asarray(pixels), strict=False):
                    images[i] = finish(array, task, pictures[i], seeds[i], settings)
        return images

    def _sample_in_steps(self, params, seeds, table, arguments, mode, shape, members, callback):
        """`programs.sample_images`, one evaluation at a time, with a call back after each."""
        state = image_sampler.start(programs.initial_noise(seeds, shape))
        *texts, guidance, conditions = arguments
        count = len(table.sigma)
        for index in range(count):
            row = jax.tree.map(lambda x: x[index : index + 1], table)  # noqa: B023
            here = guidance._replace(active=guidance.active[index : index + 1])
            state = self._advance(params, state, row, *texts, here, conditions, mode=mode)
            callback(Step(index + 1, count, tuple(members), image_sampler.clean(state)[: len(members)], self))
        return image_sampler.latents(state)

    def _encode_texts(self, texts):
        """({text: row}, T5 embeddings [rows, L, D] on the host) with each different text encoded once."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        length = self.config.text_length
        for text in rows:
            self._warn_of_cut(text, length - 1, "prompt")
        ids = np.stack([self.tokenizer.encode(text, length) for text in rows])
        with self._weights.use("text_encoder") as params:
            parts = [
                (len(members), self._encode_prompts(params["text_encoder"], ids[np.array(padded)]))
                for members, padded in self._batches([None] * len(ids))
            ]
            # On the host, where picking rows compiles nothing, however many texts there are.
            return rows, np.concatenate([np.asarray(part)[:count] for count, part in parts])

    def _encode_conditions(self, pictures):
        """{id of a PIL image: its latents [h, w, C]} of all condition images."""
        images = {id(image): image for picture in pictures for image in picture.conditions}
        if not images:
            return {}
        latents = self._encode([np.asarray(image) for image in images.values()])
        return dict(zip(images, latents, strict=True))

    def _encode(self, arrays):
        """uint8 [H, W, 3] arrays of any sizes -> their latents [h, w, C]."""
        latents = [None] * len(arrays)
        with self._weights.use("autoencoder") as params:
            for members, padded in self._batches([array.shape for array in arrays]):
                encoded = self._encode_images(params["autoencoder"], np.stack([arrays[i] for i in padded]))
                for i, latent in zip(members, encoded, strict=False):
                    latents[i] = latent
            self._weights.settle(latents)
        return latents

    def _fill_texts(self, images, ids, is_target, settings, seeds):
        """ids [B, L] with their targets filled in, as rows on the host."""
        self._require("a text", "transformer", "text_encoder", "autoencoder")
        if settings.max_tokens is not None:  # what is beyond stays end-of-text
            check_whole("max_tokens", settings.max_tokens, 1, ids.shape[1])
            first = np.argmax(is_target, axis=1)
            is_target = is_target & (np.arange(ids.shape[1]) < (first + settings.max_tokens)[:, None])
        seeds = np.array(check_seeds(seeds, len(images)), np.uint32)
        side = self.config.image_size
        latents = self._encode([np.asarray(fill_size(image, side, side)) for image in images])
        filled = [None] * len(images)
        with self._weights.use("transformer", "text_encoder") as params:
            for members, padded in self._batches([None] * len(images)):
                padded = np.array(padded)
                # Rows that only fill the batch have nothing to decide, and so cause no step.
                open_rows = is_target[padded] & (np.arange(len(padded)) < len(members))[:, None]
                with self._telling(f"{count_of(len(padded), 'text')} of {ids.shape[1]} tokens", settings.decoding):
                    sample = self._describe(
                        params,
                        jnp.stack([latents[i] for i in padded]),
                        ids[padded],
                        open_rows,
                        seeds[padded],
                        settings.steps,
                        float(settings.temperature),
                        float(settings.threshold),
                        float(settings.entropy_bound),
                        decoding=settings.decoding,
                    )
                for i, row in zip(members, np.asarray(sample.ids), strict=False):
                    filled[i] = row
        return filled

    def _batches(self, keys):
        """Indices of equal key in batches: (members, members filled up to a power of two by repeating the last)."""
        groups = {}
        for i, key in enumerate(keys):
            groups.setdefault(key, []).append(i)
        batches = []
        for group in groups.values():
            for start in range(0, len(group), self.max_batch):
                members = group[start : start + self.max_batch]
                size = min(self.max_batch, 1 << (len(members) - 1).bit_length())
                batches.append((members, members + members[-1:] * (size - len(members))))
        return batches

    # Checks

    def _require(self, task, *names):
        missing = [name for name in names if getattr(self.config, name) is None]
        if missing:
            raise ValueError(
                f"{self.name} lacks {' and '.join(missing)}, which {task} needs: convert the model again with it "
                "(python launch/convert.py --help)"
            )

    @property
    def sizes(self) -> ImageSizes:
        """The heights and widths that images may have."""
        return ImageSizes.of(self.config.transformer, self.config.autoencoder)

    @property
    def edit_limit(self) -> int:
        """The largest side that an edit has unless one is asked for: SD3's own size, 1024 pixels."""
        return self.config.transformer.base_patches * self.sizes.multiple

    def _check_size(self, height, width):
        self._require("an image", "transformer", "autoencoder")
        for name, value in (("height", height), ("width", width)):
            if value is not None:
                self.sizes.check(name, value)
        side = self.config.image_size
        return height or width or side, width or height or side

    def _working_size(self, image, number):
        """((height, width) that the network works at, the same of the result) for an image of any size."""
        self._require("an edit", "transformer", "autoencoder")
        multiple, largest = self.sizes.multiple, self.edit_limit
        shrink = min(1.0, largest / max(image.size))
        working = tuple(
            max(multiple, round(side * shrink / multiple) * multiple) for side in (image.height, image.width)
        )
        if shrink == 1:
            return working, (image.height, image.width)
        final = tuple(max(1, round(side * shrink)) for side in (image.height, image.width))
        log.warning(
            "image %d is %d x %d pixels, the largest side is %d unless one is asked for: the edit will be %d x %d",
            number, image.width, image.height, largest, final[1], final[0],
        )  # fmt: skip
        return working, final

    def _latent_shape(self, size):
        factor = self.config.autoencoder.downsample_factor
        return size[0] // factor, size[1] // factor, self.config.autoencoder.latent_channels

    def _check_text_length(self, length):
        if length is None:
            return self.config.text_length
        check_whole("text_length", length, 8, MAX_TOKENS)
        positions = self.config.transformer.text_positions if self.config.transformer else 0
        if positions and length > positions:
            raise ValueError(f"text_length is {length}, expected at most {positions}: the model has no more positions")
        return length

    @contextlib.contextmanager
    def _telling(self, what, *shape):
        """Around the call of a program: says, the first time of a shape, that it is compiled and when it runs."""
        is_new, began = (what, shape) not in self._said, time.monotonic()
        self._said.add((what, shape))
        if is_new:
            log.info("compiling the program for %s", what)
        yield
        if is_new:
            log.info("sampling, after %.1f s of compiling", time.monotonic() - began)

    def _warn_of_task(self, task):
        trained = self.config.tasks
        if trained is not None and task not in trained:
            known = ", ".join(trained) or "none"
            self._say_once(f"{self.name} was not trained for {task}, as far as it says (its tasks: {known})")

    def _warn_of_size(self, sizes):
        trained = self.config.image_size
        if max(map(max, sizes)) > trained:
            self._say_once(f"sides beyond {trained} pixels, which the model was trained at, may repeat what they show")

    def _say_once(self, line):
        if line not in self._said:
            self._said.add(line)
            log.warning("%s", line)

    def _warn_of_cut(self, text, room, what):
        ids = self.tokenizer.token_ids(text)
        if len(ids) > room:
            log.warning(
                "%s is %d tokens long, the model reads %d; cut off: %r", what, len(ids), room,
                self.tokenizer.decode(ids[room:]),
            )  # fmt: skip

    def _open(self, images, what="image"):
        """PIL images or paths, one or a list -> upright RGB images, wholly decoded."""
        if not isinstance(images, list | tuple):
            images = [images]
        if not images:
            raise ValueError(f"no {what} was given, expected at least one")
        return [open_image(image, f"{what} {number}") for number, image in enumerate(images)]


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a sampler is, as its callback sees it.

    Attributes:
      index, count: evaluations of the network done, and in all.
      members: which images of the call these are, by position.
      latents: the clean latents that the network now predicts, [images, h, w, C] on the device.
    """

    index: int
    count: int
    members: tuple[int, ...]
    latents: jax.Array
    _pipeline: Pipeline = dataclasses.field(repr=False)

    def images(self) -> list[Image.Image]:
        """The prediction as images, at the size the network works at."""
        with self._pipeline._weights.use("autoencoder", "transformer") as params:
            pixels = self._pipeline._decode_images(params["autoencoder"], self.latents)
        return [Image.fromarray(array) for array in np.asarray(pixels)]


def count_of(number, what) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def default_dtype(device) -> str:
    """bfloat16, except on a CPU, which only emulates it."""
    return "float32" if device.platform == "cpu" else "bfloat16"


def finish(array, task, picture, seed, settings) -> Image.Image:
    """uint8 [H, W, 3] -> the image at its final size, with what made it in `info["parameters"]`."""
    image = Image.fromarray(array)
    height, width = picture.final_size or picture.size
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    parameters = {
        "task": task,
        "prompt": picture.prompt,
        "negative_prompt": picture.negative,
        "seed": seed,
        "height": height,
        "width": width,
        "references": len({id(image) for image in picture.conditions}),  # those that fill the slots up do not count
        **dataclasses.asdict(settings),
    }
    image.info["parameters"] = json.dumps(parameters, default=np.generic.item)
    return image
