import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.diffusion import masking


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_one_fraction_in_each_stratum(batch):
    fractions = np.asarray(masking.sample_mask_fractions(jax.random.key(3), batch), np.float64)
    strata = np.floor((fractions - 1e-3) / (1 - 1e-3) * batch + 1e-4).astype(int)
    assert sorted(strata) == list(range(batch))


def test_each_sample_has_a_uniform_fraction():
    # Marginal of sample 0 of a batch of 4, over many batches: uniform on [0.2, 1].
    keys = jax.random.split(jax.random.key(0), 8000)
    draw = jax.vmap(lambda key: masking.sample_mask_fractions(key, 4, min_fraction=0.2)[0])
    fractions = np.asarray(jax.jit(draw)(keys), np.float64)
    assert fractions.min() >= 0.2 and fractions.max() <= 1
    counts, _ = np.histogram(fractions, bins=16, range=(0.2, 1))
    chi_squared = np.sum((counts - 500) ** 2 / 500)
    assert chi_squared < 44.3  # 15 degrees of freedom, p = 1e-4


def test_masked_share_protection_and_ids():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 99, size=(4, 20_000)).astype(np.int32)
    maskable = rng.random(ids.shape) < 0.5
    fractions = np.array([0.001, 0.3, 0.8, 1.0], np.float32)
    masked_ids, is_masked = masking.mask_tokens(jax.random.key(1), ids, fractions, maskable, 99)
    masked_ids, is_masked = np.asarray(masked_ids), np.asarray(is_masked)
    assert masked_ids.dtype == np.int32 and is_masked.dtype == bool
    assert not np.any(is_masked & ~maskable)
    np.testing.assert_array_equal(masked_ids, np.where(is_masked, 99, ids))
    share = is_masked.sum(1) / maskable.sum(1)
    deviation = np.sqrt(fractions * (1 - fractions) / maskable.sum(1))
    assert np.all(np.abs(share - fractions) <= 4 * deviation + 1e-9)  # exactly 1 at t = 1


def test_the_weight_makes_the_masked_sum_unbiased():
    # E[sum over masked of c_l / t] = sum of c_l for any costs c and any t: what makes 1/t the ELBO's weight.
    costs = np.array([0.5, 2.0, 1.0, 4.0])
    fractions = jnp.repeat(jnp.array([0.1, 0.35, 0.9]), 60_000)
    ids = jnp.zeros((fractions.size, 4), jnp.int32)
    _, is_masked = masking.mask_tokens(jax.random.key(2), ids, fractions, jnp.ones_like(ids, bool), 9)
    estimates = (np.asarray(is_masked) @ costs / np.asarray(fractions, np.float64)).reshape(3, -1)
    t = np.array([0.1, 0.35, 0.9])
    deviation = np.sqrt(np.sum(costs**2) * (1 - t) / t / 60_000)
    assert np.all(np.abs(estimates.mean(1) - costs.sum()) < 4.5 * deviation)


def test_unmask_times_are_uniform_above_zero():
    times = np.asarray(masking.unmask_times(jax.random.key(4), (40_000,)), np.float64)
    assert times.min() > 0 and times.max() <= 1
    counts, _ = np.histogram(times, bins=16, range=(0, 1))
    assert np.sum((counts - 2500) ** 2 / 2500) < 44.3  # 15 degrees of freedom, p = 1e-4
