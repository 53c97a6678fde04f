"""Weights and activations of 8 bits: against rounding in float64, and the models against themselves in float."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
from flax.traverse_util import flatten_dict, unflatten_dict

from unialign_jax import bundle
from unialign_jax.models import presets
from unialign_jax.models.mmdit import MMDiT, block_modulations, without_modulations
from unialign_jax.models.quantization import (
    MODES,
    abstract_quantized,
    quantize_kernel,
    quantize_leaf,
    quantize_module,
    quantized,
    quantized_dense,
    tree_bytes,
)
from unialign_jax.models.text_encoder import TextEncoder
from unialign_jax.parallel.sharding import path_string

CONFIG = bundle.BundleConfig(
    transformer=dataclasses.replace(
        presets.MMDIT["tiny"],
        depth=3,
        num_heads=2,
        head_width=16,
        latent_channels=4,
        tap_depth=1,
        text_width=32,
        text_positions=8,
    ),
    text_encoder=dataclasses.replace(
        presets.TEXT_ENCODER["tiny"], width=32, mlp_width=48, num_heads=2, head_width=16, depth=2
    ),
)
MODULES = {"transformer": MMDiT(CONFIG.transformer), "text_encoder": TextEncoder(CONFIG.text_encoder)}
# component: path of each quantised kernel -> the axes of one layer's kernel that are inputs
QUANTIZED = {
    "transformer": {
        f"blocks/joint/{stream}/{name}/kernel": axes
        for stream in ("image", "text")
        for name, axes in (("qkv", (0,)), ("out", (0, 1)), ("mlp_in", (0,)), ("mlp_out", (0,)))
    },
    "text_encoder": {
        f"layers/{name}/kernel": (0, 1) if name == "out" else (0,)
        for name in ("query", "key", "value", "out", "mlp_gate", "mlp_up", "mlp_out")
    },
}


@pytest.fixture(scope="module")
def params():
    generator = np.random.default_rng(0)
    abstract = bundle.abstract_params(CONFIG)
    return jax.tree.map(lambda leaf: (0.2 * generator.normal(size=leaf.shape)).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(1)
    latents = generator.normal(size=(2, 4, 6, 4)).astype(np.float32)
    text = generator.normal(size=(2, 5, 32)).astype(np.float32)
    sigma = np.array([0.3, 0.3], np.float32)
    return {
        "transformer": (latents, text, sigma),
        "text_encoder": (generator.integers(0, 512, (2, 7)).astype(np.int32),),
    }


def round_in_float64(kernel, axes):
    """Whole numbers from -127 to 127 and the scale of each output channel, for one layer's kernel."""
    kernel = kernel.astype(np.float64)
    scale = np.max(np.abs(kernel), axis=axes, keepdims=True) / 127
    return np.rint(kernel / scale), scale


@functools.cache
def program(component, mode=None):
    """`apply` of a component, compiled once for all tests; in floats, or in a mode."""
    module = MODULES[component] if mode is None else quantize_module(MODULES[component], mode)
    return jax.jit(module.apply)


def is_quantized(leaf):
    return isinstance(leaf, qwix.QArray)


def quantize(params, mode, **options):
    """Array by array, as a model is read."""
    leaves = {path: quantize_leaf(path, leaf, mode, **options) for path, leaf in flatten_dict(params, sep="/").items()}
    return unflatten_dict(leaves, sep="/")


