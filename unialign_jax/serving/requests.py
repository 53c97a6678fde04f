"""What clients send, as jobs: JSON and forms of OpenAI's API with our options beside them, and images as bytes."""

import base64
import binascii
import dataclasses
import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from unialign_jax.data.images import decode_rgb, open_image
from unialign_jax.files import shown
from unialign_jax.inference import jobs
from unialign_jax.inference.job_runner import png_bytes
from unialign_jax.inference.options import IMAGE_TASKS, OPTIONS, by_name, check_range
from unialign_jax.models.sizes import ImageSizes

# Keys of OpenAI's requests that change nothing here, or have one value that we serve.
IGNORED = ("model", "lora", "user", "stream_options", "metadata", "store", "logit_bias")
SEED_BITS = 31
MOST_SCALE = 10.0  # of adapters
# What a tier sets where the request does not.
TIERS = {
    "lossless": {},
    "fast": {"solver": "unipc", "steps": 14, "guidance_interval": [0.2, 0.9]},
}
QUALITIES = {"auto": "lossless", "high": "lossless", "hd": "lossless", "standard": "lossless"}
QUALITIES |= {"medium": "fast", "low": "fast"} | {name: name for name in TIERS}


class BadRequest(ValueError):
    """A request that cannot be done.

    Attributes:
      parameter: the key that it is about, if it is about one.
      status: of HTTP.
    """

    def __init__(self, message: str, parameter: str | None = None, status: int = 400):
        super().__init__(message)
        self.parameter, self.status = parameter, status


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
      request_bytes: of a whole request.
      image_pixels: of an image that is sent.
      samples: images of one request.
      max_steps: of the sampler.
      max_side: pixels a side of an image that is made.
    """

    request_bytes: int = 2**25
    image_pixels: int = 2**24
    samples: int = 16
    max_steps: int = 100
    max_side: int = 2048


@dataclasses.dataclass(frozen=True)
class Work:
    """A request as the engine takes it, and what its answer names."""

    job: jobs.Job
    images: tuple[Image.Image, ...]
    tier: str
    loras: dict[str, float] = dataclasses.field(default_factory=dict)


def read_image(data: bytes, name: str, limits: Limits) -> Image.Image:
    """The upright RGB image that a client sent. Raises BadRequest."""
    try:
        with open_image(data, name) as image:  # the header alone
            if image.width * image.height > limits.image_pixels:
                raise ValueError(
                    f"{name} is {image.width:,} x {image.height:,} pixels, expected at most {limits.image_pixels:,}"
                )
        return decode_rgb(data, name)
    except ValueError as error:
        raise BadRequest(str(error), name) from None


def stamped_png(image: Image.Image, stamp: Mapping[str, Any]) -> bytes:
    """An image as a PNG, with the parameters that made it and a model's stamp (`ModelSource.stamp`)."""
    return png_bytes(image, json.loads(image.info.get("parameters", "{}")) | dict(stamp))


def check_size(job: jobs.Job, sizes: ImageSizes) -> None:
    """Raises BadRequest where an image's size is none of the model's."""
    for name in ("height", "width"):
        if name in job.options and (reason := sizes.problem(name, job.options[name])):
            raise BadRequest(reason, "size")


def image_bytes(value: Any, name: str) -> bytes:
    """The bytes of an image in JSON: base64, alone or as a data URI. Raises BadRequest; a URL is not fetched."""
    if isinstance(value, Mapping):
        value = value.get("url", value.get("image_url", value.get("b64_json")))
    if isinstance(value, Mapping):  # {"image_url": {"url": ...}}
        value = value.get("url")
    if not isinstance(value, str):
        raise BadRequest(f"{name} is {shown(value)}, expected base64 or a data URI", name)
    if match := re.match(r"data:[\w.+-]+/[\w.+-]+;base64,", value):
        value = value[match.end() :]
    elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", value):
        raise BadRequest(f"{name} is a URL, which is not fetched: send the image as a data URI", name)
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{name} is no base64", name) from None


