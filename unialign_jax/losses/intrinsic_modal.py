"""The intrinsic-modal alignment loss: hidden states should point where a frozen teacher's features point."""

import chex
import jax
import jax.numpy as jnp


@jax.jit
def intrinsic_modal_loss(predicted: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - cosine similarity (the paper's eq. 4 plus a constant, so that the floor is 0), for one modality.

    float32 [B] in [0, 2], the mean over patches where there are any. A zero vector has cosine 0.

    Args:
      predicted: [B, T] pooled, or [B, P, T] one vector a patch; an alignment head's output.
      teacher: the same shape; the frozen teacher's features. Any float types; computed in float32.

    Raises ValueError for shapes that differ, AssertionError for another rank, such as a batch's as one vector.
    """
    chex.assert_rank([predicted, teacher], {2, 3})
    if predicted.shape != teacher.shape:
        raise ValueError(
            f"predicted features have shape {predicted.shape}, the teacher's {teacher.shape}; they must agree"
        )
    cosine = jnp.sum(_normalize(predicted) * _normalize(teacher), axis=-1)
    return jnp.mean(1.0 - cosine.reshape(cosine.shape[0], -1), axis=1)


def _normalize(vectors: jax.Array) -> jax.Array:
    vectors = vectors.astype(jnp.float32)
    # rsqrt of a bounded square keeps the gradient finite at a zero vector, where norm() would give NaN.
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True), 1e-24))
