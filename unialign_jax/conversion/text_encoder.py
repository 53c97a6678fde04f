"""T5 v1.1's layout, as the transformers library names it (and Stability's single files, behind a prefix)."""

from unialign_jax.conversion.rules import DENSE, DENSE_FROM_HEADS, SAME, Dropped, Rule, Table
from unialign_jax.models.text_encoder import TextEncoderConfig

BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
TABLES = ("shared.weight", "encoder.embed_tokens.weight")  # the same table, under either name or both


def t5_table(config: TextEncoderConfig, keys=TABLES) -> Table:
    """The encoder; `keys` are the source's, which decide under which name the token embedding is read."""
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


def is_t5(keys) -> bool:
    return "encoder.block.0.layer.0.SelfAttention.q.weight" in keys


def infer_config(shapes, settings, name) -> TextEncoderConfig:
    """The architecture from the tensors' shapes; the buckets' distance from config.json, T5's own otherwise."""
    if "encoder.block.0.layer.1.DenseReluDense.wi.weight" in shapes:
        raise ValueError(f"{name} is a T5 v1.0 encoder (its MLP has no gate): SD3 uses T5 v1.1 XXL")
    try:
        embedding = next(shapes[key] for key in TABLES if key in shapes)
        buckets, heads = shapes[BIAS]
        inner = shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0]
        mlp_width = shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0]
    except (KeyError, StopIteration, ValueError) as error:
        raise ValueError(f"{name} is no whole T5 v1.1 encoder: {error} is missing or has another shape") from None
    layers = {int(key.split(".")[2]) for key in shapes if key.startswith("encoder.block.")}
    if layers != set(range(len(layers))):
        absent = sorted(set(range(max(layers))) - layers)
        raise ValueError(f"{name} lacks the layers {absent[:8]}: a shard may be missing")
    return TextEncoderConfig(
        vocab_size=embedding[0],
        width=embedding[1],
        mlp_width=mlp_width,
        num_heads=heads,
        head_width=inner // heads,
        depth=len(layers),
        num_buckets=buckets,
        max_distance=settings.get("relative_attention_max_distance", TextEncoderConfig().max_distance),
    )