def relative_error(found, expected):
    found, expected = np.float64(found), np.float64(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("component", MODULES)
def test_kernels_become_int8_by_layer_and_channel(component, params):
    leaves = jax.tree_util.tree_leaves_with_path(quantize(params[component], "int8"), is_leaf=is_quantized)
    found = {path_string(path): leaf for path, leaf in leaves}
    assert {path for path, leaf in found.items() if is_quantized(leaf)} == set(QUANTIZED[component])
    for path, original in flatten_dict(params[component], sep="/").items():
        leaf = found[path]
        if path not in QUANTIZED[component]:
            np.testing.assert_array_equal(leaf, original, err_msg=path)
            continue
        assert leaf.qvalue.dtype == jnp.int8 and leaf.qvalue.shape == original.shape
        for kernel, stored, its_scale in zip(original, np.asarray(leaf.qvalue), np.asarray(leaf.scale), strict=True):
            whole, scale = round_in_float64(kernel, QUANTIZED[component][path])
            # float32 division may round a tie, or what is within its precision of one, the other way.
            near_tie = np.abs(np.abs(kernel / scale) % 1 - 0.5) < 1e-4
            assert np.all((stored == whole) | near_tie), path
            np.testing.assert_allclose(its_scale, scale, rtol=1e-6)
            assert np.all(np.abs(stored * its_scale - kernel) <= 0.5001 * scale), path


@pytest.mark.parametrize("component", MODULES)
def test_int8_model_is_the_float_model_of_the_rounded_weights(component, params, inputs):
    rounded = flatten_dict(params[component], sep="/")
    for path, axes in QUANTIZED[component].items():
        layers = [np.multiply(*round_in_float64(kernel, axes)) for kernel in rounded[path]]
        rounded[path] = np.stack(layers).astype(np.float32)
    expected = program(component)({"params": unflatten_dict(rounded, sep="/")}, *inputs[component])
    found = program(component, "int8")({"params": quantize(params[component], "int8")}, *inputs[component])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(ours, theirs) < 1e-4  # a tie rounded the other way is 1e-5 here, a wrong scale is 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("component", MODULES)
def test_close_to_the_float_model(component, mode, params, inputs):
    """Rounding moves a weight by 1 / sqrt(12) of a step, and a step is the channel's largest weight / 127. The largest
    of 32 normal weights is about 2.5 deviations, so that a matmul errs by 2.5 / 127 / sqrt(12) = 0.6 %, with rounded
    activations by sqrt(2) times that. The longest way through the blocks passes 3 layers x 4 matmuls, whose errors are
    independent: sqrt(12) x 0.6 % = 2 %, or 2.8 %. Half as much again is for what softmax and modulation enlarge;
    one bit fewer would double the errors. e4m3 has 8 numbers between powers of 2: errors of 1 / 8 / sqrt(12) between 1
    and 2, and divided by the number (the mean of 1 / x^2 where numbers are log-uniform is 0.54) 2.65 %, of two rounded
    operands 3.75 %, over the 12 matmuls 13 %.
    """
    exact = program(component)({"params": params[component]}, *inputs[component])
    found = program(component, mode)({"params": quantize(params[component], mode)}, *inputs[component])
    bound = {"int8": 0.03, "w8a8": 0.042, "fp8": 0.13}[mode]
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert 1e-3 < relative_error(ours, theirs) < bound


def one_layer(mode):
    """x [2, 3, 4, 8], a kernel [4, 8, 6] with two input axes, and the layer's quantised call."""
    generator = np.random.default_rng(2)
    x = generator.normal(size=(2, 3, 4, 8)).astype(np.float32)
    kernel = generator.normal(size=(4, 8, 6)).astype(np.float32)
    layer = nn.DenseGeneral(6, axis=(-2, -1), dtype=jnp.float32, use_bias=False)
    stored = jax.tree.map(lambda leaf: leaf[0], quantize_kernel(kernel[None], 2, mode))
    return x, kernel, lambda x: quantized_dense(layer, stored, x, mode=mode)


def test_w8a8_multiplies_whole_numbers():
    """One layer with two input axes against integer arithmetic in NumPy; and the product is int8 x int8 -> int32."""
    x, kernel, run = one_layer("w8a8")
    whole_x, scale_x = round_in_float64(x, (2, 3))
    whole_kernel, scale_kernel = round_in_float64(kernel, (0, 1))
    expected = np.einsum("bthd,hdf->btf", whole_x, whole_kernel) * scale_x[..., 0] * scale_kernel[0]
    np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)
    assert "(tensor<2x3x4x8xi8>, tensor<6x4x8xi8>) -> tensor<2x3x6xi32>" in jax.jit(run).lower(x).as_text()


def test_fp8_multiplies_e4m3():
    """The same with ml_dtypes' rounding to e4m3, whose largest number is 448."""

    def round_to_e4m3(array, axes):
        scale = np.max(np.abs(array), axis=axes, keepdims=True) / np.float32(448)
        return (array / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64), scale

    x, kernel, run = one_layer("fp8")
    (x8, scale_x), (kernel8, scale_kernel) = round_to_e4m3(x, (2, 3)), round_to_e4m3(kernel, (0, 1))
    expected = np.einsum("bthd,hdf->btf", x8, kernel8) * scale_x[..., 0] * scale_kernel[0]
    np.testing.assert_allclose(run(x), expected, rtol=1e-5, atol=1e-5)
    text = jax.jit(run).lower(x).as_text()
    assert "(tensor<2x3x4x8xf8E4M3FN>, tensor<6x4x8xf8E4M3FN>) -> tensor<2x3x6xf32>" in text


@pytest.mark.parametrize("axes", [1, 2])
def test_kernels_that_meet_8_bits_have_their_inputs_last(axes):
    """A GPU would transpose them in every call. Numbers and scales are those of int8, bit for bit."""
    kernel = np.random.default_rng(3).normal(size=(2, 4, 8, 6)).astype(np.float32)
    plain, turned = (quantize_kernel(kernel, axes, mode) for mode in ("int8", "w8a8"))
    order = (0, 2, 3, 1) if axes == 1 else (0, 3, 1, 2)
    np.testing.assert_array_equal(turned.qvalue, np.transpose(plain.qvalue, order))
    np.testing.assert_array_equal(turned.scale, np.transpose(plain.scale, order))


