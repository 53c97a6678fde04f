"""Low-rank adapters of the MM-DiT (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353), as trees of arrays.

An adapter changes the kernel W of a dense layer to W + alpha / rank * A B. A kernel of [in, out] has A [in, rank] and
B [rank, out]; those of the stacked blocks have the block as their first axis. q, k and v, one kernel here, have
adapters of their own, as PyTorch's layers do. With `dora` a "gain" [out] gives each output's weights their norm,
(1 + gain) |W|, whatever that of W + alpha / rank * A B; an output without weights has no norm, and no gain.

While adapters are trained, `AdaptedModule` adds alpha / rank * (x A) B to what a layer makes of x, so that W may be in
8 bits, and its gradient is never computed. For sampling, `params_with_adapters` changes the kernels themselves.
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from unialign_jax.models.mmdit import first_of_pairs, in_pairs, second_of_pairs
from unialign_jax.models.quantization import QuantizedModule, is_quantized, quantize_module

# Kernels that can have adapters: a pattern of the path, the number of axes that count separate matrices (the block; for
# q, k and v the part too) and of input axes. The patch embedding, a convolution elsewhere, is left out.
KERNELS = (
    (r"^blocks/joint/(image|text)/qkv/kernel$", 2, 1),
    (r"^blocks/joint/(image|text)/out/kernel$", 1, 2),
    (r"^blocks/joint/(image|text)/(modulation|mlp_in|mlp_out)/kernel$", 1, 1),
    (r"^(text_embed|time_embed/hidden|time_embed/out|image_head_modulation|image_head|text_head)/kernel$", 0, 1),
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how: the group `lora` of a configuration (configs/base.py says what its keys mean)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    dora: bool = False
    dropout: float = 0.0
    quantize_base: str = ""

    @classmethod
    def of(cls, settings: dict) -> "LoraConfig | None":
        """From the group of a configuration, None for rank 0. Raises TypeError or KeyError for another dict."""
        if not settings.get("rank"):
            return None
        return cls(**{**settings, "targets": tuple(settings["targets"])})

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def matrix_axes(path: str) -> tuple[int, int] | None:
    """The numbers of axes of the kernel at `path` that count matrices and that are inputs; None: it has no adapters."""
    return next(((lead, inputs) for pattern, lead, inputs in KERNELS if re.search(pattern, path)), None)


def to_matrices(path: str, kernel: Any):
    """The kernel at `path` as matrices [..., in, out]."""
    lead, inputs = matrix_axes(path)
    if lead == 2:  # [blocks, in, parts, ...] -> [blocks, parts, in, out]
        blocks, width, parts = kernel.shape[:3]
        return kernel.reshape(blocks, width, parts, -1).swapaxes(1, 2)
    outer = kernel.shape[:lead]
    return kernel.reshape(*outer, int(np.prod(kernel.shape[lead : lead + inputs])), -1)


def from_matrices(path: str, matrices: Any, shape: tuple[int, ...]):
    """The inverse of `to_matrices`, for a kernel of `shape`."""
    return (matrices.swapaxes(1, 2) if matrix_axes(path)[0] == 2 else matrices).reshape(shape)


def targets_of(lora: LoraConfig, paths: Any) -> list[str]:
    """The paths that have adapters. Raises ValueError for a pattern that finds no kernel that can have them."""
    adaptable = [path for path in paths if matrix_axes(path) is not None]
    for pattern in lora.targets:
        if not any(re.search(pattern, path) for path in adaptable):
            raise ValueError(
                f"lora.targets has {pattern!r}, which finds none of the kernels that can have adapters: "
                f"{', '.join(adaptable)}"
            )
    return [path for path in adaptable if any(re.search(pattern, path) for pattern in lora.targets)]


def init_adapters(lora: LoraConfig, abstract: dict, key: jax.Array) -> dict:
    """New adapters, float32, for the transformer of the shapes `abstract`: they change nothing, for B is zero.

    A is uniform in +-1 / sqrt(in), as in PEFT. Raises ValueError as `targets_of`.
    """
    shapes, adapters = flatten_dict(abstract, sep="/"), {}
    for number, path in enumerate(targets_of(lora, shapes)):
        *outer, inputs, outputs = jax.eval_shape(
            lambda kernel, path=path: to_matrices(path, kernel), shapes[path]
        ).shape
        bound, key_of_path = inputs**-0.5, jax.random.fold_in(key, number)
        down = jax.random.uniform(key_of_path, (*outer, inputs, lora.rank), jnp.float32, -bound, bound)
        adapters[f"{path}/a"], adapters[f"{path}/b"] = down, jnp.zeros((*outer, lora.rank, outputs))
        if lora.dora:
            adapters[f"{path}/gain"] = jnp.zeros((*outer, outputs))
    return unflatten_dict(adapters, sep="/")


def adapters_by_path(adapters: dict) -> dict[str, dict]:
    """{path of a kernel: its arrays by name} of a tree of adapters."""
    result = {}
    for path, leaf in flatten_dict(adapters, sep="/").items():
        kernel, _, name = path.rpartition("/")
        result.setdefault(kernel, {})[name] = leaf
    return result


def adapted(path: str, kernel: Any, adapter: dict, scale: float):
    """The kernel at `path` with its adapter, float32; numpy arrays give a numpy array."""
    matrices = to_matrices(path, kernel.astype(np.float32))
    changed = matrices + scale * (adapter["a"] @ adapter["b"])
    if "gain" in adapter:
        changed = changed * norm_factors(matrices, changed, adapter["gain"])[..., None, :]
    return from_matrices(path, changed, kernel.shape)


def norm_factors(matrices: Any, changed: Any, gain: Any):
    """DoRA's factor of each output, [..., out], which brings `changed` [..., in, out] to the norm (1 + gain) |W|.

    It is 1 where either norm is 0. SD3 converted has such outputs, in the last block's text modulation: there is no
    norm to keep, and they have the adapter without a gain.
    """
    where = np.where
    if isinstance(changed, jax.Array):
        where, changed = jnp.where, jax.lax.stop_gradient(changed)  # as DoRA's section 4.3 says
    kept, size = norms(matrices), norms(changed)
    have_both = (kept > 0) & (size > 0)
    return where(have_both, (1 + gain) * kept / where(have_both, size, 1), 1)


def norms(matrices: Any):
    """The norm of each output's weights, [..., in, out] -> [..., out]."""
    return (matrices**2).sum(-2) ** 0.5


