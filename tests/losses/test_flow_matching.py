import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.losses.flow_matching import flow_matching_loss


def make_case(seed=0):
    rng = np.random.default_rng(seed)
    clean, noise, predicted = rng.normal(size=(3, 4, 6, 5, 2)).astype(np.float32)
    sigma = np.array([0.02, 0.3, 0.7, 1.0], np.float32)
    return clean, noise, predicted, sigma


def test_velocity_form_is_the_mean_squared_error():
    clean, noise, predicted, sigma = make_case()
    loss = flow_matching_loss(predicted, noise - clean, sigma)
    error = predicted.astype(np.float64) - (noise.astype(np.float64) - clean)
    assert loss.shape == (4,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, (error**2).mean((1, 2, 3)), rtol=1e-6)


def test_x0_form_is_the_error_of_the_predicted_clean_latent():
    clean, noise, predicted, sigma = make_case(1)
    loss = flow_matching_loss(predicted, noise - clean, sigma, form="x0")
    # From the definition in the released code, without the identity that ours relies on.
    s = sigma.astype(np.float64)[:, None, None, None]
    noisy = (1 - s) * clean + s * noise
    predicted_clean = noisy - s * predicted
    np.testing.assert_allclose(loss, ((predicted_clean - clean) ** 2).mean((1, 2, 3)), rtol=1e-5)


def test_gradient():
    clean, noise, predicted, sigma = make_case(2)
    target = noise - clean
    gradient = jax.grad(lambda p: flow_matching_loss(p, target, sigma, form="x0").mean())(predicted)
    expected = 2 * sigma[:, None, None, None] ** 2 * (predicted - target) / predicted.size
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-8)


def test_bfloat16_is_computed_in_float32():
    # The difference of these two bfloat16 numbers is no bfloat16 number, and neither is its square.
    predicted = jnp.full((1, 4, 4, 1), 1.0, jnp.bfloat16)
    target = jnp.full((1, 4, 4, 1), -1.0078125, jnp.bfloat16)
    loss = flow_matching_loss(predicted, target, jnp.ones(1))
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 2.0078125**2, rtol=1e-6)


def test_errors():
    zeros = jnp.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 1\), its target \(2, 4, 4, 2\)"):
        flow_matching_loss(zeros, jnp.zeros((2, 4, 4, 2)), jnp.ones(2))
    with pytest.raises(ValueError, match="form is 'eps'"):
        flow_matching_loss(zeros, zeros, jnp.ones(2), form="eps")
