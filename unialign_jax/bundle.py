"""A model on disk: one folder with everything that running it needs.

    config.json       the architecture of each component, what it was trained for, how it is sampled, where its weights
                      came from, the hash of every file (bundle_config.py, inventory.py)
    transformer/  heads/  text_encoder/  autoencoder/     parameters as Orbax pytrees, layers stacked
    tokenizer/        tokenizer.json or spiece.model

A bundle has a folder for each component with parameters. The teacher of the intrinsic-modal loss is a bundle too, with
the one component `teacher`. A writer fills a scratch folder and renames it at the end, so a folder with a config.json
is a whole bundle. Readers hash each file while they read it.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from unialign_jax import __version__
from unialign_jax.bundle_config import (
    COMPONENTS,
    SIZES,
    BundleConfig,
    is_bundle,
    is_packaged,
    locate,
    parse_config,
    read_content,
    write_content,
)
from unialign_jax.data.tokenizer import MAX_TOKENIZER_FILE, Tokenizer, load_tokenizer
from unialign_jax.files import check_inside, check_regular, first_line, refuse_existing, replacing_folder, sha256
from unialign_jax.integrity import inventory
from unialign_jax.models import parameters
from unialign_jax.parallel import sharding
from unialign_jax.parallel.mesh import make_mesh

# Importable from here too.
__all__ = ["BundleConfig", "COMPONENTS", "SIZES", "is_bundle", "is_packaged", "locate", "sha256"]

log = logging.getLogger(__name__)

Leaves = Iterator[tuple[str, np.ndarray]]  # (path, array) pairs of a component, such as ("text_head/bias", ...)

GROUP_BYTES = 256 * 2**20  # small arrays are written together, up to this size
CHUNK_BYTES = 64 * 2**20  # arrays are stored in chunks of this size, so that a device reads only its part
READ_BYTES = 2**30  # host memory for reading, beside the arrays themselves; or the size of the largest array if more
PARTS = (*COMPONENTS, "tokenizer")  # folders of a bundle
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def read_config(directory: str | os.PathLike, *, verify: bool = True) -> BundleConfig:
    """The bundle's config.json. Raises as `bundle_config.read_content` and `parse_config` do."""
    return parse_config(directory, read_content(directory, verify))


def tokenizer_path(directory: str | os.PathLike) -> Path | None:
    """The bundle's tokenizer folder, for `load_tokenizer`; None when there is none."""
    folder = Path(directory) / "tokenizer"
    return folder if folder.is_dir() else None


def read_tokenizer(directory: str | os.PathLike, *, load: Callable = load_tokenizer, verify: bool = True):
    """The bundle's tokenizer: what `load` makes of its folder (of a teacher's, `data.tokenizer.load_backend`).

    Raises ValueError when the bundle has none, or (with `verify`) when it has been changed since it was written.
    """
    directory = Path(directory)
    recorded = read_content(directory, verify)["files"] if verify else {}
    with inventory.checked(directory, recorded, "tokenizer"):
        if tokenizer_path(directory) is None:
            raise ValueError(f"{directory} has no tokenizer: convert the model again with --tokenizer=FOLDER")
        return load(tokenizer_path(directory))


def abstract_params(config: BundleConfig, components: Iterable[str] | None = None) -> dict:
    """{component: tree of float32 ShapeDtypeStructs} of the named components, or of all that `config` has."""
    return {name: _abstract_component(config, name) for name in components or config.components}


def _abstract_component(config: BundleConfig, name: str) -> dict:
    try:
        width = config.transformer.width if name == "heads" else None
        return jax.eval_shape(lambda: parameters.init(getattr(config, name), jax.random.key(0), tap_width=width))
    except Exception as error:  # numbers that contradict each other, in many ways
        raise ValueError(f"the configuration's {name} cannot be built: {first_line(error)}") from None


# Reading


def load(
    directory: str | os.PathLike,
    *,
    components: Iterable[str] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    verify: bool = True,
) -> tuple[BundleConfig, dict]:
    """The bundle's architecture and its parameters on the devices: (config, {component: params}).

    Every device reads its own part of an array, and casts it while reading.

    Args:
      components: those of COMPONENTS to load; all that the bundle has when None.
      mesh: where the arrays go, split by `sharding.TABLE`; the first device when None.
      dtype: one dtype, or {component: dtype}; as stored when None, or for components that the dictionary lacks.
      verify: whether to hash the files and refuse those that have been changed since they were written.

    Raises FileNotFoundError or ValueError when the folder is not a whole bundle of this version or lacks a component.
    """
    content = read_content(directory, verify)
    config = parse_config(directory, content)
    names = tuple(components) if components is not None else config.components
    _require(directory, config, names)
    if verify and content["files"]:
        inventory.refuse(directory, list(inventory.at_a_glance(Path(directory), content["files"], names).values()))
    abstract = abstract_params(config, names)
    for name in names:
        chosen = dtype.get(name) if isinstance(dtype, dict) else dtype
        stored = {} if chosen else component_dtypes(directory, name)
        abstract[name] = jax.tree_util.tree_map_with_path(
            lambda path, leaf, chosen=chosen, stored=stored: jax.ShapeDtypeStruct(
                leaf.shape, chosen or stored.get(sharding.path_string(path), leaf.dtype)
            ),
            abstract[name],
        )
    if mesh is None:
        mesh = make_mesh(devices=jax.devices()[:1])
    abstract = sharding.with_shardings(abstract, sharding.tree_shardings(abstract, mesh))
    return config, restore(directory, abstract, verify=verify)


