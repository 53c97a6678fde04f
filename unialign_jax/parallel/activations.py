"""How activations lie on the device mesh, whose axes `unialign_jax.parallel.mesh` names; a mesh may lack some."""

from collections.abc import Iterable

import jax
from jax.sharding import Mesh

# The axes that split a batch: everywhere, and inside the text encoder, where "encoder" splits the weights instead.
BATCH_AXES = ("replica", "data", "state", "encoder", "fsdp")
ENCODER_BATCH_AXES = ("replica", "data", "state", "fsdp")
HEAD_AXES = ("tensor",)
ENCODER_HEAD_AXES = ("encoder", "tensor")


def keep_batch_sharded(x: jax.Array, axes: tuple[str, ...] = BATCH_AXES) -> jax.Array:
    """Keeps the batch axis split over `axes` under a mesh, so that XLA moves parameters and not activations.

    Does nothing to a batch that the mesh does not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    chosen = axes_that_divide(axes, mesh, x.shape[0])
    if mesh.empty or len(chosen) < sum(mesh.shape.get(name, 1) > 1 for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(chosen or None))


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
