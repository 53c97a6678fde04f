"""The training configuration: every key with its default, and the check that runs before a device is touched.

`configs/stage*.py` start from `paper_config()`, the paper's recipe (arXiv 2509.23760, implementation details, with what
the paper leaves open taken from the released code), and `tiny()` turns any of them into a run for a laptop.
"""

import dataclasses
import difflib
import math
import re

from ml_collections import ConfigDict

from unialign_jax.data.kinds import KINDS
from unialign_jax.models import presets
from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.mmdit import REMAT_POLICIES, AlignmentHeadsConfig, MMDiTConfig
from unialign_jax.models.sizes import ImageSizes
from unialign_jax.models.text_encoder import TextEncoderConfig
from unialign_jax.parallel.mesh import complete_mesh_shape, mesh_sizes
from unialign_jax.training.meshes import is_open


def stream(kind, path, weight=1.0, num_conditions=None, validation_path="") -> ConfigDict:
    """One task stream: what `kind` of records the folder `path` holds and its share of the optimizer steps.

    Validation reads the folder `validation_path`; where it is empty, the last records of `path`.
    """
    if num_conditions is None:
        num_conditions = KINDS[kind].num_conditions if kind in KINDS else 0  # `config_problems` names an unknown one
    return ConfigDict(
        {
            "kind": kind,
            "path": path,
            "weight": float(weight),
            "num_conditions": num_conditions,
            "validation_path": validation_path,
        }
    )


def paper_config(size="") -> ConfigDict:
    """The full-size recipe that the stages share. Raises ValueError for a `size` that is neither "" nor "tiny"."""
    if size not in ("", "tiny"):
        raise ValueError(f"unknown size {size!r} after the configuration's name, expected nothing or :tiny")
    return ConfigDict(
        {
            "name": "",
            "seed": 0,
            "num_steps": 0,
            "batch_size": 256,  # samples of one optimizer step, over all hosts
            "accumulation": 1,  # micro-batches of one optimizer step, their gradients averaged
            "image_size": 512,
            "text_length": 256,
            # Weights to start from: a run's folder or a bundle; empty is random. A stage starts from the one before.
            "init_from": "",
            "init_weights": "raw",  # or "ema", of a run
            # The bundle of the frozen T5 and autoencoder, and a T5 tokenizer folder. Empty: those of init_from, and
            # where it has none random encoders and the small tokenizer of the shapes world.
            "frozen_from": "",
            "tokenizer": "",
            # Networks. model.text_positions: rows of a table of text positions; 0, none, as in the released model.
            "model": dataclasses.asdict(presets.MMDIT["unialign_2b"]) | {"attention": "auto"},
            "heads": dataclasses.asdict(presets.ALIGNMENT_HEADS["unialign_2b"]),
            "text_encoder": dataclasses.asdict(presets.TEXT_ENCODER["t5_xxl"]),
            "autoencoder": dataclasses.asdict(presets.AUTOENCODER["sd3"]),
            # Processes and losses
            # Logit-normal noise levels; levels=1000 quantises them as the released code does, 0 does not.
            "sigma": {"mean": 0.0, "std": 1.0, "shift": 1.0, "levels": 0},
            "min_mask_fraction": 1e-3,
            "prompt_dropout": 0.1,  # share of samples whose image pass reads the empty prompt
            "loss_weights": {"flow_matching": 1.0, "masked_text": 0.2, "cross_modal": 0.05, "intrinsic_modal": 0.1},
            "one_forward": True,  # run both passes of a sample without conditions as one forward of two rows
            "flow_matching_form": "velocity",  # or "x0", the released checkpoint's
            "masked_text_normalization": "positions",  # or "maskable"
            "cross_modal": {"temperature": 0.07, "direction": "symmetric"},  # or "image_to_text", the paper's eq. 3
            # Optimizer
            "optimizer": {
                "learning_rate": 3e-5,
                "warmup_steps": 2000,
                # The last steps, in which the rate falls linearly to 0; 0 keeps it constant, as the paper does.
                "cooldown_start": 0,
                "cooldown_steps": 0,
                "weight_decay": 1e-2,
                "clip_norm": 2.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "decay_1d": True,  # decay biases too, as the reference does
                "freeze": (),  # regular expressions over parameter paths, such as "transformer/text_embed"
            },
            "ema_decay": 0.9999,  # reached in the first 90,000 steps by (1 + n) / (10 + n); 0 keeps no average
            # Data
            "streams": {},
            # Threads that read rows, batches made ahead at most, and GB (1e9 bytes) of each host's memory for batches.
            "data": {"num_threads": 16, "prefetch": 64, "prefetch_gb": 4.0, "max_bad_fraction": 0.01},
            # Machine
            # How many devices along each axis (parallel/mesh.py says what each does). All 0: chosen for the
            # machine (training/meshes.py). As soon as one is given the zeros are ones; -1 is what the others leave.
            "mesh": {"replica": 0, "data": 0, "encoder": 0, "fsdp": 0, "tensor": 0},
            "compilation_cache": "",  # a folder that keeps compiled programs between starts
            # What a run writes
            "log_every": 20,  # in batches of each stream
            "checkpoint": {"every": 1000, "keep_last": 2, "keep_every": 10000},
            "samples": {
                "every": 2000,
                "count": 8,
                "steps": 28,
                "guidance_scale": 7.0,
                "shift": 3.0,
                "caption_steps": 32,
            },
            # Losses on held-out records (training/validation.py), every so many steps and at the end; 0: never.
            "validation": {
                "every": 0,
                "records": 64,  # of each stream, rounded up to whole batches; training does not draw them
                "scenes": 0,  # of the shapes world, for the accuracies of each task; 0: none
            },
        }
    )