@pytest.mark.slow
@pytest.mark.parametrize("component", MODULES)
def test_w8a8_is_bit_for_bit_what_untransposed_kernels_give(component, params, inputs):
    """As before kernels were stored with their inputs last: int8's kernels, by qwix in their own order."""

    def intercept(call, args, kwargs, context):
        layer, kernel = context.module, None
        if isinstance(layer, nn.DenseGeneral) and context.method_name == "__call__":
            kernel = layer.get_variable("params", "kernel")
        if not is_quantized(kernel):
            return call(*args, **kwargs)
        (x,) = args
        axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
        axes = tuple(axis % x.ndim for axis in axes)
        tokens = tuple(axis for axis in range(x.ndim) if axis not in axes)
        y = qwix.dot_general(quantized(x, tokens), kernel, ((axes, tuple(range(len(axes)))), ((), ())))
        y = y.astype(layer.dtype)
        return y + layer.get_variable("params", "bias").astype(layer.dtype) if layer.use_bias else y

    def before(variables, *args):
        with nn.intercept_methods(intercept):
            return MODULES[component].apply(variables, *args)

    expected = jax.jit(before)({"params": quantize(params[component], "int8")}, *inputs[component])
    found = program(component, "w8a8")({"params": quantize(params[component], "w8a8")}, *inputs[component])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_scanned_layer_dequantises_its_own_slice(mode, params, inputs):
    """The stacked kernels enter the program as int8, and no array of their size is ever made of floats."""
    abstract = abstract_quantized(params["transformer"], mode)
    text = program("transformer", mode).lower({"params": abstract}, *inputs["transformer"]).as_text()
    for name in ("qkv", "out", "mlp_in", "mlp_out"):
        shape = "x".join(map(str, abstract["blocks"]["joint"]["image"][name]["kernel"].shape))
        stored = {"int8": "i8", "w8a8": "i8", "fp8": "f8E4M3FN"}[mode]
        assert f"tensor<{shape}x{stored}>" in text and f"tensor<{shape}xf32>" not in text


def test_modulations_made_ahead(params, inputs):
    """The modulation kernels stay floats, so that they can be used and left out as with an unquantised model."""
    latents, text, sigma = inputs["transformer"]
    stored = quantize(params["transformer"], "int8")
    module = quantize_module(MODULES["transformer"], "int8")
    row = jax.tree.map(lambda table: table[0], block_modulations(module.config, stored, sigma[:1]))
    ahead = jax.jit(module.apply)({"params": without_modulations(stored)}, latents, text, None, modulations=row)
    inside = program("transformer", "int8")({"params": stored}, latents, text, sigma)
    np.testing.assert_allclose(ahead.velocity, inside.velocity, rtol=1e-5, atol=1e-5)


def test_abstract_parameters_and_their_size(params):
    abstract = abstract_quantized(bundle.abstract_params(CONFIG, ["text_encoder"])["text_encoder"], "int8")
    concrete = quantize(params["text_encoder"], "int8")
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    for ours, theirs in zip(jax.tree.leaves(abstract), jax.tree.leaves(concrete), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    # By hand: table 512 x 32 and bias 32 x 2, norms 32 (2 x 2 + 1); each of 2 layers 4 kernels of 32 x 32 and 3 of
    # 32 x 48 in bytes, and a float32 scale for each output: 4 x 32 + 2 x 48 + 32.
    floats = 512 * 32 + 32 * 2 + 32 * 5 + 2 * (4 * 32 + 2 * 48 + 32)
    assert tree_bytes(concrete) == tree_bytes(abstract) == 4 * floats + 2 * (4 * 32 * 32 + 3 * 32 * 48)


def test_a_device_gets_the_quantised_arrays_alone(params):
    device = jax.devices()[1]
    placed = quantize(params["text_encoder"], "int8", device=device)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(placed))
    embedding = params["text_encoder"]["token_embedding"]
    table = quantize_leaf("token_embedding", embedding, "int8", dtype="bfloat16", device=device)
    assert table.dtype == jnp.bfloat16 and table.devices() == {device}


def test_what_cannot_be_quantised_is_said_in_a_line(params):
    for call in (lambda: quantize_module(MODULES["transformer"], "int4"), lambda: abstract_quantized(params, "int4")):
        with pytest.raises(ValueError, match=r"^unknown quantisation 'int4', expected one of int8, w8a8, fp8$"):
            call()
    with pytest.raises(ValueError, match="nothing to quantise here: expected the parameters of an MMDiT"):
        abstract_quantized({"conv_in": {"kernel": np.zeros((3, 3, 4, 8), np.float32)}}, "int8")
