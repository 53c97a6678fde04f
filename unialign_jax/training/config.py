"""Configurations: read a stage file, change keys of it, check all of it, and build the networks' dataclasses from it.

The keys, their defaults and their meaning are in configs/base.py, which the package has as `unialign_jax.configs.base`.
"""

import ast
import dataclasses
import difflib
import importlib.machinery
import importlib.util
import math
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from unialign_jax.configs import base
from unialign_jax.configs.base import paper_config, stream, tiny  # noqa: F401  (own stage files may import them here)
from unialign_jax.data.buckets import STEP as BUCKET_STEP
from unialign_jax.data.buckets import bucket_name, bucket_sizes
from unialign_jax.data.kinds import KINDS
from unialign_jax.files import first_line, one_line
from unialign_jax.models.attention import IMPLEMENTATIONS, resolve_implementation
from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.mmdit import REMAT_POLICIES, AlignmentHeadsConfig, MMDiTConfig
from unialign_jax.models.quantization import MODES
from unialign_jax.models.sizes import ImageSizes
from unialign_jax.models.text_encoder import TextEncoderConfig
from unialign_jax.parallel.activations import BATCH_AXES
from unialign_jax.parallel.mesh import AXES, complete_mesh_shape, mesh_sizes
from unialign_jax.training.meshes import is_open

# Keys of earlier versions -> where they are now; None: gone, for the code always does it.
RENAMED = {
    "cross_modal.direction": "parity.cross_modal_direction",
    "flow_matching_form": "parity.flow_matching_form",
    "masked_text_normalization": "parity.masked_text_normalization",
    "one_forward": None,
    "optimizer.decay_1d": "parity.decay_1d",
    "sigma.levels": "parity.sigma_levels",
}
SIZES = (
    *(f"model.{name}" for name in ("depth", "num_heads", "head_width", "patch_size", "vocab_size", "max_patches")),
    *(f"text_encoder.{name}" for name in ("depth", "num_heads", "head_width", "width", "mlp_width")),
    *("heads.hidden_width", "heads.teacher_width", "autoencoder.downsample_factor", "autoencoder.latent_channels"),
)
COUNTS = ("num_steps", "accumulation", "batch_size", "log_every", "checkpoint.every", "checkpoint.keep_last")
# (what is expected, whether a value is that, the keys)
RANGES = (
    ("at least 1", lambda x: x >= 1, (*COUNTS, *SIZES)),
    ("at least 2", lambda x: x >= 2, ("text_length",)),
    (
        "0 or more",
        lambda x: x >= 0,
        (
            *("checkpoint.keep_every", "samples.every", "samples.count", "samples.guidance_scale"),
            *("optimizer.warmup_steps", "optimizer.cooldown_start", "optimizer.cooldown_steps"),
            *("optimizer.weight_decay", "validation.every", "validation.records", "validation.scenes"),
            *("lora.rank", "model.text_positions", "data.num_threads", "data.prefetch", "parity.sigma_levels"),
            *("data.max_epochs_warning", "teacher.grid"),
            *(f"loss_weights.{name}" for name in ("flow_matching", "masked_text", "cross_modal", "intrinsic_modal")),
        ),
    ),
    ("0 to 1", lambda x: 0 <= x <= 1, ("prompt_dropout", "data.max_bad_fraction")),
    ("0 or more and less than 1", lambda x: 0 <= x < 1, ("ema_decay", "optimizer.b1", "optimizer.b2", "lora.dropout")),
    ("between 0 and 1", lambda x: 0 < x < 1, ("min_mask_fraction",)),
    (
        "a number above 0",
        lambda x: 0 < x < math.inf,
        (
            *(
                "lora.alpha",
                "optimizer.learning_rate",
                "optimizer.clip_norm",
                "optimizer.eps",
                "cross_modal.temperature",
            ),
            *("sigma.std", "sigma.shift", "samples.shift", "data.prefetch_gb"),
        ),
    ),
)
CHOICES = {
    "init_weights": ("raw", "ema"),
    "tracker": ("", "wandb"),
    "quantize_text_encoder": ("", *MODES),
    "lora.quantize_base": ("", "int8"),
    "optimizer.mu_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", *REMAT_POLICIES),
    "model.attention": ("auto", *IMPLEMENTATIONS),
    "autoencoder.kind": ("kl", "space_to_depth"),
    **{f"{group}.dtype": ("bfloat16", "float32") for group in ("model", "text_encoder", "autoencoder")},
    "parity.flow_matching_form": ("velocity", "x0"),
    "parity.masked_text_normalization": ("positions", "maskable"),
    "parity.cross_modal_direction": ("symmetric", "image_to_text"),
}

