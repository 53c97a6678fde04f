"""T5 v1.1's layout, with the names of the transformers library. Stability's single files add a prefix."""

import re
from collections.abc import Collection

from unialign_jax.conversion import rules
from unialign_jax.conversion.rules import DENSE, DENSE_FROM_HEADS, SAME, Dropped, Rule, Shapes, Table
from unialign_jax.conversion.settings import number, whole_number
from unialign_jax.models.text_encoder import TextEncoderConfig

BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
LAYER = re.compile(r"encoder\.block\.(\d{1,6})\.")
TABLES = ("shared.weight", "encoder.embed_tokens.weight")  # names of the one table; a file has one or both


def t5_table(config: TextEncoderConfig, keys: Collection[str] = TABLES) -> Table:
    """The encoder's table. The source's `keys` tell the name of its token embedding."""
    embedding = next((name for name in TABLES if name in keys), TABLES[0])
    every = range(config.depth)

    def layer(source, target, transform=DENSE):
        return Rule(f"encoder.block.{{layer}}.layer.{source}.weight", f"layers/{target}", transform, every)

    return Table(
        layout="t5",
        rules=[
            Rule(embedding, "token_embedding", SAME),
            Rule(BIAS, "relative_bias", SAME),
            layer("0.layer_norm", "attention_norm/scale", SAME),
            layer("0.SelfAttention.q", "query/kernel"),
            layer("0.SelfAttention.k", "key/kernel"),
            layer("0.SelfAttention.v", "value/kernel"),
            layer("0.SelfAttention.o", "out/kernel", DENSE_FROM_HEADS),
            layer("1.layer_norm", "mlp_norm/scale", SAME),
            layer("1.DenseReluDense.wi_0", "mlp_gate/kernel"),
            layer("1.DenseReluDense.wi_1", "mlp_up/kernel"),
            layer("1.DenseReluDense.wo", "mlp_out/kernel"),
            Rule("encoder.final_layer_norm.weight", "final_norm/scale", SAME),
        ],
        dropped=[
            Dropped("encoder.embed_tokens.weight", "the token embedding again"),
            Dropped("decoder.*", "only the encoder is used"),
            Dropped("lm_head.weight", "only the encoder is used"),
        ],
    )


def is_t5(keys: Collection[str]) -> bool:
    return "encoder.block.0.layer.0.SelfAttention.q.weight" in keys


def infer_config(shapes: Shapes, settings: dict, name: str) -> TextEncoderConfig:
    """The architecture from the tensors' shapes, and the buckets' distance from config.json or else T5's own.

    Raises ValueError for another model than T5 v1.1; `name` is for messages.
    """
    if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in shapes:
        raise ValueError(f"{name} is a T5 v1.0 encoder (its MLP has no gate): SD3 uses T5 v1.1 XXL")
    table = next((key for key in TABLES if key in shapes), TABLES[0])
    vocab_size, width = rules.shape_of(shapes, table, 2, name)
    buckets, heads = rules.shape_of(shapes, BIAS, 2, name)
    inner, _ = rules.shape_of(shapes, "encoder.block.0.layer.0.SelfAttention.q.weight", 2, name)
    mlp_width, _ = rules.shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 2, name)
    if inner % heads or buckets < 4 or buckets % 2:
        raise ValueError(f"{name} has {heads} heads in a width of {inner} and {buckets} buckets, which is no T5")
    depth = rules.count_layers(LAYER, shapes, name)
    max_distance = whole_number(settings, "relative_attention_max_distance", TextEncoderConfig().max_distance, name)
    if max_distance <= buckets // 4:
        raise ValueError(f"{name}: relative_attention_max_distance is {max_distance}, too near for {buckets} buckets")
    epsilon = number(settings, "layer_norm_epsilon", 1e-6, name)
    if epsilon != 1e-6:
        raise ValueError(f"{name}: layer_norm_epsilon is {epsilon}, the text encoder here has T5's 1e-06")
    return TextEncoderConfig(
        vocab_size=vocab_size,
        width=width,
        mlp_width=mlp_width,
        num_heads=heads,
        head_width=inner // heads,
        depth=depth,
        num_buckets=buckets,
        max_distance=max_distance,
    )
