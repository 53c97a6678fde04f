"""Attention: each implementation against float64 numpy or the plain one, alone and split over a mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.models import attention as attention_module
from unialign_jax.models.attention import attention, resolve_implementation


def make_inputs(shape, dtype="float32"):
    """A query, key, value and a cotangent of one shape; the queries are large enough for a peaked softmax."""
    rng = np.random.default_rng(0)
    spread = (2.0, 1.0, 1.0, 1.0)
    return [jnp.asarray(s * rng.standard_normal(shape), dtype) for s in spread]


def attend_in_float64(query, key, value, scale, bias=None):
    """The definition, one head at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.empty_like(query)
    for b, h in np.ndindex(query.shape[0], query.shape[2]):
        scores = scale * query[b, :, h] @ key[b, :, h].T
        if bias is not None:
            scores = scores + np.asarray(bias[h], np.float64)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ value[b, :, h]
    return out


def output_and_gradients(inputs, **options):
    """The output, and the gradients of its product with the cotangent, in one compiled program."""
    query, key, value, cotangent = inputs

    @jax.jit
    def run(query, key, value):
        out, pull_back = jax.vjp(lambda *x: attention(*x, **options), query, key, value)
        return out, *pull_back(cotangent)

    return [np.asarray(x, np.float64) for x in run(query, key, value)]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_xla_equals_the_definition(dtype, tolerance):
    query, key, value, _ = make_inputs((2, 37, 3, 16), dtype)
    out = attention(query, key, value)
    assert out.dtype == dtype
    expected = attend_in_float64(query, key, value, scale=0.25)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance, rtol=tolerance)


def test_xla_bias_and_scale_equal_the_definition():
    query, key, value, _ = make_inputs((2, 21, 3, 8))
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((3, 21, 21)), jnp.float32)
    out = attention(query, key, value, bias=bias, scale=0.7)
    np.testing.assert_allclose(out, attend_in_float64(query, key, value, 0.7, bias), atol=5e-6)


