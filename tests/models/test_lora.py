"""Adapters beside the layers: as kernels with the adapters in them, as PEFT's layers, and over a base in 8 bits."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from unialign_jax import bundle
from unialign_jax.models import parameters
from unialign_jax.models.lora import (
    AdaptedModule,
    LoraConfig,
    adapted,
    adapted_network,
    beside_kernels,
    init_adapters,
    params_with_adapters,
)
from unialign_jax.models.mmdit import MMDiT, MMDiTConfig
from unialign_jax.models.quantization import quantize_params

SMALL = MMDiTConfig(
    depth=2, num_heads=2, head_width=8, latent_channels=4, text_width=12, vocab_size=40, tap_depth=1, dtype="float32"
)


def drawn(tree, seed, spread):
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (spread * generator.normal(size=leaf.shape)).astype(np.float32), tree)


def inputs(config, batch=2):
    generator = np.random.default_rng(3)
    latents = generator.normal(size=(batch, 4, 4, config.latent_channels)).astype(np.float32)
    text = generator.normal(size=(batch, 5, config.text_width)).astype(np.float32)
    return latents, text, np.linspace(0.1, 0.9, batch).astype(np.float32)


@pytest.fixture(scope="module")
def base():
    return drawn(jax.eval_shape(lambda: parameters.init(SMALL, jax.random.key(0))), 0, 0.2)


@pytest.fixture(scope="module")
def plain(base):
    """The outputs without adapters."""
    return jax.jit(lambda params: MMDiT(SMALL).apply({"params": params}, *inputs(SMALL)))(base)


def lora_and_adapters(base, **changes):
    lora = LoraConfig(**{"rank": 3, "alpha": 6.0, "targets": (".*",)} | changes)
    return lora, drawn(init_adapters(lora, base, jax.random.key(0)), 1, 0.2)


@pytest.mark.parametrize("changes", [{}, {"dora": True}, {"dora": True, "quantize_base": "int8"}])
def test_adapters_beside_the_layers_are_kernels_with_the_adapters(changes, base, plain):
    lora, adapters = lora_and_adapters(base, **changes)
    held = quantize_params(base, "int8") if lora.quantize_base else base
    given = inputs(SMALL)

    def beside(adapters):
        return adapted_network(MMDiT(SMALL), lora).apply({"params": beside_kernels(held, adapters)}, *given)

    def merged(adapters):
        return MMDiT(SMALL).apply({"params": params_with_adapters(held, adapters, lora.scale)}, *given)

    def with_gradients(function):
        def loss(adapters):
            outputs = function(adapters)
            return jnp.mean(jnp.square(outputs.velocity - 1)) + jnp.mean(jnp.square(outputs.text_logits - 1)), outputs

        gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(adapters)
        return outputs, flatten_dict(gradients, sep="/")

    (found, ours_by_path), (expected, theirs_by_path) = map(with_gradients, (beside, merged))
    for name in ("velocity", "text_logits", "image_features", "text_tap"):
        ours, theirs, before = (np.asarray(getattr(outputs, name)) for outputs in (found, expected, plain))
        size = np.abs(theirs).max()
        assert np.abs(before - theirs).max() > 0.1 * size, name
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * size, err_msg=name)
    for path, gradient in theirs_by_path.items():
        size = np.abs(gradient).max()
        assert size > 0, path
        np.testing.assert_allclose(ours_by_path[path], gradient, atol=1e-4 * size, err_msg=path)


def test_outputs_without_weights_have_no_norm_to_keep():
    """As the last block's text modulation of SD3: DoRA's factor is 1 there, and all values and gradients are finite."""
    kernel, a, b, x = drawn([np.empty((5, 7)), np.empty((5, 3)), np.empty((3, 7)), np.empty((4, 5))], 0, 1.0)
    kernel[:, 4:] = 0
    bias, gain = np.zeros(7, np.float32), drawn(np.empty(7), 1, 0.3)
    lora = LoraConfig(rank=3, alpha=6.0, targets=(".*",), dora=True)

    def beside(adapter):
        params = {"text_head": {"kernel": kernel, "bias": bias, "adapter": adapter}}
        return AdaptedModule(OneLayer(), lora).apply({"params": params}, x)

    def merged(adapter):
        tree = {"text_head": {"kernel": adapter}}
        return x @ params_with_adapters({"text_head": {"kernel": kernel}}, tree, lora.scale)["text_head"]["kernel"]

    for up in (np.zeros_like(b), b):  # new adapters, and trained ones
        adapter = {"a": a, "b": up, "gain": gain}
        changed = kernel + 2 * a @ up
        expected = changed.copy()  # where W is zero
        expected[:, :4] *= (1 + gain[:4]) * np.linalg.norm(kernel, axis=0)[:4] / np.linalg.norm(changed, axis=0)[:4]
        for function in (beside, merged):
            found, pull = jax.vjp(function, jax.tree.map(jnp.asarray, adapter))
            np.testing.assert_allclose(found, x @ expected, atol=1e-5)
            (gradients,) = pull(jnp.ones_like(found))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
            # The plain adapter's: d (x 2 A B) / dB, and no gain.
            np.testing.assert_allclose(gradients["b"][:, 4:], 2 * (x @ a).sum(0)[:, None] * np.ones(3), atol=1e-5)
            np.testing.assert_array_equal(gradients["gain"][4:], 0)
            assert np.abs(gradients["gain"][:4]).min() > 0
        np.testing.assert_allclose(adapted("text_head/kernel", kernel, adapter, 2.0), expected, atol=1e-5)  # numpy's
    gone = {"a": np.eye(5, dtype=np.float32), "b": -kernel / 2, "gain": gain}  # A B takes the weights away
    assert not np.asarray(adapted("text_head/kernel", kernel, gone, 2.0)).any()


class OneLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(7, name="text_head")(x)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_that_of_peft(dora, monkeypatch):
    """The layer of PEFT in training, with the same inputs left out."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    import torch

    kernel, bias, x = drawn([np.empty((5, 7)), np.empty(7), np.empty((4, 5))], 0, 1.0)
    adapter = drawn({"a": np.empty((5, 3)), "b": np.empty((3, 7))}, 1, 0.5)
    keep = np.random.default_rng(2).random((4, 5)) < 0.6

    class FixedDropout(torch.nn.Module):
        def forward(self, x):
            return torch.where(torch.from_numpy(keep), x / 0.6, 0) if self.training else x

    torch_model = torch.nn.Sequential(torch.nn.Linear(5, 7))
    torch_model[0].weight.data, torch_model[0].bias.data = torch.from_numpy(kernel.T.copy()), torch.from_numpy(bias)
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], lora_dropout=0.4, use_dora=dora)
    layer = peft.get_peft_model(torch_model, settings).base_model.model[0]
    layer.lora_A["default"].weight.data = torch.from_numpy(adapter["a"].T.copy())
    layer.lora_B["default"].weight.data = torch.from_numpy(adapter["b"].T.copy())
    layer.lora_dropout["default"] = FixedDropout()
    layer.train()
    expected = layer(torch.from_numpy(x)).detach().numpy()

    lora = LoraConfig(rank=3, alpha=6.0, targets=(".*",), dora=dora, dropout=0.4)
    if dora:  # PEFT's magnitude is that of W, which is a gain of 0
        adapter["gain"] = np.zeros(7, np.float32)
    params = {"text_head": {"kernel": kernel, "bias": bias, "adapter": adapter}}
    apply = lambda **rngs: np.asarray(AdaptedModule(OneLayer(), lora).apply({"params": params}, x, rngs=rngs))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(jax.random, "bernoulli", lambda key, p, shape: jnp.asarray(keep))
        np.testing.assert_allclose(apply(dropout=jax.random.key(0)), expected, atol=1e-5)
    layer.eval()
    np.testing.assert_allclose(apply(), layer(torch.from_numpy(x)).detach().numpy(), atol=1e-5)  # sampling, validation
    several = np.stack([apply(dropout=jax.random.key(i)) for i in range(3)])
    assert np.abs(several[0] - several[1]).max() > 0.1 and np.abs(several[1] - several[2]).max() > 0.1


