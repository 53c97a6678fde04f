"""A training run's folder as a model: its configuration, the weights of its newest whole checkpoint, its frozen parts.

What a run was trained with is read where the run read it: the encoders from the bundle `frozen_from`, or drawn from
their fixed seed; the tokenizer from its folder, or the one of the shapes world.
"""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from unialign_jax import bundle, bundle_config, files
from unialign_jax.data.kinds import KINDS
from unialign_jax.data.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

WEIGHTS = ("raw", "ema")
_KEYS = {"transformer": "model", "heads": "heads", "text_encoder": "text_encoder", "autoencoder": "autoencoder"}
_MOST_STAGES = 16  # that are followed back from run to run


class StoredTree(NamedTuple):
    """One component's arrays on disk; `leaves(paths)` gives (path, array) pairs, few of them in memory at a time."""

    config: object
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    leaves: Callable[[list[str]], Iterator[tuple[str, np.ndarray]]]


def is_run(directory) -> bool:
    """Whether the folder looks like a training run's."""
    directory = Path(directory)
    return (directory / "config.json").is_file() and (directory / "checkpoints").is_dir()


def read_settings(run) -> dict:
    """The configuration that a run's config.json holds. Raises ValueError in one line when it is none."""
    path = Path(run) / "config.json"
    settings = files.read_json(path)
    kinds = {"frozen_from": str, "tokenizer": str, "init_from": str, "streams": dict, "samples": dict}
    kinds |= {"loss_weights": dict} | dict.fromkeys(_KEYS.values(), dict)
    for key, kind in kinds.items():
        if key in _KEYS.values() and key not in settings:
            raise ValueError(f"{path} lacks {key}: expected the configuration of a training run")
        if not isinstance(settings.get(key, kind()), kind):
            expected = {str: "a text", dict: "an object"}[kind]
            raise ValueError(f"{path}: {key} is a {type(settings[key]).__name__}, expected {expected}")
    return settings


def latest_step(run, *, verify: bool = False) -> int:
    """The step of a run's newest whole checkpoint.

    With `verify` its files are compared with their checksums, and a damaged one is passed over with a warning.
    Raises FileNotFoundError when the folder is no run's, ValueError when it has no whole checkpoint.
    """
    from unialign_jax.training.checkpoints import damage

    run = Path(run)
    if not is_run(run):
        raise FileNotFoundError(f"{run} is no run's folder: expected config.json and checkpoints/ inside")
    checkpoints = run.absolute() / "checkpoints"
    steps = [int(path.name) for path in checkpoints.iterdir() if re.fullmatch(r"\d{1,18}", path.name)]
    for step in sorted(steps, reverse=True):
        reason = damage(checkpoints / str(step)) if verify else None
        if reason is None:
            return step
        log.warning("%s cannot be read (%s): the one before it is taken", checkpoints / str(step), reason)
    raise ValueError(f"{checkpoints} holds no whole checkpoint")


def open_run(run, weights: str = "raw", step: int | None = None) -> dict[str, StoredTree]:
    """The transformer ("raw", or "ema" for its average) and the heads of a run's checkpoint.

    Args: `step`; the newest, and its files are compared with their checksums, when None.
    Raises FileNotFoundError when the folder is no run's, ValueError when it has no whole checkpoint or no average.
    """
    run = Path(run).absolute()
    folder = run / "checkpoints" / str(latest_step(run, verify=True) if step is None else step)
    configs = component_configs(run, read_settings(run))
    metadata = _metadata(folder)
    prefixes = {"transformer": "params/transformer/", "heads": "params/heads/"}
    if weights == "ema":
        prefixes["transformer"] = "ema/"
        if not _has_average(metadata):
            raise ValueError(f"{folder} keeps no average of the weights: take the raw ones by --weights=raw")
    trees = {}
    for name, prefix in prefixes.items():
        found = {path.removeprefix(prefix): leaf for path, leaf in metadata.items() if path.startswith(prefix)}
        trees[name] = StoredTree(
            configs[name],
            {path: tuple(leaf.shape) for path, leaf in found.items()},
            {path: np.dtype(leaf.dtype) for path, leaf in found.items()},
            lambda paths, prefix=prefix: _read(folder, metadata, prefix, paths),
        )
    return trees


def has_average(run, step: int) -> bool:
    """Whether a run's checkpoint keeps an average of the weights."""
    return _has_average(_metadata(Path(run).absolute() / "checkpoints" / str(step)))


def _has_average(metadata):
    return any(path.startswith("ema/") for path in metadata)


def _metadata(folder):
    for path in folder.rglob("*"):  # a pipe would be waited for
        if not path.is_dir():
            files.check_regular(path)
    try:
        return flatten_dict(ocp.checkpointables_metadata(folder).metadata["state"] or {}, sep="/")
    except Exception as error:
        raise ValueError(f"{folder} cannot be read: {files.first_line(error, 200)}") from error


def _read(folder, metadata, prefix, paths):
    def load(wanted):
        try:
            return ocp.load_checkpointables(folder, {"state": wanted})["state"]
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise ValueError(f"{folder} cannot be read: {files.first_line(error, 200)}") from error

    for path, leaf in bundle.in_groups(load, metadata, [prefix + path for path in paths]):
        yield path.removeprefix(prefix), leaf
        del leaf


def component_configs(run, settings: dict) -> dict:
    """{component: its configuration} of a run's settings."""
    configs = {
        name: bundle_config.parse_component(bundle.COMPONENTS[name], settings[key], f"{run}/config.json: {key}")
        for name, key in _KEYS.items()
    }
    if configs["transformer"].attention == "auto":  # a model runs anywhere; its user chooses what is fast there
        configs["transformer"] = dataclasses.replace(configs["transformer"], attention="xla")
    return configs


