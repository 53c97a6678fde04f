"""What a server does before it listens: opens a model on every device, and compiles the usual shapes."""

import logging
import re
from collections.abc import Mapping

import jax
import numpy as np
from PIL import Image

from unialign_jax.files import shown
from unialign_jax.inference.opening import ModelSource
from unialign_jax.inference.pipeline import Pipeline

log = logging.getLogger(__name__)


def open_replicas(
    source: ModelSource, count: int | None = None, loras: Mapping[str, tuple[str, float]] | None = None, **options
) -> list[Pipeline]:
    """The model on `count` devices with its weights read; on all of them, or on one CPU, when None.

    Args:
      loras: {name: (file, ...)} of adapters to load; they are off.
      options: of `Pipeline.from_bundle`.

    Raises ValueError where there are fewer devices.
    """
    devices = jax.local_devices()
    if count is None:
        count = 1 if devices[0].platform == "cpu" else len(devices)
    if count > len(devices):
        raise ValueError(f"--devices is {count}, and there are {len(devices)}")
    pipelines = [source.open(device=device, **options) for device in devices[:count]]
    for pipeline in pipelines:
        for name, (path, _) in (loras or {}).items():
            pipeline.load_lora(path, 0.0, name)
        pipeline.load()  # damaged weights are an error now, not with the first request
    return pipelines


def parse_sizes(text: str | None) -> list[tuple[int, int]] | None:
    """ "512x512,768x512" -> [(width, height)], "none" -> []; None stays. Raises ValueError."""
    if text is None:
        return None
    sizes = []
    for part in [] if text == "none" else text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", part)
        if not match:
            raise ValueError(f"--warm-up is {shown(text)}, expected sizes such as 512x512,768x512, or none")
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def batch_sizes(most: int) -> list[int]:
    """The sizes to which a pipeline fills its batches: powers of two, and the largest that it may have."""
    return sorted({min(most, 1 << power) for power in range((most - 1).bit_length() + 1)})


def warm_up(pipelines: list[Pipeline], sizes: list[tuple[int, int]] | None) -> None:
    """Runs the tasks of one image or none that the model knows, in batches of 1, 2, 4, ..., on every replica.

    Args:
      sizes: (width, height) of images; None is the model's own. Nothing is run for an empty list.

    Raises ValueError for a size that the model cannot make.
    """
    side = pipelines[0].config.image_size
    sizes = [(side, side)] if sizes is None else sizes
    tasks = pipelines[0].config.tasks
    for pipeline in pipelines if sizes else ():
        for count in batch_sizes(pipeline.max_batch):
            for width, height in sizes:
                log.info("compiling for %d of %d x %d pixels", count, width, height)
                image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
                if tasks is None or "text_to_image" in tasks:
                    pipeline.generate(["a"] * count, width=width, height=height)
                if tasks is None or "edit" in tasks:
                    pipeline.edit(["a"] * count, [image] * count)
            if tasks is None or "caption" in tasks:
                pipeline.caption([image] * count)
            if tasks is None or "vqa" in tasks:
                pipeline.answer([image] * count, ["a"] * count)
