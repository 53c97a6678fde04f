"""The cross-modal alignment loss: an image's features should find their own text among the batch's."""

import functools

import chex
import jax
import jax.numpy as jnp

from unialign_jax.parallel.activations import gather_rows


@functools.partial(jax.jit, static_argnames=("direction",))
def cross_modal_loss(
    image_features_BND: jax.Array,
    text_features_BLD: jax.Array,
    *,
    temperature: float | jax.Array = 0.07,
    direction: str = "symmetric",
) -> jax.Array:
    """InfoNCE between mean-pooled, normalised image and text features (the paper's eq. 3), float32 [B].

    The negatives of a sample are all others of the batch it is given: under jit with a sharded batch that is
    the global batch, on however many devices. Unrelated features give ln B.
    "symmetric" averages both directions, as the released code does; "image_to_text" is the paper's form.

    Args:
      image_features_BND: [B, N, D], the image branch's output after its final norm, target tokens only.
      text_features_BLD: [B, L, D], the text branch's.
      temperature: divides the cosine similarities.

    Raises ValueError for another B or D of the two or an unknown direction, AssertionError for pooled features.
    """
    chex.assert_rank([image_features_BND, text_features_BLD], 3)
    image_shape, text_shape = image_features_BND.shape, text_features_BLD.shape
    if (image_shape[0], image_shape[-1]) != (text_shape[0], text_shape[-1]):
        raise ValueError(
            f"image features have shape {image_shape}, text features {text_shape}; "
            "the first (batch) and last (width) axes must agree"
        )
    if direction not in ("symmetric", "image_to_text"):
        raise ValueError(f"direction is {direction!r}; expected 'symmetric' or 'image_to_text'")

    image_BD = _pool_and_normalize(image_features_BND)
    text_BD = _pool_and_normalize(text_features_BLD)
    all_text_BD = gather_rows(text_BD)
    # Full precision: a TPU would round the inputs to bfloat16, and 1/temperature magnifies the error.
    similarity_BB = jnp.matmul(image_BD, all_text_BD.T, precision=jax.lax.Precision.HIGHEST) / temperature
    own = jnp.sum(image_BD * text_BD, axis=-1) / temperature
    image_to_text = jax.nn.logsumexp(similarity_BB, axis=1) - own
    if direction == "image_to_text":
        return image_to_text
    return 0.5 * (image_to_text + jax.nn.logsumexp(similarity_BB, axis=0) - own)


def _pool_and_normalize(features: jax.Array) -> jax.Array:
    pooled = jnp.mean(features.astype(jnp.float32), axis=1)
    # rsqrt of a bounded square keeps the gradient finite at zero features, where norm() would give NaN.
    return pooled * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(pooled), axis=-1, keepdims=True), 1e-24))