def restore(directory: str | os.PathLike, abstract: dict, *, verify: bool = True) -> dict:
    """{component: params} in the shapes, dtypes and shardings of `abstract`, {component: tree of ShapeDtypeStructs}.

    For a caller that chooses the shardings itself, such as a training run. Where a component is spread over several
    processes, each hashes its share of the files. Raises ValueError when the bundle lacks a component, when parameters
    have other shapes, listing them, and (with `verify`) when files have been changed since they were written.
    """
    directory = Path(directory).absolute()
    content = read_content(directory, verify)
    _require(directory, parse_config(directory, content), abstract)
    if verify and not content["files"]:
        log.warning("%s", NO_HASHES.format(directory))
    params = {}
    for name, tree in abstract.items():
        wanted = flatten_dict(tree, sep="/")
        if not wanted:
            params[name] = {}
            continue
        together = any(not leaf.sharding.is_fully_addressable for leaf in wanted.values() if leaf.sharding)
        share = slice(jax.process_index(), None, jax.process_count()) if together else slice(None)
        try:
            with inventory.checked(directory, content["files"] if verify else {}, name, share):
                params[name] = _restore_component(directory, name, tree, wanted)
            problem = None
        except ValueError as error:
            problem = error
        if together and np.any(multihost_utils.process_allgather(np.array(problem is not None))):
            problem = problem or ValueError(f"{directory}/{name} cannot be read: another process says why")
        if problem:
            raise problem
    return params


NO_HASHES = "{} records no hashes of its files, so that damaged weights cannot be found: write it anew to have them"


def _restore_component(directory: Path, name: str, tree: dict, wanted: dict) -> dict:
    found = {path: leaf.shape for path, leaf in component_metadata(directory, name).items()}
    differences = [
        f"{name}/{path}: wanted {wanted[path].shape if path in wanted else 'nothing'}, "
        f"the bundle has {tuple(found[path]) if path in found else 'nothing'}"
        for path in sorted(wanted.keys() | found.keys())
        if path not in wanted or path not in found or tuple(wanted[path].shape) != tuple(found[path])
    ]
    if differences:
        more = f" and {len(differences) - 6} more" if len(differences) > 6 else ""
        raise ValueError(f"{directory} does not fit this model: {'; '.join(differences[:6])}{more}")
    return _load(directory, name, tree)


def restore_stored(
    directory: str | os.PathLike, name: str, *, dtype: Callable[[str], Any], sharding: Any = None, verify: bool = True
) -> dict:
    """The params of one component in the shapes that the bundle stores.

    The configuration is not compared with them, which takes longer than reading a small model: a network refuses
    parameters of other shapes when it is traced.

    Args:
      dtype: gives the dtype of the parameter at a path.
      sharding: of every array.
      verify: as in `restore`, which says what is raised.
    """
    directory = Path(directory).absolute()
    content = read_content(directory, verify)
    _require(directory, parse_config(directory, content), [name])
    if verify and not content["files"]:
        log.warning("%s", NO_HASHES.format(directory))
    with inventory.checked(directory, content["files"] if verify else {}, name):
        stored = component_metadata(directory, name)
        tree = {path: jax.ShapeDtypeStruct(x.shape, dtype(path), sharding=sharding) for path, x in stored.items()}
        return _load(directory, name, unflatten_dict(tree, sep="/")) if tree else {}


def _load(directory: Path, name: str, tree: dict) -> dict:
    """A component's params, in shapes that it has, and in the dtypes and shardings of `tree`."""
    context = ocp.Context()
    wanted = jax.tree.leaves(tree)
    largest = max(leaf.size * max(np.dtype(leaf.dtype).itemsize, 4) for leaf in wanted)
    context.memory.read_concurrent_bytes = max(READ_BYTES, largest + 1)
    try:
        with context:
            return ocp.load(directory / name, tree)
    except Exception as error:
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise  # no sign of damaged files
        raise ValueError(
            f"{directory}/{name} cannot be read ({first_line(error, 200)}); "
            "`python launch/convert.py inspect --verify` says which files are damaged"
        ) from error


