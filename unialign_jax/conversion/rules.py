"""Rules between PyTorch's tensors and our parameter trees, and the functions that apply them in both directions.

A `Table` describes one layout. Each `Rule` maps a PyTorch key to a part of one of our arrays by a pair of transforms;
"{layer}" in the key runs over the layers, which are stacked along the first axis of our array. A parameter that a
layout lacks is a `Fill`. A tensor that we do not need is `Dropped` by name when importing, and a `Constant` when
exporting. Everything else is an error: unknown tensors, unfilled parameters and wrong shapes are all listed.
"""

import fnmatch
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np

Shapes = Mapping[str, tuple[int, ...]]  # by key of a tensor, or by path of one of our arrays


class Transform(NamedTuple):
    """A pair of functions: `forward(tensor, shape)` gives our part of that shape, `backward(part)` the tensor."""

    name: str
    forward: Callable
    backward: Callable


DENSE = Transform("transpose", lambda x, shape: x.T.reshape(shape), lambda y: y.reshape(y.shape[0], -1).T)
DENSE_FROM_HEADS = Transform(  # our kernel has two input axes, heads and head width
    "transpose, split heads", lambda x, shape: x.T.reshape(shape), lambda y: y.reshape(-1, y.shape[-1]).T
)
VECTOR = Transform("reshape", lambda x, shape: x.reshape(shape), lambda y: y.reshape(-1))
SAME = Transform("same", lambda x, shape: x, lambda y: y)
CONV = Transform("conv channels last", lambda x, shape: x.transpose(2, 3, 1, 0), lambda y: y.transpose(3, 2, 0, 1))
POINTWISE = Transform("1x1 conv to dense", lambda x, shape: x[:, :, 0, 0].T, lambda y: y.T[:, :, None, None])
# Modulations of two parts are (shift, scale) here and in Stability's files, but (scale, shift) in diffusers' last ones.
SWAPPED_DENSE = Transform(
    "transpose, swap scale and shift",
    lambda x, shape: x.T.reshape(shape)[:, ::-1],
    lambda y: y[:, ::-1].reshape(y.shape[0], -1).T,
)
SWAPPED_VECTOR = Transform(
    "swap scale and shift", lambda x, shape: x.reshape(shape)[::-1], lambda y: y[::-1].reshape(-1)
)


def patch_conv(patch: int) -> Transform:
    """A convolution over patches [D, C, p, p] as a dense layer over patches flattened as (row, column, channel)."""
    return Transform(
        "patch conv to dense",
        lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
        lambda y: y.reshape(patch, patch, -1, y.shape[-1]).transpose(3, 2, 0, 1),
    )


class Rule(NamedTuple):
    """The PyTorch key `source` is the part `index` of our array `target`, or of each of its `layers`."""

    source: str
    target: str
    transform: Transform
    layers: range | None = None
    index: tuple = ()


class Fill(NamedTuple):
    """A parameter that a layout lacks: `make(read, shape)` gives the part `index` of `target`, float32.

    `make` gets tensors of the source by `read(key)`; `sources` are the keys that it reads.
    """

    target: str
    index: tuple
    make: Callable
    about: str
    sources: tuple[str, ...] = ()


class Dropped(NamedTuple):
    """Keys of a layout that we leave out, as a shell pattern. `check(read)` may raise ValueError."""

    pattern: str
    about: str
    check: Callable | None = None


class Constant(NamedTuple):
    """A tensor that a layout needs and that we do not have: `make()` gives it when exporting."""

    key: str
    shape: tuple[int, ...]
    make: Callable


class Table(NamedTuple):
    """One layout of one component."""

    layout: str
    rules: list[Rule]
    fills: list[Fill] = []
    dropped: list[Dropped] = []
    constants: list[Constant] = []
    float32: frozenset[str] = frozenset()  # our arrays that are computed, and stored in float32 so as not to round them


class Entry(NamedTuple):
    """A rule for a single key; `index` includes the layer."""

    source: str
    target: str
    transform: Transform
    index: tuple


def affine(
    source: str,
    target: str,
    transform: Transform = DENSE,
    bias: Transform = VECTOR,
    layers: range | None = None,
    index: tuple = (),
) -> list[Rule]:
    """The two rules of a linear layer. `index` is into the kernel; the bias lacks the kernel's first axis."""
    return [
        Rule(f"{source}.weight", f"{target}/kernel", transform, layers, index),
        Rule(f"{source}.bias", f"{target}/bias", bias, layers, index[1:]),
    ]


def expand(table: Table) -> list[Entry]:
    """The rules of a table, one for every key."""
    entries = []
    for rule in table.rules:
        if rule.layers is None:
            entries.append(Entry(rule.source, rule.target, rule.transform, rule.index))
        for layer in rule.layers or ():
            source = rule.source.replace("{layer}", str(layer))
            entries.append(Entry(source, rule.target, rule.transform, (layer, *rule.index)))
    return entries


def part_shape(shape: tuple[int, ...], index: tuple) -> tuple[int, ...]:
    """The shape of the part at an index of an array of that shape."""
    return np.broadcast_to(np.int8(0), shape)[index].shape


def source_shape(entry: Entry, shapes: Shapes) -> tuple[int, ...]:
    """The shape of an entry's PyTorch tensor, from the shapes of our arrays."""
    return _backward_shape(entry.transform, part_shape(shapes[entry.target], entry.index))


@functools.cache
def _backward_shape(transform, shape):
    return jax.eval_shape(transform.backward, jax.ShapeDtypeStruct(shape, np.float32)).shape


