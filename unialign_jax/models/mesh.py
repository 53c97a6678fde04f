"""How activations lie on the device mesh. `unialign_jax.sharding` says what each axis does to the parameters.

The names are of the axes of `sharding.make_mesh`; a mesh may lack some of them.
"""

import jax

# Over which axes a batch is split: everywhere, and inside the text encoder, whose weights are split over "encoder".
BATCH_AXES = ("replica", "data", "encoder", "fsdp")
ENCODER_BATCH_AXES = ("replica", "data", "fsdp")
HEAD_AXES = ("tensor",)
ENCODER_HEAD_AXES = ("encoder", "tensor")


def keep_batch_sharded(x, axes=BATCH_AXES):
    """Under a mesh, holds the batch axis split over `axes`: XLA must move parameters, not activations.

    A batch that the mesh does not divide, such as a few samples drawn during training, is left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    chosen = axes_that_divide(axes, mesh, x.shape[0])
    if mesh.empty or len(chosen) < sum(mesh.shape.get(name, 1) > 1 for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(chosen or None))


def axes_that_divide(names, mesh, length):
    """The axes among `names`, larger than 1 and Auto, over which `length` splits evenly, taken in order."""
    chosen, parts = [], 1
    for name in names:
        size = mesh.shape[name] if name in mesh.auto_axes else 1
        if size > 1 and length % (parts * size) == 0:
            chosen.append(name)
            parts *= size
    return tuple(chosen)
