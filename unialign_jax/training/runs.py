"""A training run's folder: its configuration, its newest whole checkpoint, and the model that both make.

A reader finds the parts of the model where the run found them: the encoders in the bundle `frozen_from`, or drawn from
their fixed seed; the tokenizer in its folder, or as the one of the shapes world.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from orbax.checkpoint import v1 as ocp

from unialign_jax import bundle, bundle_config, files
from unialign_jax.data.kinds import KINDS
from unialign_jax.data.tokenizer import Tokenizer, load_tokenizer
from unialign_jax.files.places import Place, is_remote, place, reaching, read_json
from unialign_jax.models.lora import LoraConfig, adapters_by_path
from unialign_jax.training import base_model
from unialign_jax.training.checkpoints import agreed, damage, differences, is_committed, leaf_shapes, stored_shapes
from unialign_jax.training.config import build_configs, with_new_names
from unialign_jax.training.state import Networks, init_frozen

log = logging.getLogger(__name__)

WEIGHTS = ("raw", "ema")
_KEYS = {"transformer": "model", "heads": "heads", "text_encoder": "text_encoder", "autoencoder": "autoencoder"}
_MOST_STAGES = 16  # that are followed back from run to run


# --- config.json ---


def is_run(directory: str | Path) -> bool:
    """Whether the folder looks like a training run's."""
    directory = place(directory)
    with reaching(directory):
        return (directory / "config.json").is_file() and (directory / "checkpoints").is_dir()


def read_settings(run: str | Path) -> dict:
    """The configuration that a run's config.json holds. Raises ValueError in one line when it is none."""
    texts, groups = (
        ("frozen_from", "tokenizer", "init_from"),
        ("streams", "samples", "loss_weights", "lora", *_KEYS.values()),
    )
    return _read_settings(run, dict.fromkeys(texts, str) | dict.fromkeys(groups, dict), needed=tuple(_KEYS.values()))


def settings_before(run: str | Path) -> dict | None:
    """The configuration of a run that is resumed or started from, None without a config.json.

    Raises ValueError when it cannot be read.
    """
    path = place(run) / "config.json"
    with reaching(path):
        if not (path.exists() if is_remote(path) else os.path.lexists(path)):
            return None
    try:
        return _read_settings(run, {"frozen_from": str, "tokenizer": str})
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} is damaged ({files.first_line(error)}); bring it back, or remove it and name frozen_from and "
            "tokenizer yourself"
        ) from error


def _read_settings(run, kinds: dict[str, type], needed: tuple[str, ...] = ()) -> dict:
    path = place(run) / "config.json"
    settings = with_new_names(read_json(path))
    for key, kind in kinds.items():
        if key in needed and key not in settings:
            raise ValueError(f"{path} lacks {key}: expected the configuration of a training run")
        if not isinstance(settings.get(key, kind()), kind):
            expected = {str: "a text", dict: "an object"}[kind]
            raise ValueError(f"{path}: {key} is a {type(settings[key]).__name__}, expected {expected}")
    return settings


