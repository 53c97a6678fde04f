import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.losses.cross_modal import cross_modal_loss


def reference(image, text, temperature):
    """Row and column cross-entropies in float64, one sample at a time."""
    image, text = (x.astype(np.float64).mean(1) for x in (image, text))
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    similarity = image @ text.T / temperature
    rows = [np.log(np.exp(similarity[i]).sum()) - similarity[i, i] for i in range(len(image))]
    columns = [np.log(np.exp(similarity[:, i]).sum()) - similarity[i, i] for i in range(len(image))]
    return np.array(rows), np.array(columns)


def make_case(seed=0, batch=5):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, 6, 12)).astype(np.float32)
    text = rng.normal(size=(batch, 4, 12)).astype(np.float32)
    return image, text


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_against_float64(temperature):
    image, text = make_case()
    rows, columns = reference(image, text, temperature)
    assert np.abs(rows - columns).max() > 0.1  # so that the two directions can be told apart
    symmetric = cross_modal_loss(image, text, temperature=temperature)
    one_way = cross_modal_loss(image, text, temperature=temperature, direction="image_to_text")
    assert symmetric.shape == (5,) and symmetric.dtype == jnp.float32
    # Differences of numbers of about 10, whose last bit is 1e-6.
    np.testing.assert_allclose(symmetric, (rows + columns) / 2, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(one_way, rows, rtol=2e-5, atol=1e-6)


def test_features_without_information_give_ln_n():
    # The same text for every image: nothing to tell the rows apart, exactly ln N one way and symmetric.
    image, text = make_case(1, batch=16)
    same = np.broadcast_to(text[:1], text.shape)
    np.testing.assert_allclose(cross_modal_loss(image, same, direction="image_to_text"), np.log(16), rtol=1e-5)
    # Independent features in many dimensions at a mild temperature: ln N up to their small chance similarity.
    rng = np.random.default_rng(2)
    image, text = rng.normal(size=(2, 16, 1, 4096)).astype(np.float32)
    assert cross_modal_loss(image, text, temperature=1.0).mean() == pytest.approx(np.log(16), abs=0.02)


def test_matched_features_are_near_zero_and_scale_does_not_matter():
    image, _ = make_case(3)
    text = 100 * image[:, :1] + 0 * image  # one direction per sample, unlike its neighbours'
    image = np.repeat(image[:, :1], 3, axis=1)
    assert cross_modal_loss(image, text, temperature=0.01).max() < 1e-3


def test_gradient_against_finite_differences():
    image, text = make_case(4)
    gradient = jax.grad(lambda x: cross_modal_loss(x, text, temperature=0.5).mean())(image)
    direction = np.random.default_rng(5).normal(size=image.shape)
    step = 1e-5

    def mean_loss(x):
        return np.mean(reference(x, text, 0.5))

    moved = [mean_loss(image.astype(np.float64) + sign * step * direction) for sign in (1, -1)]
    np.testing.assert_allclose((gradient * direction).sum(), (moved[0] - moved[1]) / (2 * step), rtol=1e-4)


def test_zero_features_have_finite_gradients():
    _, text = make_case()
    gradient = jax.grad(lambda x: cross_modal_loss(x, text).mean())(jnp.zeros((5, 6, 12)))
    assert np.all(np.isfinite(gradient))


def test_negatives_are_global_under_a_sharded_batch():
    image, text = make_case(6, batch=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    sharded = cross_modal_loss(jax.device_put(image, sharding), jax.device_put(text, sharding))
    rows, columns = reference(image, text, 0.07)
    np.testing.assert_allclose(sharded, (rows + columns) / 2, rtol=2e-5)


def test_errors():
    with pytest.raises(ValueError, match=r"\(2, 6, 12\), text features \(3, 4, 12\)"):
        cross_modal_loss(jnp.zeros((2, 6, 12)), jnp.zeros((3, 4, 12)))
    with pytest.raises(ValueError, match="direction is 'text_to_image'"):
        cross_modal_loss(jnp.zeros((2, 6, 12)), jnp.zeros((2, 4, 12)), direction="text_to_image")
