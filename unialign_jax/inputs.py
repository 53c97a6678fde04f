"""What a user hands to a pipeline, checked: images, texts, seeds and numbers. Every error is one line."""

import contextlib
import dataclasses
import math
from pathlib import Path

import numpy as np
from PIL import Image

from unialign_jax.data.streams import to_rgb
from unialign_jax.diffusion.flow import sampling_sigmas
from unialign_jax.sampling.programs import Guidance
from unialign_jax.sampling.solvers import SOLVERS, solver_table
from unialign_jax.sampling.text import DECODINGS

MAX_STEPS = 1000
MAX_TOKENS = 4096
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
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}, expected one of {', '.join(SOLVERS)}")
        interval = self.guidance_interval
        numbers = [x for x in interval if isinstance(x, int | float | np.number)] if np.iterable(interval) else []
        if not len(numbers) == 2 == len(interval) or not 0 <= numbers[0] <= numbers[1] <= 1:
            raise ValueError(f"guidance_interval is {interval!r}, expected two noise levels, 0 <= low <= high <= 1")

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
        if self.decoding not in DECODINGS:
            raise ValueError(f"decoding is {self.decoding!r}, expected one of {', '.join(DECODINGS)}")


def open_image(image, what) -> Image.Image:
    """A PIL image or a path -> an upright RGB image; ValueError when it cannot be decoded."""
    try:
        if isinstance(image, Image.Image):
            return to_rgb(image)
        with contextlib.closing(Image.open(image)) as opened:
            return to_rgb(opened)
    except AttributeError:
        raise ValueError(f"{what} is a {type(image).__name__}, expected a PIL image or a path") from None
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        name = f" ({image})" if isinstance(image, str | Path) else ""
        raise ValueError(f"{what}{name} cannot be read as an image: {error}") from None


def check_texts(texts, what) -> list[str]:
    """One text or a list -> a list of texts that are not empty."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError(f"no {what} was given, expected at least one")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what} {number} is empty ({text!r}): say what the model is to do")
    return texts


def spread(texts, images, what):
    """Texts and images of one length: where there is one of either, it stands for all."""
    count = max(len(texts), len(images))
    if len(texts) not in (1, count) or len(images) not in (1, count):
        raise ValueError(f"{len(texts)} {what}, but {len(images)} images: give as many, or one for all")
    return texts * (count // len(texts)), images * (count // len(images))


def check_seeds(seeds, count) -> list[int]:
    """One seed for each of `count` results; a number stands for itself and those after it, None for 0."""
    seeds = 0 if seeds is None else seeds
    if isinstance(seeds, int | np.integer):
        seeds = range(int(seeds), int(seeds) + count)
    if not np.iterable(seeds) or not all(isinstance(seed, int | np.integer) for seed in seeds):
        raise ValueError(f"seeds is {seeds!r}, expected a whole number, or one for each result")
    seeds = [int(seed) for seed in seeds]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} results: give one to each, or a single number")
    wrong = next((seed for seed in seeds if not 0 <= seed < SEEDS), None)
    if wrong is not None:
        raise ValueError(f"seed is {wrong}, expected 0 to {SEEDS - 1}")
    return seeds


def check_range(name, value, low, high):
    if not isinstance(value, int | float | np.number) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected {low} to {high}")
    return value


def check_whole(name, value, low, high):
    if not isinstance(value, int | np.integer) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, expected a whole number from {low} to {high}")
    return value
