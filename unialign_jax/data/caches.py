"""Caches: arrays that a frozen network gives for the records of a data folder, computed once and read by index.

A cache lies in the data folder that it belongs to, in a folder of its own (`NAMES`):

    cache.json                 what it is of and what made it (`Description`)
    NAME-00000.npy, ...        float16 rows of the array NAME, `rows` records a file, in the order of the records

A file appears when it is whole, so a writer that was killed resumes with the files that are not there. A row of NaN
stands for a record that cannot be decoded.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
from pathlib import Path

import numpy as np

from unialign_jax.files import check_regular, read_json, replacing_file, shown

VERSION = 1
FILE = "cache.json"
NAMES = ("teacher", "latents")  # the folders: features of the teacher; moments of the autoencoder
ENCODE_COMMAND = "python launch/prepare_data.py encode --help"
_ROWS_FILE = re.compile(r"[a-z_]+-\d{5,}\.npy")
_TARGET_BYTES = 64 << 20  # of one file


@dataclasses.dataclass(frozen=True)
class Description:
    """What `cache.json` says.

    Attributes:
      name: one of NAMES.
      records: the SHA-256 of the folder's `records.json`.
      num_records: how many records the folder has.
      size: (height, width) of the images that were encoded.
      network: identifies the network and its weights.
      arrays: name -> shape of one record's row.
      rows: records a file.
      options: further settings that change the numbers.
    """

    name: str
    records: str
    num_records: int
    size: tuple[int, int]
    network: str
    arrays: dict[str, tuple[int, ...]]
    rows: int
    options: dict

    @property
    def num_parts(self) -> int:
        return -(-self.num_records // self.rows)

    def part(self, number: int) -> range:
        """The records of part `number`."""
        return range(number * self.rows, min((number + 1) * self.rows, self.num_records))


def records_digest(directory: str | os.PathLike) -> str:
    """Identifies the records of a data folder: the SHA-256 of its `records.json`."""
    path = Path(directory) / "records.json"
    check_regular(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size_name(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def rows_of_a_file(arrays: dict[str, tuple[int, ...]]) -> int:
    """How many records go into one file, so that the files of the largest array have about 64 MB."""
    return max(1, _TARGET_BYTES // (2 * max(math.prod(shape) for shape in arrays.values())))


def is_cache(directory: Path) -> bool:
    """Whether a folder holds what a cache's writer writes, and nothing else."""
    if directory.name not in NAMES or not directory.is_dir() or directory.is_symlink():
        return False
    entries = list(directory.iterdir())
    return all(
        entry.is_file() and (entry.name == FILE or _ROWS_FILE.fullmatch(entry.name) or entry.name.endswith(".partial"))
        for entry in entries
    )


def read_description(directory: str | os.PathLike) -> Description:
    """The description in a cache's folder. Raises ValueError, or FileNotFoundError where there is none."""
    path = Path(directory) / FILE
    content = read_json(path)
    if content.get("version") != VERSION:
        raise ValueError(f"{path} is of version {shown(content.get('version'))}, this code reads version {VERSION}")
    kinds = {"name": str, "records": str, "num_records": int, "size": list, "network": str, "arrays": dict}
    kinds |= {"rows": int, "options": dict}
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind) or (kind is int and content[key] < 1):
            raise ValueError(f"{path} has {shown(content.get(key))} for {key}: remove the folder and encode again")
    arrays = {}
    for key, shape in [("size", content["size"]), *content["arrays"].items()]:
        if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"{path} has shape {shown(shape)} for {key}: remove the folder and encode again")
        arrays[key] = tuple(shape)
    size = arrays.pop("size")
    return Description(**{key: content[key] for key in kinds} | {"size": size, "arrays": arrays})


