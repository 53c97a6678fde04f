"""What clients send, as jobs: JSON and forms of OpenAI's API with our options beside them, and images as bytes."""

import base64
import binascii
import dataclasses
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unialign_jax.data.images import MAX_RESIZED, covering_size, decode_rgb, fill_size, open_image
from unialign_jax.data.streams import encode_question
from unialign_jax.files import shown
from unialign_jax.inference import jobs
from unialign_jax.inference.inputs import check_text
from unialign_jax.inference.job_runner import png_bytes
from unialign_jax.inference.options import ALIASES, IMAGE_TASKS, OPTIONS, TEXT_TASKS, by_name, check_range
from unialign_jax.models.sizes import ImageSizes

# Keys of OpenAI's requests that change nothing here, or have one value that we serve.
IGNORED = ("model", "lora", "user", "stream_options", "metadata", "store", "logit_bias")
TEXTS = sorted({name for inputs in jobs.INPUTS.values() for name in inputs.texts} | {"negative_prompt", "prefix"})
SEED_BITS = 31
IMAGES_IN_ALL = 2  # times `Limits.image_pixels`: the pixels of all images of a request
DECODED_AT_ONCE = 4  # requests; each holds up to IMAGES_IN_ALL * image_pixels, and more while it decodes
MOST_SCALE = 10.0  # of adapters
# What a tier sets where the request does not.
TIERS = {
    "lossless": {},
    "fast": {"solver": "unipc", "steps": 14, "guidance_interval": [0.2, 0.9]},
}
QUALITIES = {"auto": "lossless", "high": "lossless", "hd": "lossless", "standard": "lossless"}
QUALITIES |= {"medium": "fast", "low": "fast"} | {name: name for name in TIERS}
_decoding = threading.BoundedSemaphore(DECODED_AT_ONCE)


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
      body_seconds: in which its body must have come.
      image_pixels: of an image that is sent; all images of a request have at most IMAGES_IN_ALL times as many.
      text_characters: of a text that is sent.
      samples: images of one request.
      max_steps: of the sampler.
      max_side: pixels a side of an image that is made.
    """

    request_bytes: int = 2**25
    body_seconds: float = 60.0
    image_pixels: int = 2**24
    text_characters: int = 10_000
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


def read_images(data: Sequence[bytes], limits: Limits) -> list[Image.Image]:
    """The upright RGB images that a client sent. All headers are read before the first image is decoded.

    Raises BadRequest.
    """
    names = [f"image {number}" if len(data) > 1 else "image" for number in range(len(data))]
    total, most = 0, IMAGES_IN_ALL * limits.image_pixels
    try:
        for content, name in zip(data, names, strict=True):
            with open_image(content, name) as image:
                width, height = image.size
            if width * height > limits.image_pixels:
                raise ValueError(f"{name} is {width:,} x {height:,} pixels, expected at most {limits.image_pixels:,}")
            total += width * height
        if total > most:
            raise ValueError(f"the {len(data)} images have {total:,} pixels in all, expected at most {most:,}")
        with _decoding:
            return [decode_rgb(content, name) for content, name in zip(data, names, strict=True)]
    except ValueError as error:
        raise BadRequest(str(error), "image") from None


def stamped_png(image: Image.Image, stamp: Mapping[str, Any]) -> bytes:
    """An image as a PNG, with the parameters that made it and a model's stamp (`ModelSource.stamp`)."""
    return png_bytes(image, json.loads(image.info.get("parameters", "{}")) | dict(stamp))


def check_size(job: jobs.Job, sizes: ImageSizes) -> None:
    """Raises BadRequest where an image's size is none of the model's."""
    for name in ("height", "width"):
        if name in job.options and (reason := sizes.problem(name, job.options[name])):
            raise BadRequest(reason, "size")


def text_room(job: jobs.Job, pipeline: Any) -> tuple[int, int]:
    """(tokens that stand before the text of a caption or an answer, tokens that it may have).

    Raises BadRequest for options of a text that are more than the model has.
    """
    length, asked = job.options.get("text_length", pipeline.config.text_length), job.options.get("max_tokens")
    positions = pipeline.config.transformer.text_positions if pipeline.config.transformer else 0
    if positions and length > positions:
        raise BadRequest(f"text_length is {length}, expected at most {positions}: the model's positions", "text_length")
    if asked is not None and asked > length:
        raise BadRequest(f"max_tokens is {asked}, expected at most {length}: the tokens of the text", "max_tokens")
    if job.task == "caption":
        before = len(pipeline.tokenizer.token_ids(job.options.get("prefix", "")))
        if before >= length:
            raise BadRequest(f"prefix is {before} tokens long, expected at most {length - 1}", "prefix")
    else:
        _, is_answer = encode_question(job.text, "", pipeline.tokenizer, length)
        before = int(np.argmax(is_answer))
    return before, min(length - before, asked or length)


def check_fit(job: jobs.Job, pipeline: Any) -> list[str]:
    """Checks what depends on the model, and returns a line for each text that it will not read whole.

    Raises BadRequest for what the model cannot do.
    """
    check_size(job, pipeline.sizes)
    count = lambda text: len(pipeline.tokenizer.token_ids(text))  # noqa: E731
    if job.task in TEXT_TASKS:
        before, _ = text_room(job, pipeline)
        if job.task == "vqa" and (tokens := count(f"Q: {job.text} A: ")) > before:
            return [f"the question is {tokens} tokens long, the model reads {before}: its middle was left out"]
        return []
    most, texts = pipeline.config.text_length - 1, {"prompt": job.text, "negative_prompt": job.negative_prompt}
    return [
        f"{name} is {tokens} tokens long, the model reads {most}: the rest was cut off"
        for name, text in texts.items()
        if text and (tokens := count(text)) > most
    ]


