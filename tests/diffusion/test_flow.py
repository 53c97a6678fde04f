import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.diffusion import flow

# diffusers' schedule for shift 3, by hand from the scheduler's own formula.
GOLDEN = {
    28: ([1.0, 0.987381, 0.974108, 0.960129], [0.199827, 0.110906, 0.0089286, 0.0]),
    50: ([1.0, 0.993124, 0.986057], [0.120533, 0.066900, 0.0089286, 0.0]),
}


@pytest.mark.parametrize("num_steps", [28, 50])
def test_sampling_sigmas_are_the_golden_ones(num_steps):
    sigmas = flow.sampling_sigmas(num_steps)
    head, tail = GOLDEN[num_steps]
    assert sigmas.shape == (num_steps + 1,) and sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas[: len(head)], head, atol=6e-7)
    np.testing.assert_allclose(sigmas[-len(tail) :], tail, atol=6e-7)
    assert np.all(np.diff(sigmas) < 0)


@pytest.mark.parametrize("shift, num_steps", [(3.0, 28), (3.0, 50), (1.0, 7), (6.0, 1)])
def test_sampling_sigmas_equal_diffusers(shift, num_steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    np.testing.assert_allclose(
        flow.sampling_sigmas(num_steps, shift=shift), scheduler.sigmas.numpy(), atol=2e-7, rtol=1e-6
    )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(num_steps=0), "num_steps is 0"),
        (dict(num_steps=4, shift=0.0), "shift is 0.0"),
    ],
)
def test_sampling_sigmas_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        flow.sampling_sigmas(**kwargs)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.5)])
def test_sigma_is_logit_normal(mean, std):
    sigma = np.asarray(flow.sample_sigma(jax.random.key(0), 40_000, mean=mean, std=std), np.float64)
    logit = np.log(sigma) - np.log1p(-sigma)
    assert logit.mean() == pytest.approx(mean, abs=5 * std / 200)
    assert logit.std() == pytest.approx(std, rel=0.02)
    # Third and fourth standardised moments of a normal: 0 and 3.
    standard = (logit - mean) / std
    assert np.mean(standard**3) == pytest.approx(0, abs=0.1)
    assert np.mean(standard**4) == pytest.approx(3, abs=0.2)


def test_shift_acts_on_the_same_draw():
    # On the logit, shift 3 is an offset of ln 3.
    plain = np.asarray(flow.sample_sigma(jax.random.key(1), 1000), np.float64)
    shifted = np.asarray(flow.sample_sigma(jax.random.key(1), 1000, shift=3.0), np.float64)
    np.testing.assert_allclose(np.log(shifted / (1 - shifted)), np.log(plain / (1 - plain)) + np.log(3.0), atol=1e-4)


def test_levels_reproduce_the_reference_distribution():
    levels = 10  # coarse, so that a chi-squared over all levels is possible
    sigma = np.asarray(flow.sample_sigma(jax.random.key(2), 50_000, levels=levels))
    grid = np.rint(sigma * levels).astype(int)
    np.testing.assert_allclose(sigma, grid / levels, atol=1e-6)
    # The reference in numpy: u = sigmoid(z), timestep = levels - floor(levels u), sigma = timestep / levels.
    u = 1 / (1 + np.exp(-np.random.default_rng(0).normal(size=2_000_000)))
    timestep = levels - np.floor(levels * u).astype(int)
    expected = np.bincount(timestep, minlength=levels + 1)[1:] / len(u)
    observed = np.bincount(grid, minlength=levels + 1)
    assert observed[0] == 0
    chi_squared = np.sum((observed[1:] - 50_000 * expected) ** 2 / (50_000 * expected))
    assert chi_squared < 33.7  # 9 degrees of freedom, p = 1e-4


def test_interpolation_and_velocity_agree():
    rng = np.random.default_rng(0)
    clean, noise = rng.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    sigma = np.array([0.0, 0.25, 1.0], np.float32)
    noisy = flow.interpolate(clean, noise, sigma)
    np.testing.assert_array_equal(noisy[0], clean[0])
    np.testing.assert_allclose(noisy[1], 0.75 * clean[1] + 0.25 * noise[1], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(noisy[2], noise[2])
    target = flow.velocity(clean, noise)
    np.testing.assert_allclose(flow.predict_clean(noisy, target, sigma), clean, atol=1e-6)
    # The velocity is the derivative of the path.
    _, tangent = jax.jvp(lambda s: flow.interpolate(clean, noise, s), (jnp.asarray(sigma),), (jnp.ones(3),))
    np.testing.assert_allclose(tangent, target, atol=1e-6)
