"""The continuous process of the image branch: straight lines between a clean latent and Gaussian noise.

    x_sigma = (1 - sigma) * clean + sigma * noise        sigma in [0, 1], 0 is clean, 1 is noise
    velocity = d x_sigma / d sigma = noise - clean

Every sign and every direction of time is decided here and nowhere else.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

TRAINING_LEVELS = 1000  # grid of the reference's scheduler; it also fixes the sampling schedule


def shift_sigma(sigma: ArrayLike, shift: float) -> ArrayLike:
    """Moves noise levels towards 1 for shift > 1: shift * sigma / (1 + (shift - 1) * sigma).

    SD3 (Esser et al. 2024, eq. 23), where shift is the root of the ratio of pixel counts. Keeps 0 and 1.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigma(
    key: jax.Array,
    batch: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    levels: int | None = None,
) -> jax.Array:
    """Noise levels for training, float32 [B] in (0, 1], logit-normal: sigma = sigmoid(mean + std * z), then shifted.

    A mean above 0 gives noisier samples, as in SD3. `levels=1000` (None: any sigma) rounds sigma up to multiples of
    1/1000 before shifting: at mean 0 the reference's distribution, the timestep 1000 - floor(1000 u) of a uniform u.
    """
    normal = jax.random.normal(key, (batch,), jnp.float32)
    return sigma_at(normal, mean=mean, std=std, shift=shift, levels=levels)


def sigma_at(
    normal: jax.Array, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0, levels: int | None = None
) -> jax.Array:
    """The noise levels of standard-normal numbers; the other arguments are those of `sample_sigma`."""
    sigma = jax.nn.sigmoid(mean + std * normal)
    if levels is not None:
        sigma = jnp.maximum(jnp.ceil(sigma * levels), 1) / levels
    return shift_sigma(sigma, shift)


def interpolate(clean: jax.Array, noise: jax.Array, sigma: ArrayLike) -> jax.Array:
    """The noisy latent at sigma: (1 - sigma) * clean + sigma * noise; sigma is [B] or a scalar."""
    sigma = _like(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: jax.Array, noise: jax.Array) -> jax.Array:
    """The network's target, noise - clean: the same at every sigma."""
    return noise - clean


def predict_clean(noisy: jax.Array, velocity: jax.Array, sigma: ArrayLike) -> jax.Array:
    """The clean latent that a velocity implies: noisy - sigma * velocity; sigma is [B] or a scalar."""
    return noisy - _like(sigma, noisy) * velocity


def sampling_sigmas(num_steps: int, *, shift: float = 3.0) -> np.ndarray:
    """The noise levels of a sampler: float32 [num_steps + 1], strictly decreasing from 1 to exactly 0.

    They are those of diffusers' FlowMatchEulerDiscreteScheduler, by which the released checkpoints are sampled. Its
    shift acts on the smallest training sigma, and again on the line from 1 down to it (huggingface/diffusers#13243):
    the last level before 0 is 0.0089286 for shift 3, whatever num_steps.

    Computed in float64 on the host. Raises ValueError when num_steps is below 1 or shift is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a sampler needs at least 1 step")
    if shift <= 0:
        raise ValueError(f"shift is {shift}; it must be positive (1 shifts nothing, SD3 uses 3)")
    smallest = shift_sigma(1 / TRAINING_LEVELS, shift)
    sigmas = np.append(shift_sigma(np.linspace(1.0, smallest, num_steps), shift), 0.0)
    return sigmas.astype(np.float32)


def _like(sigma: ArrayLike, array: jax.Array) -> jax.Array:
    """sigma [B] with trailing axes of size 1, so that it multiplies array [B, ...]; scalars pass through."""
    sigma = jnp.asarray(sigma)
    return sigma if sigma.ndim == 0 else sigma.reshape(sigma.shape + (1,) * (array.ndim - sigma.ndim))
