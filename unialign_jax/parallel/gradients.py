"""How gradients are summed over the devices: of a scan of blocks (`scan_blocks`), of a weight (`split_dot_general`).

XLA on TPU does not overlap reduce-scatter with compute, so a plain scan stalls at every layer. The backward pass here
holds layer i + 1's gradients for one iteration and reduces them while it computes layer i's, by a ring of ppermutes,
which XLA does overlap. Without a wrap-around link a ring would cross the whole axis, so there both ends send inwards
along an open line. The sums over "replica" follow in the same iteration, so that those between slices overlap too.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unialign_jax.parallel.activations import BATCH_AXES, TOKEN_AXES, axes_that_divide
from unialign_jax.parallel.sharding import partition_spec, path_string, table_spec

TILE = 8 * 128  # numbers that a TPU keeps together
LONGEST_RING = 8  # replicas that are summed along one ring; more take several, one after the other


def scan_blocks(
    blocks: nn.Module,
    block: nn.Module,
    depth: int,
    passes: Sequence[tuple],
    *,
    late: bool = True,
    axes_without_wraparound: Sequence[str] = (),
    slices: int = 1,
):
    """Runs a network's blocks, carry, _ = block(carry, i, inputs[i], shared) for each i, and returns the last carries.

    The gradients of the weights are reduced one block late where `reduces_late` holds, once for all passes, else where
    autodiff makes them.

    Args:
      blocks: the `nn.scan` of `block`, bound; its parameters have the block as their first axis.
      block: a single block, unbound. `block.weights_read(params, inputs)` are the parameters that it reads.
      passes: (carry, inputs, shared) of each pass through the network. `carry` and `shared` are trees of arrays whose
        first axis is the batch; `inputs` is one of arrays whose first axes are the block and the batch, or None.
      late: False never reduces late, for a remat policy that offloads.
      slices: of the mesh, which "replica" counts from the outside.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = {leaf.shape[0] for carry, _, _ in passes for leaf in jax.tree.leaves(carry)}
    rows |= {leaf.shape[1] for _, inputs, _ in passes for leaf in jax.tree.leaves(inputs)}
    if not late or blocks.is_initializing() or not all(reduces_late(mesh, count) for count in rows):
        return [blocks(carry, jnp.arange(depth), inputs, shared)[0] for carry, inputs, shared in passes]

    def layer(params, index, carries, inputs, shared):
        each = zip(carries, inputs, shared, strict=True)
        return [block.apply({"params": params}, carry, index, *others)[0] for carry, *others in each]

    carries, inputs, shared = [list(parts) for parts in zip(*passes, strict=True)]
    params = block.weights_read(blocks.variables["params"], inputs[0])
    return scan_reducing_late(layer, params, carries, inputs, shared, blocks.name, axes_without_wraparound, slices)


def reduces_late(mesh: Mesh, batch_size: int) -> bool:
    """Whether `scan_reducing_late` applies: every device has whole weights, and a part of the state and the batch."""
    used, scattered = gradient_axes(mesh)
    whole = all(mesh.shape.get(name, 1) == 1 for name in ("fsdp", "tensor", *TOKEN_AXES))
    return whole and bool(scattered) and axes_that_divide(BATCH_AXES, mesh, batch_size) == used