def plain(leaf: Any):
    """An array of 8 bits as float32, any other as it is."""
    if not is_quantized(leaf):
        return leaf
    import qwix

    return qwix.dequantize(leaf)


def params_with_adapters(base: dict, adapters: dict, scale: float, dtype: Any = jnp.float32) -> dict:
    """The transformer's parameters `base` with `adapters`: adapted kernels, and those of 8 bits, in `dtype`."""
    params, by_path = flatten_dict(base, sep="/"), adapters_by_path(adapters)
    for path, leaf in params.items():
        if path in by_path:
            params[path] = adapted(path, plain(leaf), by_path[path], scale).astype(dtype)
        elif is_quantized(leaf):
            params[path] = plain(leaf).astype(dtype)
    return unflatten_dict(params, sep="/")


def relative_change(base: dict, adapters: dict, scale: float) -> jax.Array:
    """By how much the adapters change the kernels that they adapt: the norm of the change over that of the kernels."""
    kernels, change, size = flatten_dict(base, sep="/"), 0.0, 0.0
    for path, adapter in adapters_by_path(adapters).items():
        kernel = plain(kernels[path]).astype(jnp.float32)
        change += jnp.sum(jnp.square(adapted(path, kernel, adapter, scale) - kernel))
        size += jnp.sum(jnp.square(kernel))
    return jnp.sqrt(change / size)


# --- Training ---

ADAPTER = "adapter"  # beside a layer's kernel, the arrays of its adapter


