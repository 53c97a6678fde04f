"""Single files that are damaged or made to harm: safetensors, `.pth`. Each is refused in one line that names it."""

import builtins
import collections
import json
import os
import pickle
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest

from unialign_jax.conversion import importing, safetensors_file, sources, torch_pickle

bad_input = pytest.mark.bad_input


# Safetensors


def tensor(begin=0, end=16, shape=(4,), dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def save(path, header, size=16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return path


TENSOR = json.dumps(tensor()).encode()
DAMAGED = {
    "overlapping": ({"a": tensor(), "b": tensor(8, 24)}, 24),
    "a gap": ({"a": tensor(), "b": tensor(20, 36)}, 36),
    "trailing bytes": ({"a": tensor()}, 20),
    "negative begin": ({"a": tensor(-16, 0)}, 16),
    "backwards": ({"a": tensor(16, 0)}, 16),
    "negative shape": ({"a": tensor(0, 16, (-2, -2))}, 16),
    "too few bytes": ({"a": tensor(0, 12)}, 12),
    "a key twice": (b'{"a": %s, "a": %s}' % (TENSOR, json.dumps(tensor(16, 32)).encode()), 32),
    "a key twice, the same": (b'{"a": %s, "a": %s}' % (TENSOR, TENSOR), 16),
    "a field twice": (b'{"a": {"dtype": "F32", "shape": [4], "shape": [2, 2], "data_offsets": [0, 16]}}', 16),
    "a field is missing": ({"a": {"dtype": "F32", "shape": [4]}}, 16),
    "shape of truth": ({"a": tensor(0, 16, (True, 4))}, 16),
    "shape of floats": ({"a": tensor(0, 16, (4.0,))}, 16),
    "shape of text": ({"a": tensor(0, 16, "4")}, 16),
    "shape is null": ({"a": tensor(0, 16, None)}, 16),
    "shape is NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}', 16),
    "huge shape": ({"a": tensor(0, 16, (2**62, 2**62))}, 16),
    "huge and empty": ({"a": tensor(0, 0, (2**62, 2**62, 0))}, 0),
    "huge offsets": ({"a": tensor(2**70, 2**70 + 16)}, 16),
    "offsets of text": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": ["0", "16"]}}, 16),
    "one offset": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16]}}, 16),
    "dtype is a number": ({"a": tensor(dtype=32)}, 16),
    "not an object": ([tensor()], 16),
    "a tensor is a number": ({"a": 3}, 16),
    "metadata of numbers": ({"__metadata__": {"step": 3}, "a": tensor()}, 16),
    "not UTF-8": (b'{"\xff\xfe": 3}', 16),
    "not closed": (b'{"a": {"dtype": "F32"', 16),
    "deep": (b'{"a":' * 100_000, 16),
    "nothing": (b"  ", 0),
}


@bad_input
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_safetensors_header(case, tmp_path, refuses):
    path = save(tmp_path / "x.safetensors", *DAMAGED[case])
    refuses(lambda: safetensors_file.read_header(path), str(path))


@bad_input
@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ["not a safetensors file"]),
        (b"\x01\x00", ["not a safetensors file"]),
        (b"\xff" * 16, ["not a safetensors file"]),
        ((2**40).to_bytes(8, "little") + b"{}", ["not a safetensors file"]),
        ((1000).to_bytes(8, "little") + b"{}", ["cut short"]),
        (b"PK\x03\x04 a pickle", ["PyTorch pickle"]),
        (b"version https://git-lfs.github.com/spec/v1\n", ["Git LFS pointer"]),
        (b"<!DOCTYPE html><html>gated</html>", ["error page"]),
    ],
)
def test_what_is_no_safetensors_file(content, words, tmp_path, refuses):
    (tmp_path / "x.safetensors").write_bytes(content)
    refuses(lambda: safetensors_file.read_header(tmp_path / "x.safetensors"), "x.safetensors", *words)


@bad_input
def test_a_safetensors_file_that_is_cut_short(tmp_path, refuses):
    path = save(tmp_path / "x.safetensors", {"a": tensor(), "b": tensor(16, 32)}, size=31)
    refuses(lambda: safetensors_file.read_header(path), "is cut short")