_STREAM_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")


# Reading


def read_config(reference: str, changes: list[str]) -> ConfigDict:
    """The configuration of a stage file with `changes` ("optimizer.learning_rate=1e-4", ...) made to it.

    Raises ValueError with all unknown keys, all unreadable values and all other problems of the configuration, and
    FileNotFoundError as `load_stage`.
    """
    config = load_stage(reference)
    problems = make_changes(config, changes)
    if problems:  # the device count is not known here; `Trainer` looks again with it
        problems += config_problems(config)
        raise ValueError(listed("the configuration cannot run", problems))
    return config


def load_stage(reference: str) -> ConfigDict:
    """The configuration of a stage file: "configs/stage1.py", or "configs/stage1.py:tiny" for its size "tiny".

    "stage1" and "stage1:tiny" name a stage of the package, from any folder. Raises FileNotFoundError when there is no
    such file, ValueError with the line when the file gives no configuration.
    """
    file, _, size = reference.partition(":")
    packaged = os.path.join(os.path.dirname(base.__file__), f"{file}.py")
    if file.isidentifier() and not os.path.exists(file) and os.path.isfile(packaged):
        file = packaged
    if not os.path.isfile(file):
        found = f"{file!r} is a folder" if os.path.isdir(file) else f"there is no stage file {one_line(file)}"
        raise FileNotFoundError(f"{found}: name configs/stage1.py, stage2.py or stage3.py")
    try:
        loader = importlib.machinery.SourceFileLoader("stage", file)
        stage = importlib.util.module_from_spec(importlib.util.spec_from_loader("stage", loader))
        loader.exec_module(stage)
        if not callable(getattr(stage, "get_config", None)):
            raise ValueError("it has no function get_config")
        config = stage.get_config(size)
    except (Exception, SystemExit) as error:  # whatever the user's file does
        raise ValueError(f"{reference} gives no configuration: {_place(file, error)}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{reference}: get_config returns {type(config).__name__}, expected a ConfigDict")
    if config.get("name") == "":
        config.name = Path(file).stem
    return config


def _place(file: str, error: BaseException) -> str:
    """The error's reason, with the line of the stage file where the file itself caused it."""
    reason = first_line(error)
    frames = traceback.extract_tb(error.__traceback__)
    ours = isinstance(error, ValueError) and frames and frames[-1].filename in (__file__, base.__file__)
    if ours or isinstance(error, SyntaxError):
        return reason
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == Path(file).resolve()]
    return (f"line {lines[-1]}: " if lines else "") + f"{type(error).__name__}: {reason}"


def make_changes(config: ConfigDict, changes: list[str]) -> list[str]:
    """Sets every "key=value" whose key is known and whose value has its type; returns the others as problems.

    "streams.NAME.kind=KIND" with a new NAME adds a stream with the defaults of its kind.
    """
    problems = _add_streams(config, changes)
    known = dict(flat_items(config))
    for change in changes:
        key, equals, text = change.partition("=")
        if key in known and not equals:
            problems.append(f"{key} has no value: write {key}=VALUE")
        elif key in known:
            try:
                config.update_from_flattened_dict({key: parse_value(text, known[key])})
            except ValueError as error:
                problems.append(f"{key} is {one_line(text, 60)!r}, expected {error}")
        elif inside := [other for other in known if other.startswith(key + ".")]:
            problems.append(f"{key} is a group of keys: set one of {', '.join(inside)}")
        else:
            problems.append(_unknown(one_line(key, 100), known))
    return problems