def image_bytes(value: Any, name: str) -> bytes:
    """The bytes of an image in JSON: base64, alone or as a data URI. Raises BadRequest; a URL is not fetched."""
    if isinstance(value, Mapping):
        value = value.get("url", value.get("image_url", value.get("b64_json")))
    if isinstance(value, Mapping):  # {"image_url": {"url": ...}}
        value = value.get("url")
    if not isinstance(value, str):
        raise BadRequest(f"{name} is {shown(value)}, expected base64 or a data URI", name)
    if re.match("data:", value, re.IGNORECASE):
        head, _, value = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise BadRequest(f"{name} is a data URI without base64, expected data:image/png;base64,...", name)
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
    image_size: int | None = None,
) -> Work:
    """A request of a task as a job with its images, which are decoded when all else was found right.

    Args:
      fields: the inputs of the task and its options, under our names or OpenAI's (`n`, `size`, `quality`); what is
        None counts as not given. Without a seed it gets a fresh one.
      data: its images, encoded.
      model: the server's.
      loras: {name: usual scale} of the adapters that a request may name.
      image_size: the model's (`BundleConfig.image_size`). With it, images become as small at once as the pipeline would
        make them; the results are the same bytes.

    Raises BadRequest.
    """
    chosen = _chosen_loras(fields.get("lora"), fields.get("model"), model, loras or {})
    fields = {key: value for key, value in fields.items() if value is not None and key not in IGNORED}
    images: list[Image.Image] = []

    def inspect(path: Path) -> tuple[str, tuple[int, int]]:
        if not images:
            images.extend(read_images(data, limits))
        number = int(str(path))
        return hashlib.sha256(data[number]).hexdigest(), images[number].size

    def named(key: str) -> str:
        """A key as clients of OpenAI's know it, unless they use ours."""
        is_prompt = key == "instruction" and key not in fields and task in ("edit", "personalization")
        return "prompt" if is_prompt else key

    try:
        fields = by_name(fields)
        _check_texts(fields, limits)
        tier = _take_openai(task, fields, limits)
        for name, value in TIERS[tier].items():
            if name == "guidance_interval" and "image_guidance_scale" in fields:
                continue  # they exclude each other
            if task in OPTIONS[name].tasks:
                fields.setdefault(name, value)
        fields.setdefault("seed", secrets.randbits(SEED_BITS))
        _check_limits(fields, limits)
        fields |= {"task": task} | ({"images": [str(number) for number in range(len(data))]} if data else {})
        job = jobs.make_job(fields, Path(), named=named, inspect=inspect)
        if "image_guidance_scale" in job.options and job.options.get("guidance_interval", (0, 1)) != (0, 1):
            reason = "guidance_interval goes with text guidance only: leave out image_guidance_scale"
            raise BadRequest(reason, "guidance_interval")
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(str(error), _parameter(str(error), task)) from None
    return Work(job, tuple(_fitted(job, images, image_size)), tier, chosen)


def _parameter(message: str, task: str) -> str | None:
    """The key that a message of `make_job` is about."""
    if match := re.match(rf"{task} takes no (.*?); it takes", message, re.DOTALL):
        return match[1]
    if message.startswith(f"{task} needs"):
        return "image"
    first = re.match(r"\w*", message)[0]
    return first if first in OPTIONS or first in ALIASES or first in (*TEXTS, "image") else None


def _check_texts(fields: Mapping[str, Any], limits: Limits) -> None:
    for name in TEXTS:
        text = fields.get(name)
        if isinstance(text, str):
            if len(text) > limits.text_characters:
                most = f"{limits.text_characters:,} on this server"
                raise BadRequest(f"{name} has {len(text):,} characters, expected at most {most}", name)
            try:
                check_text(text, name)
            except ValueError as error:
                raise BadRequest(str(error), name) from None


def _fitted(job: jobs.Job, images: Sequence[Image.Image], image_size: int | None) -> list[Image.Image]:
    """The images, no larger than the pipeline is going to make them: they may wait in the queue for long.

    The pipeline fills a size with them (`fill_size`), and to fill it twice is to fill it once. An edit without a size
    depends on the size of its image, which therefore stays.
    """
    height, width = (job.options.get(name) for name in ("height", "width"))
    if job.task in TEXT_TASKS:
        height = width = image_size
    elif job.task == "personalization" or height or width:
        height, width = height or width or image_size, width or height or image_size
    if not height or not width:
        return list(images)
    fitted = []
    for image in images:
        size = covering_size(image, width, height)
        if size[0] * size[1] > MAX_RESIZED:
            found = f"an image of {image.width:,} x {image.height:,} pixels"
            raise BadRequest(f"{found} cannot be cut to {width:,} x {height:,}: its shape is too different", "image")
        if width * height < image.width * image.height:
            with _decoding:
                image = fill_size(image, width, height)
        fitted.append(image)
    return fitted


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
