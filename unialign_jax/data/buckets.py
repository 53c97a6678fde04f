"""Aspect buckets: image sizes of different shapes with about the same number of tokens."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from unialign_jax.data.records import METADATA_FILE

STEP = 64  # both sides are multiples of it
MAX_ASPECT = 2.5  # longer side to shorter
_NAME = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def bucket_sizes(image_size: int, step: int = STEP, max_aspect: float = MAX_ASPECT) -> list[tuple[int, int]]:
    """(height, width) of every bucket, from the widest to the tallest: for each side the other with the most pixels.

    No bucket has more than image_size^2 pixels, and a bucket with fewer than 85% of them is left out. Raises ValueError
    when `step` does not divide image_size.
    """
    if image_size < 1 or step < 1 or image_size % step:
        raise ValueError(f"image_size is {image_size}, expected a multiple of the buckets' step {step}")
    area, found = image_size**2, set()
    for short in range(step, image_size + step, step):
        long = area // short // step * step
        if long >= short and long <= max_aspect * short and short * long >= 0.85 * area:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda size: size[0] / size[1])


def nearest_buckets(heights: np.ndarray, widths: np.ndarray, sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    """The numbers of the buckets nearest to images by the logarithm of the aspect ratio: the least is cropped away."""
    aspects = np.log(np.asarray(widths, np.float64) / np.asarray(heights, np.float64))
    return np.abs(aspects[:, None] - np.array([math.log(width / height) for height, width in sizes])).argmin(axis=1)


def cropped_share(height: int, width: int, size: tuple[int, int]) -> float:
    """The share of an image's pixels that filling `size` crops away."""
    ratio = (width / height) / (size[1] / size[0])
    return 1 - min(ratio, 1 / ratio)


def bucket_name(size: tuple[int, int]) -> str:
    """The name of a bucket's data folder, "HEIGHTxWIDTH"."""
    return f"{size[0]}x{size[1]}"


def parse_bucket(name: str) -> tuple[int, int] | None:
    """(height, width) of a bucket's folder by its name; None for another name."""
    match = _NAME.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def data_folders(directory: Path) -> Iterator[tuple[Path, tuple[int, ...]]]:
    """(folder, bucket) of a data folder, whose bucket is (), or of the aspect buckets inside of a folder."""
    found = []
    if directory.is_dir() and not (directory / METADATA_FILE).exists():
        found = sorted(path for path in directory.iterdir() if parse_bucket(path.name) and path.is_dir())
    for folder in found or [directory]:
        yield folder, parse_bucket(folder.name) or ()
