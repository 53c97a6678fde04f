"""What a user hands to a pipeline, checked: images, texts, seeds and numbers. Every error is one line."""

import dataclasses
import math
import os

import numpy as np
from PIL import Image

from unialign_jax.data import images
from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.files import shown
from unialign_jax.sampling.programs import Guidance
from unialign_jax.sampling.solvers import SOLVERS, solver_table
from unialign_jax.sampling.text import DECODINGS

MAX_STEPS = 1000
MAX_TOKENS = 4096
MAX_CHARACTERS = 2**20  # of a text, most of which no model reads
SEEDS = 2**32


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image to be made; sizes are (height, width), `final_size` None when it is `size`."""

    prompt: str
    size: tuple[int, int]
    final_size: tuple[int, int] | None = None
    conditions: tuple[Image.Image, ...] = ()
    negative: str = ""


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How images are sampled; the fields are the arguments of `Pipeline.generate` and `edit`."""

    steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    guidance_rescale: float
    image_guidance_scale: float | None
    solver: str
    shift: float

    def __post_init__(self):
        check_whole("steps", self.steps, 1, MAX_STEPS)
        check_range("guidance_scale", self.guidance_scale, 0, 100)
        check_range("guidance_rescale", self.guidance_rescale, 0, 1)
        check_range("shift", self.shift, 0.01, 100)
        if self.image_guidance_scale is not None:
            check_range("image_guidance_scale", self.image_guidance_scale, 0, 100)
        if not isinstance(self.solver, str) or self.solver not in SOLVERS:
            raise ValueError(f"solver is {shown(self.solver)}, expected one of {', '.join(SOLVERS)}")
        interval = self.guidance_interval
        is_pair = isinstance(interval, list | tuple | np.ndarray) and len(interval) == 2
        numbers = [x for x in interval if isinstance(x, int | float | np.number)] if is_pair else []
        if len(numbers) != 2 or not 0 <= numbers[0] <= numbers[1] <= 1:
            found = shown(interval)
            raise ValueError(f"guidance_interval is {found}, expected two noise levels, 0 <= low <= high <= 1")

    def table(self):
        return solver_table(self.solver, sampling_sigmas(self.steps, shift=self.shift))

    def mode(self, has_conditions) -> str:
        if has_conditions and self.image_guidance_scale is not None:
            if tuple(self.guidance_interval) != (0, 1):
                raise ValueError("guidance_interval goes with text guidance only: leave out image_guidance_scale")
            return "text_and_image"
        if self.guidance_scale == 1:
            return "none"
        return "text" if tuple(self.guidance_interval) == (0, 1) else "interval"

    def guidance(self, batch, table) -> Guidance:
        low, high = self.guidance_interval
        return Guidance(
            scale=np.full(batch, self.guidance_scale, np.float32),
            image_scale=np.full(batch, self.image_guidance_scale or 0.0, np.float32),
            rescale=np.full(batch, self.guidance_rescale, np.float32),
            active=(table.sigma >= low) & (table.sigma <= high),
        )


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How texts are sampled; the fields are the arguments of `Pipeline.caption`."""

    steps: int
    decoding: str
    temperature: float
    threshold: float
    entropy_bound: float
    max_tokens: int | None

    def __post_init__(self):
        check_whole("steps", self.steps, 1, MAX_STEPS)
        check_range("temperature", self.temperature, 0, 100)
        check_range("threshold", self.threshold, 0, 1)
        check_range("entropy_bound", self.entropy_bound, 0, math.inf)
        if self.max_tokens is not None:
            check_whole("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        if not isinstance(self.decoding, str) or self.decoding not in DECODINGS:
            raise ValueError(f"decoding is {shown(self.decoding)}, expected one of {', '.join(DECODINGS)}")


def open_image(image, what) -> Image.Image:
    """A PIL image or a path -> an upright RGB image; ValueError when it cannot be decoded."""
    if isinstance(image, Image.Image):
        images.check_shape(image, what)
        return images.loaded_rgb(image, what)
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"{what} is a {type(image).__name__}, expected a PIL image or a path")
    try:
        return images.load_rgb(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from None


def check_texts(texts, what) -> list[str]:
    """One text or a list -> a list of texts that are not empty."""
    if isinstance(texts, str):
        texts = [texts]
    elif not isinstance(texts, list | tuple):
        raise ValueError(f"{what} is a {type(texts).__name__}, expected a text or a list of texts")
    if not texts:
        raise ValueError(f"no {what} was given, expected at least one")
    for number, text in enumerate(texts):
        check_text(text, f"{what} {number}")
        if not text.strip():
            raise ValueError(f"{what} {number} is empty ({shown(text)}): say what the model is to do")
    return list(texts)


def check_text(text, what):
    """Raises ValueError for what is no text, is longer than MAX_CHARACTERS or holds halves of characters."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is a {type(text).__name__}, expected a text")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{what} has {len(text):,} characters, expected at most {MAX_CHARACTERS:,}")
    if text.encode(errors="ignore").decode() != text:
        raise ValueError(f"{what} holds half of a character (a lone surrogate): {shown(text)}")
    return text


def spread(texts, images, what):
    """Texts and images of one length: where there is one of either, it stands for all."""
    count = max(len(texts), len(images))
    if len(texts) not in (1, count) or len(images) not in (1, count):
        raise ValueError(f"{len(texts)} {what}, but {len(images)} images: give as many, or one for all")
    return texts * (count // len(texts)), images * (count // len(images))


def check_seeds(seeds, count) -> list[int]:
    """One seed for each of `count` results; a number stands for itself and those after it, None for 0."""
    seeds = 0 if seeds is None else seeds
    if is_whole(seeds):
        seeds = range(int(seeds), int(seeds) + count)
    is_list = isinstance(seeds, list | tuple | range | np.ndarray)
    if not is_list or not all(is_whole(seed) for seed in seeds):
        raise ValueError(f"seeds is {shown(seeds)}, expected a whole number, or one for each result")
    seeds = [int(seed) for seed in seeds]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} results: give one to each, or a single number")
    wrong = next((seed for seed in seeds if not 0 <= seed < SEEDS), None)
    if wrong is not None:
        raise ValueError(f"seed is {shown(wrong)}, expected 0 to {SEEDS - 1}")
    return seeds


def check_range(name, value, low, high):
    if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not low <= value <= high:
        expected = f"{low} to {high}" if high < math.inf else f"a number of at least {low}"
        raise ValueError(f"{name} is {shown(value)}, expected {expected}")
    return value


def check_whole(name, value, low, high):
    if not is_whole(value) or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}, expected a whole number from {low} to {high}")
    return value


def is_whole(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
