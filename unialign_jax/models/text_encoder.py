"""The T5 v1.1 encoder: token ids to the embeddings that both passes of the MM-DiT read.

Source: T5 (arXiv 1910.10683) in its v1.1 form: gated GELU, no biases, RMS norms, relative position bias, no
1/sqrt(d) in the attention. Pads are ordinary tokens: there is no attention mask, as SD3 was trained.

Shape letters: B batch, L tokens, D width, H heads, d head width.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from unialign_jax.models.attention import attention
from unialign_jax.parallel.activations import BATCH_AXES, ENCODER_BATCH_AXES, ENCODER_HEAD_AXES, keep_tokens_sharded


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Architecture of the encoder; the defaults are T5 v1.1 XXL's. `dtype` is that of the matmuls."""

    vocab_size: int = 32128
    width: int = 4096
    mlp_width: int = 10240
    num_heads: int = 64
    head_width: int = 64
    depth: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    dtype: str = "bfloat16"


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The row of the bias table that each pair of positions reads: int [query, key].

    Half of the buckets are for keys before the query and half for keys after it. In each half the first half
    holds one distance per bucket. The rest grow logarithmically up to `max_distance`; the last takes all beyond it.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    per_side = num_buckets // 2
    exact = per_side // 2
    distance = np.abs(offset)
    # float32 as in T5's own code, so that the edges of the buckets round as its weights were trained.
    logarithm = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    growing = exact + logarithm / np.float32(math.log(max_distance / exact)) * np.float32(per_side - exact)
    bucket = np.where(distance < exact, distance, np.minimum(growing.astype(np.int64), per_side - 1))
    return bucket + per_side * (offset > 0)


def rms_norm(config: TextEncoderConfig, name: str) -> nn.RMSNorm:
    """Scales by the root mean square of the width, in float32."""
    return nn.RMSNorm(epsilon=1e-6, dtype=config.dtype, name=name)


class Layer(nn.Module):
    """Self-attention, then a gated MLP; each pre-normed, with a residual. Beside that, a function of other arrays."""

    config: TextEncoderConfig
    beside: Callable | None = None

    @nn.compact
    def __call__(self, x, bias, others=None):
        c = self.config

        def dense(features, name, axis=-1, fan=c.width):
            init = nn.initializers.normal(fan**-0.5)
            return nn.DenseGeneral(features, axis=axis, use_bias=False, dtype=c.dtype, kernel_init=init, name=name)

        # The weights are split over axes that split the batch elsewhere. Here the batch is whole along them: XLA moves
        # the tokens and not the weights.
        x = keep_tokens_sharded(x, ENCODER_BATCH_AXES)
        heads = (c.num_heads, c.head_width)
        hidden = rms_norm(c, "attention_norm")(x)
        # The factor 1/sqrt(d) that the scores lack is in the initial query weights instead.
        query = dense(heads, "query", fan=c.width * c.head_width)(hidden)
        key, value = dense(heads, "key")(hidden), dense(heads, "value")(hidden)
        attended = attention(
            query,
            key,
            value,
            bias=bias,
            scale=1.0,
            batch_axes=ENCODER_BATCH_AXES,
            head_axes=ENCODER_HEAD_AXES,
        )
        x = x + dense(c.width, "out", axis=(-2, -1), fan=c.num_heads * c.head_width)(attended)
        x = keep_tokens_sharded(x, ENCODER_BATCH_AXES)

        hidden = rms_norm(c, "mlp_norm")(x)
        gate = nn.gelu(dense(c.mlp_width, "mlp_gate")(hidden), approximate=True)
        hidden = gate * dense(c.mlp_width, "mlp_up")(hidden)
        x = x + dense(c.width, "mlp_out", fan=c.mlp_width)(hidden)
        return keep_tokens_sharded(x, ENCODER_BATCH_AXES), self.beside(others) if self.beside else None


class TextEncoder(nn.Module):
    """ids int32 [B, L] -> embeddings [B, L, D] in `config.dtype`, after the final norm.

    The layers are one scan: their parameters are stacked along a leading axis of length `depth`. The relative
    position bias is one table that every layer shares. Raises ValueError unless ids are a batch of integers.

    With `beside`, (function, tree of arrays [depth, ...]), layer i also computes function(tree[i]), which does not
    depend on the layer: (embeddings, stacked results).
    """

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, ids, beside=None):
        c = self.config
        if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"ids are {ids.dtype}{list(ids.shape)}, expected integers [batch, tokens]")
        table = self.param("token_embedding", nn.initializers.normal(1.0), (c.vocab_size, c.width))
        bias_init = nn.initializers.normal(c.width**-0.5)
        bias_table = self.param("relative_bias", bias_init, (c.num_buckets, c.num_heads))

        x = jnp.take(table, keep_tokens_sharded(ids, ENCODER_BATCH_AXES), axis=0).astype(c.dtype)
        x = keep_tokens_sharded(x, ENCODER_BATCH_AXES)
        buckets = relative_buckets(ids.shape[1], c.num_buckets, c.max_distance)
        bias = jnp.transpose(jnp.take(bias_table, buckets, axis=0), (2, 0, 1))  # [H, L, L]
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=c.depth,
        )
        function, others = beside or (None, None)
        x, results = layers(c, function, name="layers")(x, bias, others)
        embeddings = keep_tokens_sharded(rms_norm(c, "final_norm")(x), BATCH_AXES)
        return (embeddings, results) if beside else embeddings
