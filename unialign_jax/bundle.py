"""A model on disk: one folder with everything that running it needs.

    config.json       the architecture of each component, where its weights came from, the hash of every file
    transformer/  text_encoder/  autoencoder/  heads/     parameters as Orbax pytrees, layers stacked
    tokenizer/        tokenizer.json or spiece.model

The heads are there only when the model has them, and an autoencoder without parameters has no folder. A bundle is
written beside its place and renamed when whole: a folder with a config.json is a whole bundle.
"""

import dataclasses
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from unialign_jax import sharding
from unialign_jax.models.autoencoder import AutoencoderConfig, make_autoencoder
from unialign_jax.models.mmdit import AlignmentHeads, AlignmentHeadsConfig, MMDiT, MMDiTConfig
from unialign_jax.models.text_encoder import TextEncoder, TextEncoderConfig

FORMAT, VERSION = "unialign_jax bundle", 1
COMPONENTS = {
    "transformer": MMDiTConfig,
    "heads": AlignmentHeadsConfig,
    "text_encoder": TextEncoderConfig,
    "autoencoder": AutoencoderConfig,
}
SIZES = ("image_size", "text_length")
GROUP_BYTES = 256 * 2**20  # small arrays are written together up to this size
CHUNK_BYTES = 64 * 2**20  # arrays are stored in pieces of this size, so that a device reads its part alone
READ_BYTES = 2**30  # host memory that reading may use beside the arrays themselves, or the largest array's if more
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclasses.dataclass(frozen=True)
class BundleConfig:
    """What a bundle says of itself. A component that it lacks is None.

    `image_size` (pixels of a side) and `text_length` (tokens) are what the model was trained with, and so what sampling
    starts from. `dtypes` gives the stored dtypes by component, such as {"transformer": ["float16", "float32"]};
    `provenance` is whatever the writer recorded (sources with sizes and hashes, layout, versions).
    """

    transformer: MMDiTConfig | None = None
    heads: AlignmentHeadsConfig | None = None
    text_encoder: TextEncoderConfig | None = None
    autoencoder: AutoencoderConfig | None = None
    image_size: int = 512
    text_length: int = 256
    dtypes: dict = dataclasses.field(default_factory=dict)
    provenance: dict = dataclasses.field(default_factory=dict)

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(name for name in COMPONENTS if getattr(self, name) is not None)


def is_bundle(directory) -> bool:
    """Whether the folder holds a whole bundle (of any version)."""
    try:
        return json.loads((Path(directory) / "config.json").read_text()).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_config(directory) -> BundleConfig:
    """The bundle's config.json, without its weights.

    Raises FileNotFoundError when there is no such folder, ValueError when it is no bundle or of another version.
    """
    return _parse_config(directory, _read_json(directory))


def _read_json(directory) -> dict:
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such bundle; make one with launch/convert.py")
    if not is_bundle(directory):
        raise ValueError(f"{directory} is not a bundle: expected a folder written by launch/convert.py")
    content = json.loads((directory / "config.json").read_text())
    if content.get("version") != VERSION:
        raise ValueError(
            f"{directory} is a bundle of version {content.get('version')}, this code reads version {VERSION}: "
            "convert the model anew, or use the code that wrote it"
        )
    return content


def _parse_config(directory, content) -> BundleConfig:
    configs = {}
    for name, kind in COMPONENTS.items():
        values = content.get(name)
        if values is None:
            continue
        try:
            configs[name] = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ValueError(f"{directory}/config.json describes an unknown {name}: {error}") from None
    sizes = {key: content[key] for key in SIZES if key in content}
    return BundleConfig(**configs, **sizes, dtypes=content.get("dtypes", {}), provenance=content.get("provenance", {}))


def tokenizer_path(directory) -> Path | None:
    """The bundle's tokenizer folder, for `load_tokenizer`; None when it has none."""
    folder = Path(directory) / "tokenizer"
    return folder if folder.is_dir() else None


def abstract_params(config: BundleConfig, components=None) -> dict:
    """{component: tree of float32 ShapeDtypeStructs} of the components that `config` has, or of those named."""
    return {name: _abstract_component(config, name) for name in components or config.components}


def _abstract_component(config, name):
    if name == "transformer":
        c = config.transformer
        latents = jnp.zeros((1, c.patch_size, c.patch_size, c.latent_channels))
        module, inputs = MMDiT(c), (latents, jnp.zeros((1, 1, c.text_width)), jnp.zeros((1,)))
    elif name == "heads":
        tap = jnp.zeros((1, 1, config.transformer.width))
        module, inputs = AlignmentHeads(config.heads), (tap, tap)
    elif name == "text_encoder":
        module, inputs = TextEncoder(config.text_encoder), (jnp.zeros((1, 1), jnp.int32),)
    else:
        side = config.autoencoder.downsample_factor
        module, inputs = make_autoencoder(config.autoencoder), (jnp.zeros((1, side, side, 3)),)
    return jax.eval_shape(module.init, jax.random.key(0), *inputs).get("params", {})


