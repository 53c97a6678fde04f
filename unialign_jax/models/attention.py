"""Full (unmasked) multi-head attention as one function, with an implementation for each kind of machine.

Shape letters: B batch, N tokens, H heads, d head width.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unialign_jax.parallel.activations import (
    BATCH_AXES,
    HEAD_AXES,
    axes_that_divide,
    exchange_tokens_for_heads,
)

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
SPLASH_LANES = 128  # the TPU kernel's block sizes are multiples of this
SPLASH_MAX_BLOCK = 640  # 1,280 tokens (512 px, 256 text tokens) are two such blocks
# The kernel holds all keys and values of so many tokens (three condition images are 4,352), of more tokens those of
# SPLASH_LONG at most. One block of keys gives one gradient of the queries; of several blocks each writes its own, which
# XLA adds up afterwards.
SPLASH_MAX_KEYS = 4352
SPLASH_LONG = 2304  # with more keys than that only 128 queries at once fit into the 16 MiB that v4 gives a kernel


CUDNN_CAPABILITY = (8, 0)  # cuDNN 9: "SDPA FP16/BF16 requires SM80 (Ampere) or newer architecture"


def resolve_implementation(name: str, place: str | jax.Device, dtype: Any = "bfloat16") -> str:
    """The implementation that `name` means on a device, or on a platform ("cpu", "gpu", "cuda", "rocm", "tpu").

    "auto" becomes splash on TPU, cudnn on an NVIDIA GPU (xla for float32 models, since cuDNN's kernel has no float32,
    and on GPUs before Ampere) and xla elsewhere; other names are returned as they are. Raises ValueError for an unknown
    name.
    """
    if name in IMPLEMENTATIONS:
        return name
    if name != "auto":
        raise ValueError(f"unknown attention {name!r}, expected one of auto, {', '.join(IMPLEMENTATIONS)}")
    platform = place if isinstance(place, str) else place.platform
    if platform == "tpu":
        return "splash"
    if platform not in ("gpu", "cuda") or jnp.dtype(dtype).itemsize != 2:
        return "xla"
    capability = getattr(place, "compute_capability", None)  # "9.0"; an AMD GPU has a name there
    if capability is None:
        return "cudnn"
    version = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return "cudnn" if version and (int(version[1]), int(version[2])) >= CUDNN_CAPABILITY else "xla"


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    implementation: str = "xla",
    bias: jax.Array | None = None,
    scale: float | None = None,
    interpret: bool = False,
    batch_axes: tuple[str, ...] = BATCH_AXES,
    head_axes: tuple[str, ...] = HEAD_AXES,
) -> jax.Array:
    """softmax(scale * query key^T + bias) value, where every token reads every token.

    Returns [B, N, H, d] in the dtype of the inputs. Under `jax.set_mesh(mesh)` the work is split over `batch_axes` and
    `head_axes`; an axis that does not divide it repeats it. Where the mesh splits tokens, the inputs and the result
    are split by tokens, the work by heads (`exchange_tokens_for_heads`).

    Args:
      query, key, value: [B, N, H, d], all of one shape and dtype.
      implementation: "xla" (any machine; float32 softmax, saves no [N, N] array for the backward pass), "cudnn" (NVIDIA
        GPU, 16-bit inputs) or "splash" (TPU, Pallas). `resolve_implementation` resolves "auto".
      bias: [H, N, N] added to the scaled scores of every sample, or None; only with "xla".
      scale: factor of the scores; None means 1 / sqrt(d).
      interpret: runs the splash kernel in Pallas' interpreter, to test it without a TPU.
      batch_axes, head_axes: the mesh axes that split samples and heads.

    Raises ValueError for an unknown implementation, a bias that it does not support, and sizes that do not fit.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown attention implementation {implementation!r}, expected one of "
            f"{', '.join(IMPLEMENTATIONS)} (resolve_implementation turns 'auto' into one of them)"
        )
    if query.ndim != 4 or key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            "query, key and value must share one shape [batch, tokens, heads, width], "
            f"found {query.shape}, {key.shape}, {value.shape}"
        )
    _, tokens, heads, width = query.shape
    if bias is not None and implementation != "xla":
        raise ValueError(f"attention {implementation!r} takes no bias, use implementation='xla'")
    if bias is not None and bias.shape != (heads, tokens, tokens):
        raise ValueError(f"bias has shape {bias.shape}, expected {(heads, tokens, tokens)}")
    if scale is None:
        scale = width**-0.5

    if implementation == "cudnn":
        if query.dtype.itemsize != 2:
            raise ValueError(f"attention 'cudnn' needs bfloat16 inputs, found {query.dtype}: use 'xla'")
        # cuDNN's call has its own partitioning rule, so there is nothing to split here.
        attend = functools.partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    else:
        if implementation == "splash":
            local = functools.partial(splash_attention, scale=scale, interpret=interpret)
        else:
            local = functools.partial(xla_attention, scale=scale)
        attend = functools.partial(split_over_mesh, local, bias=bias, batch_axes=batch_axes, head_axes=head_axes)
    return exchange_tokens_for_heads(attend, query, key, value, batch_axes=batch_axes, head_axes=head_axes)