def tiny(config: ConfigDict, num_steps) -> ConfigDict:
    """The same recipe for a laptop: a 2.6 M-parameter network on the 64-pixel shapes world, minutes on two CPU cores.

    Its frozen T5 and autoencoder are small, and pretrained as the real ones are: they come with the package.
    """
    config.update(
        {
            "num_steps": num_steps,
            "frozen_from": "demo",
            "batch_size": 8,
            "image_size": 64,
            "text_length": 32,
            "model": dataclasses.asdict(presets.MMDIT["tiny"]),
            "heads": dataclasses.asdict(presets.ALIGNMENT_HEADS["tiny"]),
            "text_encoder": dataclasses.asdict(presets.TEXT_ENCODER["tiny"]),
            "autoencoder": dataclasses.asdict(presets.AUTOENCODER["tiny"]),
            "ema_decay": 0.999,
            "log_every": 20,
        }
    )
    # In few steps the rate must be high, and fall in the last third, or the weights stay as noisy as its steps.
    config.optimizer.update({"learning_rate": 1.2e-3, "warmup_steps": 100, "clip_norm": 1.0, "b2": 0.99})
    steps = config.get_oneway_ref("num_steps")
    config.optimizer.cooldown_steps = steps * 3 // 10
    config.optimizer.cooldown_start = steps - steps * 3 // 10
    config.loss_weights.masked_text = 1.0  # this text is short, and read as often as pictures are drawn
    config.data.update({"num_threads": 2, "prefetch": 8})
    config.checkpoint.update({"every": 200, "keep_every": 0})
    # Flat shapes shine through much noise: what is where is decided near sigma 1, so train there as sampling does.
    config.sigma.shift = 3.0
    config.samples.update({"every": 0, "count": 8, "steps": 16, "guidance_scale": 2.0, "shift": 2.0})
    for name, settings in config.streams.items():
        settings.path = f"data/shapes/{name}"
    return config


def active_streams(config) -> dict[str, ConfigDict]:
    """The streams with a weight above zero, by name, in a fixed order."""
    return {name: config.streams[name] for name in sorted(config.streams) if config.streams[name].weight > 0}


