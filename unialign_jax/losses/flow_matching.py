"""The image branch's loss: how far the predicted velocity is from the true one."""

import functools

import chex
import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames=("form",))
def flow_matching_loss(
    predicted_velocity: jax.Array, target_velocity: jax.Array, sigma: jax.Array, *, form: str = "velocity"
) -> jax.Array:
    """Squared error of the velocity, averaged over all elements of each latent, float32 [B].

    "velocity" is the paper's eq. 1. "x0" is what the released code trains: the error of the clean latent
    predicted at sigma, noisy - sigma * velocity, which is the velocity's error times sigma².

    Args:
      predicted_velocity, target_velocity: [B, ...] of one shape, any float type; computed in float32.
      sigma: [B]; read by "x0" alone.

    Raises ValueError for shapes that differ or an unknown form, AssertionError for a sigma that is not [B].
    """
    if predicted_velocity.shape != target_velocity.shape:
        raise ValueError(
            f"predicted velocity has shape {predicted_velocity.shape}, its target {target_velocity.shape}; "
            "they must be equal"
        )
    if form not in ("velocity", "x0"):
        raise ValueError(f"form is {form!r}; expected 'velocity' (paper, eq. 1) or 'x0' (released code)")
    chex.assert_shape(sigma, predicted_velocity.shape[:1])  # [B, 1] would make the losses [B, B]
    error = predicted_velocity.astype(jnp.float32) - target_velocity.astype(jnp.float32)
    loss = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return loss * jnp.square(sigma) if form == "x0" else loss