def gradient_axes(mesh: Mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of a mesh that gradients are summed over, and those among them that split the sum too."""
    used = tuple(name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1)
    return used, tuple(name for name in used if name != "replica")


def scan_reducing_late(
    layer: Callable,
    params: dict,
    carry: Any,
    inputs: Any,
    shared: Any,
    path: str,
    axes_without_wraparound: tuple[str, ...] = (),
    slices: int = 1,
):
    """Computes carry = layer(params[i], i, carry, inputs[i], shared) for each i under a mesh; returns the last carry.

    The gradient of a leaf is split as the table splits its state.

    Args:
      layer: a function of one device's samples; it saves its own residuals (remat included).
      params: tree of [depth, ...], whole on every device.
      carry, shared: trees of arrays whose first axis is the batch, split over all axes of the mesh that split batches.
      inputs: a tree of such arrays with the depth as an axis before the batch.
      path: of `params` in the sharding table, which gives the axis that the state of a leaf is split along.
    """
    mesh = jax.sharding.get_abstract_mesh()
    used, scattered = gradient_axes(mesh)
    of_state = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: partition_spec(f"{path}/{path_string(keys)}", leaf.shape, mesh, state=True), params
    )
    replicas = mesh.shape.get("replica", 1) // slices  # in a slice
    parts = math.prod(mesh.shape[name] for name in scattered)
    packing = Packing(params, of_state, scattered, parts, replicas)
    rows, rows_of_layers, everywhere = jax.P(used), jax.P(None, used), jax.P()
    specs = everywhere, rows, rows_of_layers, rows  # of the arguments of `scan`
    by_device = functools.partial(jax.shard_map, check_vma=False)
    vjp = {}  # the tree of a layer's vjp, and which of its leaves are the layer's weights: those are not saved twice

    def forward(params, carry, inputs, shared):
        def step(carry, of_layer):
            index, weights, inputs = of_layer
            carry, pull = jax.vjp(lambda w, c, i, s: layer(w, index, c, i, s), weights, carry, inputs, shared)
            residuals, vjp["tree"] = jax.tree.flatten(pull)
            place = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(weights))}
            vjp["weights"] = [place.get(id(leaf)) for leaf in residuals]
            return carry, [leaf for leaf in residuals if id(leaf) not in place]

        carry, residuals = jax.lax.scan(step, carry, (depths(params), params, inputs))
        return carry, [leaf[None] for leaf in residuals]

    def reduce(halves):
        pieces = reduce_scatter(halves, scattered, axes_without_wraparound)
        return sum_over_replicas(pieces, slices) if "replica" in used else pieces

    def backward(params, residuals, cotangent, shared):
        def step(state, of_layer):
            cotangent, of_shared, late = state
            weights, residuals = of_layer
            weights, residuals = jax.tree.leaves(weights), iter(residuals)
            leaves = [next(residuals) if i is None else weights[i] for i in vjp["weights"]]
            of_weights, cotangent, of_inputs, more = jax.tree.unflatten(vjp["tree"], leaves)(cotangent)
            of_shared = jax.tree.map(jnp.add, of_shared, more)
            packed, rest = packing.pack(of_weights)
            return (cotangent, of_shared, packed), (reduce(late), rest, of_inputs)

        zeros = jax.tree.map(jnp.zeros_like, shared)
        of_layers = params, [leaf[0] for leaf in residuals]
        (cotangent, of_shared, last), (pieces, rest, of_inputs) = jax.lax.scan(
            step, (cotangent, zeros, packing.zeros()), of_layers, reverse=True
        )
        # Iteration i reduced the gradients of layer i + 1; those of layer 0 are left.
        last = reduce(last)
        pieces = [jnp.concatenate([first[None], later[:-1]]) for first, later in zip(last, pieces, strict=True)]
        rest = [jax.lax.psum(leaf.astype(jnp.float32), used).astype(leaf.dtype) for leaf in rest]
        return packing.unpack(pieces, rest), cotangent, of_inputs, of_shared

    @jax.custom_vjp
    def scan(params, carry, inputs, shared):
        def plain(params, carry, inputs, shared):
            step = lambda carry, x: (layer(x[1], x[0], carry, x[2], shared), None)  # noqa: E731
            return jax.lax.scan(step, carry, (depths(params), params, inputs))[0]

        return by_device(plain, in_specs=specs, out_specs=rows)(params, carry, inputs, shared)

    def scan_forward(params, carry, inputs, shared):
        run = by_device(forward, in_specs=specs, out_specs=(rows, rows))
        carry, residuals = run(params, carry, inputs, shared)
        return carry, (params, residuals, shared)

    def scan_backward(kept, cotangent):
        gradients = packing.specs, *specs[1:]
        run = by_device(backward, in_specs=(everywhere, rows, rows, rows), out_specs=gradients)
        params, residuals, shared = kept
        return run(params, residuals, cotangent, shared)

    scan.defvjp(scan_forward, scan_backward)
    return scan(params, carry, inputs, shared)


def depths(params: dict):
    return jnp.arange(jax.tree.leaves(params)[0].shape[0])


class Packing:
    """One layer's gradients as two arrays [parts, tiles, 8, 128] of about equal size, one for each direction of a ring.

    A leaf that the state splits into `parts` along one axis is split there; row i holds part i of all leaves. The other
    leaves, such as biases, stay as they are: the "rest".
    """

    def __init__(self, params, specs, axis_names, parts, replicas=1):
        leaves, self.tree = jax.tree.flatten(params)
        self.parts, self.filled = parts, TILE * replicas  # so that the replicas too divide a part
        self.leaves = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        wanted = axis_names if len(axis_names) > 1 else axis_names[0]
        self.axes = [list(spec).index(wanted) - 1 if wanted in spec else None for spec in jax.tree.leaves(specs)]
        split = [i for i, axis in enumerate(self.axes) if axis is not None]
        sizes = {i: math.prod(self.leaves[i].shape) for i in split}
        halves = [], []
        for i in sorted(split, key=sizes.get, reverse=True):  # the next largest goes to the smaller half
            min(halves, key=lambda half: sum(sizes[j] for j in half)).append(i)
        self.halves = [half for half in halves if half]
        self.specs = jax.tree.unflatten(
            self.tree,
            [jax.P() if axis is None else jax.P(*[None] * (axis + 1), wanted) for axis in self.axes],
        )

    def pack(self, gradients: Any):
        leaves = self.tree.flatten_up_to(gradients)
        halves = []
        for half in self.halves:
            flat = [jnp.moveaxis(leaves[i], self.axes[i], 0).reshape(self.parts, -1) for i in half]
            flat = jnp.concatenate(flat, axis=1)
            flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % self.filled)))
            halves.append(flat.reshape(self.parts, -1, 8, 128))
        return halves, [leaf for leaf, axis in zip(leaves, self.axes, strict=True) if axis is None]

    def zeros(self):
        gradients = jax.tree.unflatten(self.tree, self.leaves)
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda g: self.pack(g)[0], gradients)
        )

    def unpack(self, halves: Any, rest: Any):
        """The tree of gradients from this device's pieces [depth, tiles, 8, 128] of all layers, and the rest."""
        leaves, rest = [None] * len(self.axes), iter(rest)
        for half, indices in zip(halves, self.halves, strict=True):
            flat, start = half.reshape(half.shape[0], -1), 0
            for i in indices:
                others = list(self.leaves[i].shape)
                shape = (others.pop(self.axes[i]) // self.parts, *others)
                piece = flat[:, start : start + math.prod(shape)].reshape(-1, *shape)
                leaves[i] = jnp.moveaxis(piece, 1, self.axes[i] + 1)
                start += math.prod(shape)
        leaves = [next(rest) if axis is None else leaf for leaf, axis in zip(leaves, self.axes, strict=True)]
        return jax.tree.unflatten(self.tree, leaves)


def reduce_scatter(halves: Any, axis_names: Sequence[str], axes_without_wraparound: Sequence[str] = ()):
    """This device's part of the sums over the axes of up to two arrays [parts, ...], one for each way round a ring."""
    for name in axis_names:
        if name in axes_without_wraparound and jax.lax.axis_size(name) > 2:  # two devices exchange, whatever the links
            halves = [reduce_scatter_line(half, name) for half in halves]
        else:
            halves = [reduce_scatter_ring(half, name, way) for half, way in zip(halves, (1, -1), strict=False)]
    return [half[0] for half in halves]


def reduce_scatter_ring(x: jax.Array, name: str, direction: int):
    """Reduce-scatter of the first axis over the mesh axis `name`; every device sends to one neighbour."""
    x, own = split_pieces(x, name)
    return reduce_along(x, name, direction, closed=True) + own


def reduce_scatter_line(x: jax.Array, name: str):
    """The same without a wrap-around link: partial sums come from both sides, with twice the bytes of a ring."""
    x, own = split_pieces(x, name)
    return reduce_along(x, name, 1, closed=False) + reduce_along(x, name, -1, closed=False) + own


def split_pieces(x: jax.Array, name: str):
    """x as [devices, ...], one piece for each device of the axis, and this device's piece."""
    x = x.reshape(jax.lax.axis_size(name), -1, *x.shape[1:])
    return x, jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(name), keepdims=False)


def reduce_along(x: jax.Array, name: str, direction: int, closed: bool, size: int | None = None, stride: int = 1):
    """The sum of this device's piece over the other devices: all of them on a ring, on a line those on one side.

    At each hop a device passes its partial sum to its neighbour, which adds its own contribution to the same piece. On
    an open line the first device receives zeros, and a partial sum that runs off the end is dropped.

    Args:
      size, stride: each ring or line has so many devices of the axis (None is all), every `stride`-th.
    """
    size = size or jax.lax.axis_size(name)
    device = jax.lax.axis_index(name) // stride % size
    piece = lambda hop: jax.lax.dynamic_index_in_dim(x, (device - direction * (1 + hop)) % size, keepdims=False)  # noqa: E731
    pairs = neighbours(name, direction, closed, size, stride)
    total = piece(0)
    for hop in range(1, size):
        total = jax.lax.ppermute(total, name, pairs)
        if hop < size - 1:
            total += piece(hop)
    return total


def gather_along(piece: jax.Array, name: str, direction: int, size: int, stride: int):
    """The pieces [size, ...] of all devices of a ring; every device passes on what it received."""
    device = jax.lax.axis_index(name) // stride % size
    pairs = neighbours(name, direction, True, size, stride)
    pieces = jnp.zeros((size, *piece.shape), piece.dtype)
    for hop in range(size):
        piece = jax.lax.ppermute(piece, name, pairs) if hop else piece
        pieces = jax.lax.dynamic_update_index_in_dim(pieces, piece, (device - direction * hop) % size, 0)
    return pieces


def neighbours(name: str, direction: int, closed: bool, size: int, stride: int) -> list[tuple[int, int]]:
    """Who sends to whom along an axis, in rings or lines of `size` devices, every `stride`-th."""
    pairs = []
    for device in range(jax.lax.axis_size(name)):
        place = device // stride % size
        if closed or 0 <= place + direction < size:
            pairs.append((device, device + ((place + direction) % size - place) * stride))
    return pairs


def sum_over_replicas(halves: Any, slices: int):
    """The sums over "replica" of up to two arrays [tiles, ...], the same bits on every device, one for each way round.

    The devices of a slice reduce-scatter and gather along rings; between slices only a device's share of that travels.
    """
    count = jax.lax.axis_size("replica")

    def total(x, way, stride):
        left = count // slices // stride  # devices of a slice that are still to be summed
        if left == 1:
            peers = [list(range(first, count, stride)) for first in range(stride)]
            return jax.lax.psum(x, "replica", axis_index_groups=peers) if slices > 1 else x
        size = math.gcd(left, LONGEST_RING)
        size = left if size == 1 else size
        pieces = x.reshape(size, -1, *x.shape[1:])
        place = jax.lax.axis_index("replica") // stride % size
        own = jax.lax.dynamic_index_in_dim(pieces, place, keepdims=False)
        own += reduce_along(pieces, "replica", way, True, size, stride)
        return gather_along(total(own, way, stride * size), "replica", way, size, stride).reshape(x.shape)

    return [total(half, way, 1) for half, way in zip(halves, (1, -1), strict=False)]


def split_dot_general(path: str) -> Callable:
    """A `dot_general` of activations [B, ...] and the weight at a path, whose gradient is reduce-scattered.

    The gradient of a weight is a sum over all samples and tokens, of which a device needs the piece of its part of the
    state: the table says along which axis. By itself XLA all-reduces the whole sum, which moves twice the bytes, and
    then slices.
    Without a mesh, or where the sizes do not divide, this is `jax.lax.dot_general`.
    """

    def dot_general(x, weight, dimension_numbers, precision=None, preferred_element_type=None):
        plain = functools.partial(
            jax.lax.dot_general,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        mesh = jax.sharding.get_abstract_mesh()
        spec = list(table_spec(path, mesh))
        if "fsdp" not in spec:
            return plain(x, weight)
        axis = spec.index("fsdp") - len(spec)  # from the end: the table counts the axis of blocks, a block does not
        used, scattered = gradient_axes(mesh)
        auto = axes_that_divide(BATCH_AXES, mesh, x.shape[0])
        rows = jax.P(used)
        if x.ndim > 2 and (tokens := axes_that_divide(TOKEN_AXES, mesh, x.shape[1])):
            rows, used, auto, scattered = jax.P(used, tokens), used + tokens, auto + tokens, scattered + tokens
        parts = math.prod(mesh.shape[name] for name in scattered)
        if parts == 1 or len(auto) < len(used) or mesh.shape.get("tensor", 1) > 1 or weight.shape[axis] % parts:
            return plain(x, weight)

        shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)

        def local_gradient(x, cotangent):
            transpose = jax.linear_transpose(lambda weight: plain(x, weight), shape)
            (gradient,) = transpose(cotangent)
            gradient = scatter_sum(gradient, scattered, parts, axis)
            return jax.lax.psum(gradient, "replica") if "replica" in used else gradient

        @jax.custom_vjp
        def dot(x, weight):
            return plain(x, weight)

        def forward(x, weight):
            return plain(x, weight), (x, weight)

        def backward(residuals, cotangent):
            x, weight = residuals
            _, pull = jax.vjp(lambda x: plain(x, weight), x)
            spec = [None] * weight.ndim
            spec[axis] = scattered
            gradient = jax.shard_map(
                local_gradient,
                in_specs=(rows, rows),
                out_specs=jax.P(*spec),
                axis_names=set(used),
                check_vma=False,
            )(x, cotangent)
            return pull(cotangent)[0], gradient

        dot.defvjp(forward, backward)
        return dot(x, weight)

    return dot_general


def scatter_sum(x: jax.Array, axis_names: Sequence[str], parts: int, axis: int):
    """The sum of `x` over the devices of `axis_names`, inside shard_map; each gets its piece along `axis`.

    XLA on TPU reduce-scatters only along one axis of the torus, and only whole tiles of 8 x 128 numbers; anything else
    becomes an all-reduce and a slice. So this takes one mesh axis at a time, and flat pieces padded to tiles.
    """
    pieces = jnp.moveaxis(x, axis, 0)
    shape = (pieces.shape[0] // parts, *pieces.shape[1:])
    pieces = pieces.reshape(parts, -1)
    filled = -(-pieces.shape[1] // TILE) * TILE
    pieces = jnp.pad(pieces, ((0, 0), (0, filled - pieces.shape[1])))
    piece = pieces.reshape(-1, 8, 128)
    for name in axis_names:
        piece = jax.lax.psum_scatter(piece, name, scatter_dimension=0, tiled=True)
    return jnp.moveaxis(piece.ravel()[: math.prod(shape)].reshape(shape), 0, axis)
