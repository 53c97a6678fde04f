"""Safetensors files, read and written one tensor at a time, as numpy arrays.

The format: eight bytes that give the length of a JSON header, the header ({name: {dtype, shape, data_offsets}}), then
the tensors' bytes, little-endian. Reading goes through plain file reads rather than a memory map, so that what has been
read leaves memory with the array that held it.
"""

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; a header of that length is damage, not a model


class TensorInfo(NamedTuple):
    """What the header says of a tensor, and where its bytes lie."""

    file: Path
    dtype: str  # as the header names it, such as "F16"
    shape: tuple[int, ...]
    offset: int  # bytes from the file's beginning

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_header(path) -> dict[str, TensorInfo]:
    """The tensors of one file by name. Raises ValueError for a file that is no safetensors file, or not all of it."""
    path = Path(path)
    total = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file ({describe_start(start)})")
        if 8 + length > total:
            raise truncated(path, total, 8 + length)
        text = file.read(length)
    try:
        header = json.loads(text)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors, end = {}, 0
        for name, entry in entries.items():
            begin, finish = entry["data_offsets"]
            end = max(end, finish)
            tensors[name] = TensorInfo(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin)
            known = DTYPES.get(entry["dtype"])
            if known is not None and tensors[name].size * known.itemsize != finish - begin:
                raise ValueError(f"{name} has {finish - begin} bytes for shape {entry['shape']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged safetensors header ({error}): download it again") from None
    if 8 + length + end > total:
        raise truncated(path, total, 8 + length + end)
    return tensors


def describe_start(start: bytes) -> str:
    if start.startswith(b"PK"):
        return "it looks like a PyTorch pickle: convert it to safetensors with PyTorch first"
    if start.startswith(b"version "):
        return "it is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if start.lstrip()[:1] in (b"<", b"{"):
        return "it is text, perhaps an error page that was saved as the file: download it again"
    return "its first bytes give no header length"


def truncated(path, found, expected):
    return ValueError(f"{path} is cut short: {found:,} bytes of {expected:,}. Download it again")


def read_tensor(info: TensorInfo) -> np.ndarray:
    """One tensor. Raises ValueError for a dtype that numpy cannot hold."""
    if info.dtype not in DTYPES:
        raise ValueError(f"{info.file} holds tensors of dtype {info.dtype}, which cannot be read here")
    dtype = DTYPES[info.dtype]
    array = np.fromfile(info.file, dtype=dtype, count=info.size, offset=info.offset)
    if array.size != info.size:
        raise truncated(info.file, info.offset + array.nbytes, info.offset + info.size * dtype.itemsize)
    return array.reshape(info.shape)


class Writer:
    """Writes a safetensors file in any order of its tensors; it gets its name when all of them are there.

    Args:
      path: the file, whose folder exists.
      tensors: {name: (numpy dtype, shape)}, all that the file will hold.
    """

    def __init__(self, path, tensors):
        self.path = Path(path)
        self._scratch = self.path.with_name(self.path.name + ".partial")
        self._entries, position = {}, 0
        for name, (dtype, shape) in tensors.items():
            size = math.prod(shape) * np.dtype(dtype).itemsize
            self._entries[name] = (np.dtype(dtype), tuple(shape), position)
            position += size
        header = {
            name: {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, begin + math.prod(shape) * dtype.itemsize],
            }
            for name, (dtype, shape, begin) in self._entries.items()
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._missing = set(tensors)
        self._file = self._scratch.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data_start + position)

    def write(self, name, array):
        """Raises KeyError for an unknown name, ValueError for another shape than announced."""
        dtype, shape, begin = self._entries[name]
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, announced as {shape}")
        self._file.seek(self._data_start + begin)
        self._file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _traceback):
        try:
            self._file.close()
            if kind is None:
                if self._missing:
                    raise ValueError(
                        f"{self.path}: {len(self._missing)} tensors were not written: {min(self._missing)}"
                    )
                os.replace(self._scratch, self.path)
        finally:
            self._scratch.unlink(missing_ok=True)
