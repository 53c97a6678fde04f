"""How activations lie on the device mesh, whose axes `unialign_jax.parallel.mesh` names; a mesh may lack some."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# The axes that split a batch: everywhere, and inside the text encoder, where "encoder" splits the weights instead.
BATCH_AXES = ("replica", "data", "state", "encoder", "fsdp")
ENCODER_BATCH_AXES = ("replica", "data", "state", "fsdp")
TOKEN_AXES = ("context",)  # the tokens of a sample, outside attention
ROW_AXES = (*BATCH_AXES, *TOKEN_AXES)  # samples where no tokens are split: in the autoencoder
# The heads, inside attention. The axis of the tokens takes heads there, because every token reads all tokens.
HEAD_AXES = ("tensor", *TOKEN_AXES)
ENCODER_HEAD_AXES = ("encoder", "tensor", *TOKEN_AXES)


def keep_batch_sharded(x: jax.Array, axes: tuple[str, ...] = BATCH_AXES) -> jax.Array:
    """Keeps the batch axis split over `axes` under a mesh, so that XLA moves parameters and not activations.

    Does nothing to a batch that the mesh does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    chosen = axes_that_divide(axes, mesh, x.shape[0])
    if mesh.empty or len(chosen) < sum(mesh.shape.get(name, 1) > 1 for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(chosen or None))


def keep_tokens_sharded(x: jax.Array, axes: tuple[str, ...] = BATCH_AXES) -> jax.Array:
    """The same for [B, tokens, ...], whose tokens stay split over TOKEN_AXES too where these divide them."""
    mesh = jax.sharding.get_abstract_mesh()
    tokens = axes_that_divide(TOKEN_AXES, mesh, x.shape[1])
    if not tokens:
        return keep_batch_sharded(x, axes)
    rows = axes_that_divide(axes, mesh, x.shape[0])
    return jax.lax.with_sharding_constraint(x, jax.P(rows or None, tokens))


def spread_rows(x: jax.Array) -> jax.Array:
    """[B, ...] whose rows are split over TOKEN_AXES too, for work that splits no tokens; as it is where they do not."""
    axes = axes_that_divide(ROW_AXES, jax.sharding.get_abstract_mesh(), x.shape[0])
    return jax.lax.with_sharding_constraint(x, jax.P(axes)) if TOKEN_AXES[0] in axes else x


def join_tokens(first: jax.Array, second: jax.Array) -> jax.Array:
    """[B, N, ...] and [B, L, ...] -> [B, N + L, ...]. Split tokens stay where they are: each device joins its own.

    `first_tokens` and `last_tokens` take them apart again. Their order between is not to be relied on.
    """
    parts = token_parts(first.shape[1], second.shape[1])
    pieces = (in_parts(x, parts) for x in (first, second))
    return from_parts(jnp.concatenate([*pieces], axis=1 if parts == 1 else 2), parts)


def first_tokens(x: jax.Array, count: int) -> jax.Array:
    """The first array of [B, count, ...] and another, joined."""
    parts = token_parts(count, x.shape[1] - count)
    x = in_parts(x, parts)
    return x[:, :count] if parts == 1 else from_parts(x[:, :, : count // parts], parts)


def last_tokens(x: jax.Array, count: int) -> jax.Array:
    """The second array, after the first of [B, count, ...]."""
    parts = token_parts(count, x.shape[1] - count)
    x = in_parts(x, parts)
    return x[:, count:] if parts == 1 else from_parts(x[:, :, count // parts :], parts)


def token_parts(*counts: int) -> int:
    """Into how many parts the mesh splits the tokens of arrays that are joined; 1 where it does not divide them all."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = [axes_that_divide(TOKEN_AXES, mesh, count) for count in counts]
    return mesh.shape[TOKEN_AXES[0]] if all(axes) else 1


def in_parts(x: jax.Array, parts: int) -> jax.Array:
    """[B, tokens, ...] -> [B, parts, tokens / parts, ...]."""
    return x if parts == 1 else x.reshape(x.shape[0], parts, x.shape[1] // parts, *x.shape[2:])


def from_parts(x: jax.Array, parts: int) -> jax.Array:
    return x if parts == 1 else x.reshape(x.shape[0], parts * x.shape[2], *x.shape[3:])


def exchange_tokens_for_heads(
    attend: Callable, *arrays: jax.Array, batch_axes: tuple[str, ...], head_axes: tuple[str, ...]
) -> jax.Array:
    """attend(*arrays), of arrays [B, tokens, heads, width] whose tokens are split outside and whose heads are inside.

    By an all-to-all each device gives away its tokens' other heads for its heads' other tokens, and by another takes
    the results back (DeepSpeed-Ulysses, arXiv 2309.14509). Where TOKEN_AXES split the batch or cannot split the heads,
    this is attend(*arrays).
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, count, heads, _ = arrays[0].shape
    tokens = axes_that_divide(TOKEN_AXES, mesh, count)
    rows, heads = axes_that_divide(batch_axes, mesh, rows), axes_that_divide(head_axes, mesh, heads)
    if not tokens or tokens[0] in rows or tokens[0] not in heads:
        return attend(*arrays)
    outside = jax.P(rows or None, tokens, tuple(name for name in heads if name not in tokens) or None)
    inside = jax.P(rows or None, None, heads or None)
    place = jax.lax.with_sharding_constraint
    return place(place(attend(*(place(place(x, outside), inside) for x in arrays)), inside), outside)


@jax.custom_vjp
def gather_rows(x: jax.Array) -> jax.Array:
    """All rows of x on every device, by all-gathers, under a mesh that splits its batch axis."""
    axes = axes_that_divide(BATCH_AXES, jax.sharding.get_abstract_mesh(), x.shape[0])
    if not axes:
        return x

    def gather(rows):
        for name in reversed(axes):  # for several axes at once XLA on TPU emits an all-reduce, twice the bytes
            rows = jax.lax.all_gather(rows, name, tiled=True)
        return rows

    return jax.shard_map(gather, in_specs=jax.P(axes), out_specs=jax.P(), check_vma=False)(x)


# Backward: each device keeps its own rows of the summed cotangent.
gather_rows.defvjp(lambda x: (gather_rows(x), None), lambda _, cotangent: (keep_batch_sharded(cotangent),))


def axes_that_divide(names: Iterable[str], mesh: Mesh, length: int) -> tuple[str, ...]:
    """The axes among `names`, larger than 1 and Auto, that split `length` evenly; taken greedily, in order."""
    chosen, parts = [], 1
    for name in names:
        size = mesh.shape[name] if name in mesh.auto_axes else 1
        if size > 1 and length % (parts * size) == 0:
            chosen.append(name)
            parts *= size
    return tuple(chosen)