def beside_kernels(base: dict, adapters: dict) -> dict:
    """The parameters of an `AdaptedModule`."""
    by_path = {path.rpartition("/")[0]: adapter for path, adapter in adapters_by_path(adapters).items()}
    params = flatten_dict(base, sep="/") | {f"{layer}/{ADAPTER}": adapter for layer, adapter in by_path.items()}
    return unflatten_dict(params, sep="/")


def adapted_network(transformer: nn.Module, lora: LoraConfig) -> "AdaptedModule":
    """An MMDiT for parameters of `beside_kernels`, where the base may be in 8 bits (`lora.quantize_base`)."""
    module = quantize_module(transformer, lora.quantize_base) if lora.quantize_base else transformer
    return AdaptedModule(module, lora)


@dataclasses.dataclass(frozen=True)
class AdaptedModule:
    """A Linen module whose `apply` has adapters beside its layers; other arguments and results are the module's own.

    With an rng "dropout" the adapters' inputs are dropped out, by `lora.dropout`.
    """

    module: nn.Module | QuantizedModule
    lora: LoraConfig

    def apply(self, variables: dict, *args, **kwargs):
        def intercept(call, call_args, call_kwargs, context):
            layer = context.module
            if context.method_name == "__call__" and layer.has_variable("params", ADAPTER):
                return adapted_dense(layer, call, *call_args, lora=self.lora)
            return call(*call_args, **call_kwargs)

        with nn.intercept_methods(intercept):
            return self.module.apply(variables, *args, **kwargs)


def adapted_dense(layer: Any, call: Any, x: jax.Array, lora: LoraConfig) -> jax.Array:
    """The result of a Dense or DenseGeneral `layer` for x, with its adapter; `call` is the layer's own.

    As PEFT has it: y = call(x) + scale * (dropout(x) A) B. With DoRA's factors f it is
    call(x) + (f - 1) * dropout(x) W + f * scale * (dropout(x) A) B, where a layer without dropout needs no second x W.
    """
    adapter, kernel = (layer.get_variable("params", name) for name in (ADAPTER, "kernel"))
    dropped = x
    if lora.dropout and layer.has_rng("dropout"):
        keep = jax.random.bernoulli(layer.make_rng("dropout"), 1 - lora.dropout, x.shape)
        dropped = jnp.where(keep, x / (1 - lora.dropout), 0)
    if "gain" in adapter and dropped is not x:
        both = call(in_pairs(x, dropped))  # once: a layer cannot be called twice
        y, y_dropped = first_of_pairs(both), second_of_pairs(both)
    else:
        y = y_dropped = call(x)
    path = "/".join((*layer.path, "kernel"))
    features = kernel.shape[matrix_axes(path)[1] :]
    dtype = layer.dtype or x.dtype
    lead = x.shape[: y.ndim - len(features)]
    inputs = dropped.reshape(*lead, -1).astype(dtype)
    a, b = adapter["a"].astype(dtype), (lora.scale * adapter["b"]).astype(dtype)
    if a.ndim == 3:  # q, k and v
        change = jnp.einsum("...pr,pro->...po", jnp.einsum("...i,pir->...pr", inputs, a), b)
    else:
        change = inputs @ a @ b
    change = change.reshape(y.shape).astype(y.dtype)
    if "gain" not in adapter:
        return y + change
    factors = dora_factors(path, plain(kernel), adapter, lora.scale).reshape(features).astype(y.dtype)
    product = y_dropped - layer.get_variable("params", "bias").astype(y.dtype)
    return y + (factors - 1) * product + factors * change


def dora_factors(path: str, kernel: jax.Array, adapter: dict, scale: float) -> jax.Array:
    """`norm_factors` of one layer, [..., out] float32, for a kernel without the axis of the blocks."""
    kernel = kernel.astype(jnp.float32)
    matrices = to_matrices(path, kernel[None])[0] if matrix_axes(path)[0] else to_matrices(path, kernel)
    return norm_factors(matrices, matrices + scale * (adapter["a"] @ adapter["b"]), adapter["gain"])