def test_the_checks_of_a_header_cost_little(tmp_path):
    """The library maps the file and reads no tensor: of a terabyte that is a hole, nothing is read."""
    size = 2**40
    path = save(tmp_path / "x.safetensors", {"a": tensor(0, size, (size,), "U8")}, 0)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    assert safetensors_file.read_header(path)["a"].size == size


@bad_input
@pytest.mark.parametrize("value", [np.zeros(4, np.int8), np.zeros(4, np.int64), np.zeros(4, bool), np.zeros((0, 4))])
def test_weights_that_are_no_floats(value, tmp_path, refuses):
    from safetensors.numpy import save_file

    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    save_file({key: value}, tmp_path / "x.safetensors")
    refuses(lambda: sources.open_source(tmp_path / "x.safetensors"), "x.safetensors holds", key)


# PyTorch's files


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Named:
    """A function by its name alone, which need not exist."""

    def __init__(self, module, name):
        self.code = f"c{module}\n{name}\n".encode()


FLOATS = Named("torch", "FloatStorage")
REBUILD = Named("torch._utils", "_rebuild_tensor_v2")


def program(value) -> bytes:
    """The pickle (protocol 2) of a value; Named, Storage and Made become what PyTorch writes."""
    if isinstance(value, Named):
        return value.code
    if isinstance(value, Storage):
        return program(value.reference) + b"Q"
    if isinstance(value, Made):
        return program(value.function) + program(value.arguments) + b"R"
    if isinstance(value, dict):
        return b"}(" + b"".join(program(item) for pair in value.items() for item in pair) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(program, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(program, value)) + b"t"
    return pickle.dumps(value, protocol=2)[2:-1]


class Storage:
    def __init__(self, *reference):
        self.reference = reference


class Made:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


def floats(count=4, key="0", kind=FLOATS):
    return Storage("storage", kind, key, "cpu", count)


def made(storage=None, offset=0, shape=(4,), strides=(1,)):
    return Made(REBUILD, storage or floats(), offset, shape, strides, False, {})


def write_pth(path, pickled, storages=None, compression=zipfile.ZIP_STORED, **more):
    """An archive as PyTorch writes it; `storages` are {key: bytes}."""
    if not isinstance(pickled, bytes):
        pickled = b"\x80\x02" + program(pickled) + b"."
    members = {"x/data.pkl": pickled, "x/version": b"3\n", **more}
    members |= {
        f"x/data/{key}": data for key, data in (storages or {"0": np.arange(4.0, dtype="f4").tobytes()}).items()
    }
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_what_is_written_here_is_a_tensor(tmp_path):
    path = write_pth(tmp_path / "x.pth", {"w": made(), "v": made(shape=(2, 1), strides=(2, 7), offset=1)})
    found = {key: safetensors_file.read_tensor(info) for key, info in torch_pickle.read_header(path).items()}
    np.testing.assert_array_equal(found["w"], [0, 1, 2, 3])
    np.testing.assert_array_equal(found["v"], [[1], [3]])
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(torch.load(path)["v"].numpy(), [[1], [3]])


