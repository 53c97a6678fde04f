"""The discrete process of the text branch: absorbing masks (MDLM with a log-linear schedule).

Time is the mask fraction t in (0, 1]: at t each token is masked with probability t, independently. The negative ELBO
weighs the cross-entropy of the masked tokens by 1/t.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def sample_mask_fractions(key: jax.Array, batch: int, *, min_fraction: float = 1e-3) -> jax.Array:
    """Stratified mask fractions, float32 [B]: [min_fraction, 1] is cut into B equal strata, one for each sample.

    Strata are dealt out at random (the reference gives stratum i to sample i), so that a micro-batch sees all levels.
    Draw them for the global batch: the variance that t adds to the loss falls with the number of strata.
    """
    strata_key, place_key = jax.random.split(key)
    stratum = jax.random.permutation(strata_key, batch)
    place = jax.random.uniform(place_key, (batch,), jnp.float32)
    return min_fraction + (1 - min_fraction) * (stratum + place) / batch


def mask_fraction_at(place: ArrayLike, *, min_fraction: float = 1e-3) -> ArrayLike:
    """The mask fractions at places in [0, 1] of their distribution."""
    return min_fraction + (1 - min_fraction) * place


def mask_tokens(
    key: jax.Array, ids: jax.Array, fractions: jax.Array, maskable: jax.Array, mask_id: int
) -> tuple[jax.Array, jax.Array]:
    """(masked ids int32 [B, L], is_masked bool [B, L]): each maskable token is masked with its sample's probability.

    The reference masks with probability 0.999 t under the same weight 1/t; ours is the exact pair.

    Args:
      ids: int32 [B, L].
      fractions: float32 [B].
      maskable: bool [B, L]; False protects a token (the question of a VQA example).
    """
    is_masked = maskable & (jax.random.uniform(key, ids.shape, jnp.float32) < fractions[:, None])
    return jnp.where(is_masked, jnp.asarray(mask_id, ids.dtype), ids), is_masked


def unmask_times(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The times at which masked tokens are revealed while t runs from 1 to 0: independent, uniform in (0, 1].

    A token that is masked at t is revealed before s < t with probability (t - s) / t, independently of the others.
    """
    return 1.0 - jax.random.uniform(key, shape, jnp.float32)