def write_config(config: ConfigDict, workdir: Path, step: int = 0, run: Place | None = None) -> None:
    """Keeps the run's configuration in `workdir/config.json`.

    A run that is resumed, at `step`, logs the changes since, and adds them as a line to `config_history.jsonl`.

    Args:
      run: where the run lies, if that is another place.
    """
    current = json.loads(config.to_json_best_effort())
    changes = list(_changes(settings_before(run or workdir) or current, current))
    for key, old, new in changes:
        log.warning(
            "configuration changed since the run began: %s from %s to %s",
            key,
            files.shown(old, 300),
            files.shown(new, 300),
        )
    if jax.process_index() == 0:
        if changes:
            entry = {"step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")}
            entry["changes"] = [{"key": key, "from": old, "to": new} for key, old, new in changes]
            with open(workdir / "config_history.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        files.write_json(workdir / "config.json", current)


def _changes(before: dict, after: dict, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted key, value before, value after) of every difference; None for a key that is missing."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new


def inherit_sources(config: ConfigDict, workdir: Place) -> ConfigDict:
    """The configuration with an empty `frozen_from` and `tokenizer` filled in, so that config.json names the sources.

    A resumed run keeps its own; a new one takes those of `init_from`, which is a bundle or a run. Where the tokenizer
    is still not named, it is that of the bundle `frozen_from`, for which its text encoder was made. A bundle of the
    package is kept by its name, for the package may move; its tokenizer is "", that of the shapes world. As a stage's
    default it yields to those of `init_from` or of the run.
    """
    config = config.copy_and_resolve_references()
    with reaching(workdir):
        is_new = not (workdir / "config.json").is_file()
    default = config.frozen_from if bundle.is_packaged(config.frozen_from) else ""
    if default:
        config.frozen_from = ""
    if is_new and bundle.is_bundle(bundle.locate(config.init_from)):
        before = {"frozen_from": _lasting(config.init_from), "tokenizer": _tokenizer_of(config.init_from)}
    else:
        start = settings_before(config.init_from) if config.init_from else None
        before = settings_before(workdir)
        if before is None and config.init_from:
            _checkpoints_of(config.init_from)  # a new run needs them; better told now than after it is compiled
            if ((start or {}).get("lora") or {}).get("rank"):
                raise ValueError(
                    f"init_from: {config.init_from} trained adapters: write a bundle of it (launch/convert.py export "
                    "--format=bundle), and start from that"
                )
        before = before or start or {}
    for key in ("frozen_from", "tokenizer"):
        config[key] = config[key] or before.get(key, "")
    if is_new:
        config.frozen_from = config.frozen_from or default
    if is_new and not config.tokenizer and bundle.is_bundle(bundle.locate(config.frozen_from)):
        config.tokenizer = _tokenizer_of(config.frozen_from)
    return config


def _lasting(source: str) -> str:
    """The name of a bundle that a run can be resumed with from another folder."""
    return source if bundle.is_packaged(source) else str(Path(source).absolute())


def _tokenizer_of(source: str) -> str:
    return "" if bundle.is_packaged(source) else str(bundle.tokenizer_path(Path(source).absolute()) or "")


# --- Checkpoints ---


class StoredTree(NamedTuple):
    """One component's arrays on disk; `leaves(paths)` gives (path, array) pairs, few of them in memory at a time."""

    config: object
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]
    leaves: Callable[[list[str]], Iterator[tuple[str, np.ndarray]]]


def saved_steps(checkpoints: Place) -> list[int]:
    """The steps of the checkpoints in a folder that Orbax has written whole, the newest first."""
    paths = (path for path in checkpoints.iterdir() if re.fullmatch(r"\d{1,18}", path.name))
    return sorted((int(path.name) for path in paths if is_committed(path)), reverse=True)


def latest_step(run: str | Path, *, verify: bool = False) -> int:
    """The step of a run's newest whole checkpoint.

    With `verify` its files are compared with their checksums, and a damaged one is passed over with a warning.
    Raises FileNotFoundError when the folder is no run's, ValueError when it has no whole checkpoint.
    """
    if not is_run(run):
        raise FileNotFoundError(f"{run} is no run's folder: expected config.json and checkpoints/ inside")
    checkpoints = place(run) / "checkpoints"
    for step in saved_steps(checkpoints):
        reason = damage(checkpoints / str(step)) if verify else None
        if reason is None:
            return step
        log.warning("%s cannot be read (%s): the one before it is taken", checkpoints / str(step), reason)
    raise ValueError(f"{checkpoints} holds no whole checkpoint")


def _checkpoints_of(run: str) -> Place:
    """The folder of the checkpoints of the run that init_from names. Raises FileNotFoundError where there is none."""
    directory = place(run) / "checkpoints"
    with reaching(directory):
        is_there = directory.is_dir()
    if not is_there:
        raise FileNotFoundError(f"init_from: {run} is no run's folder, it has no checkpoints/ inside")
    return directory