def config_problems(config: ConfigDict, device_count: int | None = None) -> list[str]:
    """All that is wrong with a configuration, one line each; empty when it can run.

    Args:
      device_count: what the mesh spans; None when it is not known, and then the mesh is not looked at.
    """
    problems = _key_problems(config)
    if not any(problem.startswith("missing") for problem in problems):
        problems += _type_problems(config)
    if any(not problem.startswith("unknown") for problem in problems):
        return problems

    def expect(condition, text):
        if not condition:
            problems.append(text)
        return condition

    for key in ("num_steps", "accumulation", "batch_size", "log_every", "checkpoint.every", "checkpoint.keep_last"):
        expect(_get(config, key) >= 1, f"{key} is {_get(config, key)}, expected at least 1")
    counts = ("checkpoint.keep_every", "samples.every", "samples.count", "optimizer.warmup_steps", "sigma.levels")
    counts += ("validation.every", "validation.records", "validation.scenes")
    counts += ("optimizer.cooldown_start", "optimizer.cooldown_steps", "model.text_positions")
    for key in (*counts, "data.num_threads", "data.prefetch", "optimizer.weight_decay", "samples.guidance_scale"):
        expect(_get(config, key) >= 0, f"{key} is {_get(config, key)}, expected 0 or more")
    if config.validation.every:
        expect(config.validation.records, "validation.records is 0, expected at least 1 where validation.every is on")
    if config.samples.count or (config.validation.every and config.validation.scenes):
        for key in ("samples.steps", "samples.caption_steps"):
            expect(_get(config, key) >= 1, f"{key} is {_get(config, key)}, expected at least 1")

    shards, mesh = 1, ""
    if device_count is not None:
        try:
            shards = batch_shards(config.mesh, device_count)
            mesh = f" x {shards} devices of the mesh's axes that split the batch"
        except ValueError as error:
            problems.append(str(error))
    if config.batch_size >= 1 and config.accumulation >= 1:
        parts = config.accumulation * shards
        expect(
            config.batch_size % parts == 0,
            f"batch_size {config.batch_size} is not divisible by {parts} (accumulation {config.accumulation}{mesh}): "
            f"the nearest that fits is {max(1, round(config.batch_size / parts)) * parts}",
        )
    _check_networks(config, expect)
    _check_streams(config, expect)

    for key, (lowest, highest) in {"prompt_dropout": (0, 1), "data.max_bad_fraction": (0, 1)}.items():
        expect(lowest <= _get(config, key) <= highest, f"{key} is {_get(config, key)}, expected {lowest} to {highest}")
    for key in ("ema_decay", "optimizer.b1", "optimizer.b2"):
        expect(0 <= _get(config, key) < 1, f"{key} is {_get(config, key)}, expected 0 or more and less than 1")
    expect(
        0 < config.min_mask_fraction < 1, f"min_mask_fraction is {config.min_mask_fraction}, expected between 0 and 1"
    )
    for key, weight in config.loss_weights.items():
        expect(weight >= 0 and math.isfinite(weight), f"loss_weights.{key} is {weight}, expected 0 or more")
    positive = ("optimizer.learning_rate", "optimizer.clip_norm", "optimizer.eps", "cross_modal.temperature")
    for key in (*positive, "sigma.std", "sigma.shift", "samples.shift", "data.prefetch_gb"):
        value = _get(config, key)
        expect(value > 0 and math.isfinite(value), f"{key} is {value}, expected a number above 0")
    for pattern in config.optimizer.freeze:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            problems.append(f"optimizer.freeze has {pattern!r}, which is no regular expression: {error}")
    choices = {
        "flow_matching_form": ("velocity", "x0"),
        "masked_text_normalization": ("positions", "maskable"),
        "cross_modal.direction": ("symmetric", "image_to_text"),
        "init_weights": ("raw", "ema"),
    }
    for key, allowed in choices.items():
        expect(_get(config, key) in allowed, f"{key} is {_get(config, key)!r}, expected one of {', '.join(allowed)}")
    for key, value in flat_items(config):
        if isinstance(value, float) and not math.isfinite(value):
            told = any(problem.startswith(f"{key} is ") for problem in problems)
            expect(told, f"{key} is {value}, expected a finite number")
    return problems


def listed(what: str, problems: list[str]) -> str:
    """What is wrong, as a message: a single problem on the same line, several on a line each."""
    return f"{what}: {problems[0]}" if len(problems) == 1 else "\n  ".join([f"{what}:", *problems])


def batch_shards(mesh: dict[str, int], device_count: int) -> int:
    """Into how many parts a configuration's mesh splits a batch: a chosen one into as many as there are devices.

    Raises ValueError for a mesh that does not fit.
    """
    if is_open(mesh):
        return device_count
    *batch_axes, _ = complete_mesh_shape(mesh_sizes(mesh), device_count)
    return math.prod(batch_axes)


