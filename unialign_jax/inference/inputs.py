"""The inputs of a pipeline, checked: images, texts and seeds; and how they are batched. Does not import JAX.

Every error is a ValueError of one line.
"""

import dataclasses
import os
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from unialign_jax.data import images
from unialign_jax.files import shown
from unialign_jax.inference.options import MAX_CHARACTERS, SEEDS, is_whole


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image to be made. Sizes are (height, width); `final_size` is None when the image stays at `size`."""

    prompt: str
    size: tuple[int, int]
    final_size: tuple[int, int] | None = None
    conditions: tuple[Image.Image, ...] = ()
    negative: str = ""


def batches(keys: Sequence[Hashable], most: int) -> list[list[int]]:
    """The indices of equal keys together, at most `most` in a batch, in order of appearance."""
    groups = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def open_images(images: Any, what: str = "image") -> list[Image.Image]:
    """PIL images or paths, one or a list -> upright RGB images, wholly decoded."""
    if not isinstance(images, list | tuple):
        images = [images]
    if not images:
        raise ValueError(f"no {what} was given, expected at least one")
    return [open_image(image, f"{what} {number}") for number, image in enumerate(images)]


def open_image(image: Any, what: str) -> Image.Image:
    """A PIL image or a path -> an upright RGB image, wholly decoded."""
    if isinstance(image, Image.Image):
        images.check_shape(image, what)
        return images.loaded_rgb(image, what)
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"{what} is a {type(image).__name__}, expected a PIL image or a path")
    try:
        return images.load_rgb(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from None


def check_texts(texts: Any, what: str) -> list[str]:
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


def check_text(text: Any, what: str) -> str:
    """The text, if it is one of at most MAX_CHARACTERS and without halves of characters."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is a {type(text).__name__}, expected a text")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{what} has {len(text):,} characters, expected at most {MAX_CHARACTERS:,}")
    if text.encode(errors="ignore").decode() != text:
        raise ValueError(f"{what} holds half of a character (a lone surrogate): {shown(text)}")
    return text


def spread(texts: list[str], images: list, what: str) -> tuple[list[str], list]:
    """Texts and images of one length: a single one of either stands for all."""
    count = max(len(texts), len(images))
    if len(texts) not in (1, count) or len(images) not in (1, count):
        raise ValueError(f"{len(texts)} {what}, but {len(images)} images: give as many, or one for all")
    return texts * (count // len(texts)), images * (count // len(images))


def check_negatives(texts: Any, count: int) -> list[str]:
    """One negative prompt for each of `count` prompts; a single text stands for all."""
    texts = [texts] * count if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple):
        raise ValueError(f"negative_prompt is {shown(texts)}, expected a text or a list of texts")
    for number, text in enumerate(texts):
        check_text(text, f"negative prompt {number}")
    if len(texts) != count:
        raise ValueError(f"{count} prompts, but {len(texts)} negative prompts: give one to all or each")
    return list(texts)


def check_seeds(seeds: Any, count: int) -> list[int]:
    """One seed for each of `count` results; a number s stands for s, s + 1, ..., and None for 0, 1, ..."""
    seeds = 0 if seeds is None else seeds
    if is_whole(seeds):
        seeds = range(int(seeds), int(seeds) + count)
    is_list = isinstance(seeds, list | tuple | range | np.ndarray)
    if not is_list or not all(is_whole(seed) for seed in seeds):
        raise ValueError(f"seed is {shown(seeds)}, expected a whole number, or one for each result")
    seeds = [int(seed) for seed in seeds]
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} results: give one to each, or a single number")
    wrong = next((seed for seed in seeds if not 0 <= seed < SEEDS), None)
    if wrong is not None:
        raise ValueError(f"seed is {shown(wrong)}, expected 0 to {SEEDS - 1}")
    return seeds