def _add_streams(config: ConfigDict, changes: list[str]) -> list[str]:
    """Adds the streams of which the changes name the kind; returns the names that cannot be one as problems."""
    problems = []
    for change in changes:
        match = re.fullmatch(r"streams\.([^=]*)\.kind=(.*)", change, re.DOTALL)
        if not match or match[1] in config.streams:
            continue
        name, kind = match.groups()
        if _STREAM_NAME.fullmatch(name):
            config.streams[name] = stream(kind, "")
        else:
            problems.append(f"{one_line(name, 100)!r} is no name for a stream: use letters, digits, _ and -")
    return problems


def parse_value(text: str, like: Any) -> Any:
    """`text` as a value of the type of `like`. Raises ValueError that says what was expected."""
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if isinstance(like, int | float):
        try:
            return type(like)(text)
        except ValueError:  # for int also a text of more digits than Python converts
            raise ValueError("a whole number" if isinstance(like, int) else "a number") from None
    if isinstance(like, tuple):
        return _parse_tuple(text, like)
    return text


def _parse_tuple(text: str, like: tuple) -> tuple:
    if not text:
        return ()
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last: nested too deeply
        values = text  # one bare word or regular expression
    values = tuple(values) if isinstance(values, tuple | list) else (values,)
    kind = type(like[0]) if like else str
    if not all(type(value) is kind for value in values):
        raise ValueError(f"a tuple of {kind.__name__}, such as {like or ('transformer/text_embed',)}")
    return values


def with_new_names(settings: dict) -> dict:
    """What a run's config.json says, with the keys of earlier versions under their present names (`RENAMED`)."""
    names = {tuple(old.split(".")): new and tuple(new.split(".")) for old, new in RENAMED.items()}
    flat = flatten_dict(settings, keep_empty_nodes=True)
    return unflatten_dict({new: value for path, value in flat.items() if (new := names.get(path, path))})


