"""Readers of what people have on disk or in a bucket: a module for each format, and a guess which one it is."""

import os
from collections.abc import Iterator
from types import ModuleType

from unialign_jax.data import signatures
from unialign_jax.data.sources import folder, huggingface, json_lists, locations, parquet, webdataset
from unialign_jax.data.sources.parts import Part, SourceOptions

FORMATS: dict[str, ModuleType] = {
    "json": json_lists,
    "folder": folder,
    "webdataset": webdataset,
    "parquet": parquet,
    "hf": huggingface,
}
ALIASES = {"jsonl": "json"}
_ENDINGS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".tar": "webdataset", ".tgz": "webdataset"}
_ENDINGS |= {".parquet": "parquet", ".arrow": "hf"}


def guess_format(path: str) -> str:
    """The format of a file or folder, by its name, its first bytes, or what it holds.

    Raises FileNotFoundError where nothing is, and ValueError for what is none of them.
    """
    if path.startswith("hf://datasets/") and path.count("/") <= 4 and not path.endswith(tuple(_ENDINGS)):
        return "hf"
    if not locations.exists(path):
        hint = "; the name of a Hugging Face data set needs --format=hf" if path.count("/") == 1 else ""
        raise FileNotFoundError(f"source {path} does not exist{hint}")
    if locations.is_folder(path):
        return _guess_folder(path)
    name = path.lower().removesuffix(".gz") if path.lower().endswith(".tar.gz") else path.lower()
    known = _ENDINGS.get(os.path.splitext(name)[1])
    if known and known != "hf":
        return known
    with locations.open_file(path) as file:
        head = file.read(signatures.HEAD)
    found = signatures.guess(head)
    if found in ("a tar file", "a Parquet file"):
        return "webdataset" if found == "a tar file" else "parquet"
    if not found and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return "json"
    what = f", it is {found}" if found else ""
    raise ValueError(f"source {path} is in no known format{what}: name one with --format ({', '.join(FORMATS)})")


def _guess_folder(path: str) -> str:
    if huggingface.is_saved(path):
        return "hf"
    names = locations.listing(path)
    if any(webdataset.is_tar(name) for name in names):
        return "webdataset"
    if any(name.endswith(".parquet") for name in names):
        return "parquet"
    lists = [name for name in names if name.endswith((".jsonl", ".json")) and name not in folder.METADATA]
    pictures = any(name.lower().endswith(folder.IMAGES) or name in folder.METADATA for name in names)
    if lists and not pictures:
        raise ValueError(f"source {path} is a folder; it holds {', '.join(lists[:3])}: name that file, or a pattern")
    return "folder"


def list_parts(format: str, paths: list[str], options: SourceOptions) -> Iterator[Part]:
    """The parts of all files and folders, in order. Each has its own label, so that no two rows share a key."""
    reader = FORMATS[format]
    for path, label in zip(paths, labels(paths), strict=True):
        yield from reader.list_parts(path, label, options)


def labels(paths: list[str]) -> list[str]:
    """The shortest ends of paths, the same number of names for each, that tell them apart."""
    split = [[name for name in path.split("/") if name] or [path] for path in paths]
    for count in range(1, max(map(len, split), default=1) + 1):
        found = ["/".join(names[-count:]) for names in split]
        if len(set(found)) == len(found):
            return found
    return paths
