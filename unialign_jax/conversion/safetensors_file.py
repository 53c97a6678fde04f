"""Safetensors files, read and written one tensor at a time, as numpy arrays.

The format: eight bytes that give the length of a JSON header, the header ({name: {dtype, shape, data_offsets}}), then
the tensors' bytes, little-endian. The safetensors library checks a header (offsets that overlap, leave gaps or point
elsewhere, sizes that do not fit); reading goes through plain file reads rather than its memory map, so that what has
been read leaves memory with the array that held it.
"""

import contextlib
import json
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from unialign_jax.files import check_regular, first_line, replacing_file, unique_keys

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
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; a header of that length is damage, not a model


class TensorInfo(NamedTuple):
    """What a file says of a tensor, and where its bytes lie."""

    file: Path
    dtype: str  # as safetensors names it, such as "F16"
    shape: tuple[int, ...]
    offset: int  # bytes from the file's beginning
    strides: tuple[int, ...] | None = None  # in values; None for C order
    crc: int | None = None  # CRC-32 of the tensor's bytes, where the file has one

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def read_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """The tensors of one file by name.

    Raises FileNotFoundError, and ValueError for a file that is no safetensors file, not all of it, or damaged.
    """
    path = Path(path)
    total = check_regular(path)
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= MAX_HEADER:
            raise ValueError(f"{path} is not a safetensors file ({describe_start(start)})")
        if 8 + length > total:
            raise truncated(path, total, 8 + length)
        text = file.read(length)
    try:
        with safetensors.safe_open(path, "numpy"):  # checks every entry, reads no tensor
            pass
        header = json.loads(text, object_pairs_hook=unique_keys)
    except (safetensors.SafetensorError, ValueError) as error:
        end = 8 + length + announced_bytes(text)
        if end > total:
            raise truncated(path, total, end) from None
        reason = first_line(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{path} has a damaged safetensors header ({reason}): download it again") from None
    return {
        name: TensorInfo(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def announced_bytes(text: str) -> int:
    """How many bytes of tensors a header speaks of, of any kind; 0 where it is too damaged to tell."""
    try:
        entries = [entry for name, entry in json.loads(text).items() if name != "__metadata__"]
        return max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return 0


def describe_start(start: bytes) -> str:
    if start.startswith(b"PK"):
        return "it looks like a PyTorch pickle: if it is, give it a name that ends in .pth"
    if start.startswith(b"version "):
        return "it is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if start.lstrip()[:1] in (b"<", b"{"):
        return "it is text, perhaps an error page that was saved as the file: download it again"
    return "its first bytes give no header length"


def truncated(path: str | os.PathLike, found: int, expected: int):
    return ValueError(f"{path} is cut short: {found:,} bytes of {expected:,}. Download it again")


def read_tensor(info: TensorInfo) -> np.ndarray:
    """One tensor. Raises ValueError for a dtype that numpy cannot hold, and for bytes that are missing or changed."""
    if info.dtype not in DTYPES:
        raise ValueError(f"{info.file} holds tensors of dtype {info.dtype}, which cannot be read here")
    dtype = DTYPES[info.dtype]
    count = info.size
    if info.strides is not None and count:
        count = 1 + sum((size - 1) * stride for size, stride in zip(info.shape, info.strides, strict=True))
    array = np.fromfile(info.file, dtype=dtype, count=count, offset=info.offset)
    if array.size != count:
        raise truncated(info.file, info.offset + array.nbytes, info.offset + count * dtype.itemsize)
    if info.crc is not None and zlib.crc32(array.view(np.uint8).data) != info.crc:
        raise ValueError(f"{info.file} is damaged: the checksum from byte {info.offset:,} differs. Download it again")
    if info.strides is not None:
        strides = [stride * dtype.itemsize for stride in info.strides]
        return np.lib.stride_tricks.as_strided(array, info.shape, strides, writeable=False).copy()
    return array.reshape(info.shape)


class Writer:
    """Writes a safetensors file in any order of its tensors; it gets its name when all of them are there.

    Args:
      tensors: {name: (numpy dtype, shape)}, all that the file will hold.
      metadata: texts by name, for the file's header.
    """

    def __init__(self, path, tensors, metadata=None):
        self.path = Path(path)
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
        text = json.dumps(
            {"__metadata__": {"format": "pt", **(metadata or {})}, **header}, separators=(",", ":")
        ).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._missing = set(tensors)
        self._header, self._size = len(text).to_bytes(8, "little") + text, self._data_start + position

    def write(self, name: str, array: np.ndarray):
        """Raises KeyError for an unknown name, ValueError for another shape than announced."""
        dtype, shape, begin = self._entries[name]
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, announced as {shape}")
        self._file.seek(self._data_start + begin)
        self._file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
        self._missing.discard(name)

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(stack.enter_context(replacing_file(self.path)).open("wb"))
            self._file.write(self._header)
            self._file.truncate(self._size)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None and self._missing:
            error = ValueError(f"{self.path}: {len(self._missing)} tensors were not written: {min(self._missing)}")
            with self._stack:
                raise error
        return self._stack.__exit__(kind, error, traceback)
