"""The training configuration: every key with its default, and the check that runs before a device is touched.

`configs/stage*.py` start from `paper_config()`, the paper's recipe (arXiv 2509.23760, implementation details, with what
the paper leaves open taken from the released code), and `tiny()` turns any of them into a run for a laptop.
"""

import dataclasses
import difflib
import importlib.util
import math
import re
from pathlib import Path

from ml_collections import ConfigDict

from unialign_jax.data.streams import KINDS
from unialign_jax.models import presets
from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.mmdit import REMAT_POLICIES, AlignmentHeadsConfig, MMDiTConfig
from unialign_jax.models.text_encoder import TextEncoderConfig


def stream(kind, path, weight=1.0, num_conditions=None) -> ConfigDict:
    """One task stream: what `kind` of records the folder `path` holds and its share of the optimizer steps."""
    if num_conditions is None:
        num_conditions = {"edit": 1, "perception": 1, "personalization": 3}.get(kind, 0)
    return ConfigDict({"kind": kind, "path": path, "weight": weight, "num_conditions": num_conditions})


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
            # Weights to start from: a run's folder; empty is random. A stage starts from the one before.
            "init_from": "",
            "init_weights": "raw",  # or "ema"
            "tokenizer": "",  # a T5 tokenizer folder; empty is the small tokenizer of the shapes world
            # Networks
            "model": dataclasses.asdict(presets.MMDIT["unialign_2b"]),
            "heads": dataclasses.asdict(presets.ALIGNMENT_HEADS["unialign_2b"]),
            "text_encoder": dataclasses.asdict(presets.TEXT_ENCODER["t5_xxl"]),
            "autoencoder": dataclasses.asdict(presets.AUTOENCODER["sd3"]),
            # Processes and losses
            # Logit-normal noise levels; levels=1000 quantises them as the released code does, 0 does not.
            "sigma": {"mean": 0.0, "std": 1.0, "shift": 1.0, "levels": 0},
            "min_mask_fraction": 1e-3,
            "prompt_dropout": 0.1,  # share of samples whose image pass reads the empty prompt
            "loss_weights": {"flow_matching": 1.0, "masked_text": 0.2, "cross_modal": 0.05, "intrinsic_modal": 0.1},
            "flow_matching_form": "velocity",  # or "x0", the released checkpoint's
            "masked_text_normalization": "positions",  # or "maskable"
            "cross_modal": {"temperature": 0.07, "direction": "symmetric"},  # or "image_to_text", the paper's eq. 3
            # Optimizer
            "optimizer": {
                "learning_rate": 3e-5,
                "warmup_steps": 2000,
                "weight_decay": 1e-2,
                "clip_norm": 2.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "decay_1d": True,  # decay biases too, as the reference does
                "freeze": (),  # regular expressions over parameter paths, such as "transformer/text_embed"
            },
            "ema_decay": 0.9999,  # 0 keeps no average
            # Data
            "streams": {},
            "data": {"num_threads": 16, "prefetch": 64, "max_bad_fraction": 0.01},
            # Machine
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
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
        }
    )


def tiny(config: ConfigDict, num_steps) -> ConfigDict:
    """The same recipe for a laptop: a 4 M-parameter network on the 64-pixel shapes world, minutes on two CPU cores."""
    config.update(
        {
            "num_steps": num_steps,
            "batch_size": 16,
            "image_size": 64,
            "text_length": 32,
            "model": dataclasses.asdict(presets.MMDIT["tiny"]),
            "heads": dataclasses.asdict(presets.ALIGNMENT_HEADS["tiny"]),
            "text_encoder": dataclasses.asdict(presets.TEXT_ENCODER["tiny"]),
            "autoencoder": dataclasses.asdict(presets.AUTOENCODER["tiny"]),
            "ema_decay": 0.99,
            "log_every": 10,
        }
    )
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 50})
    config.data.update({"num_threads": 2, "prefetch": 8})
    config.checkpoint.update({"every": 100, "keep_every": 0})
    config.samples.update({"every": 0, "count": 8, "steps": 28, "guidance_scale": 3.0, "shift": 1.0})
    for name, settings in config.streams.items():
        settings.path = f"data/shapes/{name}"
    return config


def load_stage(argument: str) -> ConfigDict:
    """The configuration of a stage file, "configs/stage1.py" or "configs/stage1.py:tiny".

    Raises FileNotFoundError when there is no such file, ValueError for a size that it does not know.
    """
    file, _, size = argument.partition(":")
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no configuration {file}; the stages are configs/stage1.py to stage3.py")
    spec = importlib.util.spec_from_file_location("stage", file)
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    return stage.get_config(size)


def unknown_overrides(config: ConfigDict, arguments: list[str]) -> list[str]:
    """The problems with `--config.key=value` arguments whose key the configuration does not have, one line each."""
    problems = []
    known = list(_flat_keys(config))
    for argument in arguments:
        match = re.match(r"--?config\.([^=]+)", argument)
        if match and match[1] not in known and not isinstance(_get(config, match[1]), ConfigDict):
            near = difflib.get_close_matches(match[1], known, n=1)
            problems.append(f"unknown key --config.{match[1]}" + (f" (nearest: --config.{near[0]})" if near else ""))
    return problems


