"""One tensor out of a PyTorch `.pth` file, without PyTorch and without running what the file says.

Such a file is a zip archive: `data.pkl` describes the tensors, `data/<key>` holds the bytes of each storage. A pickle
can name any function to be called; this reader knows the few that rebuild tensors and refuses all others.
"""

import collections
import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype("<f8"),
}


class StorageType(NamedTuple):
    dtype: np.dtype


def rebuild_tensor(storage, offset, shape, strides, *_):
    """A tensor as a view of its storage, as PyTorch describes it: offset and strides count elements."""
    if len(shape) != len(strides) or min((offset, *shape, *strides), default=0) < 0:
        raise pickle.UnpicklingError("a tensor has an impossible shape")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.size or (all(shape) and last >= storage.size):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    strides = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides, writeable=False).copy()


def rebuild_parameter(tensor, *_):
    return tensor


ALLOWED = {
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("torch", name): StorageType(dtype) for name, dtype in STORAGES.items()},
}


class Unpickler(pickle.Unpickler):
    def __init__(self, file, archive, prefix):
        super().__init__(file)
        self._archive, self._prefix = archive, prefix

    def find_class(self, module, name):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which is not part of a plain tensor")
        return ALLOWED[module, name]

    def persistent_load(self, reference):
        kind, storage_type, key, _device, count = reference
        if kind != "storage" or not isinstance(storage_type, StorageType):
            raise pickle.UnpicklingError(f"it refers to a {kind} of unknown type")
        data = self._archive.read(f"{self._prefix}data/{key}")
        return np.frombuffer(data, storage_type.dtype, count)


def read_tensor(path) -> np.ndarray:
    """The one tensor that a `.pth` file holds, bare or in a dictionary.

    Raises ValueError when the file is not a PyTorch archive, asks for anything but tensors, or holds several.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{path} is not a PyTorch file: it holds no data.pkl")
            prefix = pickles[0].removesuffix("data.pkl")
            if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
                raise ValueError(f"{path} was written on a big-endian machine, which is not read here")
            content = Unpickler(io.BytesIO(archive.read(pickles[0])), archive, prefix).load()
    except zipfile.BadZipFile:
        raise ValueError(f"{path} is not a PyTorch file (no zip archive), or not all of one") from None
    except (pickle.UnpicklingError, KeyError, EOFError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is refused: {error}") from None
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    if len(tensors) != 1 or not isinstance(tensors[0], np.ndarray):
        raise ValueError(f"{path} holds {len(tensors)} entries, expected one tensor")
    return tensors[0]
