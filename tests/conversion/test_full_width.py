"""SD3 at its published width, two blocks deep: file to bundle to velocity and gradient, against diffusers."""

import dataclasses

import jax
import numpy as np
import pytest

from unialign_jax import bundle
from unialign_jax.conversion.importing import convert
from unialign_jax.models.mmdit import MMDiT, MMDiTConfig


def test_velocity_and_gradient_are_sd3s(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    published = dict(
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        in_channels=16,
        out_channels=16,
        patch_size=2,
        pos_embed_max_size=192,
        sample_size=128,
    )
    # Weights of 16 bits, in files of half the size; both sides compute with them in float32.
    model = diffusers.SD3Transformer2DModel(num_layers=2, **published).eval()
    positions = model.pos_embed.pos_embed
    model.to(torch.bfloat16).save_pretrained(tmp_path / "transformer")
    model.float().pos_embed.pos_embed = positions  # which both sides compute
    convert("sd3", tmp_path / "transformer", tmp_path / "bundle", components=["transformer"])
    config, params = bundle.load(tmp_path / "bundle", dtype="float32")
    expected_config = dataclasses.replace(MMDiTConfig(), depth=2, tap_depth=2)
    assert config.transformer == expected_config  # all but the depth is UniAlignment's

    rng = np.random.default_rng(0)
    latents, cotangent = rng.standard_normal((2, 1, 12, 20, 16)).astype(np.float32)
    text = rng.standard_normal((1, 9, 4096)).astype(np.float32)
    sigma = np.array([0.7], np.float32)
    torch_latents = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()).requires_grad_()
    expected = model(
        hidden_states=torch_latents,
        encoder_hidden_states=torch.from_numpy(text),
        pooled_projections=torch.zeros(1, 2048),
        timestep=1000 * torch.from_numpy(sigma),
    ).sample
    expected.backward(torch.from_numpy(cotangent.transpose(0, 3, 1, 2).copy()))

    module = MMDiT(dataclasses.replace(config.transformer, dtype="float32", remat="none"))

    @jax.jit
    def velocity_and_gradient(transformer, latents):
        forward = lambda x: module.apply({"params": transformer}, x, text, sigma).velocity  # noqa: E731
        velocity, pull_back = jax.vjp(forward, latents)
        return velocity, *pull_back(cotangent)

    velocity, gradient = velocity_and_gradient(params["transformer"], latents)
    for found, wanted in ((velocity, expected.detach()), (gradient, torch_latents.grad)):
        wanted = wanted.numpy().transpose(0, 2, 3, 1)
        assert np.abs(np.asarray(found) - wanted).max() <= 1e-5 * np.abs(wanted).max()