def _require(directory: str | os.PathLike, config: BundleConfig, names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown:
        raise ValueError(f"unknown component {unknown[0]!r}, expected some of {', '.join(COMPONENTS)}")
    missing = [name for name in names if getattr(config, name) is None]
    if missing:
        raise ValueError(
            f"{directory} lacks {', '.join(missing)}; it has {', '.join(config.components)}. Convert the model again "
            "with the missing part (python launch/convert.py --help)"
        )


def component_metadata(directory: str | os.PathLike, name: str) -> dict:
    """{path: metadata with shape and dtype} of a component's stored arrays."""
    folder = Path(directory).absolute() / name
    if not folder.is_dir():
        return {}
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_regular(path)  # opening a pipe would block
    try:
        return flatten_dict(ocp.metadata(folder).metadata or {}, sep="/")
    except Exception as error:
        raise ValueError(f"{folder} is damaged: {first_line(error, 200)}") from error


def component_dtypes(directory: str | os.PathLike, name: str) -> dict[str, np.dtype]:
    return {path: np.dtype(leaf.dtype) for path, leaf in component_metadata(directory, name).items()}


def read_leaves(
    directory: str | os.PathLike, name: str, paths: Iterable[str] | None = None, *, verify: bool = True
) -> Leaves:
    """A component's (path, array) pairs on the host, as stored. Holds a few small arrays or one large one at a time.

    Args:
      paths: those to read, in this order; all when None.
      verify: whether to hash the component's files meanwhile; a ValueError is then raised after the last array.
    """
    directory = Path(directory).absolute()
    recorded = read_content(directory)["files"] if verify else {}
    with inventory.checked(directory, recorded, name):
        metadata = component_metadata(directory, name)
        yield from in_groups(
            lambda wanted: ocp.load(directory / name, wanted), metadata, metadata if paths is None else paths
        )


def in_groups(load: Callable[[dict], dict], metadata: dict, paths: Iterable[str]) -> Leaves:
    """(path, array) pairs that `load(tree of empty arrays)` fills, in calls of at most GROUP_BYTES."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    group, size, paths = {}, 0, list(paths)
    for i, path in enumerate(paths):
        group[path] = np.empty(metadata[path].shape, metadata[path].dtype)  # takes no memory before it is filled
        size += group[path].nbytes
        if size >= GROUP_BYTES or i == len(paths) - 1:
            with context:
                loaded = flatten_dict(load(unflatten_dict(group, sep="/")), sep="/")
            names = list(group)
            group, size = {}, 0
            for name in names:
                yield name, loaded.pop(name)


def verify(directory: str | os.PathLike) -> list[str]:
    """The files of a bundle that are not as they were written, one line each.

    Raises ValueError when no hashes are recorded, and for a config.json that cannot be read or has been changed.
    """
    directory = Path(directory).absolute()
    recorded = read_content(directory)["files"]
    if not recorded:
        raise ValueError(NO_HASHES.format(directory))
    parts = {name.split("/")[0] for name in recorded} | {name for name in PARTS if (directory / name).exists()}
    problems = inventory.at_a_glance(directory, recorded, sorted(parts))
    for name in inventory.additional(directory, recorded):
        if name != "config.json":
            problems.setdefault(name, f"{name} is not in the inventory")
    sound = [name for name in recorded if name not in problems]
    return [*problems.values(), *inventory.changed(directory, recorded, sound)]


# Writing


def save(
    directory: str | os.PathLike,
    config: BundleConfig,
    params: dict,
    *,
    tokenizer: Tokenizer | str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a bundle from parameters in memory.

    Args:
      config: its `dtypes` are not read; the bundle records those of `params`.
      params: {component: tree of arrays}, for every component of `config`.
      tokenizer: a tokenizer, or the folder of one, which is copied.
    """
    with Writer(directory, overwrite=overwrite) as writer:
        for name in config.components:
            leaves = ((path, np.asarray(leaf)) for path, leaf in flatten_dict(params[name], sep="/").items())
            writer.add(name, getattr(config, name), leaves)
        if tokenizer is not None:
            writer.add_tokenizer(tokenizer)
        writer.provenance = config.provenance
        writer.sizes = {key: getattr(config, key) for key in SIZES}
        writer.tasks, writer.sampling = config.tasks, config.sampling


class Writer:
    """Writes a bundle component by component, in a folder that appears when it is whole (`files.replacing_folder`).

        with Writer(directory) as writer:
            writer.add("transformer", config, leaves)

    The attributes `provenance`, `tasks`, `sampling` and `sizes` (values for SIZES) go into the config.json at the end.
    Raises FileExistsError for an existing `directory`, unless `overwrite` is set and it has only a bundle's files.
    """

    def __init__(self, directory: str | os.PathLike, *, overwrite: bool = False):
        self.directory = Path(directory).absolute()
        self.provenance, self.sizes, self.tasks, self.sampling = {}, {}, None, {}
        self._options = {"overwrite": overwrite, "foreign": strangers}
        refuse_existing(self.directory, **self._options)
        self._configs, self._dtypes, self._folder = {}, {}, contextlib.ExitStack()

    def __enter__(self):
        self.scratch = self._folder.enter_context(replacing_folder(self.directory, **self._options))
        return self

    def add(self, name: str, config: dict, leaves: Iterable[tuple[str, np.ndarray]]) -> None:
        """Writes a component from its (path, array) pairs. Holds a few small arrays or one large one at a time."""
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights hardly compress
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        context.memory.deepcopy_host_arrays = False
        folder, dtypes, group, size = self.scratch / name, set(), {}, 0

        def flush():
            with context:
                ocp.partial.save(folder, unflatten_dict(group, sep="/"))
            group.clear()

        for path, leaf in leaves:
            group[path] = leaf
            dtypes.add(str(leaf.dtype))
            size += leaf.nbytes
            del leaf  # so that `flush` frees it before the next one is made
            if size >= GROUP_BYTES:
                flush()
                size = 0
        if group:
            flush()
        if dtypes:
            ocp.partial.finalize(folder)
        self._configs[name], self._dtypes[name] = config, sorted(dtypes)

    def add_tokenizer(self, tokenizer: Tokenizer | str | os.PathLike, source: str | os.PathLike | None = None) -> None:
        """Writes a `Tokenizer`, or copies a tokenizer's folder. Links may not leave `source`, or the folder."""
        target = self.scratch / "tokenizer"
        if hasattr(tokenizer, "save"):
            tokenizer.save(target)
            return
        files = [Path(tokenizer) / name for name in TOKENIZER_FILES if (Path(tokenizer) / name).is_file()]
        if not any(file.name in TOKENIZER_FILES[:2] for file in files):
            raise FileNotFoundError(f"{tokenizer} holds no tokenizer: expected tokenizer.json or spiece.model")
        target.mkdir()
        for file in files:
            check_regular(file, MAX_TOKENIZER_FILE)
            check_inside(file, source or tokenizer)
            shutil.copyfile(file, target / file.name)

    def __exit__(self, _kind, error, _traceback):
        try:
            with self._folder:  # renames the folder, or removes it after an error
                if error is not None:
                    raise error
                self._finish()
        except BaseException as found:
            explain_full_disk(found, self.directory)
            if found is not error:
                raise

    def _finish(self) -> None:
        write_content(
            self.scratch,
            {
                **{name: None for name in COMPONENTS},
                **{name: dataclasses.asdict(config) for name, config in self._configs.items()},
                **{key: self.sizes.get(key, getattr(BundleConfig, key)) for key in SIZES},
                "tasks": None if self.tasks is None else list(self.tasks),
                "sampling": self.sampling,
                "dtypes": self._dtypes,
                "provenance": {**self.provenance, "versions": versions()},
                "files": inventory.take(self.scratch, [*self._configs, "tokenizer"]),
            },
        )


def strangers(directory: Path) -> list[str]:
    """The names of files in a folder that no writer of bundles wrote, hidden files included."""
    try:
        recorded = read_content(directory, verify=False)["files"]
    except (OSError, ValueError):
        return sorted(path.name for path in directory.iterdir())
    paths = (path for path in directory.rglob("*") if not path.is_dir() or path.is_symlink())
    names = sorted(path.relative_to(directory).as_posix() for path in paths)
    known = recorded.keys() | {"config.json"}
    # Without recorded hashes, everything under the names of a bundle's folders counts as its own.
    return [name for name in names if name not in known and (recorded or name.split("/")[0] not in PARTS)]


def explain_full_disk(error: BaseException, output: Path) -> None:
    """Raises OSError in one line if an error, or one that caused it, means a full disk; Orbax's are of many kinds."""
    link = error
    while link is not None:
        if getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(link):
            full = f"the disk of {output.parent} is full; nothing was kept. Free some space, or choose another --output"
            raise OSError(errno.ENOSPC, full) from error
        link = link.__cause__ or link.__context__


def versions() -> dict[str, str]:
    """The versions of this package and of the libraries that write a bundle."""
    others = ("jax", "flax", "orbax-checkpoint", "numpy")
    return {"unialign_jax": __version__} | {name: importlib.metadata.version(name) for name in others}