def _flat_keys(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _get(config, dotted):
    for key in dotted.split("."):
        if not isinstance(config, ConfigDict) or key not in config:
            return None
        config = config[key]
    return config


def active_streams(config) -> dict[str, ConfigDict]:
    """The streams with a weight above zero, by name, in a fixed order."""
    return {name: config.streams[name] for name in sorted(config.streams) if config.streams[name].weight > 0}


def num_micro_samples(config) -> int:
    return config.batch_size // config.accumulation


def config_problems(config: ConfigDict, batch_shards: int, host_count: int = 1) -> list[str]:
    """All that is wrong with a configuration, one line each; empty when it can run.

    Args:
      batch_shards: over how many parts the mesh splits the batch (data x fsdp).
      host_count: processes that read data.
    """
    problems = []

    def expect(condition, text):
        if not condition:
            problems.append(text)

    expect(config.num_steps > 0, f"num_steps is {config.num_steps}, expected at least 1")
    expect(config.accumulation > 0, f"accumulation is {config.accumulation}, expected at least 1")
    shards = batch_shards * max(config.accumulation, 1)
    expect(
        config.batch_size > 0 and config.batch_size % shards == 0,
        f"batch_size {config.batch_size} is not divisible by {shards} "
        f"(accumulation {config.accumulation} x {batch_shards} devices of the mesh's data and fsdp axes): "
        f"the nearest that fits is {max(1, round(config.batch_size / shards)) * shards}",
    )
    expect(
        config.batch_size % host_count == 0, f"batch_size {config.batch_size} is not divisible by {host_count} hosts"
    )
    expect(config.text_length >= 2, f"text_length is {config.text_length}, expected at least 2")
    patch = config.autoencoder.downsample_factor * config.model.patch_size
    largest = patch * config.model.max_patches
    expect(
        config.image_size % patch == 0 and 0 < config.image_size <= largest,
        f"image_size is {config.image_size}, expected a multiple of {patch} up to {largest}",
    )
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
        1 <= config.model.tap_depth <= config.model.depth,
        f"model.tap_depth is {config.model.tap_depth}, expected 1 to model.depth {config.model.depth}",
    )
    choices = {
        "model.remat": (config.model.remat, ("none", *REMAT_POLICIES)),
        "model.attention": (config.model.attention, ("auto", "xla", "cudnn", "splash")),
        "flow_matching_form": (config.flow_matching_form, ("velocity", "x0")),
        "masked_text_normalization": (config.masked_text_normalization, ("positions", "maskable")),
        "cross_modal.direction": (config.cross_modal.direction, ("symmetric", "image_to_text")),
        "init_weights": (config.init_weights, ("raw", "ema")),
    }
    for key, (value, allowed) in choices.items():
        expect(value in allowed, f"{key} is {value!r}, expected one of {', '.join(allowed)}")
    for key in ("prompt_dropout", "ema_decay"):
        expect(0 <= config[key] < 1, f"{key} is {config[key]}, expected 0 <= {key} < 1")
    expect(
        0 < config.min_mask_fraction < 1, f"min_mask_fraction is {config.min_mask_fraction}, expected between 0 and 1"
    )
    for key, weight in config.loss_weights.items():
        expect(weight >= 0 and math.isfinite(weight), f"loss_weights.{key} is {weight}, expected 0 or more")
    for key in ("learning_rate", "clip_norm", "eps"):
        expect(config.optimizer[key] > 0, f"optimizer.{key} is {config.optimizer[key]}, expected more than 0")
    for pattern in config.optimizer.freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"optimizer.freeze has {pattern!r}, which is no regular expression: {error}")
    for key in ("log_every", "checkpoint.every", "checkpoint.keep_last"):
        expect(_get(config, key) >= 1, f"{key} is {_get(config, key)}, expected at least 1")

    expect(config.streams, "streams is empty: name at least one task stream")
    expect(
        not config.streams or active_streams(config),
        "every stream has weight 0: give at least one a weight above 0",
    )
    for name, settings in config.streams.items():
        expect(settings.weight >= 0, f"streams.{name}.weight is {settings.weight}, expected 0 or more")
        expect(settings.kind in KINDS, f"streams.{name}.kind is {settings.kind!r}, expected one of {', '.join(KINDS)}")
        if settings.weight > 0:
            expect(settings.path, f"streams.{name} has no data: set streams.{name}.path, or its weight to 0")
        needs = settings.kind in ("edit", "perception", "personalization")
        expect(
            (settings.num_conditions > 0) == needs,
            f"streams.{name}.num_conditions is {settings.num_conditions}, expected "
            + (f"at least 1 for {settings.kind}" if needs else f"0 for {settings.kind}"),
        )
    return problems


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
