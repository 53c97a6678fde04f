"""Weights of 8 bits, through qwix: half of bfloat16's memory for T5 and the MM-DiT.

All modes store the matmul kernels of the scanned layers in 8 bits with one float32 scale for each layer and output
channel (absmax, round to nearest); everything else keeps its dtype. They differ in the numbers and in the arithmetic of
a layer:

    int8    whole numbers; dequantises the kernel and multiplies in the model's dtype: weights are rounded, arithmetic
            is not
    w8a8    also rounds the inputs to int8, with a scale for each token, and multiplies integers: for GPUs, faster
    fp8     as w8a8 in e4m3 floats (4 bits of precision), which Hopper and later multiply; other devices convert them
            to a wider float first, which gives the same products

A GPU multiplies 8 bits only with the summed axis last, so that w8a8 and fp8 store their kernels so. Otherwise XLA
transposes the kernels of all layers in every call: 4.45 GiB of T5.

`qwix.quantize_model` does not know scanned layers: `qwix.quantize_params` would take one scale over all of them. So
Linen's interceptors replace the layers' calls here, and qwix does the arithmetic. It is imported where it works: it
brings flax.nnx, a third of a second at the start of commands that quantise nothing.
"""

import dataclasses
import functools
import re
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from unialign_jax.files import first_line

if TYPE_CHECKING:
    import qwix

# What each mode stores.
TYPES = {"int8": jnp.int8, "w8a8": jnp.int8, "fp8": jnp.float8_e4m3fn}
MODES = tuple(TYPES)

# Paths of the kernels that are quantised, each [layers, inputs, outputs], with the number of input axes.
KERNELS = (
    (r"^blocks/joint/(image|text)/(qkv|mlp_in|mlp_out)/kernel$", 1),
    (r"^blocks/joint/(image|text)/out/kernel$", 2),
    (r"^layers/(query|key|value|mlp_gate|mlp_up|mlp_out)/kernel$", 1),
    (r"^layers/out/kernel$", 2),
)

# The largest magnitude becomes 127. qwix's own range ends at 127.5: a tie, 127 or -128 as rounding errors have it. Of
# e4m3 it becomes the largest number, 448.
ABSMAX = {jnp.int8: f"absmax,{127.5 / 127}", jnp.float8_e4m3fn: "absmax"}


@dataclasses.dataclass(frozen=True)
class QuantizedModule:
    """A Linen module whose `apply` takes quantised parameters; other arguments and results are the module's own."""

    module: nn.Module
    mode: str

    @property
    def config(self):
        return self.module.config

    def apply(self, variables: dict, *args, **kwargs):
        def intercept(call, call_args, call_kwargs, context):
            layer = context.module
            if isinstance(layer, nn.DenseGeneral) and context.method_name == "__call__":
                kernel = layer.get_variable("params", "kernel")
                if is_quantized(kernel):
                    return quantized_dense(layer, kernel, *call_args, mode=self.mode)
            return call(*call_args, **call_kwargs)

        with nn.intercept_methods(intercept):
            return self.module.apply(variables, *args, **kwargs)


def quantize_module(module: nn.Module, mode: str) -> QuantizedModule:
    """An MMDiT or a TextEncoder for parameters of `quantize_leaf`. Raises ValueError for an unknown mode."""
    check_mode(mode)
    return QuantizedModule(module, mode)


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ValueError(f"unknown quantisation {mode!r}, expected one of {', '.join(MODES)}")


