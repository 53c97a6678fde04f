import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.sampling.text import DECODINGS, sample_text

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


@functools.partial(jax.jit, static_argnames="decoding")
def sample_toy(ids, keys, num_steps, decoding="ancestral", **options):
    return sample_text(
        toy_logits, ids, ids == MASK_ID, keys, num_steps=num_steps, mask_id=MASK_ID, decoding=decoding, **options
    )


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


def toy_probabilities(ids, temperature=1.0):
    """The model's distribution over the real tokens [position, token] in float64."""
    table = np.exp(LOGITS[tuple(ids)][:, :MASK_ID] / temperature)
    return table / table.sum(1, keepdims=True)


def ordered_distribution(start, choose, temperature):
    """The exact outcome of a sampler that at step k reveals the positions choose(probabilities, masked, k)."""
    state, step = {tuple(start): 1.0}, 0
    while any(MASK_ID in ids for ids in state):
        after = {}
        for ids, probability in state.items():
            masked = [i for i, token in enumerate(ids) if token == MASK_ID]
            chosen = choose(toy_probabilities(ids), masked, step) if masked else []
            table = toy_probabilities(ids, temperature)
            for tokens in itertools.product(range(MASK_ID), repeat=len(chosen)):
                new = list(ids)
                for i, token in zip(chosen, tokens, strict=True):
                    new[i] = token
                p = probability * np.prod([table[i, token] for i, token in zip(chosen, tokens, strict=True)])
                after[tuple(new)] = after.get(tuple(new), 0) + p
        state, step = after, step + 1
    return state


def check_distribution(expected, start, num_steps, **options):
    """Chi-squared of NUM_SAMPLES samples against the exact probabilities of every outcome."""
    assert sum(expected.values()) == pytest.approx(1)
    ids = jnp.tile(jnp.array(start), (NUM_SAMPLES, 1))
    keys = jax.random.split(jax.random.key(num_steps), NUM_SAMPLES)
    sampled = np.asarray(sample_toy(ids, keys, num_steps, **options).ids)

    assert sampled.max() < MASK_ID
    found, counts = np.unique(sampled, axis=0, return_counts=True)
    assert {tuple(ids) for ids in found.tolist()} <= set(expected)
    observed = dict(zip(map(tuple, found.tolist()), counts, strict=True))
    means = {ids: NUM_SAMPLES * p for ids, p in expected.items()}
    chi_squared = sum((observed.get(ids, 0) - mean) ** 2 / mean for ids, mean in means.items())
    freedom = len(expected) - 1
    # Mean freedom, variance 2 * freedom: far into the tail (p < 1e-5 for 8 and for 26 degrees of freedom).
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom) + 10


@pytest.mark.slow
@pytest.mark.parametrize("start, num_steps", [((3, 3, 3), 1), ((3, 3, 3), 2), ((3, 3, 3), 8), ((3, 1, 3), 3)])
def test_distribution_equals_the_step_by_step_sampler(start, num_steps):
    check_distribution(ancestral_distribution(start, num_steps), start, num_steps)


def test_the_distribution_depends_on_the_steps():
    # What gives the test above its power: 1, 2 and 8 steps are far apart compared with its tolerance.
    one, two, eight = (ancestral_distribution((3, 3, 3), n) for n in (1, 2, 8))
    for a, b in ((one, two), (two, eight)):
        assert sum((a[ids] - b[ids]) ** 2 / b[ids] for ids in b) * NUM_SAMPLES > 150


# The orders of the other decodings, in plain loops: (probabilities [L, V], masked positions, step) -> positions.


def by_confidence(threshold):
    def choose(probabilities, masked, step):
        surest = max(masked, key=lambda i: probabilities[i].max())
        return [i for i in masked if probabilities[i].max() >= threshold or i == surest]

    return choose


