"""Export: what PyTorch's own classes load strictly, and what comes back is what went in."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from unialign_jax import bundle
from unialign_jax.conversion.exporting import bundle_from_run, export
from unialign_jax.conversion.importing import convert_sd3, convert_unialign
from unialign_jax.models.mmdit import AlignmentHeads, MMDiT


@pytest.fixture(scope="module")
def sd3_bundle(sd3_folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles") / "sd3"
    convert_sd3(sd3_folder, directory)
    return directory


@pytest.fixture(scope="module")
def released_bundle(released_folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles") / "released"
    convert_unialign(released_folder, directory)
    return directory


def assert_same_bundles(a, b):
    (config_a, params_a), (config_b, params_b) = bundle.load(a), bundle.load(b)
    assert dataclasses.replace(config_a, provenance={}) == dataclasses.replace(config_b, provenance={})
    jax.tree.map(np.testing.assert_array_equal, params_a, params_b)


def differing(before, after):
    assert before.keys() == after.keys()
    return {
        key for key in before if before[key].dtype != after[key].dtype or not np.array_equal(before[key], after[key])
    }


def test_the_release_comes_back_bit_for_bit(released_folder, released_bundle, tmp_path):
    config, _ = bundle.load(released_bundle)
    assert (config.heads.hidden_width, config.heads.teacher_width, config.heads.final_silu) == (20, 12, True)
    assert export(tmp_path / "out", format="unialign", source=released_bundle) == []
    name = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(released_folder / name), load_file(tmp_path / "out" / name)
    assert differing(before, after) <= {"pos_embed.pos_embed", "null_image_embd"}
    np.testing.assert_allclose(after["pos_embed.pos_embed"], before["pos_embed.pos_embed"], atol=1e-6)
    name = "vae/diffusion_pytorch_model.safetensors"
    assert differing(load_file(released_folder / name), load_file(tmp_path / "out" / name)) == set()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ]
    convert_unialign(tmp_path / "out", tmp_path / "again")
    assert_same_bundles(released_bundle, tmp_path / "again")


def test_pytorch_loads_the_export_strictly(torch_models, released_model, released_bundle, tmp_path):
    import diffusers
    import torch
    import transformers

    export(tmp_path / "out", format="unialign", source=released_bundle)
    path = tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"
    tensors = {key: torch.from_numpy(value) for key, value in load_file(path).items()}
    fresh = copy.deepcopy(released_model)
    fresh.load_state_dict(tensors, strict=True)
    vae, info = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out/vae", output_loading_info=True)
    assert not any(info.values()) and vae.config.shift_factor == 0.0609
    t5, info = transformers.T5EncoderModel.from_pretrained(tmp_path / "out/text_encoder", output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(t5(ids).last_hidden_state, torch_models.t5(ids).last_hidden_state)


def test_the_released_models_heads_and_logits_are_pytorchs(released_model, released_bundle):
    import torch

    config, params = bundle.load(released_bundle, components=["transformer", "heads"])
    tap = np.random.default_rng(0).standard_normal((2, 5, config.transformer.width)).astype(np.float32)
    image, text = AlignmentHeads(config.heads).apply({"params": params["heads"]}, tap, tap)
    with torch.no_grad():
        pooled = torch.from_numpy(tap).mean(1)
        for found, adapter in ((image, released_model.siglip_adapter_img), (text, released_model.siglip_adapter_text)):
            np.testing.assert_allclose(found, adapter.fc(pooled).numpy(), rtol=1e-5, atol=1e-5)
        logits = released_model.text_proj_out(torch.from_numpy(tap)).numpy()
    head = params["transformer"]["text_head"]
    np.testing.assert_allclose(tap @ np.asarray(head["kernel"]) + head["bias"], logits, rtol=1e-4, atol=1e-4)


def test_a_file_without_adapters_has_no_heads(dual_file, tmp_path):
    """DualDiffusion's, whose architecture follows from its shapes alone."""
    convert_unialign(dual_file, tmp_path / "dual", components=["transformer"])
    config = bundle.read_config(tmp_path / "dual")
    assert config.components == ("transformer",)
    assert (config.transformer.depth, config.transformer.num_heads, config.transformer.base_patches) == (3, 2, 8)
    convert_unialign(dual_file, tmp_path / "new", components=["transformer"], heads=True)
    config, params = bundle.load(tmp_path / "new", components=["heads"])
    kernel = np.asarray(params["heads"]["image_hidden"]["kernel"])
    limit = np.sqrt(6 / sum(kernel.shape))
    assert 0.99 * limit < np.abs(kernel).max() <= limit and not np.any(params["heads"]["image_hidden"]["bias"])
    assert not config.heads.final_silu


