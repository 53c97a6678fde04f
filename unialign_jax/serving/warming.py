"""What a server does before it listens: opens a model on every device, and compiles the usual shapes."""

import logging
import re

import jax
import numpy as np
from PIL import Image

from unialign_jax.files import shown
from unialign_jax.inference.opening import ModelSource
from unialign_jax.inference.pipeline import Pipeline

log = logging.getLogger(__name__)


def open_replicas(source: ModelSource, count: int | None = None, **options) -> list[Pipeline]:
    """The model on `count` devices with its weights read; on all of them, or on one CPU, when None.

    Args:
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
        pipeline.load()  # damaged weights are an error now, not with the first request
    return pipelines


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "512x512,768x512" -> [(width, height)]. Raises ValueError."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", part)
        if not match:
            raise ValueError(f"--warm-up is {shown(text)}, expected sizes such as 512x512,768x512, or none")
        sizes.append((int(match[1]), int(match[2])))
    return sizes


def warm_up(pipelines: list[Pipeline], text: str | None) -> None:
    """Runs every task that the model knows, alone and in a full batch, on every replica.

    Args:
      text: sizes of images as `parse_sizes` reads them; None is the model's own, "none" does nothing.

    Raises ValueError for a size that the model cannot make.
    """
    if text == "none":
        return
    side = pipelines[0].config.image_size
    sizes = parse_sizes(text) if text else [(side, side)]
    tasks = pipelines[0].config.tasks
    for pipeline in pipelines:
        for count in sorted({1, pipeline.max_batch}):
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