def describe(run, settings: dict) -> dict:
    """What a bundle of the run says of itself beside its components: sizes, tasks, sampling."""
    samples = settings.get("samples", {})
    found = {"steps": "steps", "edit_steps": "steps", "caption_steps": "caption_steps"}
    found |= {"guidance_scale": "guidance_scale", "shift": "shift"}
    content = {
        **{key: settings[key] for key in bundle.SIZES if key in settings},
        "sampling": {key: samples[name] for key, name in found.items() if name in samples},
        "tasks": trained_tasks(settings),
    }
    config = bundle_config.parse_config(run, content)  # refuses what cannot be, and names it
    return {key: getattr(config, key) for key in (*bundle.SIZES, "sampling", "tasks")}


def trained_tasks(settings: dict, stages: int = _MOST_STAGES) -> list[str]:
    """The tasks that a run trained, and those that what it started from was trained for, as far as that is there."""
    weights = {"image": "flow_matching", "text": "masked_text"}
    weights = {side: settings.get("loss_weights", {}).get(name, 1) for side, name in weights.items()}
    own = set()
    for stream in settings.get("streams", {}).values():
        name = stream.get("kind") if isinstance(stream, dict) else None
        kind = KINDS.get(name) if isinstance(name, str) else None
        if kind is not None and stream.get("weight", 1):
            own.update(task for task in kind.tasks if weights["text" if task in ("caption", "vqa") else "image"])
    before = settings.get("init_from")
    try:
        if before and bundle.is_bundle(bundle.locate(before)):
            own.update(bundle.read_config(bundle.locate(before), verify=False).tasks or ())
        elif before and is_run(before) and stages:
            own.update(trained_tasks(read_settings(before), stages - 1))
    except (OSError, ValueError) as error:
        log.warning("what %s was trained for is not known: %s", before, error)
    return [task for task in bundle_config.TASKS if task in own]


def read_run_tokenizer(settings: dict, run) -> Tokenizer:
    """The tokenizer that the run was trained with."""
    try:
        return load_tokenizer(settings.get("tokenizer") or None)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; the run was trained with it: bring it back, or name where it is now in {run}/config.json"
        ) from None


def draw_frozen(settings: dict) -> dict:
    """{component: (config, parameters)} of the encoders that a run without a bundle draws from their fixed seed."""
    from ml_collections import ConfigDict

    from unialign_jax.training.config import build_configs
    from unialign_jax.training.state import Networks, init_frozen

    networks = Networks.create(*build_configs(ConfigDict(settings), "cpu"))
    params = init_frozen(networks)
    modules = {"text_encoder": networks.text_encoder, "autoencoder": networks.autoencoder}
    return {name: (module.config, params[name]) for name, module in modules.items()}


class Run(NamedTuple):
    """A run, opened to sample from.

    Attributes:
      name: of its folder, for messages.
      config: as that of a bundle.
      tokenizer: the run's.
      leaves: component -> its (path, array) pairs on the host.
      weights, step: which of its weights these are.
      digest: of all that tells them from others.
      frozen_from: the bundle of the encoders; None where they are drawn.
    """

    name: str
    config: bundle.BundleConfig
    tokenizer: Tokenizer
    leaves: Callable[[str], Iterator[tuple[str, np.ndarray]]]
    weights: str
    step: int
    digest: str
    frozen_from: Path | None


def open_to_sample(run, weights: str | None = None, *, frozen_from=None, verify: bool = True) -> Run:
    """A run's newest whole checkpoint, with the frozen parts that it was trained with.

    Args:
      weights: "raw" or "ema"; when None the average where the run keeps one, as its own samples.
      frozen_from: the bundle of the text encoder and the autoencoder, in place of the run's own.
      verify: whether the checkpoint and the bundle of the frozen parts are checked against their checksums.
    Raises FileNotFoundError or ValueError, in one line, for a run that cannot be read.
    """
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
    settings, step = read_settings(run), latest_step(run, verify=verify)
    to_verify = {"text_encoder", "autoencoder"} if verify else set()  # each the first time that it is read
    weights = weights or ("ema" if has_average(run, step) else "raw")
    trees = open_run(run, weights, step)
    configs = component_configs(run, settings)
    source, drawn = frozen_from or settings.get("frozen_from"), {}
    if source:
        source = bundle.locate(source)
        frozen = bundle.read_config(source, verify=verify)
        configs |= {name: getattr(frozen, name) for name in ("text_encoder", "autoencoder")}

    def leaves(name):
        if name in trees:
            return trees[name].leaves(list(trees[name].shapes))
        if source:
            return frozen_leaves(name)
        if not drawn:
            drawn.update(draw_frozen(settings))
        return ((path, np.asarray(leaf)) for path, leaf in flatten_dict(drawn[name][1], sep="/").items())

    def frozen_leaves(name):
        yield from bundle.read_leaves(source, name, verify=name in to_verify)
        to_verify.discard(name)

    config = bundle.BundleConfig(**configs, **describe(run, settings))
    described = [Path(folder) / "config.json" for folder in (run, source) if folder]
    told = b"".join(path.read_bytes() for path in described) + f" {step} {weights}".encode()
    digest = hashlib.sha256(told).hexdigest()
    return Run(str(run), config, read_run_tokenizer(settings, run), leaves, weights, step, digest, source or None)