def index_text(index: tuple) -> str:
    """An index as in code, such as "[2, :, 0:2]"; empty for a whole array."""
    parts = [
        f"{'' if i.start is None else i.start}:{'' if i.stop is None else i.stop}" if isinstance(i, slice) else str(i)
        for i in index
    ]
    return f"[{', '.join(parts)}]" if parts else ""


def matches(keys: Iterable[str], pattern: str) -> list[str]:
    """The keys that a shell pattern matches."""
    return [key for key in keys if fnmatch.fnmatchcase(key, pattern)]


def layer_numbers(pattern: re.Pattern, keys: Iterable[str]) -> set[int]:
    return {int(match[1]) for match in map(pattern.match, keys) if match}


def count_layers(pattern: re.Pattern, keys: Iterable[str], name: str) -> int:
    """The number of layers, which `pattern` finds in the keys. Raises ValueError when one is missing between others."""
    numbers = layer_numbers(pattern, keys)
    absent = list(itertools.islice((i for i in range(max(numbers, default=0)) if i not in numbers), 8))
    if absent:
        raise ValueError(f"{name} lacks its blocks {absent}: a shard may be missing")
    return len(numbers)


def shape_of(shapes: Shapes, key: str, rank: int, name: str) -> tuple[int, ...]:
    """The shape of a tensor. Raises ValueError when it is missing or of another rank; `name` is for messages."""
    if key not in shapes:
        raise ValueError(f"{name} lacks {key}")
    if len(shapes[key]) != rank:
        raise ValueError(f"{name}: {key} has shape {list(shapes[key])}, expected {rank} dimensions")
    return shapes[key]


def problems(table: Table, found: Shapes, shapes: Shapes) -> list[str]:
    """Why tensors `found` ({key: shape}) do not fill our `shapes` ({path: shape}) exactly, one line for each reason."""
    entries, lines = expand(table), []
    known = {entry.source for entry in entries} | {key for fill in table.fills for key in fill.sources}
    for entry in entries:
        if entry.target not in shapes:
            raise KeyError(f"the table {table.layout} names {entry.target}, which the model does not have")
        if entry.source not in found:
            lines.append(f"missing tensor {entry.source} (for {entry.target})")
            continue
        expected = source_shape(entry, shapes)
        if tuple(found[entry.source]) != expected:
            lines.append(f"{entry.source} has shape {tuple(found[entry.source])}, expected {expected}")
    for fill in table.fills:
        lines += [f"missing tensor {key} (for {fill.target})" for key in fill.sources if key not in found]
    for key in found:
        if key not in known and not any(fnmatch.fnmatchcase(key, dropped.pattern) for dropped in table.dropped):
            lines.append(f"unknown tensor {key} {tuple(found[key])}")
    filled = dict.fromkeys(shapes, 0)
    for item in (*entries, *table.fills):
        filled[item.target] += np.prod(part_shape(shapes[item.target], item.index), dtype=np.int64)
    for path, shape in shapes.items():
        size = np.prod(shape, dtype=np.int64)
        if filled[path] != size:
            lines.append(f"nothing fills {size - filled[path]:,} of the {size:,} values of {path}")
    return lines


def storage_dtype(dtypes: Iterable) -> np.dtype:
    """A dtype that holds values of all `dtypes` exactly. A single one is kept, but eight-bit floats become bfloat16."""
    dtypes = {np.dtype(dtype) for dtype in dtypes}
    wide = {np.dtype(ml_dtypes.bfloat16) if dtype.itemsize == 1 else dtype for dtype in dtypes}
    return wide.pop() if len(wide) == 1 else np.dtype(np.float32)


def leaf_dtypes(
    table: Table, dtypes: Mapping[str, np.dtype], shapes: Shapes, dtype: np.dtype | None = None
) -> dict[str, np.dtype]:
    """The dtype to store each of our arrays in: `dtype` or else the source's; float32 for those in `table.float32`."""
    whole = storage_dtype(dtypes[entry.source] for entry in expand(table))
    sources = {}
    for entry in expand(table):
        sources.setdefault(entry.target, set()).add(dtypes[entry.source])
    result = {path: np.dtype(dtype or storage_dtype(sources.get(path) or {whole})) for path in shapes}
    return result | {path: np.dtype(np.float32) for path in table.float32}


def import_leaves(
    table: Table, read: Callable[[str], np.ndarray], shapes: Shapes, dtypes: Mapping[str, np.dtype]
) -> Iterator[tuple[str, np.ndarray]]:
    """The (path, array) pairs of our arrays, from the tensors that `read(key)` gives; `problems` must be empty."""
    by_target = {}
    for entry in expand(table):
        by_target.setdefault(entry.target, []).append(entry)
    for path, shape in shapes.items():
        leaf = np.empty(shape, dtypes[path])
        for entry in by_target.get(path, ()):
            part = leaf[entry.index]
            leaf[entry.index] = entry.transform.forward(read(entry.source), part.shape)
        for fill in table.fills:
            if fill.target == path:
                leaf[fill.index] = fill.make(read, leaf[fill.index].shape)
        yield path, leaf
        del leaf  # before the next one, which may be as large, is made


def export_shapes(table: Table, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """{key: shape} of all tensors of an export, in the table's order."""
    result = {entry.source: source_shape(entry, shapes) for entry in expand(table)}
    return result | {constant.key: constant.shape for constant in table.constants}


def export_tensors(table: Table, path: str, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The (key, tensor) pairs that our array at `path` becomes."""
    for entry in expand(table):
        if entry.target == path:
            yield entry.source, entry.transform.backward(leaf[entry.index])