def _check_networks(config, expect):
    sizes = {"model": ("depth", "num_heads", "head_width", "patch_size", "vocab_size", "max_patches")}
    sizes["text_encoder"] = ("depth", "num_heads", "head_width", "width", "mlp_width")
    sizes["heads"] = ("hidden_width", "teacher_width")
    sizes["autoencoder"] = ("downsample_factor", "latent_channels")
    found = {f"{group}.{name}": config[group][name] for group, names in sizes.items() for name in names}
    if not all([expect(value >= 1, f"{key} is {value}, expected at least 1") for key, value in found.items()]):
        return
    expect(config.text_length >= 2, f"text_length is {config.text_length}, expected at least 2")
    problem = ImageSizes.of(config.model, config.autoencoder).problem("image_size", config.image_size)
    expect(not problem, problem)
    expect(
        config.model.latent_channels == config.autoencoder.latent_channels,
        f"model.latent_channels is {config.model.latent_channels}, "
        f"the autoencoder gives {config.autoencoder.latent_channels}",
    )
    expect(
        config.model.text_width == config.text_encoder.width,
        f"model.text_width is {config.model.text_width}, the text encoder gives {config.text_encoder.width}",
    )
    expect(
        config.model.vocab_size <= config.text_encoder.vocab_size,
        f"model.vocab_size is {config.model.vocab_size}, "
        f"the text encoder's table has {config.text_encoder.vocab_size} rows",
    )
    expect(
        not config.model.text_positions or config.model.text_positions >= config.text_length,
        f"model.text_positions is {config.model.text_positions}, expected 0 or at least text_length "
        f"{config.text_length}",
    )
    expect(
        1 <= config.model.tap_depth <= config.model.depth,
        f"model.tap_depth is {config.model.tap_depth}, expected 1 to model.depth {config.model.depth}",
    )
    choices = {
        "model.remat": ("none", *REMAT_POLICIES),
        "model.attention": ("auto", "xla", "cudnn", "splash"),
        "autoencoder.kind": ("kl", "space_to_depth"),
        **{f"{group}.dtype": ("bfloat16", "float32") for group in ("model", "text_encoder", "autoencoder")},
    }
    for key, allowed in choices.items():
        expect(_get(config, key) in allowed, f"{key} is {_get(config, key)!r}, expected one of {', '.join(allowed)}")


def _check_streams(config, expect):
    expect(config.streams, "streams is empty: name at least one task stream")
    expect(
        not config.streams or active_streams(config),
        "every stream has weight 0: give at least one a weight above 0",
    )
    for name, settings in config.streams.items():
        weight = settings.weight
        expect(weight >= 0 and math.isfinite(weight), f"streams.{name}.weight is {weight}, expected 0 or more")
        if weight > 0:
            expect(settings.path, f"streams.{name} has no data: set streams.{name}.path, or its weight to 0")
        known = f"streams.{name}.kind is {settings.kind!r}, expected one of {', '.join(KINDS)}"
        if not expect(settings.kind in KINDS, known):
            continue
        needs = KINDS[settings.kind].num_conditions > 0
        expect(
            (settings.num_conditions > 0) == needs,
            f"streams.{name}.num_conditions is {settings.num_conditions}, expected "
            + (f"at least 1 for {settings.kind}" if needs else f"0 for {settings.kind}"),
        )


def _key_problems(config):
    """Keys that a stage file has added by mistake, or taken away."""
    expected = _defaults(config).keys()
    found = dict(flat_items(config)).keys()
    unknown = [f"unknown key {key}{nearest(key, expected)}" for key in sorted(found - expected)]
    missing = [f"missing key {key}" for key in sorted(expected - found)]
    if not isinstance(config.get("streams"), ConfigDict):
        missing.append("missing key streams: expected a group with a task stream at least")
    return unknown + missing


def _defaults(config) -> dict:
    """Dotted key -> its value in the recipe, for the streams that this configuration has."""
    streams = config.get("streams")
    names = streams if isinstance(streams, ConfigDict) else ()
    example = stream("text_to_image", "")
    return dict(flat_items(paper_config())) | {f"streams.{n}.{key}": v for n in names for key, v in example.items()}


def _type_problems(config):
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


def nearest(key: str, known) -> str:
    """What was meant by a key that is not known, as " (nearest: ...)", or nothing."""
    near = difflib.get_close_matches(key, sorted(known), n=1)
    # `learning_rate` is spelt unlike `optimizer.learning_rate`, but surely meant.
    near += [other for other in sorted(known) if other.split(".")[-1] == key.split(".")[-1]]
    return f" (nearest: {near[0]})" if near else ""


def flat_items(config: ConfigDict, prefix=""):
    """(dotted key, value) of every leaf."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _get(config, dotted):
    for key in dotted.split("."):
        config = config[key]
    return config


def build_configs(config, attention_platform: str):
    """The four network configurations as their dataclasses; attention "auto" is decided for the platform."""
    from unialign_jax.models.attention import resolve_implementation

    model = MMDiTConfig(**config.model)
    model = dataclasses.replace(
        model, attention=resolve_implementation(model.attention, attention_platform, model.dtype)
    )
    return (
        model,
        AlignmentHeadsConfig(**config.heads),
        TextEncoderConfig(**config.text_encoder),
        AutoencoderConfig(**config.autoencoder),
    )