def flatten(tree) -> dict:
    """A tree as {"blocks/joint/image/qkv/kernel": leaf, ...}."""
    return {sharding.path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(leaves) -> dict:
    tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


# Reading


def load(directory, *, components=None, mesh=None, dtype=None) -> tuple[BundleConfig, dict]:
    """The bundle's architecture and its parameters, on their devices.

    Args:
      directory: the bundle.
      components: which to load, of "transformer", "heads", "text_encoder", "autoencoder"; all that it has when None.
      mesh: where the arrays go, split by `sharding.TABLE`; the first device when None.
      dtype: what to cast to while reading: one dtype, or {component: dtype}; as stored when None (or absent).

    Returns (config, {component: params}). Every device reads its own part of an array, already cast.
    Raises FileNotFoundError or ValueError, in one line, for a folder that is no whole bundle, another version, or a
    component that it lacks.
    """
    config = read_config(directory)
    names = tuple(components) if components is not None else config.components
    _require(directory, config, names)
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
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return config, restore(directory, sharding.with_shardings(abstract, sharding.tree_shardings(abstract, mesh)))


def restore(directory, abstract: dict) -> dict:
    """{component: params} in the shapes, dtypes and shardings of `abstract`, {component: tree of ShapeDtypeStructs}.

    For a caller that has decided where everything lives, such as a training run. Raises ValueError when the bundle
    lacks a component or its parameters have other shapes, listing them.
    """
    directory = Path(directory).absolute()
    config = read_config(directory)
    _require(directory, config, abstract)
    params = {}
    for name, tree in abstract.items():
        wanted = flatten(tree)
        if not wanted:
            params[name] = {}
            continue
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
        context = ocp.Context()
        largest = max(leaf.size * max(np.dtype(leaf.dtype).itemsize, 4) for leaf in wanted.values())
        context.memory.read_concurrent_bytes = max(READ_BYTES, largest + 1)
        try:
            with context:
                params[name] = ocp.load(directory / name, tree)
        except Exception as error:
            raise ValueError(
                f"{directory}/{name} cannot be read ({_first_line(error)}); "
                "`python launch/convert.py inspect --verify` says which files are damaged"
            ) from error
    return params


def _require(directory, config, names):
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown:
        raise ValueError(f"unknown component {unknown[0]!r}, expected some of {', '.join(COMPONENTS)}")
    missing = [name for name in names if getattr(config, name) is None]
    if missing:
        raise ValueError(
            f"{directory} lacks {', '.join(missing)}; it has {', '.join(config.components)}. Convert the model again "
            "with the missing part (python launch/convert.py --help)"
        )


def component_metadata(directory, name) -> dict:
    """{path: array metadata with shape and dtype} of a component's stored arrays."""
    folder = Path(directory).absolute() / name
    if not folder.is_dir():
        return {}
    try:
        return flatten(ocp.metadata(folder).metadata)
    except Exception as error:
        raise ValueError(f"{folder} is damaged: {_first_line(error)}") from error


def component_dtypes(directory, name) -> dict[str, np.dtype]:
    return {path: np.dtype(leaf.dtype) for path, leaf in component_metadata(directory, name).items()}


def read_leaves(directory, name, paths=None):
    """A component's stored arrays on the host, as stored: (path, array) pairs, a few small ones or one large at a time.

    Args: `paths` of those that are wanted, in their order; all when None.
    """
    metadata = component_metadata(directory, name)
    folder = Path(directory).absolute() / name
    return in_groups(lambda wanted: ocp.load(folder, wanted), metadata, metadata if paths is None else paths)


def in_groups(load, metadata, paths):
    """(path, array) pairs of what `load(tree of empty arrays)` fills, called for at most GROUP_BYTES at a time."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    group, size, paths = {}, 0, list(paths)
    for i, path in enumerate(paths):
        group[path] = np.empty(metadata[path].shape, metadata[path].dtype)  # takes no memory until it is written
        size += group[path].nbytes
        if size >= GROUP_BYTES or i == len(paths) - 1:
            with context:
                loaded = flatten(load(unflatten(group)))
            names = list(group)
            group, size = {}, 0
            for name in names:
                yield name, loaded.pop(name)


def verify(directory) -> list[str]:
    """What is wrong with the bundle's files, one line each; empty when all are as they were written."""
    directory = Path(directory)
    recorded = _read_json(directory).get("files", {})
    lines = []
    for name, entry in recorded.items():
        path = directory / name
        if not path.is_file():
            lines.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            lines.append(f"{name} has {path.stat().st_size:,} bytes, expected {entry['size']:,}")
        elif sha256(path) != entry["sha256"]:
            lines.append(f"{name} has been changed (its hash differs)")
    return lines


# Writing


def save(directory, config: BundleConfig, params: dict, *, tokenizer=None, overwrite=False):
    """Writes a bundle from parameters in memory.

    Args:
      directory: the folder to write.
      config: its `dtypes` are filled in here.
      params: {component: tree of arrays}; the components that `config` has.
      tokenizer: a tokenizer folder to copy, or a `Tokenizer`.
    """
    with Writer(directory, overwrite=overwrite) as writer:
        for name in config.components:
            leaves = ((path, np.asarray(leaf)) for path, leaf in flatten(params[name]).items())
            writer.add(name, getattr(config, name), leaves)
        if tokenizer is not None:
            writer.add_tokenizer(tokenizer)
        writer.provenance = config.provenance
        writer.sizes = {key: getattr(config, key) for key in SIZES}


class Writer:
    """Writes a bundle component by component into `<directory>.partial`, which gets its name when all went well.

        with Writer(directory) as writer:
            writer.add("transformer", config, leaves)

    What an interrupted writer left is removed by the next. Raises FileExistsError for an existing `directory`, unless
    `overwrite` is set and it is a bundle.
    """

    def __init__(self, directory, *, overwrite=False):
        self.directory = Path(directory).absolute()
        self.scratch = self.directory.with_name(self.directory.name + ".partial")
        self.provenance = {}
        self.sizes = {}  # of SIZES, where they differ from the released model's
        if self.directory.exists():
            if not overwrite:
                raise FileExistsError(f"{directory} exists already; choose another --output, or give --overwrite")
            if not is_bundle(self.directory):
                raise FileExistsError(f"{directory} exists and is not a bundle, so it is not overwritten")
        self._configs, self._dtypes = {}, {}

    def __enter__(self):
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        return self

    def add(self, name, config, leaves: Iterable[tuple[str, np.ndarray]]):
        """Writes a component from its (path, array) pairs, holding a few small arrays or one large one at a time."""
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights do not compress, and the hash guards them
        context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
        context.memory.deepcopy_host_arrays = False
        folder, dtypes, group, size = self.scratch / name, set(), {}, 0

        def flush():
            with context:
                ocp.partial.save(folder, unflatten(group))
            group.clear()

        for path, leaf in leaves:
            group[path] = leaf
            dtypes.add(str(leaf.dtype))
            size += leaf.nbytes
            del leaf  # flushing must free it before the next is made
            if size >= GROUP_BYTES:
                flush()
                size = 0
        if group:
            flush()
        if dtypes:
            ocp.partial.finalize(folder)
        self._configs[name], self._dtypes[name] = config, sorted(dtypes)

    def add_tokenizer(self, tokenizer):
        """Copies a tokenizer folder's files, or writes a `Tokenizer`."""
        target = self.scratch / "tokenizer"
        if hasattr(tokenizer, "save"):
            tokenizer.save(target)
            return
        files = [Path(tokenizer) / name for name in TOKENIZER_FILES if (Path(tokenizer) / name).is_file()]
        if not any(file.name in TOKENIZER_FILES[:2] for file in files):
            raise FileNotFoundError(f"{tokenizer} holds no tokenizer: expected tokenizer.json or spiece.model")
        target.mkdir()
        for file in files:
            shutil.copyfile(file, target / file.name)

    def __exit__(self, kind, error, _traceback):
        try:
            if kind is None:
                self._finish()
            elif is_disk_full(error):
                raise OSError(
                    errno.ENOSPC, f"the disk of {self.directory.parent} is full; nothing was kept. Free some space, or "
                    "choose another --output"
                ) from error  # fmt: skip
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _finish(self):
        files = {}
        for path in sorted(path for path in self.scratch.rglob("*") if path.is_file()):
            files[str(path.relative_to(self.scratch))] = {"size": path.stat().st_size, "sha256": sha256(path)}
        content = {
            "format": FORMAT,
            "version": VERSION,
            **{name: None for name in COMPONENTS},
            **{name: dataclasses.asdict(config) for name, config in self._configs.items()},
            **{key: self.sizes.get(key, getattr(BundleConfig, key)) for key in SIZES},
            "dtypes": self._dtypes,
            "provenance": {**self.provenance, "versions": versions()},
            "files": files,
        }
        (self.scratch / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        if self.directory.exists():  # an older bundle steps aside only now
            old = self.directory.with_name(self.directory.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.directory, old)
            os.replace(self.scratch, self.directory)
            shutil.rmtree(old)
        else:
            os.replace(self.scratch, self.directory)


def is_disk_full(error) -> bool:
    """Whether an error (or one that caused it) is a full disk; the storage library gives its own errors for it."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    result = {}
    for name in ("unialign_jax", "jax", "flax", "orbax-checkpoint", "numpy"):
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "not installed as a package"
    return result


def _first_line(error) -> str:
    return next(itertools.chain(str(error).strip().splitlines(), [type(error).__name__]))[:200]
