import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.diffusion import flow
from unialign_jax.sampling.image import sample_image_latents

SHAPE = (2, 4, 4, 3)
TARGETS = jnp.array([0.5, -1.0, 2.0, 0.0])  # one per row of the doubled batch: [uncond, uncond, cond, cond]


def toy_velocity(latents, sigma, targets=TARGETS):
    """Some smooth field that depends on the latents, on sigma and on the row."""
    return jnp.tanh(latents) * (1 + sigma[:, None, None, None]) - targets[:, None, None, None]


def test_gaussian_to_gaussian():
    # Clean ~ N(m, s²), noise ~ N(0, 1): the exact velocity is known, and each noise ends at m + s * noise.
    mean, deviation = 1.5, 0.4

    def velocity_fn(latents, sigma):
        sigma = sigma[:, None, None, None]
        variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
        # E[noise - clean | latents], by Gaussian conditioning.
        return (sigma - (1 - sigma) * deviation**2) / variance * (latents - (1 - sigma) * mean) - mean

    noise = jax.random.normal(jax.random.key(0), SHAPE)
    exact = mean + deviation * np.asarray(noise)
    sample = jax.jit(lambda sigmas: sample_image_latents(velocity_fn, noise, sigmas, 1.0))
    errors = [
        np.abs(sample(flow.sampling_sigmas(n, schedule="shifted_linear")) - exact).max()
        for n in (100, 200, 400)
    ]
    assert errors[2] < 0.01
    # Euler is of first order: twice the steps, half the error.
    np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2, atol=0.1)


@pytest.mark.parametrize("guidance_scale", [7.0, np.array([1.0, 3.5], np.float32)])
def test_equals_a_plain_loop(guidance_scale):
    sigmas = flow.sampling_sigmas(6)
    noise = np.asarray(jax.random.normal(jax.random.key(1), SHAPE))
    sampled = sample_image_latents(toy_velocity, noise, sigmas, guidance_scale)

    latents = noise.astype(np.float64)
    scale = np.reshape(guidance_scale, (-1, 1, 1, 1))
    targets = np.asarray(TARGETS, np.float64)[:, None, None, None]
    for sigma, next_sigma in zip(sigmas[:-1].astype(np.float64), sigmas[1:].astype(np.float64), strict=True):
        unconditional = np.tanh(latents) * (1 + sigma) - targets[:2]
        conditional = np.tanh(latents) * (1 + sigma) - targets[2:]
        velocity = (1 - scale) * unconditional + scale * conditional
        latents = latents + (next_sigma - sigma) * velocity
    assert sampled.dtype == jnp.float32
    np.testing.assert_allclose(sampled, latents, rtol=1e-4, atol=1e-5)


def test_scales_0_and_1_are_the_two_models():
    noise = jax.random.normal(jax.random.key(2), SHAPE)
    sigmas = flow.sampling_sigmas(4)
    for scale, half in ((0.0, TARGETS[:2]), (1.0, TARGETS[2:])):
        alone = functools.partial(toy_velocity, targets=jnp.concatenate([half, half]))
        np.testing.assert_allclose(
            sample_image_latents(toy_velocity, noise, sigmas, scale),
            sample_image_latents(alone, noise, sigmas, 5.0),
            atol=1e-5,
        )


def test_latents_stay_float32():
    def velocity_fn(latents, sigma):
        assert latents.dtype == sigma.dtype == jnp.float32
        return jnp.ones_like(latents, jnp.bfloat16)

    noise = jnp.zeros(SHAPE, jnp.bfloat16)
    latents = sample_image_latents(velocity_fn, noise, flow.sampling_sigmas(28), 7.0)
    assert latents.dtype == jnp.float32
    np.testing.assert_allclose(latents, -1.0, rtol=1e-6)


def test_other_values_do_not_retrace():
    traces = []

    @jax.jit
    def sample(noise, sigmas, guidance_scale):
        traces.append(noise.shape)
        return sample_image_latents(toy_velocity, noise, sigmas, guidance_scale)

    noise = jax.random.normal(jax.random.key(3), SHAPE)
    results = [
        sample(noise, flow.sampling_sigmas(8), 7.0),
        sample(noise, flow.sampling_sigmas(8, shift=1.0), 7.0),
        sample(noise, flow.sampling_sigmas(8), 2.0),
        sample(noise + 1, flow.sampling_sigmas(8), 7.0),
    ]
    assert len(traces) == 1
    for other in results[1:]:
        assert np.abs(other - results[0]).max() > 1e-2
