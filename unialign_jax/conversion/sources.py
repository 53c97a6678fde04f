"""Finds a model's components in downloads: diffusers' folders, Stability's single files, files of one component.

`open_source(path)` reads names and headers only. It tells where each component is, and in which layout.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unialign_jax import bundle
from unialign_jax.conversion import autoencoder, safetensors_file, text_encoder, torch_pickle, transformer
from unialign_jax.conversion.safetensors_file import DTYPES, FLOATS, TensorInfo
from unialign_jax.conversion.settings import read_settings
from unialign_jax.files import check_inside, check_regular, read_json, shown

# The prefix of each component's keys in Stability's single files. CLIP is not used.
PREFIXES = {
    "model.diffusion_model.": "transformer",
    "first_stage_model.": "autoencoder",
    "text_encoders.t5xxl.transformer.": "text_encoder",
    "text_encoders.t5xxl.": "text_encoder",
    "text_encoders.clip_l.": None,
    "text_encoders.clip_g.": None,
}
FOLDERS = {
    "transformer": ("transformer",),
    "autoencoder": ("vae",),
    "text_encoder": ("text_encoder_3", "text_encoder"),
}
TOKENIZER_FOLDERS = ("tokenizer_3", "tokenizer")
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors$")
SCALED = re.compile(r"(^|[._])(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale)($|[._])")
MAX_SHARDS = 10_000
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class Part(NamedTuple):
    """One component in a source."""

    component: str  # "transformer", "text_encoder", "autoencoder" or "teacher"
    layout: str  # transformer: "diffusers", "stability", "unialign"; autoencoder: "diffusers", "ldm"; "t5"
    tensors: dict[str, TensorInfo]  # by key, without the component's prefix
    settings: dict  # its config.json, or {}
    name: str  # for messages: the file or folder

    def read(self, key: str) -> np.ndarray:
        """The tensor at a key. Raises KeyError when there is none."""
        return safetensors_file.read_tensor(self.tensors[key])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self.tensors.items()}

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        return {key: DTYPES[info.dtype] for key, info in self.tensors.items()}

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})


class Source(NamedTuple):
    """The components in a download, and the files that go with them."""

    path: Path
    parts: dict[str, Part]
    tokenizer: Path | None
    mask_embedding: Path | None
    dropped: dict[str, str]  # {part: reason}, of whole parts that are not used


def open_source(path: str | Path, components: Iterable[str] = tuple(FOLDERS)) -> Source:
    """Those of `components` that are in a file or folder; the others may be damaged or absent.

    Raises FileNotFoundError or ValueError with what was found and expected.
    """
    path = Path(path)
    if not path.is_dir():
        try:
            check_regular(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: there is no such file or folder") from None
        return _open_single_file(path, components)
    parts, dropped = {}, {}
    folders = [(path / name) for names in FOLDERS.values() for name in names if (path / name).is_dir()]
    for component in components:
        for name in FOLDERS[component]:
            if (path / name) not in folders or component in parts:
                continue
            classes = read_settings(path / name).get("architectures")
            if isinstance(classes, list) and any(isinstance(each, str) and "CLIP" in each for each in classes):
                dropped[name] = "CLIP: UniAlignment reads T5 alone"
                continue
            part = open_part(path / name)
            if part is None:
                dropped[name] = "neither an MM-DiT, a T5 encoder nor a VAE"
            else:
                parts[part.component] = part
    if not folders:
        part = open_part(path)
        if part is None:
            tensors = read_tensors(path)
            raise unknown(path, tensors)
        parts[part.component] = part
    tokenizer = next((path / name for name in TOKENIZER_FOLDERS if is_t5_tokenizer(path / name)), None)
    if tokenizer is not None:
        check_tokenizer(tokenizer, path)
    masks = sorted([*path.glob("mask_token_emb*.pth"), *path.glob("checkpoint/mask_token_emb*.pth")])
    return Source(path, parts, tokenizer, masks[0] if masks else None, dropped)


def open_component(path: str | Path, component: str) -> Part:
    """The named component in a file or folder. Raises ValueError when something else is in it."""
    parts = open_source(path, (component,)).parts
    if component not in parts:
        held = ", ".join(f"{name} ({part.layout})" for name, part in parts.items()) or "something else"
        raise ValueError(f"{path} holds {held}, expected {component}")
    return parts[component]


def is_t5_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of T5's tokenizer. (CLIP's are vocab.json and merges.txt.)"""
    return (folder / "spiece.model").is_file() or (
        (folder / "tokenizer.json").is_file() and not (folder / "merges.txt").is_file()
    )


def check_tokenizer(folder: str | Path, root: str | Path) -> None:
    """Raises ValueError when a tokenizer's file, which would be copied into the bundle, is a link out of `root`."""
    for name in bundle.TOKENIZER_FILES:
        check_inside(Path(folder) / name, root)


def _open_single_file(path: Path, components: Iterable[str]) -> Source:
    tensors = read_tensors(path)
    split: dict[str | None, dict] = {}
    for key, info in tensors.items():
        for prefix, component in PREFIXES.items():
            if key.startswith(prefix):
                split.setdefault(component, {})[key.removeprefix(prefix)] = info
                break
        else:
            split.setdefault("", {})[key] = info
    alone = len(split.keys() - {None}) == 1 and len(list(path.parent.glob("*.safetensors"))) == 1
    settings = read_settings(path.parent) if alone else {}
    parts, dropped = {}, {}
    if None in split:
        dropped["text_encoders.clip_l, text_encoders.clip_g"] = "UniAlignment reads T5 alone"
    for component, found in split.items():
        if component is None or (component and component not in components):
            continue
        part = identify(found, settings, str(path))
        if part is None:
            raise unknown(path, found)
        if component and part.component != component:
            raise ValueError(f"{path}: what its keys call a {component} is a {part.component}")
        parts[part.component] = part
    return Source(path, parts, None, None, dropped)