def by_entropy(bound):
    def choose(probabilities, masked, step):
        entropy = {i: -sum(p * np.log(p) for p in probabilities[i] if p > 0) for i in masked}
        chosen = []
        for i in sorted(masked, key=entropy.get):
            if chosen and sum(entropy[j] for j in chosen) > bound:  # with i, the sum less the largest, which is i
                break
            chosen.append(i)
        return chosen

    return choose


def by_top_k(num_steps):
    def choose(probabilities, masked, step):
        count = int(np.ceil(len(masked) / (num_steps - step)))
        return sorted(masked, key=lambda i: -probabilities[i].max())[:count]

    return choose


ORDERS = [
    ("confidence", dict(threshold=0.5), by_confidence(0.5)),
    ("confidence", dict(threshold=2.0), by_confidence(2.0)),  # one at a time
    ("entropy", dict(entropy_bound=2.5), by_entropy(2.5)),
    ("entropy", dict(entropy_bound=-1.0), by_entropy(-1.0)),  # one at a time
    ("top_k", dict(num_steps=2), by_top_k(2)),
    ("top_k", dict(num_steps=5), by_top_k(5)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoding, options, choose",
    [
        ("confidence", dict(threshold=0.6), by_confidence(0.6)),
        ("entropy", dict(entropy_bound=0.9), by_entropy(0.9)),
        ("top_k", dict(num_steps=2), by_top_k(2)),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_orders_have_the_exact_distribution(decoding, options, choose, temperature):
    start, options = (3, 3, 3), {"num_steps": 2} | options
    expected = ordered_distribution(start, choose, temperature)
    check_distribution(expected, start, decoding=decoding, temperature=temperature, **options)


WIDE_MASK, TRACES = 31, []


def wide_logits(ids, library=jnp):
    """A model of 16 tokens and a vocabulary of 32 (the last the mask) in which a token sees its own row only."""
    context = library.cumsum(ids * 7 % 11, axis=1) + library.sum(ids, axis=1, keepdims=True)
    # Some predictions are sure and others are not: probability falls as a power of the distance to a peak.
    return -2 * library.log(1.01 - library.sin(context[..., None] * (1 + library.arange(32.0))))


@functools.partial(jax.jit, static_argnames="decoding")
def wide_program(ids, is_target, keys, decoding, **options):
    TRACES.append(decoding)
    return sample_text(wide_logits, ids, is_target, keys, mask_id=WIDE_MASK, decoding=decoding, **options)


def sample_wide(
    ids, is_target, keys, decoding="ancestral", num_steps=6, temperature=1.0, threshold=0.5, entropy_bound=2.5
):
    return wide_program(
        ids,
        is_target,
        keys,
        decoding,
        num_steps=num_steps,
        temperature=np.broadcast_to(np.float32(temperature), len(ids)),
        threshold=threshold,
        entropy_bound=entropy_bound,
    )


def wide_problem(seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, WIDE_MASK, size=(3, 16)).astype(np.int32)
    return ids, rng.random((3, 16)) < 0.7, jax.random.split(jax.random.key(seed), 3)


@pytest.mark.slow
@pytest.mark.parametrize("decoding, options, choose", ORDERS)
def test_orders_equal_a_plain_loop_at_temperature_0(decoding, options, choose):
    ids, is_target, keys = wide_problem(0)
    sampled, evaluations = sample_wide(ids, is_target, keys, decoding, temperature=0.0, **options)

    steps, expected = [], np.where(is_target, WIDE_MASK, ids)
    for row in expected:
        step = 0
        while WIDE_MASK in row:
            logits = wide_logits(row[None].astype(np.float64), np)[0, :, :WIDE_MASK]
            probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            for i in choose(probabilities, np.flatnonzero(row == WIDE_MASK), step):
                row[i] = np.argmax(logits[i])
            step += 1
        steps.append(step)
    np.testing.assert_array_equal(sampled, expected)
    assert evaluations == max(steps)
    # One at a time, or in fewer steps than there are tokens.
    one_at_a_time = options.get("threshold", 0) > 1 or options.get("entropy_bound", 0) < 0
    assert (sum(steps) == is_target.sum()) == one_at_a_time
    assert decoding != "top_k" or evaluations == options["num_steps"]


def test_temperature_0_is_the_most_likely_token_and_temperature_is_per_sample():
    ids, is_target, keys = wide_problem(1)
    is_target[:] = True
    # In one step every token is drawn from the same prediction.
    temperature = np.array([0.0, 1.0, 1e3], np.float32)
    sampled = np.asarray(sample_wide(ids, is_target, keys, num_steps=1, temperature=temperature).ids)
    likeliest = np.argmax(wide_logits(np.full((3, 16), WIDE_MASK), np)[..., :WIDE_MASK], axis=-1)
    assert np.array_equal(sampled[0], likeliest[0])
    assert 0 < np.mean(sampled[1] == likeliest[1]) < 1
    assert len(np.unique(sampled[2])) > 4  # close to uniform
    plain = sample_wide(ids, is_target, keys, num_steps=1).ids
    np.testing.assert_array_equal(plain[1], sampled[1])
    assert np.any(plain[0] != sampled[0])


def test_other_values_do_not_retrace():
    ids, is_target, keys = wide_problem(4)
    first = {decoding: sample_wide(ids, is_target, keys, decoding).ids for decoding in DECODINGS}
    traces = len(TRACES)
    # Which of the decodings each value changes.
    for options, changed in [
        (dict(keys=keys[::-1]), DECODINGS),
        (dict(num_steps=9), ("ancestral", "top_k")),
        (dict(temperature=0.0), DECODINGS),
        (dict(threshold=1.1), ("confidence",)),
        (dict(entropy_bound=0.0), ("entropy",)),
    ]:
        for decoding in DECODINGS:
            after = sample_wide(ids, is_target, **({"keys": keys} | options), decoding=decoding).ids
            assert np.array_equal(first[decoding], after) == (decoding not in changed), (options, decoding)
    assert len(TRACES) == traces


@pytest.mark.parametrize("decoding", DECODINGS)
def test_protected_tokens_stay_and_no_mask_is_left(decoding):
    ids, is_target, keys = wide_problem(2)
    is_target[2] = False  # a sample with nothing to do
    sampled = np.asarray(sample_wide(ids, is_target, keys, decoding).ids)
    assert sampled.dtype == np.int32
    np.testing.assert_array_equal(sampled[~is_target], ids[~is_target])
    assert sampled.min() >= 0 and sampled.max() < WIDE_MASK
    # What stood at the targets is never read.
    ids[is_target] = 4
    np.testing.assert_array_equal(sample_wide(ids, is_target, keys, decoding).ids, sampled)


@pytest.mark.slow
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_sample_does_not_depend_on_its_batch(decoding):
    ids, is_target, keys = wide_problem(3)
    is_target[1, 4:] = False  # done long before the others

    def sample(rows):
        rows = np.array(rows)
        return np.asarray(sample_wide(ids[rows], is_target[rows], keys[rows], decoding).ids)

    together = sample([0, 1, 2])
    np.testing.assert_array_equal(sample([2, 0, 1]), together[[2, 0, 1]])
    np.testing.assert_array_equal(sample([1]), together[[1]])
    # And it does depend on its key.
    other = sample_wide(ids, is_target, keys[::-1], decoding).ids
    assert np.any(other[0] != together[0])


def test_forwards_only_where_something_is_revealed():
    forwards = []

    def counted_logits(ids):
        jax.debug.callback(lambda: forwards.append(1))
        return wide_logits(ids)

    @jax.jit
    def sample(is_target, num_steps):
        ids, keys = jnp.zeros((8, 16), jnp.int32), jax.random.split(jax.random.key(3), 8)
        return sample_text(counted_logits, ids, is_target, keys, num_steps=num_steps, mask_id=WIDE_MASK)

    def count(is_target, num_steps):
        forwards.clear()
        evaluations = int(sample(is_target, num_steps).evaluations)
        jax.effects_barrier()
        assert evaluations == len(forwards)
        return evaluations

    few, every, none = np.zeros((8, 16), bool), np.ones((8, 16), bool), np.zeros((8, 16), bool)
    few[3:5, :2] = True
    assert 1 <= count(few, 64) <= 4
    assert count(none, 64) == 0
    assert 32 < count(every, 64) <= 64
    assert count(every, 4) == 4  # 128 tokens leave none of four steps empty


def test_errors():
    ids, keys = jnp.zeros((2, 16), jnp.int32), jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="num_steps is 0"):
        sample_text(wide_logits, ids, ids == 0, keys, num_steps=0, mask_id=WIDE_MASK)
    with pytest.raises(ValueError, match="'greedy'; expected one of ancestral, confidence, entropy, top_k"):
        sample_text(wide_logits, ids, ids == 0, keys, num_steps=4, mask_id=WIDE_MASK, decoding="greedy")
    with pytest.raises(ValueError, match=r"\(2, 16\), \(2, 16\), \(1,\)"):
        sample_text(wide_logits, ids, ids == 0, keys[:1], num_steps=4, mask_id=WIDE_MASK)


@pytest.mark.slow
@pytest.mark.parametrize("decoding", ["ancestral", "top_k"])
def test_a_text_in_parts_has_the_tokens_of_one_call(decoding):
    ids, is_target, keys = wide_problem(0)
    options = {"num_steps": 6, "evaluations": 0, "most": 99}
    whole = wide_program(ids, is_target, keys, decoding, **options)
    parts, options["most"] = ids, 2
    while options["evaluations"] < whole.evaluations:
        parts, options["evaluations"] = wide_program(parts, is_target, keys, decoding, **options)
        assert np.any(np.asarray(parts) == WIDE_MASK) == (options["evaluations"] < whole.evaluations)
    np.testing.assert_array_equal(parts, whole.ids)
    assert options["evaluations"] == whole.evaluations > 2


# End of text last, and single first tokens: the rules in plain loops, and what they are for.

END = 5


def ending_logits(ids, library=jnp):
    """`wide_logits` with end-of-text the likeliest at about half of the positions."""
    return wide_logits(ids, library) + 4.0 * (library.arange(32) == END)


@functools.partial(jax.jit, static_argnames="decoding")
def sample_ending(ids, is_target, keys, decoding, **options):
    options = {"num_steps": 6, "threshold": 0.5, "entropy_bound": 2.5, "single_steps": 0} | options
    options |= {"mask_id": WIDE_MASK, "eos_id": END, "temperature": 0.0}
    return sample_text(ending_logits, ids, is_target, keys, decoding=decoding, **options)


def in_order(probabilities, masked):
    """The positions whose turn it is: words from the surest on, or where there are none ends from the right."""
    words = [i for i in masked if probabilities[i].argmax() != END]
    return sorted(words, key=lambda i: -probabilities[i].max()) or sorted(masked, reverse=True)


def by_words(decoding, probabilities, masked, step, num_steps=6, threshold=0.5, entropy_bound=2.5, single_steps=0):
    turn = in_order(probabilities, masked)
    if decoding == "top_k":
        if step == num_steps - 1:
            return masked
        count = 1 if step < min(single_steps, num_steps // 2) else int(np.ceil(len(turn) / (num_steps - step)))
        return turn[:count]
    if decoding == "confidence":
        return turn[: max(1, sum(probabilities[i].max() >= threshold for i in turn))]
    entropy = {i: -sum(p * np.log(p) for p in probabilities[i] if p > 0) for i in turn}
    if probabilities[turn[0]].argmax() != END:
        turn.sort(key=entropy.get)
    sums = [[entropy[i] for i in turn[: count + 1]] for count in range(len(turn))]
    return turn[: max(1, sum(sum(values) - max(values) <= entropy_bound for values in sums))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "decoding, options",
    [
        ("top_k", dict(num_steps=6)),
        ("top_k", dict(num_steps=9, single_steps=3)),
        ("top_k", dict(num_steps=4, single_steps=3)),  # of which it takes two
        ("top_k", dict(num_steps=1, single_steps=3)),  # of which it takes none
        ("confidence", dict(threshold=0.5)),
        ("entropy", dict(entropy_bound=2.5)),
    ],
)
def test_end_of_text_last_equals_a_plain_loop(decoding, options):
    ids, is_target, keys = wide_problem(0)
    sampled, evaluations = sample_ending(ids, is_target, keys, decoding, **options)
    steps, ends, expected = [], 0, np.where(is_target, WIDE_MASK, ids)
    for row in expected:
        step = 0
        while WIDE_MASK in row:
            logits = ending_logits(row[None].astype(np.float64), np)[0, :, :WIDE_MASK]
            probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            masked = np.flatnonzero(row == WIDE_MASK).tolist()
            ends += any(probabilities[i].argmax() == END for i in masked)
            for i in by_words(decoding, probabilities, masked, step, **options):
                row[i] = np.argmax(logits[i])
            step += 1
        steps.append(step)
    np.testing.assert_array_equal(sampled, expected)
    assert evaluations == max(steps) and ends > 0
    assert decoding != "top_k" or evaluations <= options["num_steps"]


def fill(logits_fn, length, **options):
    """One text, all of it masked, by top_k at temperature 0."""
    ids, keys = jnp.zeros((1, length), jnp.int32), jax.random.split(jax.random.key(0), 1)
    options = {"mask_id": WIDE_MASK, "decoding": "top_k", "temperature": 0.0, "num_steps": length} | options
    return sample_text(logits_fn, ids, ids == 0, keys, **options).ids[0].tolist()


@pytest.mark.slow
def test_end_of_text_last_finds_the_likeliest_sentence_and_not_the_shortest():
    """The exact conditionals of four sentences, two short ones that share where they end and two long ones."""
    sentences = np.array([[6, 7, 8, END], [9, 10, 11, END], [12, END, END, END], [13, END, END, END]])
    chances = np.array([0.3, 0.26, 0.22, 0.22])

    def exact(ids):
        fits = jnp.all((ids[0] == WIDE_MASK) | (ids[0] == sentences), axis=1) * chances
        return jnp.log(jnp.einsum("s,slv->lv", fits, jax.nn.one_hot(sentences, 32)) + 1e-9)[None]

    assert fill(exact, 4)[1] == END  # the surest position ends the text
    assert fill(exact, 4, eos_id=END) == [6, 7, 8, END]


@pytest.mark.slow
def test_a_model_without_positions_neither_ends_at_once_nor_repeats_itself():
    sentence = jnp.array([6, 7, 8, END, END, END])

    def alike(everywhere, place):
        """Predicts one token at every position until it sees that token at its `place`, and then the sentence."""

        def logits(ids):
            seen = ids[:, place, None] == everywhere
            return 5.0 * jax.nn.one_hot(jnp.where(seen, sentence, everywhere), 32)

        return logits

    assert fill(alike(END, -1), 6) == [END] * 6  # an empty text
    assert fill(alike(END, -1), 6, eos_id=END) == sentence.tolist()
    assert fill(alike(6, 0), 6, eos_id=END, num_steps=3) == [6, 6, 8, END, END, END]
    assert fill(alike(6, 0), 6, eos_id=END, num_steps=3, single_steps=1) == sentence.tolist()


def test_ancestral_decoding_is_the_reference_s_whatever_protects_the_others():
    ids, is_target, keys = wide_problem(5)
    plain = sample_wide(ids, is_target, keys).ids
    options = {"num_steps": 6, "mask_id": WIDE_MASK, "eos_id": END, "single_steps": 4}
    protected = jax.jit(lambda *a: sample_text(wide_logits, *a, **options))(ids, is_target, keys).ids
    np.testing.assert_array_equal(protected, plain)
