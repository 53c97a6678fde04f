import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.sampling.text import sample_text

LENGTH, VOCABULARY, MASK_ID = 3, 4, 3  # three real tokens and the mask
NUM_SAMPLES = 20_000

# A fixed conditional table: for every partly masked sequence, a distribution over each position's tokens.
# It is not consistent with any joint, so the order and the grouping of the reveals show in the outcome. The
# mask's column is large: a sampler that does not exclude it is caught at once.
LOGITS = 1.5 * np.random.default_rng(7).normal(size=(VOCABULARY,) * LENGTH + (LENGTH, VOCABULARY))
LOGITS[..., MASK_ID] = 3.0
LOGITS_TABLE = jnp.asarray(LOGITS, jnp.float32)


def toy_logits(ids):
    return LOGITS_TABLE[ids[:, 0], ids[:, 1], ids[:, 2]]


def ancestral_distribution(start, num_steps):
    """The exact outcome of the step-by-step sampler in float64: t goes from 1 to 0 linearly, and each step
    reveals every masked token with probability (t - s) / t, drawn from the prediction at the step's start."""
    state = {tuple(start): 1.0}
    times = np.linspace(1, 0, num_steps + 1)
    for t, s in zip(times[:-1], times[1:], strict=True):
        reveal, after = (t - s) / t, {}
        for ids, probability in state.items():
            table = np.exp(LOGITS[ids][:, :MASK_ID])
            table /= table.sum(1, keepdims=True)
            choices = [
                [(MASK_ID, 1 - reveal)] + [(v, reveal * table[i, v]) for v in range(MASK_ID)]
                if token == MASK_ID
                else [(token, 1.0)]
                for i, token in enumerate(ids)
            ]
            for combination in itertools.product(*choices):
                new = tuple(token for token, _ in combination)
                after[new] = after.get(new, 0) + probability * np.prod([p for _, p in combination])
        state = after
    return {ids: p for ids, p in state.items() if p > 0}


@pytest.mark.parametrize("start, num_steps", [((3, 3, 3), 1), ((3, 3, 3), 2), ((3, 3, 3), 8), ((3, 1, 3), 3)])
def test_distribution_equals_the_step_by_step_sampler(start, num_steps):
    expected = ancestral_distribution(start, num_steps)
    assert sum(expected.values()) == pytest.approx(1)
    ids = jnp.tile(jnp.array(start), (NUM_SAMPLES, 1))
    keys = jax.random.split(jax.random.key(num_steps), NUM_SAMPLES)
    sample = jax.jit(lambda i, k: sample_text(toy_logits, i, i == 3, k, num_steps=num_steps, mask_id=MASK_ID))
    sampled = np.asarray(sample(ids, keys))

    assert sampled.max() < MASK_ID
    found, counts = np.unique(sampled, axis=0, return_counts=True)
    assert {tuple(ids) for ids in found.tolist()} <= set(expected)
    observed = dict(zip(map(tuple, found.tolist()), counts, strict=True))
    means = {ids: NUM_SAMPLES * p for ids, p in expected.items()}
    chi_squared = sum((observed.get(ids, 0) - mean) ** 2 / mean for ids, mean in means.items())
    freedom = len(expected) - 1
    # Mean freedom, variance 2 * freedom: far into the tail (p < 1e-5 for 8 and for 26 degrees of freedom).
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom) + 10


def test_the_distribution_depends_on_the_steps():
    # What gives the test above its power: 1, 2 and 8 steps are far apart compared with its tolerance.
    one, two, eight = (ancestral_distribution((3, 3, 3), n) for n in (1, 2, 8))
    for a, b in ((one, two), (two, eight)):
        assert sum((a[ids] - b[ids]) ** 2 / b[ids] for ids in b) * NUM_SAMPLES > 150


def wide_logits(ids):
    """A model of 16 tokens and a vocabulary of 11 (mask 10) in which every token sees its own row only."""
    context = jnp.cumsum(ids * 7 % 11, axis=1) + jnp.sum(ids, axis=1, keepdims=True)
    return jnp.sin(context[..., None] * (1 + jnp.arange(11.0)))


@jax.jit
def sample_wide(ids, is_target, keys):
    return sample_text(wide_logits, ids, is_target, keys, num_steps=6, mask_id=10)


def test_protected_tokens_stay_and_no_mask_is_left():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 10, size=(3, 16)).astype(np.int32)
    is_target = rng.random((3, 16)) < 0.6
    is_target[2] = False  # a sample with nothing to do
    keys = jax.random.split(jax.random.key(0), 3)
    sampled = np.asarray(sample_wide(ids, is_target, keys))
    assert sampled.dtype == np.int32
    np.testing.assert_array_equal(sampled[~is_target], ids[~is_target])
    assert sampled.min() >= 0 and sampled.max() < 10
    # What stood at the targets is never read.
    ids[is_target] = 4
    np.testing.assert_array_equal(sample_wide(ids, is_target, keys), sampled)


def test_a_sample_does_not_depend_on_its_batch():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 10, size=(3, 16)).astype(np.int32)
    is_target = rng.random((3, 16)) < 0.7
    keys = jax.random.split(jax.random.key(5), 3)

    def sample(rows):
        rows = np.array(rows)
        return np.asarray(sample_wide(ids[rows], is_target[rows], keys[rows]))

    together = sample([0, 1, 2])
    np.testing.assert_array_equal(sample([2, 0, 1]), together[[2, 0, 1]])
    np.testing.assert_array_equal(sample([1]), together[[1]])
    # And it does depend on its key.
    other = sample_wide(ids, is_target, keys[::-1])
    assert np.any(other[0] != together[0])


def test_forwards_only_where_something_is_revealed():
    forwards = []

    def counted_logits(ids):
        jax.debug.callback(lambda: forwards.append(1))
        return wide_logits(ids)

    def make_counter(num_steps):
        sample = jax.jit(
            lambda ids, is_target, keys: sample_text(
                counted_logits, ids, is_target, keys, num_steps=num_steps, mask_id=10
            )
        )

        def count(is_target):
            forwards.clear()
            ids, keys = np.zeros((8, 16), np.int32), jax.random.split(jax.random.key(3), 8)
            sample(ids, is_target, keys).block_until_ready()
            jax.effects_barrier()
            return len(forwards)

        return count

    few, every, none = np.zeros((8, 16), bool), np.ones((8, 16), bool), np.zeros((8, 16), bool)
    few[3:5, :2] = True
    in_64_steps, in_4_steps = make_counter(64), make_counter(4)
    assert 1 <= in_64_steps(few) <= 4
    assert in_64_steps(none) == 0
    assert 32 < in_64_steps(every) <= 64
    assert in_4_steps(every) == 4  # 128 tokens leave none of four steps empty


def test_errors():
    ids, keys = jnp.zeros((2, 16), jnp.int32), jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="num_steps is 0"):
        sample_text(wide_logits, ids, ids == 0, keys, num_steps=0, mask_id=10)
    with pytest.raises(ValueError, match=r"\(2, 16\), \(2, 16\), \(1,\)"):
        sample_text(wide_logits, ids, ids == 0, keys[:1], num_steps=4, mask_id=10)
