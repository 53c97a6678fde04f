"""The MM-DiT against diffusers' SD3Transformer2DModel, its weights moved over by hand.

Two claims. With SD3's weights, what SD3 lacks filled in so that it does nothing, and a zero pooled vector, the image
velocity is SD3's. With a full last block, everything else that the network gives (conditions in the sequence, taps,
features, logits) is what diffusers' own blocks give when they are put together as UniAlignment puts them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.models.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(
    depth=3,
    num_heads=4,
    head_width=16,
    latent_channels=4,
    text_width=24,
    vocab_size=30,
    tap_depth=2,
    max_patches=24,
    base_patches=8,
    remat="none",
    dtype="float32",
)
POOLED_WIDTH = 20
TEXT_TOKENS = 7
SIZES = [(8, 8), (6, 12)]  # 6 is an odd number of patches: the crop from the position table is off centre
apply = jax.jit(MMDiT(CONFIG).apply)


@pytest.fixture(scope="module")
def sd3():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=CONFIG.base_patches * CONFIG.patch_size,
        patch_size=CONFIG.patch_size,
        in_channels=CONFIG.latent_channels,
        out_channels=CONFIG.latent_channels,
        num_layers=CONFIG.depth,
        attention_head_dim=CONFIG.head_width,
        num_attention_heads=CONFIG.num_heads,
        joint_attention_dim=CONFIG.text_width,
        caption_projection_dim=CONFIG.width,
        pooled_projection_dim=POOLED_WIDTH,
        pos_embed_max_size=CONFIG.max_patches,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # further from the residual stream than the library's small initial weights
        for parameter in model.context_embedder.parameters():
            parameter.mul_(0.01)  # small enough for the norms' epsilon to show
    return model.eval()


@pytest.fixture(scope="module")
def full_block(sd3):
    """A last block whose text half goes on after the attention, as UniAlignment's does and SD3's does not."""
    import torch
    from diffusers.models.attention import JointTransformerBlock

    torch.manual_seed(1)
    return JointTransformerBlock(
        dim=CONFIG.width, num_attention_heads=CONFIG.num_heads, attention_head_dim=CONFIG.head_width
    ).eval()


@pytest.fixture(scope="module")
def inputs():
    """latents per size, text embeddings, sigma and two condition images, as float32 numpy."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "latents": {size: normal(2, *size, CONFIG.latent_channels) for size in SIZES},
        "conditions": normal(2, 2, 6, 12, CONFIG.latent_channels),
        "text": normal(2, TEXT_TOKENS, CONFIG.text_width),
        "sigma": np.array([0.05, 0.9], np.float32),
    }


def array(tensor):
    return tensor.detach().numpy()


def linear(module, features=None):
    """A torch Linear as {kernel, bias}; `features` is the shape that its outputs are folded into."""
    kernel, bias = array(module.weight).T, array(module.bias)
    if features is None:
        return {"kernel": kernel, "bias": bias}
    return {"kernel": kernel.reshape(-1, *features), "bias": bias.reshape(features)}


def half_of_block(block, stream):
    """One stream's half of a JointTransformerBlock. In SD3's last block the text half is cut short."""
    heads = (CONFIG.num_heads, CONFIG.head_width)
    if stream == "image":
        modulation, feed_forward, out = block.norm1, block.ff, block.attn.to_out[0]
        projections = (block.attn.to_q, block.attn.to_k, block.attn.to_v)
    else:
        modulation, feed_forward = block.norm1_context, block.ff_context
        out = None if block.context_pre_only else block.attn.to_add_out
        projections = (block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj)
    qkv = [linear(projection, heads) for projection in projections]
    tree = {
        "qkv": {
            "kernel": np.stack([p["kernel"] for p in qkv], axis=1),
            "bias": np.stack([p["bias"] for p in qkv]),
        }
    }
    if out is None:
        scale, shift = np.split(array(modulation.linear.weight).T, 2, axis=1)  # diffusers: scale first
        scale_bias, shift_bias = np.split(array(modulation.linear.bias), 2)
        zero, zero_bias = np.zeros_like(scale), np.zeros_like(scale_bias)
        tree["modulation"] = {
            "kernel": np.stack([shift, scale] + 4 * [zero], axis=1),
            "bias": np.stack([shift_bias, scale_bias] + 4 * [zero_bias]),
        }
        return tree
    projected = linear(out)
    tree["out"] = {"kernel": projected["kernel"].reshape(*heads, -1), "bias": projected["bias"]}
    tree["modulation"] = linear(modulation.linear, (6, CONFIG.width))
    tree["mlp_in"] = linear(feed_forward.net[0].proj)
    tree["mlp_out"] = linear(feed_forward.net[2])
    return tree


