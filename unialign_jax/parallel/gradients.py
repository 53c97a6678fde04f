"""A scan over layers whose gradients are summed over the devices one layer late, behind the compute.

Autodiff of a scan sums the gradients of a layer's weights where it makes them, and the next layer waits: the TPU's
compiler runs reduce-scatters alone. Here the backward pass keeps a layer's gradients for one round and sums them while
it computes those of the layer before; and as a ring of permutes, which the compiler runs beside compute. It does not
where the ends of a ring are no neighbours, so that a line of devices sends both ways and leaves the ends apart.
"""

import functools
import math

import jax
import jax.numpy as jnp

from unialign_jax.parallel.activations import BATCH_AXES, TILE, axes_that_divide
from unialign_jax.parallel.sharding import partition_spec


def reduces_late(mesh, batch_size) -> bool:
    """Whether `scan_reducing_late` serves: weights are whole on every device, state and batch are split."""
    used = [name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1]
    whole = mesh.shape.get("fsdp", 1) == mesh.shape.get("tensor", 1) == 1
    splits_state = any(name != "replica" for name in used)
    return whole and splits_state and list(axes_that_divide(BATCH_AXES, mesh, batch_size)) == used


def scan_reducing_late(layer, params, carry, shared, path, lines=()):
    """carry = layer(params[i], i, carry, shared) for each i; see above for its gradient. To be run under a mesh.

    Args:
      layer: a function of one device's samples; its residuals are what it keeps for its own gradient.
      params: tree of [depth, ...], whole on every device.
      carry, shared: trees of arrays whose first axis is the batch, split over all axes of the mesh that split batches.
      path: of `params` in the sharding table, which says along which axis a leaf of the state is split.
      lines: of `sharding.lines`, the axes of the mesh that are no rings.

    Returns the last carry. The gradient of a leaf comes split as the table splits the state.
    """
    mesh = jax.sharding.get_abstract_mesh()
    used = tuple(name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1)
    scattered = tuple(name for name in used if name != "replica")
    specs = jax.tree_util.tree_map_with_path(
        lambda keys, leaf: partition_spec("/".join([path, *(key.key for key in keys)]), leaf.shape, mesh, state=True),
        params,
    )
    packing = Packing(params, specs, scattered, math.prod(mesh.shape[name] for name in scattered))
    rows, everywhere = jax.P(used), jax.P()
    by_device = functools.partial(jax.shard_map, check_vma=False)
    kept_params = {}  # which residuals are a layer's own weights, and need not be kept a second time

    def forward(params, carry, shared):
        def step(carry, inputs):
            index, weights = inputs
            carry, pull = jax.vjp(lambda w, c, s: layer(w, index, c, s), weights, carry, shared)
            residuals, kept_params["tree"] = jax.tree.flatten(pull)
            place = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(weights))}
            kept_params["places"] = [place.get(id(leaf)) for leaf in residuals]
            return carry, [leaf for leaf in residuals if id(leaf) not in place]

        carry, residuals = jax.lax.scan(step, carry, (depths(params), params))
        return carry, [leaf[None] for leaf in residuals]

    def backward(params, residuals, cotangent, shared):
        def step(state, inputs):
            cotangent, of_shared, late = state
            weights, residuals = inputs
            weights, residuals = jax.tree.leaves(weights), iter(residuals)
            leaves = [next(residuals) if i is None else weights[i] for i in kept_params["places"]]
            of_weights, cotangent, more = jax.tree.unflatten(kept_params["tree"], leaves)(cotangent)
            of_shared = jax.tree.map(jnp.add, of_shared, more)
            packed, rest = packing.pack(of_weights)
            return (cotangent, of_shared, packed), (reduce_scatter(late, scattered, lines), rest)

        zeros = jax.tree.map(jnp.zeros_like, shared)
        inputs = params, [leaf[0] for leaf in residuals]
        (cotangent, of_shared, last), (pieces, rest) = jax.lax.scan(
            step, (cotangent, zeros, packing.zeros()), inputs, reverse=True
        )
        # Round i summed the gradients of layer i + 1.
        last = reduce_scatter(last, scattered, lines)
        pieces = [jnp.concatenate([first[None], later[:-1]]) for first, later in zip(last, pieces, strict=True)]
        if "replica" in used:
            pieces = [jax.lax.psum(piece, "replica") for piece in pieces]
        rest = [jax.lax.psum(leaf.astype(jnp.float32), used).astype(leaf.dtype) for leaf in rest]
        return packing.unpack(pieces, rest), cotangent, of_shared

    @jax.custom_vjp
    def scan(params, carry, shared):
        def plain(params, carry, shared):
            step = lambda carry, inputs: (layer(inputs[1], inputs[0], carry, shared), None)  # noqa: E731
            return jax.lax.scan(step, carry, (depths(params), params))[0]

        return by_device(plain, in_specs=(everywhere, rows, rows), out_specs=rows)(params, carry, shared)

    def scan_forward(params, carry, shared):
        run = by_device(forward, in_specs=(everywhere, rows, rows), out_specs=(rows, rows))
        carry, residuals = run(params, carry, shared)
        return carry, (params, residuals, shared)

    def scan_backward(kept, cotangent):
        run = by_device(backward, in_specs=(everywhere, rows, rows, rows), out_specs=(packing.specs, rows, rows))
        params, residuals, shared = kept
        return run(params, residuals, cotangent, shared)

    scan.defvjp(scan_forward, scan_backward)
    return scan(params, carry, shared)