def open_part(folder: str | Path) -> Part | None:
    """The component in one folder of safetensors, or None when it is of no known kind."""
    return identify(read_tensors(folder), read_settings(folder), str(folder))


def identify(tensors: dict[str, TensorInfo], settings: dict, name: str) -> Part | None:
    """The component that the tensors make, or None when it is of no known kind."""
    check_floats(tensors, name)
    if layout := transformer.detect_layout(tensors):
        return Part("transformer", layout, tensors, settings, name)
    if text_encoder.is_t5(tensors):
        return Part("text_encoder", "t5", tensors, settings, name)
    if layout := autoencoder.detect_layout(tensors):
        return Part("autoencoder", layout, tensors, settings, name)
    return None


def check_floats(tensors: dict[str, TensorInfo], name: str | Path) -> None:
    """Raises ValueError for tensors that are empty, not of floats, or scaled eight-bit weights."""
    scaled = [key for key in tensors if SCALED.search(key)]
    if scaled:
        raise ValueError(
            f"{name} holds scaled eight-bit weights ({scaled[0]}), which are not read here: "
            "use the file in fp16 or bf16, or the plain fp8 one"
        )
    for key, info in tensors.items():
        if info.dtype not in FLOATS:
            raise ValueError(f"{name} holds {key} of dtype {info.dtype}, expected floats of {', '.join(FLOATS)}")
        if info.size == 0:
            raise ValueError(f"{name} holds {key} of shape {list(info.shape)}, which is empty")


def unknown(path: Path, tensors: dict[str, TensorInfo]) -> ValueError:
    keys = ", ".join(sorted(tensors)[:3])
    return ValueError(
        f"{path} is neither an SD3 or UniAlignment transformer, a T5 v1.1 encoder nor SD3's VAE: "
        f"its {len(tensors)} tensors begin with {keys}"
    )


def read_tensors(path: str | Path, wanted: Callable[[str], bool] | None = None) -> dict[str, TensorInfo]:
    """The tensors of a file (safetensors or `.pth`), or of the one model, sharded or not, in a folder.

    Args:
      wanted: tells which keys are needed; all when None. Shards without any, by the index, need not be there.
    """
    path = Path(path)
    if path.is_file():
        match = SHARD.search(path.name)
        if match and int(match[3]) > 1:
            return _read_shards(path.parent, *_shard_names(path))
        if path.suffix in PICKLES:
            return torch_pickle.read_header(path)
        return safetensors_file.read_header(path)
    indices = sorted(path.glob("*.index*.json"))
    files = sorted(path.glob("*.safetensors"))
    # Of several variants in one folder, such as fp16 beside float32, the one with the plain name is read.
    plain = [index for index in indices if index.name.endswith(".safetensors.index.json")]
    whole = [file for file in files if not SHARD.search(file.name)]
    unmarked = [file for file in whole if file.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    if len(plain) == 1:
        return _read_index(plain[0], wanted)
    if unmarked:
        return safetensors_file.read_header(unmarked[0])
    if len(whole) == 1:
        return safetensors_file.read_header(whole[0])
    if len(indices) == 1 and not whole:
        return _read_index(indices[0], wanted)
    families = {SHARD.search(file.name)[1]: file for file in files if SHARD.search(file.name)}
    if len(families) == 1 and not whole:
        return _read_shards(path, *_shard_names(next(iter(families.values()))))
    if files:
        names = ", ".join(file.name for file in files[:6])
        raise ValueError(f"{path} holds several models ({names}): name the file that is meant")
    pickles = [file.name for file in sorted(path.iterdir()) if file.suffix in PICKLES]
    if pickles:
        raise ValueError(f"{path} holds {pickles[0]} but no safetensors: give that file itself as the source")
    raise ValueError(f"{path} holds no safetensors files")


def _shard_names(path: Path) -> tuple[str, list[str]]:
    """The name of a shard, and the names of all shards of its model."""
    stem, _, count = SHARD.search(path.name).groups()
    if int(count) > MAX_SHARDS:
        raise ValueError(f"{path} calls for {int(count):,} shards, expected at most {MAX_SHARDS:,}")
    return path.name, [f"{stem}-{i + 1:05d}-of-{count}.safetensors" for i in range(int(count))]


def _read_index(index: Path, wanted: Callable[[str], bool] | None) -> dict[str, TensorInfo]:
    """The tensors of the shards in an index. Raises ValueError when it names a file that is not beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is no index of shards: it has no weight_map")
    for key, name in weight_map.items():
        if not isinstance(name, str) or name in ("", "..") or Path(name).name != name or "\0" in name:
            raise ValueError(f"{index} says that {key[:80]!r} lies in {shown(name)}, expected a file beside the index")
    weight_map = {key: name for key, name in weight_map.items() if wanted is None or wanted(key)}
    tensors = _read_shards(index.parent, index.name, sorted(set(weight_map.values())))
    absent = [key for key, name in weight_map.items() if key not in tensors or tensors[key].file.name != name]
    if absent:
        names = ", ".join(sorted(absent)[:3])
        raise ValueError(f"{index} names {len(absent)} tensors that its shards do not hold: {names}")
    return tensors


def _read_shards(folder: Path, named_by: str, names: list[str]) -> dict[str, TensorInfo]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(names)} shards that {named_by} calls for: "
            f"{', '.join(missing[:8])}. Download them"
        )
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        for key, info in safetensors_file.read_header(folder / name).items():
            if key in tensors:
                raise ValueError(f"{folder / name} and {tensors[key].file.name} both hold {key}: which one is meant?")
            tensors[key] = info
    return tensors