def params_from_torch(model, blocks):
    """Our tree from an SD3Transformer2DModel, with `blocks` in place of its own; pooled vector absent (zeros)."""
    import torch

    layers = [{stream: half_of_block(block, stream) for stream in ("image", "text")} for block in blocks]
    if "out" not in layers[-1]["text"]:
        # What SD3 lacks is taken from the block before; the zero gates above keep it silent.
        layers[-1]["text"] = {**layers[-2]["text"], **layers[-1]["text"]}

    embedder = model.time_text_embed
    time_out = linear(embedder.timestep_embedder.linear_2)
    with torch.no_grad():
        time_out["bias"] = time_out["bias"] + array(embedder.text_embedder(torch.zeros(POOLED_WIDTH)))
    head_modulation = linear(model.norm_out.linear, (2, CONFIG.width))
    head_modulation["kernel"] = head_modulation["kernel"][:, ::-1]  # scale, shift -> shift, scale
    head_modulation["bias"] = head_modulation["bias"][::-1]
    rng = np.random.default_rng(3)
    patch_kernel = array(model.pos_embed.proj.weight).transpose(2, 3, 1, 0).reshape(-1, CONFIG.width)
    return {
        "patch_embed": {"kernel": patch_kernel, "bias": array(model.pos_embed.proj.bias)},
        "text_embed": linear(model.context_embedder),
        "time_embed": {"hidden": linear(embedder.timestep_embedder.linear_1), "out": time_out},
        "blocks": {"joint": jax.tree.map(lambda *x: np.stack(x), *layers)},
        "image_head_modulation": head_modulation,
        "image_head": linear(model.proj_out),
        "text_head": {
            "kernel": rng.standard_normal((CONFIG.width, CONFIG.vocab_size)).astype(np.float32),
            "bias": rng.standard_normal(CONFIG.vocab_size).astype(np.float32),
        },
    }


def to_torch(x):
    """[..., H, W, C] numpy -> [..., C, H, W] torch."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, -3)))


def assert_close(found, expected, name):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, name
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_velocity_and_its_gradient_are_sd3s(sd3, inputs, size):
    import torch

    params = params_from_torch(sd3, sd3.transformer_blocks)
    latents, text, sigma = inputs["latents"][size], inputs["text"], inputs["sigma"]
    cotangent = np.random.default_rng(5).standard_normal(latents.shape).astype(np.float32)

    torch_latents = to_torch(latents).requires_grad_()
    expected = sd3(
        hidden_states=torch_latents,
        encoder_hidden_states=torch.from_numpy(text),
        pooled_projections=torch.zeros(2, POOLED_WIDTH),
        timestep=1000 * torch.from_numpy(sigma),
    ).sample
    expected.backward(to_torch(cotangent))

    @jax.jit
    def velocity_and_gradient(latents):
        velocity, pull_back = jax.vjp(
            lambda x: MMDiT(CONFIG).apply({"params": params}, x, text, sigma).velocity, latents
        )
        return velocity, pull_back(cotangent)[0]

    velocity, gradient = velocity_and_gradient(latents)
    assert_close(velocity, np.moveaxis(array(expected), 1, -1), "velocity")
    assert_close(gradient, np.moveaxis(torch_latents.grad.numpy(), 1, -1), "gradient with respect to the latents")


def test_our_tree_is_wholly_filled(sd3, inputs):
    params = params_from_torch(sd3, sd3.transformer_blocks)
    latents = jnp.asarray(inputs["latents"][SIZES[0]])
    shapes = jax.eval_shape(MMDiT(CONFIG).init, jax.random.key(0), latents, inputs["text"], inputs["sigma"])
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)


class Expected(NamedTuple):
    velocity: np.ndarray
    text_logits: np.ndarray
    image_features: np.ndarray
    text_features: np.ndarray
    image_tap: np.ndarray
    text_tap: np.ndarray


def run_torch_blocks(model, blocks, params, latents, text, sigma, conditions):
    """UniAlignment's forward pass, written with diffusers' modules."""
    import torch

    with torch.no_grad():
        time = model.time_text_embed(1000 * torch.from_numpy(sigma), torch.zeros(2, POOLED_WIDTH))
        images = [latents, *np.moveaxis(conditions, 1, 0)]
        image = torch.cat([model.pos_embed(to_torch(x)) for x in images], dim=1)
        context = model.context_embedder(torch.from_numpy(text))
        height, width = latents.shape[1] // CONFIG.patch_size, latents.shape[2] // CONFIG.patch_size
        target = height * width
        for depth, block in enumerate(blocks, start=1):
            context, image = block(hidden_states=image, encoder_hidden_states=context, temb=time)
            if depth == CONFIG.tap_depth:
                image_tap, text_tap = array(image[:, :target]), array(context)
        image_features = model.norm_out(image[:, :target], time)
        patches = model.proj_out(image_features).reshape(2, height, width, CONFIG.patch_size, CONFIG.patch_size, -1)
        velocity = torch.einsum("nhwpqc->nhpwqc", patches).reshape(latents.shape)
        text_features = array(torch.nn.functional.layer_norm(context, (CONFIG.width,), eps=1e-6))
    head = params["text_head"]
    text_logits = text_features @ head["kernel"] + head["bias"]
    return Expected(array(velocity), text_logits, array(image_features), text_features, image_tap, text_tap)


@pytest.mark.parametrize("size", SIZES)
def test_every_output_is_what_diffusers_blocks_give(sd3, full_block, inputs, size):
    blocks = [*sd3.transformer_blocks[:-1], full_block]
    params = params_from_torch(sd3, blocks)
    latents, text, sigma = inputs["latents"][size], inputs["text"], inputs["sigma"]
    conditions = inputs["conditions"]  # of another shape than the square latents
    expected = run_torch_blocks(sd3, blocks, params, latents, text, sigma, conditions)
    found = apply({"params": params}, latents, text, sigma, conditions)
    for name in Expected._fields:
        assert_close(getattr(found, name), getattr(expected, name), name)