def depths(params):
    return jnp.arange(jax.tree.leaves(params)[0].shape[0])


class Packing:
    """One layer's gradients as two arrays [parts, tiles, 8, 128], half of the bytes each, for a ring in each direction.

    A leaf that the state splits into `parts` along one axis is cut there, and part i of all leaves stands in row i.
    Other leaves, such as biases, stay as they are, the "rest".
    """

    def __init__(self, params, specs, axis_names, parts):
        leaves, self.tree = jax.tree.flatten(params)
        self.parts = parts
        self.leaves = [jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype) for leaf in leaves]
        wanted = axis_names if len(axis_names) > 1 else axis_names[0]
        self.axes = [list(spec).index(wanted) - 1 if wanted in spec else None for spec in jax.tree.leaves(specs)]
        split = [i for i, axis in enumerate(self.axes) if axis is not None]
        sizes = {i: math.prod(self.leaves[i].shape) for i in split}
        halves = [], []
        for i in sorted(split, key=sizes.get, reverse=True):  # the next largest to the emptier half
            min(halves, key=lambda half: sum(sizes[j] for j in half)).append(i)
        self.halves = [half for half in halves if half]
        self.specs = jax.tree.unflatten(
            self.tree,
            [jax.P() if axis is None else jax.P(*[None] * (axis + 1), wanted) for axis in self.axes],
        )

    def pack(self, gradients):
        leaves = self.tree.flatten_up_to(gradients)
        halves = []
        for half in self.halves:
            flat = [jnp.moveaxis(leaves[i], self.axes[i], 0).reshape(self.parts, -1) for i in half]
            flat = jnp.concatenate(flat, axis=1)
            flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % TILE)))
            halves.append(flat.reshape(self.parts, -1, 8, 128))
        return halves, [leaf for leaf, axis in zip(leaves, self.axes, strict=True) if axis is None]

    def zeros(self):
        gradients = jax.tree.unflatten(self.tree, self.leaves)
        return jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda g: self.pack(g)[0], gradients)
        )

    def unpack(self, halves, rest):
        """Of all layers: the pieces [depth, tiles, 8, 128] of this device, and the rest, as the tree of gradients."""
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


def reduce_scatter(halves, axis_names, lines=()):
    """Up to two arrays [parts, ...] -> this device's part of their sums over the axes; round a ring one each way."""
    for name in axis_names:
        if name in lines:
            halves = [line(half, name) for half in halves]
        else:
            halves = [ring(half, name, direction) for half, direction in zip(halves, (1, -1), strict=False)]
    return [half[0] for half in halves]


def ring(x, name, direction):
    """reduce-scatter of the first axis over the devices of the mesh axis `name`, each sending to one neighbour."""
    x, own = cut(x, name)
    return travel(x, name, direction, closed=True) + own


def line(x, name):
    """The same where the ends are no neighbours: sums come from both sides, with twice the bytes of a ring."""
    x, own = cut(x, name)
    return travel(x, name, 1, closed=False) + travel(x, name, -1, closed=False) + own


def cut(x, name):
    """x as [devices, ...], a piece for each device of the axis, and this device's."""
    x = x.reshape(jax.lax.axis_size(name), -1, *x.shape[1:])
    return x, jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(name), keepdims=False)


def travel(x, name, direction, closed):
    """What comes to this device of its part, from all others on a closed ring, on a line from those on one side.

    Each hop sends a sum one device on, and the part that it is of is added there. On a line nothing comes to the
    first device, which is zeros; a sum that reaches the last without having met its device ends there.
    """
    size = jax.lax.axis_size(name)
    device = jax.lax.axis_index(name)
    part = lambda hop: jax.lax.dynamic_index_in_dim(x, (device - direction * (1 + hop)) % size, keepdims=False)  # noqa: E731
    neighbours = [(i, (i + direction) % size) for i in range(size) if closed or 0 <= i + direction < size]
    total = part(0)
    for hop in range(1, size):
        total = jax.lax.ppermute(total, name, neighbours)
        if hop < size - 1:
            total += part(hop)
    return total
