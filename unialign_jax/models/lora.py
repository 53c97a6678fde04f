"""Low-rank adapters of the MM-DiT (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353), as trees of arrays.

An adapter changes the kernel W of a dense layer to W + alpha / rank * A B. The changed kernels are computed before the
network reads them, so that the network knows nothing of adapters. A kernel of [in, out] has A [in, rank] and
B [rank, out]; those of the stacked blocks have the block as their first axis. q, k and v, one kernel here, have
adapters of their own, as PyTorch's layers do. With `dora` a "gain" [out] gives each output's weights their norm,
(1 + gain) |W|, whatever that of W + alpha / rank * A B.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

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
        size = jax.lax.stop_gradient(norms(changed)) if isinstance(changed, jax.Array) else norms(changed)
        changed = changed * ((1 + adapter["gain"]) * norms(matrices) / size)[..., None, :]
    return from_matrices(path, changed, kernel.shape)


def norms(matrices: Any):
    """The norm of each output's weights, [..., in, out] -> [..., out]."""
    return (matrices**2).sum(-2) ** 0.5


def params_with_adapters(base: dict, adapters: dict, scale: float, dtype: Any = None) -> dict:
    """The transformer's parameters `base` with `adapters`: the adapted kernels in float32 or `dtype`, others as before.

    Differentiable with respect to the adapters.
    """
    params = flatten_dict(base, sep="/")
    for path, adapter in adapters_by_path(adapters).items():
        kernel = adapted(path, params[path], adapter, scale)
        params[path] = kernel if dtype is None else kernel.astype(dtype)
    return unflatten_dict(params, sep="/")


def relative_change(base: dict, adapters: dict, scale: float) -> jax.Array:
    """By how much the adapters change the kernels that they adapt: the norm of the change over that of the kernels."""
    kernels, change, size = flatten_dict(base, sep="/"), 0.0, 0.0
    for path, adapter in adapters_by_path(adapters).items():
        kernel = kernels[path].astype(jnp.float32)
        change += jnp.sum(jnp.square(adapted(path, kernel, adapter, scale) - kernel))
        size += jnp.sum(jnp.square(kernel))
    return jnp.sqrt(change / size)
