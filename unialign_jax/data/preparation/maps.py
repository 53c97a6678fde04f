"""Perception records from plain images: a map of the image is the target, the image itself the condition.

Edges are OpenCV's. Depth and pose come from a function that the user names, "package.module:function": from an RGB
image of Pillow to the map, as an image of Pillow or a uint8 array [H, W] or [H, W, 3].
"""

import functools
import importlib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from unialign_jax.data.images import decode_rgb
from unialign_jax.data.jsonl import BadRow
from unialign_jax.data.kinds import PERCEPTION
from unialign_jax.data.records import Record
from unialign_jax.data.sources.pictures import Picture, difference_hash
from unialign_jax.files import first_line

CAPTIONS = {"canny": "a canny edge map", "depth": "a depth map", "pose": "a pose map"}
CANNY_THRESHOLDS = 100, 200  # of the gradient: edges begin above the second and go on above the first


def check_maps(names: Sequence[str], models: Mapping[str, str]) -> None:
    """Raises ValueError for a name that is no map, a map without its function, and a function that is not there."""
    if unknown := [name for name in names if name not in CAPTIONS]:
        raise ValueError(f"--maps has {unknown[0]!r}, expected some of {', '.join(CAPTIONS)}")
    if unused := [name for name in models if name not in names]:
        raise ValueError(f"--{unused[0]}-model is given, but --maps does not have {unused[0]}")
    for name in names:
        find_function(name, models.get(name))


@functools.cache
def find_function(name: str, model: str | None) -> Callable:
    """The function that makes a map of an image. Raises ValueError when there is none."""
    if name == "canny":
        try:
            import cv2
        except ImportError:
            raise ValueError("--maps=canny needs OpenCV: pip install opencv-python-headless") from None
        return lambda image: cv2.Canny(cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2GRAY), *CANNY_THRESHOLDS)
    if not model:
        raise ValueError(f"--maps={name} needs --{name}-model=package.module:function")
    module, _, attribute = model.partition(":")
    if os.getcwd() not in sys.path:  # where a user's own file lies
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's file does
        raise ValueError(
            f"--{name}-model={model} cannot be imported: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not callable(found):
        raise ValueError(f"--{name}-model={model} is a {type(found).__name__}, expected a function")
    return found


def map_records(
    record: Record, names: Sequence[str], models: Mapping[str, str], *, hashed: bool = False
) -> list[tuple[Record, Picture]]:
    """A perception record for each map of a record's image, with the picture of the map.

    Raises BadRow when a function fails, or gives no map.

    Args:
      names: of the maps.
      models: {map: "package.module:function"}.
      hashed: whether to compute the hashes of the maps.
    """
    image, made = decode_rgb(record.image, record.key), []
    for name in names:
        data, drawn = draw_map(image, name, models.get(name))
        caption = f"{CAPTIONS[name]} of this: {record.caption}" if record.caption else CAPTIONS[name]
        picture = Picture(data, *image.size, difference_hash(drawn) if hashed else 0)
        key = f"{record.key}/{name}"
        made.append((Record(key, data, (record.image,), caption=caption, instruction=PERCEPTION[name]), picture))
    return made


def draw_map(image: Image.Image, name: str, model: str | None) -> tuple[bytes, Image.Image]:
    """A map of the image's size, as PNG and as an image. Raises BadRow when the function fails, or gives no map."""
    function = find_function(name, model)
    try:
        found = function(image)
        if not isinstance(found, Image.Image):
            found = np.asarray(found)
            if found.dtype != np.uint8:
                raise ValueError(f"the map is an array of {found.dtype}, expected uint8")
            found = Image.fromarray(found)
        if found.mode not in ("L", "RGB"):
            raise ValueError(f"the map is an image of mode {found.mode}, expected L or RGB")
    except Exception as error:  # whatever a user's function does to one image
        raise BadRow("map cannot be made", f"{name}: {type(error).__name__}: {first_line(error)}") from error
    if found.size != image.size:
        found = found.resize(image.size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    found.save(buffer, "PNG")
    return buffer.getvalue(), found