def load_params(run: str, abstract: dict, weights: str = "raw", step: int | None = None) -> dict:
    """The parameters that another run has trained, onto the shardings of `abstract`.

    A table of text positions that the other run does not have is left out.
    Raises ValueError when the folder has no checkpoint or its leaves differ, FileNotFoundError when it is not there.

    Args:
      abstract: {"transformer": ..., "heads": ...}, or some of them.
      weights: "raw", or "ema" for the averaged transformer.
      step: of the checkpoint; the newest when None.
    """
    directory = _checkpoints_of(run)
    steps = saved_steps(directory) if step is None else [step]
    if not steps:
        raise ValueError(f"init_from: {directory} holds no whole checkpoint")
    folder = directory / str(steps[0])
    if reason := agreed(folder, damage(folder)):
        raise ValueError(
            f"init_from: {folder} cannot be read: {reason}. Remove it to start from the checkpoint before it"
        )
    found = stored_shapes(folder)
    if "params/transformer/text_positions" not in found:
        transformer = {name: leaf for name, leaf in abstract["transformer"].items() if name != "text_positions"}
        abstract = abstract | {"transformer": transformer}
    wanted, branches = {"params": dict(abstract)}, tuple(f"params/{name}/" for name in abstract)
    if weights == "ema":
        if not _has_average(found):
            raise ValueError(f"init_from: {folder} keeps no EMA; use init_weights=raw")
        others = {name: tree for name, tree in abstract.items() if name != "transformer"}
        wanted = {"params": others, "ema": abstract["transformer"]} if others else {"ema": abstract["transformer"]}
        branches = ("ema/", *(f"params/{name}/" for name in others))
    found = {path: shape for path, shape in found.items() if path.startswith(branches)}
    if lines := differences(leaf_shapes(wanted), found):
        raise ValueError(f"init_from: {folder} does not fit this configuration: {'; '.join(lines)}")
    options = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with ocp.Context(pytree_options=options):
        loaded = ocp.load_checkpointables(folder, {"state": wanted})["state"]
    return loaded.get("params", {}) | ({"transformer": loaded["ema"]} if weights == "ema" else {})


def open_run(run: str | Path, weights: str = "raw", step: int | None = None) -> dict[str, StoredTree]:
    """The transformer and the heads of a run's checkpoint; of a run of adapters the transformer alone, with them.

    Raises FileNotFoundError when the folder is no run's, ValueError when it has no whole checkpoint or no average.

    Args:
      weights: "raw", or "ema" for the averaged transformer.
      step: the newest when None, and then its files are compared with their checksums.
    """
    trees = _open_checkpoint(run, weights, step)
    if (adapters := _adapters(run, trees)) is None:
        return trees
    base, lora = open_base(run), adapters.lora
    by_path = adapters_by_path(adapters.tree)
    if missing := by_path.keys() - base.shapes.keys():
        raise ValueError(f"{run} has adapters of {min(missing)}, which the transformer of its base does not have")
    dtypes = base.dtypes | dict.fromkeys(by_path, np.dtype(np.float32))
    merged = lambda paths: base_model.adapted_leaves(base.leaves(paths), by_path, lora.scale)  # noqa: E731
    return {"transformer": StoredTree(trees["transformer"].config, base.shapes, dtypes, merged)}


class Adapters(NamedTuple):
    """The adapters of a run's checkpoint, on the host."""

    lora: LoraConfig
    tree: dict


def open_adapters(run: str | Path, weights: str = "raw", step: int | None = None) -> Adapters:
    """The adapters of a run's checkpoint. Raises as `open_run`, and ValueError for a run that trained all weights."""
    adapters = _adapters(run, _open_checkpoint(run, weights, step))
    if adapters is None:
        raise ValueError(f"{run} trained all weights, expected a run with lora.rank")
    return adapters


def open_base(run: str | Path) -> StoredTree:
    """The transformer that a run's adapters change, without them. Raises ValueError when it has changed since."""
    base = base_model.read_base(run)
    base_model.check_base(base, run)
    if base.step >= 0:
        return open_run(base.source, base.weights, base.step)["transformer"]
    directory = bundle.locate(base.source)
    metadata = bundle.component_metadata(directory, "transformer")
    return StoredTree(
        bundle.read_config(directory).transformer,
        {path: tuple(leaf.shape) for path, leaf in metadata.items()},
        {path: np.dtype(leaf.dtype) for path, leaf in metadata.items()},
        lambda paths: bundle.read_leaves(directory, "transformer", paths),
    )


