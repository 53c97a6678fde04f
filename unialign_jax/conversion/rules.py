"""Rules between PyTorch's tensors and our parameter trees, and the one walker that reads them in both directions.

A `Table` describes one layout. Each `Rule` ties a PyTorch key to a part of one of our arrays by a named pair of
transforms; "{layer}" in the key runs over the layers, which are stacked along the first axis of our array. What a
layout lacks is a `Fill`, what it has and we do not need is `Dropped` by name (and a `Constant` when exporting). Nothing
else is tolerated: an unknown tensor, an unfilled parameter or a wrong shape stops the walker, which lists all of them.
"""

import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np


class Transform(NamedTuple):
    """A named pair: `forward(tensor, shape)` gives our part of that shape, `backward(part)` gives the tensor back."""

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
# Modulations of two parts: ours are shift, scale, as Stability's; diffusers' final ones are scale, shift.
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
    """`source`, a PyTorch key, is the part `index` of our array `target` (of each of `layers`, when there are any)."""

    source: str
    target: str
    transform: Transform
    layers: range | None = None
    index: tuple = ()


class Fill(NamedTuple):
    """What a layout lacks: `make(read, shape)` gives the part `index` of `target`, float32.

    `read(key)` gives a tensor of the source; `sources` are the keys that are used up in this way.
    """

    target: str
    index: tuple
    make: Callable
    about: str
    sources: tuple[str, ...] = ()


class Dropped(NamedTuple):
    """Keys (a shell pattern) that a layout holds and we leave out on purpose. `check(read)` may raise ValueError."""

    pattern: str
    about: str
    check: Callable | None = None


class Constant(NamedTuple):
    """A tensor that a layout must hold and we do not: `make()` gives it when exporting."""

    key: str
    shape: tuple[int, ...]
    make: Callable


class Table(NamedTuple):
    layout: str
    rules: list[Rule]
    fills: list[Fill] = []
    dropped: list[Dropped] = []
    constants: list[Constant] = []
    float32: frozenset[str] = frozenset()  # of ours, that are computed and would be rounded by a narrower dtype


class Entry(NamedTuple):
    """A rule for one key; `index` includes the layer."""

    source: str
    target: str
    transform: Transform
    index: tuple


def affine(source, target, transform=DENSE, bias=VECTOR, layers=None, index=()):
    """The two rules of a linear layer. `index` counts from the kernel's axes; the bias lacks the first of them."""
    return [
        Rule(f"{source}.weight", f"{target}/kernel", transform, layers, index),
        Rule(f"{source}.bias", f"{target}/bias", bias, layers, index[1:]),
    ]


def expand(table: Table) -> list[Entry]:
    entries = []
    for rule in table.rules:
        if rule.layers is None:
            entries.append(Entry(rule.source, rule.target, rule.transform, rule.index))
        for layer in rule.layers or ():
            source = rule.source.replace("{layer}", str(layer))
            entries.append(Entry(source, rule.target, rule.transform, (layer, *rule.index)))
    return entries


@functools.cache
def part_shape(shape, index_key):
    return np.broadcast_to(np.int8(0), shape)[_from_key(index_key)].shape


def _index_key(index):  # slices became hashable only in Python 3.12
    return tuple((i.start, i.stop) if isinstance(i, slice) else i for i in index)


def _from_key(key):
    return tuple(slice(*i) if isinstance(i, tuple) else i for i in key)


def source_shape(entry: Entry, shapes) -> tuple[int, ...]:
    """The shape of the PyTorch tensor that an entry expects, from the shape of ours."""
    part = part_shape(shapes[entry.target], _index_key(entry.index))
    return _backward_shape(entry.transform, part)


@functools.cache
def _backward_shape(transform, shape):
    return jax.eval_shape(transform.backward, jax.ShapeDtypeStruct(shape, np.float32)).shape


def index_text(index) -> str:
    """An index as it is written, such as "[2, :, 0:2]"; empty for a whole array."""
    parts = [
        f"{'' if i.start is None else i.start}:{'' if i.stop is None else i.stop}" if isinstance(i, slice) else str(i)
        for i in index
    ]
    return f"[{', '.join(parts)}]" if parts else ""


def matches(keys, pattern) -> list[str]:
    return [key for key in keys if fnmatch.fnmatchcase(key, pattern)]


def shape_of(shapes, key, rank, name) -> tuple[int, ...]:
    """The shape of a tensor that gives sizes. Raises ValueError when it is missing or of another rank."""
    if key not in shapes:
        raise ValueError(f"{name} lacks {key}")
    if len(shapes[key]) != rank:
        raise ValueError(f"{name}: {key} has shape {list(shapes[key])}, expected {rank} dimensions")
    return shapes[key]


def problems(table: Table, found: Mapping[str, tuple], shapes: Mapping[str, tuple]) -> list[str]:
    """All that keeps `found` ({key: shape}) from filling `shapes` ({our path: shape}) exactly; empty when nothing."""
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
        filled[item.target] += np.prod(part_shape(shapes[item.target], _index_key(item.index)), dtype=np.int64)
    for path, shape in shapes.items():
        size = np.prod(shape, dtype=np.int64)
        if filled[path] != size:
            lines.append(f"nothing fills {size - filled[path]:,} of the {size:,} values of {path}")
    return lines


def storage_dtype(dtypes) -> np.dtype:
    """The dtype that holds values of all `dtypes` exactly: their own when it is one, bfloat16 for eight-bit floats."""
    dtypes = {np.dtype(dtype) for dtype in dtypes}
    wide = {np.dtype(ml_dtypes.bfloat16) if dtype.itemsize == 1 else dtype for dtype in dtypes}
    return wide.pop() if len(wide) == 1 else np.dtype(np.float32)


def leaf_dtypes(table: Table, dtypes: Mapping[str, np.dtype], shapes, dtype=None) -> dict[str, np.dtype]:
    """The dtype in which each of our arrays is stored: `dtype`, or the source's; float32 where the table wants it."""
    whole = storage_dtype(dtypes[entry.source] for entry in expand(table))
    sources = {}
    for entry in expand(table):
        sources.setdefault(entry.target, set()).add(dtypes[entry.source])
    result = {path: np.dtype(dtype or storage_dtype(sources.get(path) or {whole})) for path in shapes}
    return result | {path: np.dtype(np.float32) for path in table.float32}


def import_leaves(table: Table, read: Callable, shapes, dtypes) -> Iterator[tuple[str, np.ndarray]]:
    """Our arrays, one after another, from the tensors that `read(key)` gives. `problems` must have been empty."""
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
        del leaf  # the next may be as large


def export_shapes(table: Table, shapes) -> dict[str, tuple[int, ...]]:
    """{key: shape} of all tensors that an export writes, in the table's order."""
    result = {entry.source: source_shape(entry, shapes) for entry in expand(table)}
    return result | {constant.key: constant.shape for constant in table.constants}


def export_tensors(table: Table, path: str, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The PyTorch tensors that are parts of our array at `path`."""
    for entry in expand(table):
        if entry.target == path:
            yield entry.source, entry.transform.backward(leaf[entry.index])