def flat_items(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Checking


def config_problems(config: ConfigDict, device_count: int | None = None, device: jax.Device | None = None) -> list[str]:
    """All that is wrong with a configuration, one line each; empty when it can run.

    The mesh is checked only where `device_count`, the number of devices that it spans, is known, and what attention
    "auto" stands for only where `device`, one of them, is.
    """
    problems = _key_problems(config)
    if not any(problem.startswith("missing") for problem in problems):
        problems += _type_problems(config)
    if any(not problem.startswith("unknown") for problem in problems):
        return problems
    return [
        *problems,
        *_value_problems(config),
        *_batch_problems(config, device_count),
        *_context_problems(config, device_count),
        *_network_problems(config),
        *_attention_problems(config, device),
        *_stream_problems(config),
    ]


def listed(what: str, problems: list[str]) -> str:
    """The problems as one message: a single one on the same line, several on a line each."""
    return f"{what}: {problems[0]}" if len(problems) == 1 else "\n  ".join([f"{what}:", *problems])


def _key_problems(config: ConfigDict) -> list[str]:
    """Keys that a stage file has added by mistake, or taken away."""
    expected = _defaults(config).keys()
    found = dict(flat_items(config)).keys()
    problems = [_unknown(key, expected) for key in sorted(found - expected)]
    problems += [f"missing key {key}" for key in sorted(expected - found)]
    if not isinstance(config.get("streams"), ConfigDict):
        problems.append("missing key streams: expected a group with a task stream at least")
    return problems


def _unknown(key: str, known: Iterable[str]) -> str:
    near = [RENAMED[key]] if RENAMED.get(key) else difflib.get_close_matches(key, sorted(known), n=1)
    # `learning_rate` is spelt unlike `optimizer.learning_rate`, but surely meant.
    near += [other for other in sorted(known) if other.split(".")[-1] == key.split(".")[-1]]
    if key in RENAMED and not RENAMED[key]:
        return f"unknown key {key} (it is always on)"
    if key.startswith("streams.") and not any(other.startswith(f"{key.rpartition('.')[0]}.") for other in known):
        near = [*near[:1], f"streams.{key.split('.')[1]}.kind=KIND makes a new stream"]
        return f"unknown key {key} (nearest: {'; '.join(near)})"
    return f"unknown key {key}" + (f" (nearest: {near[0]})" if near else "")


def _defaults(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> its value in the recipe, for the streams that this configuration has."""
    streams = config.get("streams")
    names = streams if isinstance(streams, ConfigDict) else ()
    example = stream("text_to_image", "")
    return dict(flat_items(paper_config())) | {f"streams.{n}.{key}": v for n in names for key, v in example.items()}


def _type_problems(config: ConfigDict) -> list[str]:
    """Values of another type than the recipe's, and numbers that no array holds."""
    problems, defaults = [], _defaults(config)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", tuple: "a tuple"}
    for key, value in flat_items(config):
        if key not in defaults:
            continue
        kind = type(defaults[key])
        if kind is float and type(value) is int:
            kind = int
        least, most = (0, 2**32 - 1) if key == "seed" else (1 - 2**31, 2**31 - 1)
        fits = isinstance(value, (tuple, list) if kind is tuple else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            problems.append(f"{key} is {str(value)[:60]!r}, expected {words.get(kind, kind.__name__)}")
        elif kind is tuple and not all(type(part) is type((*defaults[key], "")[0]) for part in value):
            problems.append(f"{key} is {str(value)[:60]}, expected values such as {defaults[key] or ('transformer/',)}")
        elif kind is int and not least <= value <= most:
            shown = value if abs(value) < 10**20 else "a number of more than 20 digits"
            problems.append(f"{key} is {shown}, expected {least} to {most}")
    return problems


def _value_problems(config: ConfigDict) -> Iterator[str]:
    """What can be said of one key alone."""
    values = dict(flat_items(config))
    infinite = {key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    for expected, fits, keys in RANGES:
        for key in keys:
            if not fits(values[key]):
                yield f"{key} is {values[key]}, expected {expected}"
                infinite.discard(key)
    for key in sorted(infinite):
        yield f"{key} is {values[key]}, expected a finite number"
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            names = ", ".join(name or "''" for name in allowed)
            yield f"{key} is {values[key]!r}, expected one of {names}"
    for key in ("optimizer.freeze", "lora.targets"):
        for pattern in values[key]:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                yield f"{key} has {pattern!r}, which is no regular expression: {error}"
    if config.lora.rank > 0:
        yield from _lora_problems(config)
    validates = config.validation.every
    if validates and not config.validation.records:
        yield "validation.records is 0, expected at least 1 where validation.every is on"
    if config.samples.prompts and "prompts" in config.streams:
        yield "streams.prompts has the name of the sheets of samples.prompts: choose another for the stream"
    if config.samples.count or config.samples.prompts or (validates and config.validation.scenes):
        for key in ("samples.steps", "samples.caption_steps"):
            if values[key] < 1:
                yield f"{key} is {values[key]}, expected at least 1"


def _lora_problems(config: ConfigDict) -> Iterator[str]:
    """What does not go with adapters."""
    if not config.init_from:
        yield "lora.rank is on, but init_from is empty: name the bundle or the run whose weights the adapters change"
    if not config.lora.targets:
        yield "lora.targets is empty: name at least one pattern of kernels that get adapters"
    if config.optimizer.freeze:
        yield "optimizer.freeze goes with full fine-tuning: with lora.rank, lora.targets says what is trained"
    if config.loss_weights.intrinsic_modal:
        yield "loss_weights.intrinsic_modal trains the alignment heads, which have no adapters: set it to 0"


def _batch_problems(config: ConfigDict, device_count: int | None) -> Iterator[str]:
    shards, mesh = 1, ""
    if device_count is not None:
        try:
            shards = batch_shards(config.mesh, device_count)
            mesh = f" x {shards} devices of the mesh's axes that split the batch"
        except ValueError as error:
            yield str(error)
    if config.batch_size < 1 or config.accumulation < 1:
        return
    parts = config.accumulation * shards
    if config.batch_size % parts:
        yield (
            f"batch_size {config.batch_size} is not divisible by {parts} (accumulation {config.accumulation}{mesh}): "
            f"the nearest that fits is {max(1, round(config.batch_size / parts)) * parts}"
        )


def _context_problems(config: ConfigDict, device_count: int | None) -> Iterator[str]:
    """The axis `context` of a mesh splits the tokens of images and of texts evenly, and the heads in attention."""
    if device_count is None or is_open(config.mesh):
        return
    try:
        sizes = dict(zip(AXES, complete_mesh_shape(mesh_sizes(config.mesh), device_count), strict=True))
    except ValueError:  # already told
        return
    context, tensor, heads = sizes["context"], sizes["tensor"], config.model.num_heads
    factor = config.autoencoder.downsample_factor * config.model.patch_size
    if context == 1 or min(heads, factor, config.image_size) < 1:
        return
    if heads % (context * tensor):
        across = f"mesh.context {context}" + (f" x mesh.tensor {tensor}" if tensor > 1 else "")
        yield f"model.num_heads is {heads}, expected a multiple of {across}, over which attention splits the heads"
    if config.text_length % context:
        yield f"text_length is {config.text_length}, expected a multiple of mesh.context {context}, which splits tokens"
    buckets = config.data.buckets and config.image_size % BUCKET_STEP == 0
    square = (config.image_size, config.image_size)
    for height, width in bucket_sizes(config.image_size) if buckets else [square]:
        if (height // factor) * (width // factor) % context:
            yield (
                f"an image of {height} x {width} has {(height // factor) * (width // factor)} tokens, expected a "
                f"multiple of mesh.context {context}, which splits them"
            )
            return


def _network_problems(config: ConfigDict) -> Iterator[str]:
    """What does not fit together in the networks."""
    values = dict(flat_items(config))
    if min(values[key] for key in SIZES) < 1:  # already told
        return
    model, text_encoder, autoencoder = config.model, config.text_encoder, config.autoencoder
    if problem := ImageSizes.of(model, autoencoder).problem("image_size", config.image_size):
        yield problem
    if config.data.buckets and config.image_size % BUCKET_STEP:
        yield f"image_size is {config.image_size}, expected a multiple of {BUCKET_STEP} with data.buckets"
    token = autoencoder.downsample_factor * model.patch_size
    side = math.gcd(config.image_size, BUCKET_STEP) if config.data.buckets else config.image_size
    if config.teacher.grid and (config.teacher.grid % token or side % config.teacher.grid):
        yield (
            f"teacher.grid is {config.teacher.grid}, expected a multiple of a token's {token} pixels that divides "
            f"{'the sides of all buckets, ' if config.data.buckets else 'image_size '}{side}"
        )
    if model.latent_channels != autoencoder.latent_channels:
        yield f"model.latent_channels is {model.latent_channels}, the autoencoder gives {autoencoder.latent_channels}"
    if model.text_width != text_encoder.width:
        yield f"model.text_width is {model.text_width}, the text encoder gives {text_encoder.width}"
    if model.vocab_size > text_encoder.vocab_size:
        yield f"model.vocab_size is {model.vocab_size}, the text encoder's table has {text_encoder.vocab_size} rows"
    if 0 < model.text_positions < config.text_length:
        yield (
            f"model.text_positions is {model.text_positions}, expected 0 or at least text_length {config.text_length}"
        )
    if not 1 <= model.tap_depth <= model.depth:
        yield f"model.tap_depth is {model.tap_depth}, expected 1 to model.depth {model.depth}"


def _attention_problems(config: ConfigDict, device: jax.Device | None) -> Iterator[str]:
    """cuDNN's backward pass, as JAX calls it, takes even numbers of tokens only."""
    model, factor = config.model, config.autoencoder.downsample_factor * config.model.patch_size
    if factor < 1 or model.attention not in CHOICES["model.attention"] or model.dtype not in CHOICES["model.dtype"]:
        return  # already told
    chosen = resolve_implementation(model.attention, device, model.dtype) if device else model.attention
    if chosen != "cudnn" or config.data.buckets and not config.text_length % 2:  # sizes of buckets are even
        return
    image = (config.image_size // factor) ** 2
    counts = {0, *(stream.num_conditions for stream in config.streams.values() if stream.weight > 0)}
    odd = [count for count in sorted(counts) if ((1 + count) * image + config.text_length) % 2]
    if odd:
        yield (
            f"image_size {config.image_size} and text_length {config.text_length} give "
            f"{(1 + odd[0]) * image + config.text_length} tokens, and cuDNN trains attention over even numbers only: "
            f"take even ones of both (image_size in multiples of {2 * factor}), or model.attention=xla"
        )


def _stream_problems(config: ConfigDict) -> Iterator[str]:
    if config.teacher.online and not config.teacher.path:
        yield "teacher.online is on, but teacher.path is empty: name the teacher's bundle"
    if config.teacher.online and config.data.cached_latents:
        yield "teacher.online reads images, data.cached_latents leaves them out: store the teacher's features too"
    if not config.streams:
        yield "streams is empty: name at least one task stream"
    elif not any(stream.weight > 0 for stream in config.streams.values()):
        yield "every stream has weight 0: give at least one a weight above 0"
    for name, settings in config.streams.items():
        if settings.weight < 0:
            yield f"streams.{name}.weight is {settings.weight}, expected 0 or more"
        if settings.weight > 0 and not settings.path:
            yield f"streams.{name} has no data: set streams.{name}.path, or its weight to 0"
        if settings.kind not in KINDS:
            yield f"streams.{name}.kind is {settings.kind!r}, expected one of {', '.join(KINDS)}"
        elif (settings.num_conditions > 0) != (needs := KINDS[settings.kind].num_conditions > 0):
            expected = f"at least 1 for {settings.kind}" if needs else f"0 for {settings.kind}"
            yield f"streams.{name}.num_conditions is {settings.num_conditions}, expected {expected}"


def batch_shards(mesh: dict[str, int], device_count: int) -> int:
    """Into how many parts a configuration's mesh splits a batch; an open mesh splits it over all devices.

    Raises ValueError for a mesh that does not fit.
    """
    if is_open(mesh):
        return device_count
    sizes = dict(zip(AXES, complete_mesh_shape(mesh_sizes(mesh), device_count), strict=True))
    return math.prod(sizes[name] for name in BATCH_AXES)


# Building


def active_streams(config: ConfigDict) -> dict[str, ConfigDict]:
    """The streams with a weight above zero, by name, in a fixed order.

    With `data.buckets` there is one for every aspect bucket, NAME_HEIGHTxWIDTH, with the size as its `bucket`.
    """
    active = {name: config.streams[name] for name in sorted(config.streams) if config.streams[name].weight > 0}
    if not config.data.buckets:
        return active
    sizes = bucket_sizes(config.image_size)
    return {f"{name}_{bucket_name(size)}": _in_bucket(active[name], size) for name in active for size in sizes}


def _in_bucket(stream: ConfigDict, size: tuple[int, int]) -> ConfigDict:
    paths = {key: stream[key] and os.path.join(stream[key], bucket_name(size)) for key in ("path", "validation_path")}
    return ConfigDict(stream.to_dict() | paths | {"bucket": size})


def build_configs(
    config: ConfigDict, place: str | jax.Device
) -> tuple[MMDiTConfig, AlignmentHeadsConfig, TextEncoderConfig, AutoencoderConfig]:
    """The four network configurations as their dataclasses; attention "auto" is decided for a device or platform."""
    model = MMDiTConfig(**config.model)
    attention = resolve_implementation(model.attention, place, model.dtype)
    return (
        dataclasses.replace(model, attention=attention),
        AlignmentHeadsConfig(**config.heads),
        TextEncoderConfig(**config.text_encoder),
        AutoencoderConfig(**config.autoencoder),
    )
