"""The tensors of a PyTorch file (`.pth`), without PyTorch and without running what the file says.

Such a file is a zip archive: `data.pkl` describes the tensors, `data/<key>` holds the bytes of each storage. A pickle
is a program for a stack machine that can call any function. The machine here makes dictionaries, lists, numbers, text
and descriptions of tensors, and refuses all else. No tensor is read: what comes out says where its bytes lie.
"""

import math
import os
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unialign_jax.conversion.safetensors_file import DTYPES, FLOATS, TensorInfo, read_tensor
from unialign_jax.files import check_regular, first_line

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
CALLS = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict")
MAX_PICKLE = 2**22  # bytes; that of a model of 700 tensors has a few hundred thousand
LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name


class Refused(ValueError):
    """What a plain file of tensors does not do."""


class Global(NamedTuple):
    """A function or type that the pickle names, "module name"; it is only recognised, never loaded."""

    name: str


class Storage(NamedTuple):
    """Values of one dtype that lie in the file one after another."""

    dtype: str
    offset: int
    count: int
    crc: int


def read_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """The tensors of a state dictionary, a `.pth` file of {name: tensor}, by name.

    Raises FileNotFoundError, and ValueError for a file that is damaged, compressed, or asks for anything but tensors.
    """
    content = read_content(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} holds {describe(content)}, expected a dictionary of tensors by name")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, TensorInfo):
            raise ValueError(f"{path} holds {describe(value)} under {str(key)[:80]!r}, expected tensors by name alone")
    return content


def read_single(path: str | os.PathLike) -> np.ndarray:
    """The one tensor of floats that a `.pth` file holds, bare or in a dictionary; errors as `read_header`."""
    content = read_content(path)
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    if len(tensors) != 1 or not isinstance(tensors[0], TensorInfo):
        raise ValueError(f"{path} holds {describe(content)}, expected one tensor")
    if tensors[0].dtype not in FLOATS:
        raise ValueError(f"{path} holds a tensor of dtype {tensors[0].dtype}, expected floats")
    return read_tensor(tensors[0])


def describe(value: Any) -> str:
    if isinstance(value, TensorInfo):
        return "a tensor"
    if isinstance(value, dict | list | tuple):
        return f"{len(value)} entries"
    return "text" if isinstance(value, str) else "nothing" if value is None else "a number"


