import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.losses.intrinsic_modal import intrinsic_modal_loss


def test_closed_forms():
    predicted = jnp.array([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    teacher = jnp.array([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0], [1.0, 0.0], [1.0, 0.0]])
    loss = intrinsic_modal_loss(predicted, teacher)
    assert loss.shape == (5,) and loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [0.0, 2.0, 1.0, 1 - 0.6, 1.0], atol=1e-6)


def test_patches_are_averaged_after_the_cosine():
    rng = np.random.default_rng(0)
    predicted, teacher = rng.normal(size=(2, 3, 5, 7))
    cosine = np.sum(predicted * teacher, -1)
    cosine /= np.linalg.norm(predicted, axis=-1) * np.linalg.norm(teacher, axis=-1)
    loss = intrinsic_modal_loss(predicted.astype(np.float32), teacher.astype(np.float32))
    np.testing.assert_allclose(loss, 1 - cosine.mean(1), rtol=1e-5)
    pooled = intrinsic_modal_loss(predicted.mean(1).astype(np.float32), teacher.mean(1).astype(np.float32))
    assert np.abs(loss - pooled).max() > 0.05  # not the cosine of the averages


def test_gradient():
    # d(1 - cos)/dp = -(t_hat - cos * p_hat) / |p|, and orthogonal to p.
    rng = np.random.default_rng(1)
    predicted, teacher = rng.normal(size=(2, 4, 9))
    gradient = jax.grad(lambda p: intrinsic_modal_loss(p, teacher.astype(np.float32)).sum())(
        predicted.astype(np.float32)
    )
    length = np.linalg.norm(predicted, axis=1, keepdims=True)
    p_hat, t_hat = predicted / length, teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    cosine = (p_hat * t_hat).sum(1, keepdims=True)
    np.testing.assert_allclose(gradient, -(t_hat - cosine * p_hat) / length, rtol=1e-4, atol=1e-6)


def test_float16_teacher_of_full_width():
    # Precomputed features are float16 and 3584 wide: their squares overflow float16 (largest number 65504).
    teacher = np.full((2, 3584), 40.0, np.float16)
    predicted = np.full((2, 3584), 0.5, np.float32)
    np.testing.assert_allclose(intrinsic_modal_loss(predicted, teacher), 0.0, atol=1e-5)
    zero = jax.grad(lambda p: intrinsic_modal_loss(p, teacher).sum())(jnp.zeros((2, 3584)))
    assert np.all(np.isfinite(zero))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 8\), the teacher's \(2, 9\)"):
        intrinsic_modal_loss(jnp.zeros((2, 8)), jnp.zeros((2, 9)))
