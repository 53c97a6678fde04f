import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.losses.masked_text import masked_text_loss

MASK_ID = 6


def make_case(seed=0, batch=3, length=8, vocabulary=9):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.normal(size=(batch, length, vocabulary))).astype(np.float32)
    ids = rng.integers(0, MASK_ID, size=(batch, length)).astype(np.int32)
    maskable = rng.random((batch, length)) < 0.7
    is_masked = maskable & (rng.random((batch, length)) < 0.6)
    fraction = np.array([0.05, 0.5, 1.0], np.float32)[:batch]
    return logits, ids, is_masked, maskable, fraction


def reference_nll(logits, ids):
    """SUBS in float64, position by position: the mask's logit is removed, then an ordinary log-softmax."""
    logits = np.delete(logits.astype(np.float64), MASK_ID, axis=-1)
    ids = ids - (ids > MASK_ID)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, ids[..., None], -1)[..., 0]


@pytest.mark.parametrize("normalization", ["positions", "maskable"])
def test_against_float64(normalization):
    logits, ids, is_masked, maskable, fraction = make_case()
    loss = masked_text_loss(logits, ids, is_masked, maskable, fraction, mask_id=MASK_ID, normalization=normalization)
    assert loss.shape == (3,) and loss.dtype == jnp.float32
    weighted = (reference_nll(logits, ids) * is_masked).sum(1) / fraction
    np.testing.assert_allclose(
        loss, weighted / 8 if normalization == "positions" else weighted * 3 / maskable.sum(), rtol=1e-5
    )
    # What the caller takes, the mean over the batch, is the sum over positions or over maskable ones.
    count = ids.size if normalization == "positions" else maskable.sum()
    np.testing.assert_allclose(loss.mean(), weighted.sum() / count, rtol=1e-5)


def test_gradient_against_torch():
    torch = pytest.importorskip("torch")
    logits, ids, is_masked, maskable, fraction = make_case(1)
    gradient = jax.grad(lambda x: masked_text_loss(x, ids, is_masked, maskable, fraction, mask_id=MASK_ID).mean())(
        logits
    )

    torch_logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    penalty = torch.zeros(9, dtype=torch.float64)
    penalty[MASK_ID] = -1e6
    log_p = torch.log_softmax(torch_logits + penalty, -1)
    nll = -torch.gather(log_p, -1, torch.tensor(ids, dtype=torch.int64)[..., None])[..., 0]
    weighted = nll * torch.tensor(is_masked) / torch.tensor(fraction, dtype=torch.float64)[:, None]
    (weighted.sum() / ids.size).backward()
    np.testing.assert_allclose(gradient, torch_logits.grad, rtol=1e-5, atol=1e-8)

    # SUBS, exactly: no gradient on visible tokens, and none on the mask's logit.
    assert not np.any(gradient[~is_masked])
    assert not np.any(gradient[..., MASK_ID])
    assert np.all(np.abs(gradient[is_masked]).sum(-1) > 0)


def test_visible_tokens_and_the_masks_logit_do_not_matter():
    logits, ids, is_masked, maskable, fraction = make_case(2)
    loss = masked_text_loss(logits, ids, is_masked, maskable, fraction, mask_id=MASK_ID)
    changed = logits.copy()
    changed[~is_masked] = 1e4
    changed[..., MASK_ID] = 1e4
    np.testing.assert_array_equal(masked_text_loss(changed, ids, is_masked, maskable, fraction, mask_id=MASK_ID), loss)
    nothing = masked_text_loss(
        logits, ids, np.zeros_like(is_masked), maskable, fraction, mask_id=MASK_ID, normalization="maskable"
    )
    np.testing.assert_array_equal(nothing, np.zeros(3))


def test_uniform_logits_give_the_log_of_the_vocabulary():
    # All masked at t = 1, and V - 1 possible ids: ln(V - 1) for every sample.
    ids = jnp.zeros((2, 5), jnp.int32)
    everywhere = jnp.ones((2, 5), bool)
    loss = masked_text_loss(jnp.zeros((2, 5, 9)), ids, everywhere, everywhere, jnp.ones(2), mask_id=MASK_ID)
    np.testing.assert_allclose(loss, np.log(8), rtol=1e-6)


def test_a_true_mask_token_counts_zero():
    logits, ids, is_masked, maskable, fraction = make_case(3)
    ids[is_masked] = MASK_ID
    value, gradient = jax.value_and_grad(
        lambda x: masked_text_loss(x, ids, is_masked, maskable, fraction, mask_id=MASK_ID).sum()
    )(logits)
    assert value == 0 and not np.any(gradient)


def test_bfloat16_logits_are_summed_in_float32():
    # 4096 equal logits: in bfloat16 a running sum of exponentials stalls at 256, in float32 it does not.
    ids = jnp.zeros((1, 2), jnp.int32)
    everywhere = jnp.ones((1, 2), bool)
    logits = jnp.zeros((1, 2, 4097), jnp.bfloat16)
    loss = masked_text_loss(logits, ids, everywhere, everywhere, jnp.ones(1), mask_id=MASK_ID)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.log(4096), rtol=1e-6)


def test_the_backward_pass_keeps_no_float32_copy_of_the_logits():
    logits, ids, is_masked, maskable, fraction = make_case(4)
    logits = jnp.asarray(logits, jnp.bfloat16)
    _, backward = jax.vjp(lambda x: masked_text_loss(x, ids, is_masked, maskable, fraction, mask_id=MASK_ID), logits)
    kept = [leaf for leaf in jax.tree.leaves(backward) if leaf.size == logits.size]
    assert [leaf.dtype for leaf in kept] == [jnp.bfloat16]  # the logits themselves, nothing else of their size


def test_errors():
    logits, ids, is_masked, maskable, fraction = make_case()
    with pytest.raises(ValueError, match="mask_id is 9; the logits cover the ids 0 to 8"):
        masked_text_loss(logits, ids, is_masked, maskable, fraction, mask_id=9)
    with pytest.raises(ValueError, match=r"maskable has shape \(3, 1\)"):
        masked_text_loss(logits, ids, is_masked, maskable[:, :1], fraction, mask_id=MASK_ID)
    with pytest.raises(ValueError, match="normalization is 'tokens'"):
        masked_text_loss(logits, ids, is_masked, maskable, fraction, mask_id=MASK_ID, normalization="tokens")
