"""The image sampler: Euler steps along the velocity field, with classifier-free guidance."""

import jax
import jax.numpy as jnp

from unialign_jax.diffusion import flow


def sample_image_latents(velocity_fn, noise, sigmas, guidance_scale):
    """Integrates latents from noise (sigma 1) to clean (sigma 0).

    Each step evaluates one batch of 2B, the unconditional half first, and moves along
        v = v_uncond + guidance_scale * (v_cond - v_uncond),
    so a scale of 1 is the conditional model alone. Latents stay float32 whatever velocity_fn computes in.

    Call it under jax.jit with noise, sigmas and guidance_scale as arguments (and velocity_fn closing over
    traced parameters): it is one scan over traced sigmas, so other values of them compile nothing new.

    Args:
      velocity_fn: (latents [2B, H, W, C], sigma [2B]) -> velocity [2B, H, W, C]; it knows both halves'
        prompts, and gives both the same condition images.
      noise: [B, H, W, C], standard normal.
      sigmas: [N + 1], decreasing to 0; `diffusion.flow.sampling_sigmas` gives them.
      guidance_scale: a scalar, or [B] for a scale per sample.
    Returns:
      latents, float32 [B, H, W, C].
    """
    batch = noise.shape[0]
    sigmas = jnp.asarray(sigmas, jnp.float32)
    scale = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), (batch,))
    scale = scale.reshape((batch,) + (1,) * (noise.ndim - 1))

    def step(latents, sigma_and_next):
        sigma, next_sigma = sigma_and_next
        both = velocity_fn(jnp.concatenate([latents, latents]), jnp.full((2 * batch,), sigma))
        unconditional, conditional = jnp.split(both.astype(jnp.float32), 2)
        velocity = unconditional + scale * (conditional - unconditional)
        return flow.euler_step(latents, velocity, sigma, next_sigma), None

    latents, _ = jax.lax.scan(step, noise.astype(jnp.float32), (sigmas[:-1], sigmas[1:]))
    return latents