HUGE = 2**40
PICKLES = {
    "a negative offset": made(offset=-1),
    "an offset beyond": made(offset=1),
    "a shape beyond": made(shape=(5,)),
    "strides beyond": made(shape=(2, 2), strides=(3, 1)),
    "negative strides": made(strides=(-1,)),
    "strides that repeat": made(shape=(HUGE,), strides=(0,)),
    "a huge shape": made(shape=(HUGE, HUGE, HUGE), strides=(0, 0, 0)),
    "a shape of truth": made(shape=(True,)),
    "a shape of floats": made(shape=(4.0,)),
    "a shape of text": made(shape="4"),
    "a shape of nothing": made(shape=None),
    "more strides than sizes": made(strides=(1, 1)),
    "sixty dimensions": made(shape=(1,) * 60, strides=(1,) * 60),
    "no storage": Made(REBUILD, [1.0], 0, (4,), (1,), False, {}),
    "too few arguments": Made(REBUILD, floats()),
    "a storage that is missing": made(floats(key="7")),
    "a storage outside": made(floats(key="../../etc/passwd")),
    "a storage of another size": made(floats(count=3)),
    "a storage of a huge size": made(floats(count=HUGE)),
    "a storage of an unknown type": made(floats(kind=Named("torch", "QInt8Storage"))),
    "a storage of no type": made(floats(kind="FloatStorage")),
    "another persistent object": Storage("module", 1),
    "a persistent object that is text": Storage(),
    "a number": 3,
    "text": "weights",
    "nothing": None,
    "a list": [made()],
    "an empty dictionary": {},
    "a nested dictionary": {"model": {"w": made()}},
    "a step beside the tensors": {"w": made(), "step": 3},
    "tensors by number": {0: made()},
    "tensors by tuple": {("w", 0): made()},
    "a key twice": b"\x80\x02}(" + 2 * (program("w") + program(made())) + b"u.",
    "a parameter of a list": Made(Named("torch._utils", "_rebuild_parameter"), [1], True, {}),
    "a dictionary from pairs": Made(Named("collections", "OrderedDict"), [["w", 1]]),
    "a call of a tensor": Made(made(), 1),
    "os.system": Made(Named("os", "system"), "true"),
    "eval": Made(Named("builtins", "eval"), "1"),
    "getattr": Made(Named("builtins", "getattr"), "x", "y"),
    "a module": Made(Named("torch.nn.modules.linear", "Linear")),
    "numpy": Made(Named("numpy.core.multiarray", "_reconstruct")),
    "a name of two lines": b"\x80\x04\x8c\x02a\nb\x8c\x01c\x93.",
    "a new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "an instance": b"(i__main__\nEvil\n.",
    "an extension": b"\x80\x02\x82\x01.",
    "no end": b"\x80\x02}",
    "an empty program": b"",
    "an unknown instruction": b"\x80\x02\xff.",
    "an empty stack": b"\x80\x02.",
    "a mark that is missing": b"\x80\x02}u.",
    "half a pair": b"\x80\x02}(K\x01u.",
    "a value that was not kept": b"\x80\x02h\x05.",
    "text that is cut short": b"\x80\x02X\xff\xff\xff\x7fabc.",
    "text that is not UTF-8": b"\x80\x02X\x02\x00\x00\x00\xc3\x28.",
    "a number of 255 digits": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "a float without digits": b"\x80\x02Fx\n.",
}


@bad_input
@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_is_no_state_dictionary(case, tmp_path, refuses):
    path = write_pth(tmp_path / "x.pth", PICKLES[case])
    refuses(lambda: torch_pickle.read_header(path), "x.pth")


@bad_input
def test_nothing_that_a_pickle_names_is_run(tmp_path, refuses):
    marker = tmp_path / "ran"
    for content in (Call(os.mkdir, str(marker)), {"a": Call(builtins.eval, f"open({str(marker)!r}, 'w')")}):
        path = write_pth(tmp_path / "x.pth", pickle.dumps(content, protocol=2))
        for read in (torch_pickle.read_header, torch_pickle.read_single):
            refuses(lambda read=read, path=path: read(path), "it wants to load", "not part of a plain tensor")
    assert not marker.exists()


@bad_input
@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_other_protocols_run_nothing_either(protocol, tmp_path, refuses):
    path = write_pth(tmp_path / "x.pth", pickle.dumps(Call(os.mkdir, str(tmp_path / "ran")), protocol=protocol))
    refuses(lambda: torch_pickle.read_header(path), "x.pth is refused")
    assert not (tmp_path / "ran").exists()


BOMBS = {
    "a memo of two billion": b"\x80\x02}r\xff\xff\xff\x7f.",
    "a key that hashes for ever": b"\x80\x02K\x01" + b"q\x00h\x00\x86" * 60 + b"K\x02}q\x01h\x00K\x03s.",
    "doubled and doubled": b"\x80\x02]" + b"q\x00h\x00h\x00\x86" * 200 + b".",
}


@bad_input
@pytest.mark.parametrize("case", BOMBS)
def test_a_pickle_that_would_eat_the_machine(case, tmp_path, refuses):
    path = write_pth(tmp_path / "x.pth", BOMBS[case])
    tracemalloc.start()
    refuses(lambda: torch_pickle.read_header(path), "x.pth")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@bad_input
@pytest.mark.parametrize("member", ["data.pkl", "data/0", "byteorder"])
def test_a_zip_bomb(member, tmp_path, refuses):
    """Ten megabytes of zeros in ten kilobytes; PyTorch compresses nothing."""
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in {"data.pkl", member}:
            archive.writestr(f"x/{name}", bytes(10**7 if name == member else 10))
    tracemalloc.start()
    refuses(lambda: torch_pickle.read_header(path), "is compressed or encrypted")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def edited(path, edit):
    path.write_bytes(edit(path.read_bytes()))


ARCHIVES = {
    "not a zip archive": lambda path: path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."),
    "nothing": lambda path: path.write_bytes(b""),
    "cut short": lambda path: edited(path, lambda data: data[:-30]),
    "cut at its beginning": lambda path: edited(path, lambda data: data[100:]),
    "no data.pkl": lambda path: write_members(path, [("readme", b"")]),
    "two of data.pkl": lambda path: write_members(path, [("x/data.pkl", b"\x80\x02N."), ("y/data.pkl", b"\x80\x02N.")]),
    "a large data.pkl": lambda path: write_pth(path, b"N" * 2**23),
    "a large byteorder": lambda path: write_pth(path, {"w": made()}, **{"x/byteorder": b"little" * 10**6}),
    "big-endian": lambda path: write_pth(path, {"w": made()}, **{"x/byteorder": b"big"}),
    "a changed data.pkl": lambda path: edited(path, lambda data: data.replace(b"FloatStorage", b"HalfStorage ", 1)),
    "a member elsewhere": lambda path: edited(path, lambda data: data.replace(b"x/data/0", b"x/data/1", 1)),
    "a member twice": lambda path: write_members(path, [("x/data.pkl", b""), ("x/data.pkl", b"\x80\x02N.")]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


def write_members(path, members):
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for name, data in members:
            archive.writestr(name, data)


@bad_input
@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_is_none_of_pytorchs(case, tmp_path, refuses):
    path = write_pth(tmp_path / "x.pth", {"w": made()})
    ARCHIVES[case](path)
    message = refuses(lambda: torch_pickle.read_header(path), "x.pth")
    assert "Errno" not in message


@bad_input
def test_a_flipped_bit_in_a_tensor_is_found(tmp_path, refuses):
    path = write_pth(tmp_path / "x.pth", {"w": made()})
    info = torch_pickle.read_header(path)["w"]
    edited(path, lambda data: data[: info.offset + 5] + bytes([data[info.offset + 5] ^ 1]) + data[info.offset + 6 :])
    refuses(lambda: safetensors_file.read_tensor(torch_pickle.read_header(path)["w"]), "x.pth", "checksum")


@bad_input
@pytest.mark.parametrize(
    "content, storages, words",
    [
        ({"a": made(), "b": made()}, None, ["2 entries"]),
        ([made(), made()], None, ["2 entries"]),
        (made(floats(kind=Named("torch", "LongStorage"))), {"0": bytes(32)}, ["I64", "expected floats"]),
        (made(shape=(2, 2), strides=(2, 1)), None, ["shape (2, 2)", "(4,)"]),
        (made(shape=(3,)), None, ["shape (3,)", "(4,)"]),
        (made(), {"0": np.full(4, np.nan, "f4").tobytes()}, ["not finite"]),
    ],
)
def test_a_mask_embedding_that_is_none(content, storages, words, tmp_path, refuses):
    path = write_pth(tmp_path / "mask.pth", content, storages)
    config = collections.namedtuple("Config", "width")(4)
    tokenizer = collections.namedtuple("Tokenizer", "mask_id")(0)
    refuses(lambda: importing.read_mask_embedding(path, config, tokenizer), "mask.pth", *words)


@bad_input
def test_a_mask_embedding_of_gigabytes(tmp_path, refuses):
    (tmp_path / "mask.pth").touch()
    os.truncate(tmp_path / "mask.pth", 2**32)
    refuses(lambda: importing.read_mask_embedding(tmp_path / "mask.pth", None, None), "expected at most 67,108,864")