def split_over_mesh(
    local: Callable,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    batch_axes: Any,
    head_axes: Any,
) -> jax.Array:
    """Calls `local(query, key, value, bias)` on each device's own samples and heads; directly on a single device.

    XLA's partitioner refuses a Pallas kernel, and would gather everything for a loop. Work that no axis divides is
    repeated on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape[name] == 1 for name in mesh.auto_axes):
        return local(query, key, value, bias)
    batch_axes = axes_that_divide(batch_axes, mesh, query.shape[0])
    head_axes = axes_that_divide(head_axes, mesh, query.shape[2])
    tokens_spec = jax.P(batch_axes or None, None, head_axes or None, None)
    bias_spec = None if bias is None else jax.P(head_axes or None, None, None)
    return jax.shard_map(
        local,
        in_specs=(tokens_spec, tokens_spec, tokens_spec, bias_spec),
        out_specs=tokens_spec,
        check_vma=False,  # a pallas_call does not say over which axes its result varies
    )(query, key, value, bias)


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None, *, scale: float
) -> jax.Array:
    """Attention in plain XLA operations, recomputed in the backward pass: [B, N, H, d] -> [B, N, H, d]."""

    def heads(query, key, value, bias):
        """[..., N, d] -> [..., N, d]; the softmax is float32 whatever the inputs are."""
        scores = jnp.einsum("...nd,...md->...nm", query, key, preferred_element_type=jnp.float32) * scale
        if bias is not None:
            scores = scores + bias.astype(jnp.float32)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("...nm,...md->...nd", weights, value)

    def heads_in_turn(query, key, value, bias):
        # One head of one sample at a time keeps its [N, N] scores in the CPU's cache: at 320 tokens three to four
        # times as fast as all at once. float32, because CPUs emulate bfloat16 matmuls.
        def head(operands):
            *query_key_value, bias = operands
            wide = (x.astype(jnp.float32) for x in query_key_value)
            return jax.checkpoint(heads, prevent_cse=False)(*wide, bias).astype(query.dtype)

        return jax.lax.map(lambda sample: jax.lax.map(head, (*sample, bias)), (query, key, value))

    @jax.checkpoint
    def attend(query, key, value, bias):
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        attended = jax.lax.platform_dependent(*heads_first, bias, cpu=heads_in_turn, default=heads)
        return jnp.swapaxes(attended, 1, 2)

    return attend(query, key, value, bias)


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, bias: None, *, scale: float, interpret: bool
) -> jax.Array:
    """Attention by JAX's Pallas kernel for TPU: [B, N, H, d] -> [B, N, H, d].

    The sequence is padded to a multiple of 128. Padding has its own segment id, so that tokens never read it.
    """
    # Here, since Pallas' kernels take a fifth of a second to import.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    del bias
    _, tokens, heads, _ = query.shape
    padded = -(-tokens // SPLASH_LANES) * SPLASH_LANES
    block = splash_block(padded)
    keys = padded if padded <= SPLASH_MAX_KEYS else splash_block(padded, SPLASH_LONG)
    at_once = splash_block(keys)
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([splash_mask.FullMask((padded, padded))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=keys,
            block_kv_compute=at_once,
            block_q_dkv=block if keys <= SPLASH_LONG else SPLASH_LANES,
            block_kv_dkv=keys,
            block_kv_dkv_compute=at_once,
            use_fused_bwd_kernel=True,  # computes the scores once for all three gradients
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segment = jnp.asarray(np.arange(padded) >= tokens, jnp.int32)
    segments = splash.SegmentIds(q=segment, kv=segment)

    def prepare(x):
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padded - tokens), (0, 0)))

    # The kernel does not scale the scores itself.
    attended = jax.vmap(kernel, in_axes=(0, 0, 0, None))(
        prepare(query * jnp.asarray(scale, query.dtype)), prepare(key), prepare(value), segments
    )
    return jnp.swapaxes(attended[:, :, :tokens], 1, 2)


def splash_block(padded: int, most: int = SPLASH_MAX_BLOCK) -> int:
    """The largest block that divides the padded length, in multiples of 128 up to `most`."""
    return max(b for b in range(SPLASH_LANES, most + 1, SPLASH_LANES) if padded % b == 0)
