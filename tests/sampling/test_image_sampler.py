import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.diffusion import flow
from unialign_jax.sampling import image as image_sampler
from unialign_jax.sampling.image import text_guidance, two_scale_guidance
from unialign_jax.sampling.solvers import solver_table

SHAPE = (2, 4, 4, 3)
RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=SHAPE).astype(np.float32)
TARGETS = np.array([0.5, -1.0, 2.0, 0.0], np.float32)[:, None, None, None]  # [uncond, uncond, cond, cond]


def sample_image_latents(velocity_fn, noise, table, inputs=None):
    """The latents after all evaluations of a table."""
    return image_sampler.advance(velocity_fn, image_sampler.start(noise), (table, inputs)).latents


def toy_halves(library, latents, sigma):
    """Both predictions of some smooth field that depends on the latents, on sigma and on the row."""
    shared = library.tanh(latents) * (1 + sigma)
    return shared - TARGETS[:2], shared - TARGETS[2:]


@pytest.mark.parametrize("scale", [7.0, np.array([1.0, 3.5], np.float32)])
def test_guided_euler_equals_a_plain_loop(scale):
    sigmas = flow.sampling_sigmas(6)

    def velocity(latents, sigma, _):
        return text_guidance(*toy_halves(jnp, latents, sigma), scale)

    sampled = sample_image_latents(velocity, NOISE, solver_table("euler", sigmas))

    latents, scales = NOISE.astype(np.float64), np.reshape(scale, (-1, 1, 1, 1))
    for sigma, next_sigma in zip(sigmas[:-1].astype(np.float64), sigmas[1:].astype(np.float64), strict=True):
        unconditional, conditional = toy_halves(np, latents, sigma)
        latents = latents + (next_sigma - sigma) * ((1 - scales) * unconditional + scales * conditional)
    assert sampled.dtype == jnp.float32
    np.testing.assert_allclose(sampled, latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["heun", "unipc"])
def test_pieces_equal_one_scan(name):
    table = solver_table(name, flow.sampling_sigmas(5))
    inputs = np.linspace(-1, 1, len(table.sigma)).astype(np.float32)

    def velocity(latents, sigma, shift):
        return jnp.tanh(latents) * (1 + sigma) + shift

    whole = sample_image_latents(velocity, NOISE, table, inputs)
    advance = jax.jit(lambda state, rows: image_sampler.advance(velocity, state, rows))
    state = image_sampler.start(NOISE)
    for i, (sigma, shift) in enumerate(zip(table.sigma, inputs, strict=True)):
        before = np.asarray(state.latents)
        state = advance(state, jax.tree.map(lambda x: x[i : i + 1], (table, inputs)))  # noqa: B023
        # The preview is what the velocity there implies.
        expected = before - sigma * (np.tanh(before) * (1 + sigma) + shift)
        np.testing.assert_allclose(state.clean, expected, atol=1e-5)
    np.testing.assert_allclose(state.latents, whole, atol=1e-6)
    # The last step goes to the clean prediction.
    np.testing.assert_allclose(state.clean, whole, atol=1e-6)


def test_latents_stay_float32():
    def velocity(latents, sigma, _):
        assert latents.dtype == sigma.dtype == jnp.float32 and sigma.shape == ()
        return jnp.ones_like(latents, jnp.bfloat16)

    table = solver_table("euler", flow.sampling_sigmas(28))
    latents = sample_image_latents(velocity, jnp.zeros(SHAPE, jnp.bfloat16), table)
    assert latents.dtype == jnp.float32
    np.testing.assert_allclose(latents, -1.0, rtol=1e-6)


def test_other_values_do_not_retrace():
    traces = []

    @jax.jit
    def sample(seed, table, scale, rescale):
        traces.append(seed)
        noise = jax.random.normal(jax.random.key(seed), SHAPE)
        return sample_image_latents(
            lambda latents, sigma, _: text_guidance(*toy_halves(jnp, latents, sigma), scale, rescale), noise, table
        )

    sigmas = flow.sampling_sigmas(9)
    euler = solver_table("euler", sigmas)
    results = [
        sample(0, euler, 7.0, 0.0),
        sample(0, solver_table("euler", flow.sampling_sigmas(9, shift=1.0)), 7.0, 0.0),
        sample(0, solver_table("dpmpp_2m", sigmas), 7.0, 0.0),
        sample(0, solver_table("unipc", sigmas), 7.0, 0.0),
        sample(0, solver_table("heun", flow.sampling_sigmas(5)), 7.0, 0.0),  # nine evaluations too
        sample(0, euler, 2.0, 0.0),
        sample(0, euler, 7.0, 0.7),
        sample(1, euler, 7.0, 0.0),
    ]
    assert len(traces) == 1
    for i, one in enumerate(results):
        for other in results[:i]:
            assert np.abs(one - other).max() > 1e-4


# Velocities of different spread, so that rescaling shows.
VELOCITIES = (RNG.normal(size=(3, *SHAPE)) * np.reshape([1.0, 2.0, 0.5], (3, 1, 1, 1, 1))).astype(np.float32)


def rescaled(guided, conditional, rescale):
    """Lin et al. 2305.08891, eq. 15 and 16, in float64, sample by sample."""
    return np.stack([g * (r * c.std() / g.std() + 1 - r) for g, c, r in zip(guided, conditional, rescale, strict=True)])


@pytest.mark.parametrize("rescale", [0.0, np.array([0.0, 0.7], np.float32)])
def test_guidance_arithmetic(rescale):
    neither, image_only, both = VELOCITIES.astype(np.float64)
    text, image = np.array([7.0, 0.5], np.float32), np.array([1.5, 3.0], np.float32)
    t, i = text[:, None, None, None].astype(np.float64), image[:, None, None, None].astype(np.float64)
    by_sample = np.broadcast_to(rescale, (2,))

    expected = rescaled((1 - t) * image_only + t * both, both, by_sample)
    found = text_guidance(VELOCITIES[1], VELOCITIES[2], text, rescale)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    # The three weights sum to one.
    expected = rescaled((1 - i) * neither + (i - t) * image_only + t * both, both, by_sample)
    found = two_scale_guidance(*VELOCITIES, image, text, rescale)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_guidance_in_bfloat16_is_computed_in_float32():
    unconditional, conditional = jnp.asarray(VELOCITIES[:2], jnp.bfloat16)
    found = text_guidance(unconditional, conditional, 7.0, 0.5)
    expected = text_guidance(unconditional.astype(jnp.float32), conditional.astype(jnp.float32), 7.0, 0.5)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_special_scales():
    neither, image_only, both = VELOCITIES
    np.testing.assert_allclose(text_guidance(image_only, both, 1.0, 1.0), both, atol=1e-6)
    np.testing.assert_allclose(text_guidance(image_only, both, 0.0), image_only, atol=1e-6)
    # An image scale of 1 is text guidance from the images alone; equal scales are guidance from nothing.
    np.testing.assert_allclose(
        two_scale_guidance(*VELOCITIES, 1.0, 5.0), text_guidance(image_only, both, 5.0), atol=1e-5
    )
    np.testing.assert_allclose(two_scale_guidance(*VELOCITIES, 5.0, 5.0), text_guidance(neither, both, 5.0), atol=1e-5)
    # Nothing to rescale by: no division by zero.
    np.testing.assert_array_equal(text_guidance(jnp.ones(SHAPE), jnp.ones(SHAPE), 3.0, 0.7), np.ones(SHAPE))