def make_work(
    task: str,
    fields: Mapping[str, Any],
    data: Sequence[bytes],
    limits: Limits,
    *,
    model: str = "",
    loras: Mapping[str, float] | None = None,
) -> Work:
    """A request of a task as a job with its images.

    Args:
      fields: the inputs of the task and its options, under our names or OpenAI's (`n`, `size`, `quality`); what is
        None counts as not given. Without a seed it gets a fresh one.
      data: its images, encoded.
      model: the server's.
      loras: {name: usual scale} of the adapters that a request may name.

    Raises BadRequest.
    """
    chosen = _chosen_loras(fields.get("lora"), fields.get("model"), model, loras or {})
    fields = {key: value for key, value in fields.items() if value is not None and key not in IGNORED}
    images = tuple(
        read_image(content, f"image {number}" if len(data) > 1 else "image", limits)
        for number, content in enumerate(data)
    )
    try:
        fields = by_name(fields)
        tier = _take_openai(task, fields, limits)
        for name, value in TIERS[tier].items():
            if task in OPTIONS[name].tasks:
                fields.setdefault(name, value)
        fields.setdefault("seed", secrets.randbits(SEED_BITS))
        _check_limits(fields, limits)
        contents = {
            str(number): (hashlib.sha256(content).hexdigest(), image.size)
            for number, (content, image) in enumerate(zip(data, images, strict=True))
        }
        fields |= {"task": task} | ({"images": list(contents)} if contents else {})
        job = jobs.make_job(fields, Path(), inspect=lambda path: contents[str(path)])
    except BadRequest:
        raise
    except ValueError as error:
        parameter = re.match(r"\w+", str(error))
        raise BadRequest(str(error), parameter[0] if parameter else None) from None
    return Work(job, images, tier, chosen)


def _chosen_loras(asked: Any, model_asked: Any, model: str, loras: Mapping[str, float]) -> dict[str, float]:
    """{name: scale} of the adapters that `lora` or a model of the name MODEL:ADAPTERS asks for."""
    known, chosen = ", ".join(loras) or "none", {}
    if isinstance(model_asked, str) and model_asked.startswith(f"{model}:"):
        name = model_asked.removeprefix(f"{model}:")
        if name not in loras:
            raise BadRequest(f"there is no model {shown(model_asked)}; LoRAs of this server: {known}", "model", 404)
        chosen[name] = loras[name]
    if isinstance(asked, str) and asked:
        asked = {asked: loras.get(asked, 1.0)}
    if not isinstance(asked or {}, Mapping):
        raise BadRequest(f"lora is {shown(asked)}, expected a name, or an object of names and scales", "lora")
    for name, scale in (asked or {}).items():
        if name not in loras:
            raise BadRequest(f"lora names {shown(name)}, expected one of this server's: {known}", "lora")
        try:
            chosen[name] = check_range(f"lora: the scale of {name}", scale, -MOST_SCALE, MOST_SCALE)
        except ValueError as error:
            raise BadRequest(str(error), "lora") from None
    return {name: scale for name, scale in chosen.items() if scale}


def _take_openai(task: str, fields: dict, limits: Limits) -> str:
    """Changes OpenAI's keys into ours, and returns the tier."""
    quality = fields.pop("quality", "auto")
    if quality not in QUALITIES:
        raise BadRequest(f"quality is {shown(quality)}, expected one of {', '.join(QUALITIES)}", "quality")
    if task not in IMAGE_TASKS:
        return QUALITIES[quality]
    count = fields.pop("n", None)
    if count is not None:
        if type(count) is not int or not 1 <= count <= limits.samples:
            raise BadRequest(f"n is {shown(count)}, expected 1 to {limits.samples}", "n")
        fields["images_per_prompt"] = count
    size = fields.pop("size", "auto")
    if size != "auto":
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
        if not match:
            raise BadRequest(f"size is {shown(size)}, expected WIDTHxHEIGHT in pixels, or auto", "size")
        fields["width"], fields["height"] = int(match[1]), int(match[2])
    if (form := fields.pop("response_format", "b64_json")) != "b64_json":
        raise BadRequest(
            f"response_format is {shown(form)}, expected b64_json: no images are kept here", "response_format"
        )
    for name, served in (
        ("output_format", ("png",)),
        ("background", ("auto", "opaque")),
        ("moderation", ("auto", "low")),
    ):
        if (value := fields.pop(name, served[0])) not in served:
            raise BadRequest(f"{name} is {shown(value)}, expected {' or '.join(served)}", name)
    if fields.pop("mask", None) is not None:
        raise BadRequest("mask is not read by this model: say in the prompt what is to change", "mask")
    if fields.pop("stream", False):
        raise BadRequest("stream is not served for images", "stream")
    for name in ("style", "input_fidelity", "partial_images", "output_compression"):
        fields.pop(name, None)
    return QUALITIES[quality]


def _check_limits(fields: dict, limits: Limits) -> None:
    for name, most in (
        ("images_per_prompt", limits.samples),
        ("steps", limits.max_steps),
        ("height", limits.max_side),
        ("width", limits.max_side),
    ):
        value = fields.get(name)
        if isinstance(value, int | float) and value > most:
            raise BadRequest(f"{name} is {shown(value)}, expected at most {most} on this server", name)