def read_content(path: str | os.PathLike):
    """What the file's pickle describes: nested dictionaries, lists and tuples of TensorInfo, numbers and text."""
    path = Path(path)
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = check_members(archive)
            pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise Refused("it holds no data.pkl, which a PyTorch file has")
            prefix = pickles[0].removesuffix("data.pkl")
            for name in (f"{prefix}byteorder", pickles[0]):
                if name in members and members[name].file_size > MAX_PICKLE:
                    raise Refused(f"its {name[-80:]} has {members[name].file_size:,} bytes, more than any model's")
            if f"{prefix}byteorder" in members and archive.read(f"{prefix}byteorder") != b"little":
                raise Refused("it was written on a big-endian machine, which is not read here")
            program = archive.read(pickles[0])
            return Machine(path, lambda key: locate(path, members, f"{prefix}data/{key}")).run(program)
    except Refused as error:
        raise ValueError(f"{path} is refused: {error}") from None
    except (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or first_line(error, 100)
        raise ValueError(
            f"{path} is not a PyTorch file (a zip archive, as PyTorch writes since 1.6), or not all of one ({reason})"
        ) from None


def check_members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by name, none compressed: a small file must not become a large one."""
    members = {}
    for info in archive.infolist():
        if info.filename in members:
            raise Refused(f"it holds {info.filename[:80]!r} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise Refused(f"{info.filename[:80]!r} in it is compressed or encrypted, which PyTorch never does")
        members[info.filename] = info
    return members


def locate(path: str | os.PathLike, members: dict[str, zipfile.ZipInfo], name: str) -> tuple[int, zipfile.ZipInfo]:
    """Where the bytes of a member begin in the file."""
    if name not in members:
        raise Refused(f"it lacks {name[:80]!r}")
    info = members[name]
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(LOCAL_HEADER)
        name_length, extra_length = struct.unpack("<2H", header[26:])
        found = file.read(name_length)
        size = file.seek(0, 2)
    if header[:4] != b"PK\x03\x04" or found != name.encode():
        raise Refused(f"{name[:80]!r} in it is not where its directory says")
    begin = info.header_offset + LOCAL_HEADER + name_length + extra_length
    if begin + info.file_size > size:
        raise Refused(f"{name[:80]!r} in it reaches beyond the file's end")
    return begin, info


class Machine:
    """Runs a pickle's program as far as a plain file of tensors needs it.

    Args: `path` of the file; `find(key)` gives where a storage's bytes begin, and its zip member.
    """

    def __init__(self, path, find):
        self._path, self._find = path, find
        self._stack, self._marks, self._memo = [], [], {}

    def run(self, program: bytes):
        """The value that the program describes."""
        try:
            for opcode, argument, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    return self._pop()
                self._step(opcode.name, argument)
        except Refused:
            raise
        except ValueError as error:  # of pickletools, for a program that is cut short or garbled
            raise damaged(first_line(error, 100)) from None
        raise damaged("it has no end")

    def _step(self, name, argument):
        push = self._stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(self._stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "INT" | "LONG" | "BINFLOAT" | "FLOAT":
                push(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "UNICODE":
                push(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "TUPLE":
                push(tuple(self._pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                push(tuple([self._pop() for _ in range(int(name[-1]))][::-1]))
            case "LIST":
                push(self._pop_mark())
            case "DICT":
                pairs = self._pop_mark()
                push({})
                self._put(pairs)
            case "APPEND" | "APPENDS":
                values = [self._pop()] if name == "APPEND" else self._pop_mark()
                self._top(list).extend(values)
            case "SETITEM" | "SETITEMS":
                self._put([self._pop(), self._pop()][::-1] if name == "SETITEM" else self._pop_mark())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "GET" | "BINGET" | "LONG_BINGET":
                if argument not in self._memo:
                    raise damaged("it refers to what is not there")
                push(self._memo[argument])
            case "GLOBAL":
                push(known(argument))
            case "STACK_GLOBAL":
                last = self._pop(str)
                push(known(f"{self._pop(str)} {last}"))
            case "BINPERSID":
                push(self._storage(self._pop()))
            case "REDUCE":
                arguments = self._pop(tuple)
                push(self._call(self._pop(), arguments))
            case "BUILD":  # a state dictionary's notes on versions, which are not needed
                self._pop()
                self._top(dict)
            case _:
                raise Refused(f"its pickle has the instruction {name}, which no plain tensor needs")

    def _top(self, kind=object):
        if len(self._stack) <= (self._marks[-1] if self._marks else 0) or not isinstance(self._stack[-1], kind):
            raise damaged("a value is missing or of another kind")
        return self._stack[-1]

    def _pop(self, kind=object):
        self._top(kind)
        return self._stack.pop()

    def _pop_mark(self):
        if not self._marks:
            raise damaged("a mark is missing")
        begin = self._marks.pop()
        items = self._stack[begin:]
        del self._stack[begin:]
        return items

    def _put(self, pairs):
        """Keys and values, in turn, into the dictionary at the top."""
        items = self._top(dict)
        if len(pairs) % 2:
            raise damaged("a value is missing")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | int):  # of tuples in tuples, a hash can take for ever
                raise Refused("its pickle has keys that are no names")
            if key in items:
                raise Refused(f"its pickle gives {str(key)[:80]!r} twice")
            items[key] = value

    def _storage(self, reference) -> Storage:
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] != "storage":
            raise Refused("its pickle refers to something else than a storage")
        _, kind, key, _, count = reference
        name = kind.name.removeprefix("torch ") if isinstance(kind, Global) else ""
        if name not in STORAGES or not isinstance(key, str) or not is_count(count):
            raise Refused("its pickle refers to a storage of an unknown type")
        begin, info = self._find(key)
        dtype = STORAGES[name]
        if count * DTYPES[dtype].itemsize != info.file_size:
            raise Refused(f"its storage {key[:80]!r} has {info.file_size:,} bytes for {count:,} values of {dtype}")
        return Storage(dtype, begin, count, info.CRC)

    def _call(self, function, arguments):
        name = function.name if isinstance(function, Global) else None
        if name == "collections OrderedDict" and arguments in ((), ([],)):
            return {}
        if name == "torch._utils _rebuild_parameter" and arguments and isinstance(arguments[0], TensorInfo):
            return arguments[0]
        if name == "torch._utils _rebuild_tensor_v2" and len(arguments) >= 4:
            return rebuild_tensor(self._path, *arguments[:4])
        raise Refused("its pickle calls a function in a way that no plain tensor needs")


def damaged(reason: str) -> Refused:
    return Refused(f"its pickle is damaged ({reason})")


def known(name: str) -> Global:
    """Refuses a name that no plain file of tensors needs."""
    if name not in CALLS and not (name.startswith("torch ") and name.removeprefix("torch ") in STORAGES):
        wanted = name.replace(" ", ".")[:100]
        raise Refused(f"it wants to load {wanted!r}, which is not part of a plain tensor")
    return Global(name)


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def rebuild_tensor(path: str | os.PathLike, storage: Any, offset: Any, shape: Any, strides: Any) -> TensorInfo:
    """A tensor as a view of its storage, as PyTorch describes it: offset and strides count values."""
    fits = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not fits or len(shape) != len(strides) or len(shape) > 32 or not all(map(is_count, (offset, *shape, *strides))):
        raise Refused("a tensor has an impossible shape")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.count or (all(shape) and last >= storage.count):
        raise Refused("a tensor reaches beyond its storage")
    begin = storage.offset + offset * DTYPES[storage.dtype].itemsize
    c_order = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    plain = not all(shape) or all(n == 1 or a == b for n, a, b in zip(shape, strides, c_order, strict=True))
    whole = plain and offset == 0 and math.prod(shape) == storage.count
    return TensorInfo(path, storage.dtype, shape, begin, None if plain else strides, storage.crc if whole else None)
