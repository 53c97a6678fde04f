"""The T5 v1.1 encoder against the transformers library's, and its published size."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.models.text_encoder import (
    TextEncoder,
    TextEncoderConfig,
    relative_buckets,
)

TINY = TextEncoderConfig(
    vocab_size=50,
    width=24,
    mlp_width=40,
    num_heads=3,
    head_width=8,
    depth=3,
    max_distance=20,
    dtype="float32",
)
encode = jax.jit(TextEncoder(TINY).apply)


@pytest.fixture(scope="module")
def params():
    return jax.jit(TextEncoder(TINY).init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]


@pytest.fixture(scope="module")
def t5():
    """The T5 class of transformers, on torch."""
    pytest.importorskip("torch")
    return pytest.importorskip("transformers").models.t5.modeling_t5


@pytest.fixture(scope="module")
def torch_encoder(t5):
    import torch
    from transformers import T5Config

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=TINY.vocab_size,
        d_model=TINY.width,
        d_ff=TINY.mlp_width,
        num_heads=TINY.num_heads,
        d_kv=TINY.head_width,
        num_layers=TINY.depth,
        relative_attention_num_buckets=TINY.num_buckets,
        relative_attention_max_distance=TINY.max_distance,
        feed_forward_proj="gated-gelu",
        initializer_factor=1.0,
        dropout_rate=0.0,
    )
    model = t5.T5EncoderModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The library starts norms at one, where a forgotten scale would not show.
            if "layer_norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            if name == "shared.weight":
                parameter[::3] *= 0.01  # small enough for the norms' epsilon to show
            if "relative_attention_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


def params_from_torch(model, config):
    """The tensors of a T5EncoderModel in our tree, by hand."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    width, heads, head_width = config.width, config.num_heads, config.head_width

    def stack(name, shape=None):
        layers = [state[f"encoder.block.{i}.{name}.weight"].T for i in range(config.depth)]
        return np.stack([layer if shape is None else layer.reshape(shape) for layer in layers])

    by_head = (width, heads, head_width)
    bias_name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        "token_embedding": state["shared.weight"],
        "relative_bias": state[bias_name],
        "layers": {
            "attention_norm": {"scale": stack("layer.0.layer_norm")},
            "query": {"kernel": stack("layer.0.SelfAttention.q", by_head)},
            "key": {"kernel": stack("layer.0.SelfAttention.k", by_head)},
            "value": {"kernel": stack("layer.0.SelfAttention.v", by_head)},
            "out": {"kernel": stack("layer.0.SelfAttention.o", (heads, head_width, width))},
            "mlp_norm": {"scale": stack("layer.1.layer_norm")},
            "mlp_gate": {"kernel": stack("layer.1.DenseReluDense.wi_0")},
            "mlp_up": {"kernel": stack("layer.1.DenseReluDense.wi_1")},
            "mlp_out": {"kernel": stack("layer.1.DenseReluDense.wo")},
        },
        "final_norm": {"scale": state["encoder.final_layer_norm.weight"]},
    }


def test_embeddings_equal_the_transformers_library(torch_encoder, params):
    import torch

    ids = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 45))  # past max_distance
    with torch.no_grad():
        expected = torch_encoder(input_ids=torch.from_numpy(ids)).last_hidden_state.numpy()
    converted = params_from_torch(torch_encoder, TINY)
    assert jax.tree.map(jnp.shape, converted) == jax.tree.map(jnp.shape, params)

    found = encode({"params": converted}, jnp.asarray(ids, jnp.int32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (32, 20), (16, 64)])
def test_relative_buckets_equal_the_transformers_library(t5, num_buckets, max_distance):
    import torch

    position = torch.arange(400)
    expected = t5.T5Attention._relative_position_bucket(
        position[None, :] - position[:, None], num_buckets=num_buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(relative_buckets(400, num_buckets, max_distance), expected.numpy())


def test_xxl_is_as_large_as_the_published_encoder(t5):
    import torch
    from transformers import T5Config

    init = TextEncoder(TextEncoderConfig()).init
    shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    with torch.device("meta"):
        published = t5.T5EncoderModel(
            T5Config(
                vocab_size=32128,
                d_model=4096,
                d_ff=10240,
                num_heads=64,
                num_layers=24,
                feed_forward_proj="gated-gelu",
            )
        )
    # 4,762,107,904 in the matrices, 200,704 in the norms and 2,048 in the relative bias.
    assert count == sum(p.numel() for p in published.parameters()) == 4_762_310_656


def test_bfloat16_stays_near_float32(params):
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    ids = jnp.arange(20, dtype=jnp.int32).reshape(2, 10)
    exact = encode({"params": params}, ids)
    rough = jax.jit(TextEncoder(dataclasses.replace(TINY, dtype="bfloat16")).apply)({"params": params}, ids)
    assert rough.dtype == jnp.bfloat16
    assert jnp.max(jnp.abs(exact - rough)) < 0.1  # values are of order one after the final norm


def test_bad_input_is_refused_with_the_numbers():
    for ids in (jnp.zeros((4,), jnp.int32), jnp.zeros((1, 4))):
        with pytest.raises(ValueError, match=r"expected integers \[batch, tokens\]"):
            jax.eval_shape(TextEncoder(TINY).init, jax.random.key(0), ids)