def test_xla_gradients_equal_finite_differences_of_the_definition():
    inputs = make_inputs((2, 11, 2, 4))
    _, *gradients = output_and_gradients(inputs)
    arrays = [np.asarray(x, np.float64) for x in inputs[:3]]
    cotangent = np.asarray(inputs[3], np.float64)
    rng = np.random.default_rng(2)
    for which in range(3):
        direction, step = rng.standard_normal(arrays[0].shape), 1e-5
        moved = {sign: list(arrays) for sign in (1, -1)}
        for sign in moved:
            moved[sign][which] = arrays[which] + sign * step * direction
        change = attend_in_float64(*moved[1], 0.5) - attend_in_float64(*moved[-1], 0.5)
        expected = np.sum(change * cotangent) / (2 * step)
        assert np.sum(gradients[which] * direction) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_xla_keeps_no_scores_for_the_backward_pass():
    # 16 heads of 512 x 512 float32 scores are 16 MiB; query, key and value are 0.5 MiB each.
    inputs = make_inputs((2, 512, 8, 16))[:3]
    kept = jax.eval_shape(lambda *x: jax.vjp(attention, *x)[1], *inputs)  # on any machine
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) <= 2 * 2**20
    gradient = jax.grad(lambda *x: jnp.sum(attention(*x) ** 2), argnums=(0, 1, 2))
    memory = jax.jit(gradient).lower(*inputs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 10 * 2**20


# 200 is not a multiple of the block and padded to 256; 700 takes two blocks of queries. Where only 384 keys are held at
# once, each block of keys writes a part of the queries' gradient.
@pytest.mark.parametrize(("tokens", "keys"), [(128, 4352), (200, 4352), (700, 4352), (700, 384)])
def test_splash_equals_xla_forward_and_backward(tokens, keys, monkeypatch):
    monkeypatch.setattr(attention_module, "SPLASH_MAX_KEYS", keys)
    monkeypatch.setattr(attention_module, "SPLASH_LONG", min(keys, 2304))
    inputs = make_inputs((2, tokens, 2, 64))
    expected = output_and_gradients(inputs, implementation="xla")
    found = output_and_gradients(inputs, implementation="splash", interpret=True)
    for name, a, b in zip(("output", "dquery", "dkey", "dvalue"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.skipif(jax.device_count() == 1, reason="needs several devices: set jax_num_cpu_devices")
@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_split_over_a_mesh_equals_one_device(implementation):
    tensor = 2 if jax.device_count() % 2 == 0 else 1
    data = 2 if jax.device_count() % (2 * tensor) == 0 else 1
    fsdp = jax.device_count() // (data * tensor)
    inputs = make_inputs((data * fsdp, 100, 2 * tensor, 16))
    expected = output_and_gradients(inputs, implementation="xla")
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    with jax.set_mesh(jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=axis_types)):
        options = {"implementation": implementation, "interpret": implementation == "splash"}
        query, key, value, _ = inputs
        out = jax.jit(lambda *x: attention(*x, **options))(query, key, value)
        # Each device holds its own samples and heads only.
        assert out.addressable_shards[0].data.shape == (1, 100, 2, 16)
        found = output_and_gradients(inputs, **options)
    for name, a, b in zip(("output", "dquery", "dkey", "dvalue"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


@pytest.mark.skipif(jax.device_count() == 1, reason="needs several devices: set jax_num_cpu_devices")
def test_a_batch_that_the_mesh_does_not_divide_still_works():
    query, key, value, _ = make_inputs((1, 20, 3, 8))
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((3, 20, 20)), jnp.float32)
    expected = attend_in_float64(query, key, value, 8**-0.5, bias)
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((jax.device_count(), 1, 1), ("data", "fsdp", "tensor"), axis_types=axis_types)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda *x: attention(*x, bias=bias))(query, key, value)
    np.testing.assert_allclose(out, expected, atol=5e-6)


@pytest.mark.parametrize("implementation", ["xla", "splash"])
def test_where_nothing_divides_every_device_does_all(implementation):
    inputs = make_inputs((3, 20, 3, 8))
    expected = output_and_gradients(inputs, implementation="xla")
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=axis_types)):
        found = output_and_gradients(inputs, implementation=implementation, interpret=implementation == "splash")
    for name, a, b in zip(("output", "dquery", "dkey", "dvalue"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_auto_is_resolved_by_platform():
    expected = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn", "rocm": "xla", "cpu": "xla"}
    assert {platform: resolve_implementation("auto", platform) for platform in expected} == expected
    assert resolve_implementation("auto", "gpu", dtype="float32") == "xla"
    assert resolve_implementation("xla", "tpu") == "xla"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.5", "xla"), ("7.0", "xla"), ("8.0", "cudnn"), ("8.9", "cudnn"), ("10.0", "cudnn"), ("gfx942", "xla")],
)
def test_auto_is_cudnn_where_cudnn_has_it(capability, expected):
    """T4 and V100 are before SM80, which cuDNN's kernel needs; JAX names AMD's GPUs "gpu" too."""
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    assert resolve_implementation("auto", gpu) == expected
    assert resolve_implementation("auto", gpu, "float32") == "xla"
    assert resolve_implementation("cudnn", gpu) == "cudnn"


def test_bad_requests_are_refused_with_the_reason():
    query, key, value, _ = make_inputs((1, 4, 2, 8))
    with pytest.raises(ValueError, match="unknown attention 'flash'.*auto, xla, cudnn, splash"):
        resolve_implementation("flash", "cpu")
    with pytest.raises(ValueError, match="unknown attention implementation 'auto'"):
        attention(query, key, value, implementation="auto")
    for implementation in ("cudnn", "splash"):
        with pytest.raises(ValueError, match=f"'{implementation}' takes no bias"):
            attention(query, key, value, implementation=implementation, bias=jnp.zeros((2, 4, 4)))
    with pytest.raises(ValueError, match="bias has shape"):
        attention(query, key, value, bias=jnp.zeros((1, 4, 4)))
    with pytest.raises(ValueError, match="needs bfloat16 inputs, found float32"):
        attention(query, key, value, implementation="cudnn")
    with pytest.raises(ValueError, match="share one shape"):
        attention(query, key[:, :3], value)