def _adapters(run, trees) -> Adapters | None:
    try:
        lora = LoraConfig.of(read_settings(run).get("lora", {}))
    except (TypeError, LookupError) as error:
        raise ValueError(
            f"{run}/config.json: lora is no group of a run's adapters: {files.first_line(error)}"
        ) from None
    if lora is None:
        return None
    tree = trees["transformer"]
    return Adapters(lora, unflatten_dict(dict(tree.leaves(list(tree.shapes))), sep="/"))


def _open_checkpoint(run, weights, step) -> dict[str, StoredTree]:
    """The branches of a run's checkpoint as they are stored."""
    run = place(run)
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


def has_average(run: str | Path, step: int) -> bool:
    """Whether a run's checkpoint keeps an average of the weights."""
    return _has_average(_metadata(place(run) / "checkpoints" / str(step)))


def _has_average(metadata: dict) -> bool:
    return any(path.startswith("ema/") for path in metadata)


def _metadata(folder):
    for path in () if is_remote(folder) else folder.rglob("*"):  # a pipe would be waited for
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


# --- The model ---


def component_configs(run: str | Path, settings: dict) -> dict:
    """{component: its configuration} of a run's settings."""
    configs = {
        name: bundle_config.parse_component(bundle.COMPONENTS[name], settings[key], f"{run}/config.json: {key}")
        for name, key in _KEYS.items()
    }
    if configs["transformer"].attention == "auto":  # a model runs anywhere; its user chooses what is fast there
        configs["transformer"] = dataclasses.replace(configs["transformer"], attention="xla")
    return configs


def describe(run: str | Path, settings: dict) -> dict:
    """The entries of a bundle of the run beside its components: sizes, tasks, sampling."""
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
    """The tasks that a run and the stages before it trained, as far back as they can be read."""
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


def read_run_tokenizer(settings: dict, run: str | Path) -> Tokenizer:
    """The tokenizer that the run was trained with."""
    try:
        return load_tokenizer(settings.get("tokenizer") or None)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; the run was trained with it: bring it back, or name where it is now in {run}/config.json"
        ) from None


def draw_frozen(settings: dict) -> dict:
    """{component: (config, parameters)} of the encoders that a run without a bundle draws from their fixed seed."""
    networks = Networks.create(*build_configs(ConfigDict(settings), "cpu"))
    params = init_frozen(networks)
    modules = {"text_encoder": networks.text_encoder, "autoencoder": networks.autoencoder}
    return {name: (module.config, params[name]) for name, module in modules.items()}


class Run(NamedTuple):
    """A run, opened to sample from.

    Attributes:
      name: its folder's, for messages.
      leaves: component -> its (path, array) pairs on the host.
      digest: a hash by which these weights are told from others.
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


def open_to_sample(
    run: str | Path, weights: str | None = None, *, frozen_from: str | Path | None = None, verify: bool = True
) -> Run:
    """A run's newest whole checkpoint, with the frozen parts that it was trained with.

    Raises FileNotFoundError or ValueError, in one line, for a run that cannot be read.

    Args:
      weights: "raw" or "ema"; when None the average where the run keeps one, as for the run's own samples.
      frozen_from: the bundle of the text encoder and the autoencoder, in place of the run's own.
      verify: whether the checkpoint and the bundle of the frozen parts are compared with their checksums.
    """
    if weights not in (None, *WEIGHTS):
        raise ValueError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
    settings, step = read_settings(run), latest_step(run, verify=verify)
    to_verify = {"text_encoder", "autoencoder"} if verify else set()  # each the first time that it is read
    weights = weights or ("ema" if has_average(run, step) else "raw")
    trees = open_run(run, weights, step)
    configs = component_configs(run, settings)
    configs |= {name: None for name in ("heads",) if name not in trees}
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
    described = [folder / "config.json" for folder in (place(run), source) if folder]
    described += [path for path in (place(run) / "base.json",) if path.is_file()]
    told = b"".join(path.read_bytes() for path in described) + f" {step} {weights}".encode()
    digest = hashlib.sha256(told).hexdigest()
    return Run(str(run), config, read_run_tokenizer(settings, run), leaves, weights, step, digest, source or None)