def rounds_inputs(mode: str) -> bool:
    """Whether the mode multiplies 8 bits by 8 bits; its kernels then have the input axes last."""
    return mode != "int8"


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a tree is a kernel in 8 bits, a `qwix.QArray`."""
    return hasattr(leaf, "qvalue")


def quantized_dense(layer: nn.DenseGeneral, kernel: "qwix.QArray", x: jax.Array, mode: str) -> jax.Array:
    """The call of `layer` with a `kernel` of `quantize_kernel` in the same mode, of one layer."""
    import qwix

    axes = layer.axis if isinstance(layer.axis, tuple) else (layer.axis,)
    axes = tuple(axis % x.ndim for axis in axes)
    first = kernel.ndim - len(axes) if rounds_inputs(mode) else 0
    dimensions = ((axes, tuple(range(first, first + len(axes)))), ((), ()))
    if rounds_inputs(mode):
        tokens = tuple(axis for axis in range(x.ndim) if axis not in axes)
        x = quantized(x, tokens, TYPES[mode])
        y = qwix.dot_general(x, kernel, dimensions).astype(layer.dtype)
    else:
        # Rounded to the model's dtype once, as any other weight of it would be.
        y = jax.lax.dot_general(x.astype(layer.dtype), qwix.dequantize(kernel).astype(layer.dtype), dimensions)
    if layer.use_bias:
        y = y + layer.get_variable("params", "bias").astype(layer.dtype)
    return y


def quantized(x: jax.Array, axes: tuple[int, ...], dtype: Any = jnp.int8) -> "qwix.QArray":
    """x in 8 bits, with a float32 scale for each index along `axes`: as int8 whole numbers from -127 to 127."""
    import qwix

    method = ABSMAX[dtype]
    return qwix.quantize(x.astype(jnp.float32), dtype, channelwise_axes=axes, calibration_method=method)


def input_axes(path: str) -> int | None:
    """The number of input axes of the kernel at `path`, if it is quantised; None for other parameters."""
    return next((axes for pattern, axes in KERNELS if re.search(pattern, path)), None)


@functools.partial(jax.jit, static_argnames=("axes", "mode"))
def quantize_kernel(kernel: jax.Array, axes: int, mode: str) -> "qwix.QArray":
    """[layers, inputs (`axes` of them), outputs] -> QArray of 8 bits, scales float32.

    Its shape is the kernel's, or [layers, outputs, inputs] in modes that round inputs. Layers are quantised one by one:
    beside the kernel itself this needs the memory of one layer.
    """

    def layer(weights):
        inputs = tuple(range(axes))
        if rounds_inputs(mode):
            inputs = tuple(range(weights.ndim - axes, weights.ndim))
            weights = jnp.moveaxis(weights, range(axes), inputs)
        outputs = tuple(axis for axis in range(weights.ndim) if axis not in inputs)
        return quantized(weights, outputs, TYPES[mode])

    return jax.lax.map(layer, kernel)


def quantize_leaf(path: str, leaf: Any, mode: str, *, dtype: Any = None, device: jax.Device | None = None):
    """The parameter at `path` ("layers/query/kernel") quantised, or cast to `dtype` where it is not to be quantised.

    Computed on the host; only the result is put on `device`, by default the first: no model is whole and unquantised.
    """
    axes = input_axes(path)
    leaf = jax.device_put(leaf, host_device())
    leaf = quantize_kernel(leaf, axes, mode) if axes is not None else leaf.astype(dtype or leaf.dtype)
    return jax.device_put(leaf, device or jax.local_devices()[0])


def quantize_params(params: dict, mode: str) -> dict:
    """A network's float parameters, each kernel of KERNELS as a `qwix.QArray`. Inside jit or `jax.eval_shape` too."""

    def convert(path, leaf):
        axes = input_axes(path)
        return leaf if axes is None else quantize_kernel(leaf, axes, mode)

    return unflatten_dict({path: convert(path, leaf) for path, leaf in flatten_dict(params, sep="/").items()}, sep="/")


def dequantize_params(params: dict, mode: str) -> dict:
    """The parameters of a network with their quantised kernels as floats again, float32, [layers, inputs, outputs]."""
    import qwix

    def convert(path, leaf):
        axes = input_axes(path)
        if axes is None:
            return leaf
        kernel = qwix.dequantize(leaf)
        return jnp.moveaxis(kernel, range(-axes, 0), range(1, 1 + axes)) if rounds_inputs(mode) else kernel

    return unflatten_dict({path: convert(path, leaf) for path, leaf in flatten_dict(params, sep="/").items()}, sep="/")


def host_device() -> jax.Device:
    """JAX's CPU device. Raises ValueError when JAX_PLATFORMS excludes it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            f"quantisation needs JAX's CPU device beside {jax.default_backend()}: add cpu to JAX_PLATFORMS, "
            f"such as JAX_PLATFORMS={jax.default_backend()},cpu ({first_line(error)})"
        ) from None


def abstract_quantized(abstract_params: dict, mode: str) -> dict:
    """The parameters as ShapeDtypeStructs, with a `qwix.QArray` for every quantised kernel: to compile with.

    Raises ValueError for an unknown mode and for a tree without such kernels.
    """
    check_mode(mode)
    if not any(input_axes(path) is not None for path in flatten_dict(abstract_params, sep="/")):
        raise ValueError("nothing to quantise here: expected the parameters of an MMDiT or a TextEncoder")
    return jax.eval_shape(functools.partial(quantize_params, mode=mode), abstract_params)


def tree_bytes(params: dict) -> int:
    """The size of a tree of arrays, QArrays or ShapeDtypeStructs in bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