def test_blocks_and_keys_drop_other_inputs(base, monkeypatch):
    """Adapters of equal blocks, of which dropout makes different ones."""
    lora, adapters = lora_and_adapters(base, dropout=0.5, targets=("blocks/joint/image/mlp_in",))
    network = adapted_network(MMDiT(dataclasses.replace(SMALL, remat="none")), lora)
    variables, masks, bernoulli = {"params": beside_kernels(base, adapters)}, [], jax.random.bernoulli

    def draw(*arguments):
        mask = bernoulli(*arguments)
        jax.debug.callback(lambda drawn: masks.append(np.asarray(drawn)), mask)
        return mask

    monkeypatch.setattr(jax.random, "bernoulli", draw)
    run = jax.jit(lambda key: network.apply(variables, *inputs(SMALL), rngs={"dropout": key}).velocity)
    outputs = [run(jax.random.key(number)) for number in (0, 0, 1)]
    jax.effects_barrier()
    assert len(masks) == 3 * SMALL.depth and 0.4 < np.mean(masks) < 0.6
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert np.abs(outputs[0] - outputs[2]).max() > 0.01
    assert len({mask.tobytes() for mask in masks}) == 2 * SMALL.depth  # of two blocks and two keys


def test_a_base_of_8_bits_is_near_the_base():
    """The demo model's velocity: the error of int8, and that of bfloat16 beside it. docs/finetuning.md has both."""
    described, params = bundle.load(bundle.locate("demo"))
    errors = {}
    config = dataclasses.replace(described.transformer, dtype="float32")
    given = inputs(config, batch=8)
    lora = LoraConfig(rank=2, alpha=2.0, targets=("qkv",), quantize_base="int8")
    adapters = init_adapters(lora, params["transformer"], jax.random.key(0))  # new ones, which change nothing
    expected = MMDiT(config).apply({"params": params["transformer"]}, *given)
    for name, module, held in (
        ("bfloat16", MMDiT(dataclasses.replace(config, dtype="bfloat16")), params["transformer"]),
        (
            "int8",
            adapted_network(MMDiT(config), lora),
            beside_kernels(quantize_params(params["transformer"], "int8"), adapters),
        ),
    ):
        found = jax.jit(module.apply)({"params": held}, *given)
        for part in ("velocity", "text_logits"):
            error = np.asarray(getattr(found, part) - getattr(expected, part), np.float64)
            errors[name, part] = np.sqrt(
                np.square(error).mean() / np.square(np.asarray(getattr(expected, part))).mean()
            )
    print(errors)
    assert 1e-4 < errors["int8", "velocity"] < 0.02 and 1e-4 < errors["int8", "text_logits"] < 0.02
