"""Dense layers that read one row a sample: their weights stay split over the devices, and the rows travel.

The adaLN modulations hold a third of the weights of the MM-DiT and read one row a sample; other layers read hundreds
of tokens. To gather these weights and to reduce their gradients would move a thousand times the bytes of the rows.
"""

import jax
import jax.numpy as jnp

from unialign_jax.parallel.activations import BATCH_AXES, axes_that_divide
from unialign_jax.parallel.gradients import gradient_axes
from unialign_jax.parallel.sharding import stays_split


def moves_rows(path: str, kernel: jax.Array, rows: int) -> bool:
    """Whether `dense_of_all_blocks` applies: the kernel at a path is split, and the devices divide the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not stays_split(path, kernel.shape, mesh):
        return False
    return axes_that_divide(BATCH_AXES, mesh, rows) == gradient_axes(mesh)[0]


def dense_of_all_blocks(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """A dense layer of each block, all over the same rows: [B, I] -> [depth, B, J, O], in the kernel's dtype.

    A device computes its part of the outputs for the rows of all devices that have the other parts; then each gets back
    the whole outputs of its own rows. Gradients of the kernel need no sum over these devices.

    Args:
      x: [B, I] float32, split over all axes of the mesh that split batches.
      kernel: [depth, I, J, O], split along the last axis as the state is.
      bias: [depth, J, O], whole on every device.
    """
    used, scattered = gradient_axes(jax.sharding.get_abstract_mesh())

    def local(x, kernel, bias):
        x = jax.lax.all_gather(x, scattered, tiled=True).astype(kernel.dtype)
        outputs = jnp.einsum("bi,nijo->nbjo", x, kernel)
        outputs = jax.lax.all_to_all(outputs, scattered, split_axis=1, concat_axis=3, tiled=True)
        return outputs + bias.astype(kernel.dtype)[:, None]

    split = jax.P(None, None, None, scattered)
    by_device = jax.shard_map(
        local, in_specs=(jax.P(used), split, jax.P()), out_specs=jax.P(None, used), check_vma=False
    )
    # The gradients of x and of the bias are sums over devices: in float32.
    return by_device(x.astype(jnp.float32), kernel, bias.astype(jnp.float32))