class Writer:
    """Writes the parts of a cache that are not there yet: `writer.missing()`, then `writer.write(part, arrays)`.

    Several processes may write parts of one cache. Raises ValueError for a folder that holds a cache of other records,
    of another network or of other settings, unless `overwrite` is on: then what is there is removed.
    """

    def __init__(self, directory: str | os.PathLike, description: Description, *, overwrite: bool = False):
        self.directory, self.description = Path(directory) / description.name, description
        path = self.directory / FILE
        if self.directory.exists() and not is_cache(self.directory):
            raise ValueError(f"{self.directory} holds what is no cache: move that away")
        if path.exists() and not overwrite:
            if problems := differences(read_description(self.directory), description):
                raise ValueError(f"{self.directory} is there already, and {problems[0]}; --overwrite replaces it")
            return
        if self.directory.exists():
            for file in self.directory.iterdir():
                file.unlink()
        self.directory.mkdir(exist_ok=True)
        content = {"format": "unialign_jax cache", "version": VERSION} | dataclasses.asdict(description)
        with replacing_file(path) as scratch:
            scratch.write_text(json.dumps(content, indent=1) + "\n")

    def missing(self, share: tuple[int, int] = (0, 1)) -> list[int]:
        """The numbers of the parts that are not there, of every n-th part from the i-th on: `share` is (i, n)."""
        return [
            number for number in range(share[0], self.description.num_parts, share[1]) if not self._is_there(number)
        ]

    def _is_there(self, number):
        return all(_file(self.directory, name, number).is_file() for name in self.description.arrays)

    def write(self, number: int, arrays: dict[str, np.ndarray]) -> None:
        """Part `number`: arrays [records of the part, ...]. Raises ValueError for arrays of another shape."""
        count = len(self.description.part(number))
        for name, shape in self.description.arrays.items():
            if arrays[name].shape != (count, *shape):
                raise ValueError(f"{name} of part {number} has shape {arrays[name].shape}, expected {(count, *shape)}")
        for name in self.description.arrays:
            with replacing_file(_file(self.directory, name, number)) as scratch, open(scratch, "wb") as file:
                np.save(file, np.asarray(arrays[name], np.float16))


class Cache:
    """A whole cache: `cache[index]` -> {name: float16 array} of one record, read from disk. Safe in threads."""

    def __init__(self, directory: str | os.PathLike, name: str, leave_out: tuple[str, ...] = ()):
        """Raises ValueError for a cache of other records, or with parts missing.

        Args:
          leave_out: arrays that are not read.
        """
        self.directory = Path(directory) / name
        self.description = read_description(self.directory)
        again = f"encode again, see `{ENCODE_COMMAND}`"
        if self.description.records != records_digest(directory):
            raise ValueError(f"{self.directory} was made of other records than {directory} holds: {again}")
        for number in range(self.description.num_parts):
            for array, shape in self.description.arrays.items():
                file = _file(self.directory, array, number)
                try:
                    found = check_regular(file)
                except FileNotFoundError:
                    raise ValueError(f"{file} is missing, the cache is not whole: {again}") from None
                expected = _file_size((len(self.description.part(number)), *shape))
                if found != expected:
                    raise ValueError(f"{file} has {found} bytes, expected {expected}: {again}")
        self._arrays = [array for array in self.description.arrays if array not in leave_out]
        self._maps: dict[tuple[str, int], np.ndarray] = {}

    def __getitem__(self, index: int) -> dict[str, np.ndarray] | None:
        """The arrays of record `index`; None when the record could not be decoded."""
        number, row = divmod(index, self.description.rows)
        found = {name: np.array(self._map(name, number)[row]) for name in self._arrays}
        return None if any(np.isnan(value.flat[0]) for value in found.values()) else found

    def _map(self, name, number):
        if (name, number) not in self._maps:
            self._maps[name, number] = np.load(_file(self.directory, name, number), mmap_mode="r")
        return self._maps[name, number]


def find_cache(directory: str | os.PathLike, name: str, leave_out: tuple[str, ...] = ()) -> Cache | None:
    """The cache of that name in a data folder; None where there is none. Arguments and errors are those of `Cache`."""
    return Cache(directory, name, leave_out) if (Path(directory) / name / FILE).is_file() else None


def differences(found: Description, expected: Description) -> list[str]:
    """What differs between two descriptions, one line each, the found one named first."""
    words = {
        "records": "it was made of other records",
        "network": f"it was made by another network ({found.network}, not {expected.network})",
        "size": f"it was made of images of {size_name(found.size)} pixels, not {size_name(expected.size)}",
    }
    lines = [text for key, text in words.items() if getattr(found, key) != getattr(expected, key)]
    if found.options != expected.options or found.arrays != expected.arrays:
        old, new = (json.dumps(each.options | {"arrays": each.arrays}) for each in (found, expected))
        lines.append(f"it was made with other settings ({old}, not {new})")
    return lines


def _file_size(shape: tuple[int, ...]) -> int:
    """Bytes of an .npy file of float16."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return header.tell() + 2 * math.prod(shape)


def _file(directory: Path, name: str, number: int) -> Path:
    return directory / f"{name}-{number:05d}.npy"
