"""The autoencoders: SD3's against diffusers' AutoencoderKL, the tiny stand-in against its definition."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.models.autoencoder import (
    AutoencoderConfig,
    Moments,
    denormalize,
    make_autoencoder,
    normalize,
    sample_latents,
)

NARROW = AutoencoderConfig(
    latent_channels=4, downsample_factor=2, block_widths=(32, 64), norm_groups=8, dtype="float32"
)
TINY = AutoencoderConfig(kind="space_to_depth", latent_channels=48, downsample_factor=4, scale=2.0, shift=0.0)


def make_torch_autoencoder(config):
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.block_widths)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_widths,
        layers_per_block=config.blocks_per_level,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def params_from_torch(model, config):
    """The tensors of a diffusers AutoencoderKL in our tree, by hand."""
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}

    def conv(name):
        kernel = state[f"{name}.weight"].transpose(2, 3, 1, 0)
        return {"kernel": kernel, "bias": state[f"{name}.bias"]}

    def dense(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(name):
        tree = {f"norm_{i}": norm(f"{name}.norm{i + 1}") for i in range(2)}
        tree |= {f"conv_{i}": conv(f"{name}.conv{i + 1}") for i in range(2)}
        if f"{name}.conv_shortcut.weight" in state:
            tree["shortcut"] = conv(f"{name}.conv_shortcut")
        return tree

    def half(name, direction, sampler, blocks):
        attention = f"{name}.mid_block.attentions.0"
        tree = {
            "conv_in": conv(f"{name}.conv_in"),
            "middle_block_0": block(f"{name}.mid_block.resnets.0"),
            "middle_block_1": block(f"{name}.mid_block.resnets.1"),
            "middle_attention": {
                "norm": norm(f"{attention}.group_norm"),
                "query": dense(f"{attention}.to_q"),
                "key": dense(f"{attention}.to_k"),
                "value": dense(f"{attention}.to_v"),
                "out": dense(f"{attention}.to_out.0"),
            },
            "norm_out": norm(f"{name}.conv_norm_out"),
            "conv_out": conv(f"{name}.conv_out"),
        }
        for i in range(len(config.block_widths)):
            level = f"{name}.{direction}_blocks.{i}"
            for j in range(blocks):
                tree[f"{direction}_{i}_block_{j}"] = block(f"{level}.resnets.{j}")
            if i < len(config.block_widths) - 1:
                tree[f"{direction}_{i}_{sampler}"] = conv(f"{level}.{sampler}rs.0.conv")
        return tree

    return {
        "encoder": half("encoder", "down", "downsample", config.blocks_per_level),
        "decoder": half("decoder", "up", "upsample", config.blocks_per_level + 1),
    }


def init_shapes(config):
    image = jnp.zeros((1, 8 * config.downsample_factor, 8 * config.downsample_factor, 3))
    return jax.eval_shape(make_autoencoder(config).init, jax.random.key(0), image).get("params", {})


@pytest.fixture(scope="module")
def torch_autoencoder():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = make_torch_autoencoder(NARROW)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms start at scale one and bias zero, where forgetting them would not show.
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_moments_and_images_equal_diffusers(torch_autoencoder):
    import torch

    params = params_from_torch(torch_autoencoder, NARROW)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, init_shapes(NARROW))
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 24, 32, 3)).astype(np.float32)
    latents = rng.standard_normal((2, 12, 16, 4)).astype(np.float32)
    with torch.no_grad():
        posterior = torch_autoencoder.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latent_dist
        decoded = torch_autoencoder.decode(torch.from_numpy(latents.transpose(0, 3, 1, 2))).sample

    model = make_autoencoder(NARROW)
    moments = jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))(images)
    found = jax.jit(lambda x: model.apply({"params": params}, x, method="decode"))(latents)
    for ours, theirs in (
        (moments.mean, posterior.mean),
        (moments.log_variance, posterior.logvar),
        (found, decoded),
    ):
        expected = theirs.numpy().transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_sd3_is_as_large_as_diffusers():
    torch = pytest.importorskip("torch")
    config = AutoencoderConfig()
    with torch.device("meta"):
        model = make_torch_autoencoder(config)
    shapes = init_shapes(config)
    for half in ("encoder", "decoder"):
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes[half]))
        assert count == sum(p.numel() for p in getattr(model, half).parameters())
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == sum(p.numel() for p in model.parameters())


def test_sd3_moments_have_the_published_shape():
    images = jnp.zeros((2, 64, 48, 3))
    model = make_autoencoder(AutoencoderConfig())
    variables = {"params": init_shapes(model.config)}
    moments = jax.eval_shape(lambda v, x: model.apply(v, x, method="encode"), variables, images)
    assert moments.mean.shape == moments.log_variance.shape == (2, 8, 6, 16)
    assert moments.mean.dtype == moments.log_variance.dtype == jnp.float32
    decoded = jax.eval_shape(lambda v, x: model.apply(v, x, method="decode"), variables, moments.mean)
    assert (decoded.shape, decoded.dtype) == (images.shape, jnp.float32)


def test_log_variance_is_held_between_minus_30_and_20():
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), init_shapes(NARROW))
    bias = np.array([1, 2, 3, 4, -100, -7, 7, 100], np.float32)
    params["encoder"]["conv_out"]["bias"] = bias  # with all else zero, this is what the encoder gives
    encode = jax.jit(lambda x: make_autoencoder(NARROW).apply({"params": params}, x, method="encode"))
    moments = encode(np.zeros((1, 4, 4, 3), np.float32))
    np.testing.assert_array_equal(moments.mean[0, 0, 0], [1, 2, 3, 4])
    np.testing.assert_array_equal(moments.log_variance[0, 0, 0], [-30, -7, 7, 20])


def test_sampling_follows_the_posterior_and_normalises():
    config = AutoencoderConfig()
    shape = (1, 64, 64, 16)
    moments = Moments(mean=jnp.full(shape, 0.5), log_variance=jnp.full(shape, 2 * math.log(0.25)))
    np.testing.assert_allclose(sample_latents(moments, None, config), (0.5 - 0.0609) * 1.5305, rtol=1e-6)
    draws = np.asarray(sample_latents(moments, jax.random.key(0), config), np.float64)
    # 65,536 draws: the mean is known to 0.0015 and the deviation to 0.0011 (one standard error).
    assert draws.mean() == pytest.approx((0.5 - 0.0609) * 1.5305, abs=0.006)
    assert draws.std() == pytest.approx(0.25 * 1.5305, abs=0.005)
    raw = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    np.testing.assert_allclose(denormalize(normalize(raw, config), config), raw, atol=1e-6)


def test_space_to_depth_is_exactly_invertible():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)
    model = make_autoencoder(TINY)
    assert model.init(jax.random.key(0), images) == {}
    moments = model.apply({"params": {}}, images, method="encode")
    assert moments.mean.shape == (2, 2, 3, 48)
    assert np.all(moments.log_variance == -30)
    # One latent is one 4 x 4 square of pixels, row by row.
    np.testing.assert_array_equal(moments.mean[1, 1, 2], images[1, 4:8, 8:12].reshape(48))
    latents = sample_latents(moments, None, TINY)
    decoded = model.apply({"params": {}}, denormalize(latents, TINY), method="decode")
    np.testing.assert_array_equal(decoded, images)


def test_space_to_depth_latents_of_ramps_have_about_unit_variance():
    # Colours spread evenly over [-1, 1], as a colourful picture's are: their deviation is 1 / sqrt(3).
    ramp = np.linspace(-1, 1, 64, dtype=np.float32)
    red, green = np.meshgrid(ramp, ramp)
    images = np.stack([red, green, -red], axis=-1)[None]
    latents = sample_latents(make_autoencoder(TINY).apply({}, images, method="encode"), None, TINY)
    assert np.std(latents) == pytest.approx(2 / math.sqrt(3), rel=0.05)


def test_bad_configs_and_sizes_are_refused_with_the_numbers():
    replace = dataclasses.replace
    with pytest.raises(ValueError, match="unknown autoencoder kind 'vq'"):
        make_autoencoder(replace(TINY, kind="vq"))
    with pytest.raises(ValueError, match="latent_channels is 47, expected .* 48"):
        make_autoencoder(replace(TINY, latent_channels=47))
    with pytest.raises(ValueError, match="downsample_factor is 4, but 2 block_widths give 2"):
        make_autoencoder(replace(NARROW, downsample_factor=4))
    for config in (TINY, NARROW):
        with pytest.raises(ValueError, match="multiples of"):
            jax.eval_shape(make_autoencoder(config).init, jax.random.key(0), jnp.zeros((1, 9, 8, 3)))
    with pytest.raises(ValueError, match=r"latents have shape .* width, 48\]"):
        make_autoencoder(TINY).apply({}, jnp.zeros((1, 2, 2, 16)), method="decode")
