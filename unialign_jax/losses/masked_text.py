"""The text branch's loss: the negative ELBO of masked diffusion, a weighted cross-entropy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnames=("mask_id", "normalization"))
def masked_text_loss(
    logits_BLV: jax.Array,
    ids_BL: jax.Array,
    is_masked_BL: jax.Array,
    maskable_BL: jax.Array,
    mask_fraction_B: jax.Array,
    *,
    mask_id: int,
    normalization: str = "positions",
) -> jax.Array:
    """Cross-entropy of the masked tokens, weighted by 1/t (MDLM; the paper's eq. 2), float32 [B].

    SUBS parameterisation: the mask itself has probability zero, and a visible token is known, so its loss and
    its gradient are exactly zero. A token whose true id is the mask's can never be predicted and counts zero.

    The sum over a sample's masked tokens is divided so that the mean over B of the result is
      "positions": sum / (B * L), prompt and pads included, as the released code divides;
      "maskable":  sum / (number of maskable tokens in the batch), for answers much shorter than L.

    Args:
      logits_BLV: [B, L, V], any float type; the softmax is taken in float32, and neither it nor a float32
        copy of the logits is kept for the backward pass.
      ids_BL: int32, the true tokens.
      is_masked_BL: bool, which of them the network saw as the mask.
      maskable_BL: bool, which of them could have been masked; read by "maskable" alone.
      mask_fraction_B: float32, t of each sample.

    Raises ValueError for shapes that do not fit, a mask_id outside the vocabulary and an unknown normalization,
    AssertionError for logits that are not [B, L, V] and a mask_fraction that is not [B].
    """
    chex.assert_rank(logits_BLV, 3)
    chex.assert_shape(mask_fraction_B, logits_BLV.shape[:1])  # [B, 1] would make the losses [B, B]
    batch, length, vocabulary = logits_BLV.shape
    for name, array in (("ids", ids_BL), ("is_masked", is_masked_BL), ("maskable", maskable_BL)):
        if array.shape != (batch, length):
            raise ValueError(f"{name} has shape {array.shape}; the logits ask for {(batch, length)}")
    if not 0 <= mask_id < vocabulary:
        raise ValueError(f"mask_id is {mask_id}; the logits cover the ids 0 to {vocabulary - 1}")
    if normalization not in ("positions", "maskable"):
        raise ValueError(f"normalization is {normalization!r}; expected 'positions' or 'maskable'")

    counted_BL = is_masked_BL & (ids_BL != mask_id)
    nll_BL = jnp.where(counted_BL, _negative_log_likelihood(logits_BLV, ids_BL, mask_id), 0.0)
    loss_B = jnp.sum(nll_BL, axis=1) / mask_fraction_B
    if normalization == "positions":
        return loss_B / length
    return loss_B * batch / jnp.maximum(jnp.sum(maskable_BL), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _negative_log_likelihood(logits: jax.Array, ids: jax.Array, mask_id: int) -> jax.Array:
    """-log p(ids) [B, L] under a softmax over all ids but the mask's."""
    return _forward(logits, ids, mask_id)[0]


def _forward(logits, ids, mask_id):
    log_normalizer = jax.nn.logsumexp(_without_mask(logits, mask_id), axis=-1)
    picked = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0].astype(jnp.float32)
    return log_normalizer - picked, (logits, ids, log_normalizer)


def _backward(mask_id, residuals, cotangent):
    # softmax - onehot, recomputed from the logits: autodiff would keep a float32 exp(logits) [B, L, V].
    logits, ids, log_normalizer = residuals
    probability = jnp.exp(_without_mask(logits, mask_id) - log_normalizer[..., None])
    onehot = jnp.arange(logits.shape[-1]) == ids[..., None]
    gradient = (probability - onehot) * cotangent[..., None]
    return gradient.astype(logits.dtype), np.zeros(ids.shape, jax.dtypes.float0)


_negative_log_likelihood.defvjp(_forward, _backward)


def _without_mask(logits: jax.Array, mask_id: int) -> jax.Array:
    return jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits.astype(jnp.float32))
