"""Images of rows: found by path or as bytes, proved to decode, and held against the rules of a data set."""

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unialign_jax.data import images
from unialign_jax.data.jsonl import BadRow
from unialign_jax.data.sources import locations
from unialign_jax.files import one_line

_KEPT_FORMATS = ("JPEG", "PNG")
_JPEG_QUALITY = 95


@dataclass(frozen=True)
class ImageRules:
    """Which images get through, and how they are stored.

    Attributes:
      min_side: pixels of the shorter side, at least.
      max_aspect: longer side to shorter, at most.
      max_side: larger images are shrunk to this longer side; None keeps them.
      side: images are shrunk to this shorter side, as the training's transform does it; None keeps them.
      animated: whether of several frames the first is taken; or else such an image is refused.
      hashed: whether to compute a hash of what is seen, for near-duplicates.
    """

    min_side: int = 1
    max_aspect: float = images.MAX_ASPECT
    max_side: int | None = None
    side: int | None = None
    animated: bool = True
    hashed: bool = False


# The released code's: 256 pixels and 4:1 for folders, 100 pixels and 4:1 for webdataset, nothing for its JSONL files.
FORMAT_RULES = {
    "json": ImageRules(),
    "folder": ImageRules(256, 4, animated=False),
    "webdataset": ImageRules(100, 4, animated=False),
    "parquet": ImageRules(256, 4, animated=False),
    "hf": ImageRules(256, 4, animated=False),
}


class Picture(NamedTuple):
    """A sound image: its bytes (JPEG or PNG), its size when upright, and its hash (0 unless asked for)."""

    data: bytes
    width: int
    height: int
    hash: int


def read_image(value: Any, base: str, root: str | None, free_paths: bool) -> tuple[bytes, str]:
    """The bytes that a field's value stands for, and a name for messages.

    Args:
      value: a path, bytes, or a dict of `bytes` and `path` of which one is given.
      base: the folder that paths are relative to.
      root: the folder that they may not leave; None for `base`, unless `free_paths`.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        if len(value) > images.MAX_BYTES:
            raise BadRow("image file cannot be read", f"it has more than {images.MAX_BYTES:,} bytes")
        return bytes(value), "image"
    if not isinstance(value, str) or not value:
        raise BadRow("images missing", f"expected a path or bytes, found {value!r:.200}")
    if locations.is_web(value) or (locations.is_url(value) and not (root and locations.is_inside(value, root))):
        raise BadRow("image is a URL", f"{value:.200}: download it first")
    if not base and not root:
        raise BadRow("image file cannot be read", f"{value:.200}: there is no folder that it could be relative to")
    path = locations.join(root or base, value)
    if not (free_paths and root is None) and not locations.is_inside(path, root or base):
        raise BadRow("image outside of the folder", f"{value:.200}: name a folder that holds it with --image-root")
    try:
        return locations.read_bytes(path, images.MAX_BYTES), path
    except (FileNotFoundError, ValueError) as error:
        raise BadRow("image file cannot be read", str(error)) from None
    except OSError as error:
        locations.raise_if_remote(error, path)
        raise BadRow("image file cannot be read", str(error)) from None


def check_image(data: bytes, name: str, rules: ImageRules) -> Picture:
    """The image as it is stored: JPEG and PNG as they are, others, and what is shrunk, encoded anew. Raises BadRow."""
    try:
        with images.open_image(data, name) as image:
            image_format = image.format
            if getattr(image, "is_animated", False) and image_format != "TIFF" and not rules.animated:
                raise BadRow("image is animated", f"{name} has {image.n_frames} frames")
            short, long = sorted(image.size)
            if short < rules.min_side:
                raise BadRow("image too small", f"{name} is {image.width} x {image.height}, expected {rules.min_side}")
            if long > rules.max_aspect * short:
                detail = f"{name} is {image.width} x {image.height}, expected at most {rules.max_aspect:g} to 1"
                raise BadRow("image too long or too wide", detail)
            is_small = (rules.max_side is None or long <= rules.max_side) and (
                rules.side is None or short <= rules.side
            )
            is_kept = image_format in _KEPT_FORMATS and is_small
            image = images.loaded_rgb(image, name)
    except BadRow:
        raise
    except images.BadShape as error:
        raise BadRow("image cannot be decoded", str(error)) from None
    except ValueError as error:
        raise BadRow("image cannot be decoded", str(error)) from None
    seen = difference_hash(image) if rules.hashed else 0
    if not is_kept:
        if rules.max_side is not None:
            image.thumbnail((rules.max_side, rules.max_side), Image.Resampling.LANCZOS)
        if rules.side is not None and min(image.size) > rules.side:
            image = image.resize(images.covering_size(image, rules.side, rules.side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        if image_format == "JPEG":
            image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
        else:
            image.save(buffer, "PNG")
        data = buffer.getvalue()
    return Picture(data, image.width, image.height, seen)


def difference_hash(image: Image.Image) -> int:
    """64 bits: whether each of 8 x 8 places of the image, made grey and small, is brighter than that right of it.

    Copies of another size or compression differ in a few bits, other images in about 32 (`dhash`, Krawetz 2013).
    """
    small = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX, reducing_gap=2.0), dtype=np.int16)
    bits = (small[:, :-1] > small[:, 1:]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(data: bytes, side: int) -> bytes:
    """A JPEG of at most `side` pixels a side, for people to look at."""
    image = images.decode_rgb(data, one_line("image"))
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