@pytest.mark.parametrize("format", ["diffusers", "stability"])
def test_sd3_comes_back_but_for_the_pooled_embedding(format, sd3_folder, sd3_file, sd3_bundle, tmp_path):
    output = tmp_path / ("out" if format == "diffusers" else "out.safetensors")
    lost = export(output, format=format, source=sd3_bundle)
    assert lost[0] == "the text head (captions and answers)"
    if format == "diffusers":
        name = "transformer/diffusion_pytorch_model.safetensors"
        before, after = load_file(sd3_folder / name), load_file(output / name)
        pooled, time = "time_text_embed.text_embedder.", "time_text_embed.timestep_embedder.linear_2.bias"
        positions = "pos_embed.pos_embed"
    else:
        before, after = load_file(sd3_file), load_file(output)
        before = {key: value for key, value in before.items() if "clip" not in key and "embed_tokens" not in key}
        after = {key: value for key, value in after.items() if "embed_tokens" not in key}
        pooled, time = "model.diffusion_model.y_embedder.", "model.diffusion_model.t_embedder.mlp.2.bias"
        positions = "model.diffusion_model.pos_embed"
    changed = differing(before, after)
    assert {key for key in changed if not key.startswith(pooled)} <= {time, positions}
    assert not any(np.any(value) for key, value in after.items() if key.startswith(pooled))


def test_a_trained_models_images_are_those_of_its_diffusers_export(sd3_bundle, tmp_path):
    """Every parameter moved, the last text half's too, which the SD3 layout leaves out."""
    import diffusers
    import torch

    config, params = bundle.load(sd3_bundle, components=["transformer"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(x) + 0.02 * rng.standard_normal(x.shape).astype(np.float32), params)
    trained = dataclasses.replace(config, text_encoder=None, autoencoder=None)
    bundle.save(tmp_path / "trained", trained, params)
    export(tmp_path / "out", format="diffusers", source=tmp_path / "trained")
    model, info = diffusers.SD3Transformer2DModel.from_pretrained(
        tmp_path / "out/transformer", output_loading_info=True
    )
    assert not any(info.values())
    latents = rng.standard_normal((1, 6, 12, 4)).astype(np.float32)
    text = rng.standard_normal((1, 7, 24)).astype(np.float32)
    sigma = np.array([0.3], np.float32)
    with torch.no_grad():
        expected = model.eval()(
            hidden_states=torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()),
            encoder_hidden_states=torch.from_numpy(text),
            pooled_projections=torch.randn(1, 2048),  # whatever is pooled, it adds nothing
            timestep=1000 * torch.from_numpy(sigma),
        ).sample.numpy()
    module = MMDiT(dataclasses.replace(config.transformer, dtype="float32"))
    found = module.apply({"params": params["transformer"]}, latents, text, sigma).velocity
    np.testing.assert_allclose(found, expected.transpose(0, 2, 3, 1), rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_another_dtype_is_written_rounded(sd3_bundle, tmp_path):
    export(
        tmp_path / "half.safetensors",
        format="stability",
        source=sd3_bundle,
        dtype="float16",
        components=["transformer"],
    )
    export(tmp_path / "full.safetensors", format="stability", source=sd3_bundle, components=["transformer"])
    half, full = load_file(tmp_path / "half.safetensors"), load_file(tmp_path / "full.safetensors")
    assert {value.dtype for value in half.values()} == {np.dtype("float16")}
    for key, value in full.items():
        np.testing.assert_array_equal(half[key], value.astype(np.float16))


def test_what_is_there_is_not_overwritten_unasked(sd3_bundle, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="give --overwrite"):
        export(tmp_path / "out", format="diffusers", source=sd3_bundle)
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="holds mine.txt, which no export wrote"):
        export(tmp_path / "out", format="diffusers", source=sd3_bundle, overwrite=True)
    with pytest.raises(ValueError, match="ends in .safetensors"):
        export(tmp_path / "single", format="stability", source=sd3_bundle)
    with pytest.raises(ValueError, match="unknown format 'gguf'"):
        export(tmp_path / "x", format="gguf", source=sd3_bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_runs_newest_checkpoint_is_exported(weights, run, tmp_path):
    workdir, state = run
    export(tmp_path / "out", format="unialign", run=workdir, weights=weights)
    found = load_file(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors")
    if weights == "ema":
        expected = state.ema["text_head"]
    else:
        expected = jax.tree.map(lambda x: x + 12, state.params["transformer"]["text_head"])
    np.testing.assert_array_equal(found["text_proj_out.weight"], np.asarray(expected["kernel"]).T)
    np.testing.assert_array_equal(
        found["siglip_adapter_img.fc.0.weight"], np.asarray(state.params["heads"]["image_hidden"]["kernel"]).T
    )
    with pytest.raises(FileNotFoundError, match="no run's folder"):
        export(tmp_path / "other", format="unialign", run=tmp_path)


def test_a_run_becomes_a_bundle_with_given_encoders(run, tiny_bundle, tmp_path):
    workdir, state = run
    bundle_from_run(tmp_path / "out", workdir, weights="ema", source=tiny_bundle, dtype="bfloat16")
    config, params = bundle.load(tmp_path / "out")
    assert config.components == ("transformer", "heads", "text_encoder", "autoencoder")
    rounded = jax.tree.map(lambda x: x.astype("bfloat16"), state.ema)
    jax.tree.map(np.testing.assert_array_equal, params["transformer"], rounded)
    _, expected = bundle.load(tiny_bundle, components=["text_encoder", "autoencoder"])
    for name, tree in expected.items():
        jax.tree.map(np.testing.assert_array_equal, params[name], tree)
    settings = json.loads((workdir / "config.json").read_text())
    assert (config.image_size, config.text_length) == (settings["image_size"], settings["text_length"])
    assert config.provenance["step"] == 12 and config.provenance["frozen_from"] == "tiny"
    assert (tmp_path / "out/tokenizer/tokenizer.json").is_file()
