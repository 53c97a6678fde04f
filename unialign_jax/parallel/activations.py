"""How activations lie on the device mesh. `unialign_jax.parallel.sharding` says what each axis does to the parameters.

The names are of the axes of `sharding.make_mesh`; a mesh may lack some of them.
"""

import functools
import math

import jax
import jax.numpy as jnp

# Over which axes a batch is split: everywhere, and inside the text encoder, whose weights are split over "encoder".
BATCH_AXES = ("replica", "data", "encoder", "fsdp")
ENCODER_BATCH_AXES = ("replica", "data", "fsdp")
HEAD_AXES = ("tensor",)
ENCODER_HEAD_AXES = ("encoder", "tensor")
TILE = 8 * 128


def keep_batch_sharded(x, axes=BATCH_AXES):
    """Under a mesh, holds the batch axis split over `axes`: XLA must move parameters, not activations.

    A batch that the mesh does not divide is left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    chosen = axes_that_divide(axes, mesh, x.shape[0])
    if mesh.empty or len(chosen) < sum(mesh.shape.get(name, 1) > 1 for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(chosen or None))


@jax.custom_vjp
def gather_rows(x):
    """Under a mesh that splits the batch axis of x, all its rows on every device, by one all-gather."""
    axes = axes_that_divide(BATCH_AXES, jax.sharding.get_abstract_mesh(), x.shape[0])
    if not axes:
        return x

    def gather(rows):
        for name in reversed(axes):  # over several at once the TPU's compiler would sum zeros and rows, twice the bytes
            rows = jax.lax.all_gather(rows, name, tiled=True)
        return rows

    return jax.shard_map(gather, in_specs=jax.P(axes), out_specs=jax.P(), check_vma=False)(x)


# The cotangent is a sum over devices of which each wants its own rows.
gather_rows.defvjp(lambda x: (gather_rows(x), None), lambda _, cotangent: (keep_batch_sharded(cotangent),))


def axes_that_divide(names, mesh, length):
    """The axes among `names`, larger than 1 and Auto, over which `length` splits evenly, taken in order."""
    chosen, parts = [], 1
    for name in names:
        size = mesh.shape[name] if name in mesh.auto_axes else 1
        if size > 1 and length % (parts * size) == 0:
            chosen.append(name)
            parts *= size
    return tuple(chosen)


def dot_general_splitting(axis):
    """A `dot_general` of activations [B, ...] and a weight whose gradient is reduce-scattered along its `axis`.

    The gradient of a weight is a sum over all samples, of which each device wants the piece that its part of the state
    needs. Left to itself XLA sums it whole on every device, which moves twice the bytes, and then cuts the piece out.
    Without a mesh, or where a size does not come out even, this is `jax.lax.dot_general`.
    """

    def dot_general(x, weight, dimension_numbers, precision=None, preferred_element_type=None):
        plain = functools.partial(
            jax.lax.dot_general,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        mesh = jax.sharding.get_abstract_mesh()
        used = [name for name in BATCH_AXES if mesh.shape.get(name, 1) > 1]
        scattered = tuple(name for name in used if name != "replica")
        parts = math.prod(mesh.shape[name] for name in scattered)
        auto = axes_that_divide(BATCH_AXES, mesh, x.shape[0])
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
            rows = jax.P(tuple(used))
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


def scatter_sum(x, axis_names, parts, axis):
    """The sum of `x` over the devices of `axis_names`, inside shard_map; each gets its piece along `axis`.

    The TPU's compiler scatters along one axis of the torus, and whole tiles of 8 x 128 numbers; anything else it makes
    an all-reduce, and cuts the piece out. So one mesh axis at a time, and the pieces travel flat, filled up to tiles.
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
