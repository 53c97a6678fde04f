"""Export: what PyTorch's own classes load strictly, and what comes back is what went in."""

import copy
import dataclasses
import errno
import json
import os
import sys
import types

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from unialign_jax import bundle
from unialign_jax.conversion import exporting, safetensors_file
from unialign_jax.conversion.exporting import bundle_from_run, export
from unialign_jax.conversion.importing import convert
from unialign_jax.conversion.inspecting import inspect
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.diffusion import flow
from unialign_jax.models.mmdit import AlignmentHeads, MMDiT
from unialign_jax.models.text_encoder import TextEncoder
from unialign_jax.training.checkpoints import Checkpoints

bad_input = pytest.mark.bad_input


@pytest.fixture(scope="module")
def sd3_bundle(sd3_folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles") / "sd3"
    convert("sd3", sd3_folder, directory)
    return directory


@pytest.fixture(scope="module")
def released_bundle(released_folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundles") / "released"
    convert("unialign", released_folder, directory)
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


@pytest.mark.slow
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
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"text_encoder", "tokenizer", "transformer", "vae", "scheduler", "model_index.json"}
    convert("unialign", tmp_path / "out", tmp_path / "again")
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
    convert("unialign", dual_file, tmp_path / "dual", components=["transformer"])
    config = bundle.read_config(tmp_path / "dual")
    assert config.components == ("transformer",)
    assert (config.transformer.depth, config.transformer.num_heads, config.transformer.base_patches) == (3, 2, 8)
    convert("unialign", dual_file, tmp_path / "new", components=["transformer"], heads=True)
    config, params = bundle.load(tmp_path / "new", components=["heads"])
    kernel = np.asarray(params["heads"]["image_hidden"]["kernel"])
    limit = np.sqrt(6 / sum(kernel.shape))
    assert 0.99 * limit < np.abs(kernel).max() <= limit and not np.any(params["heads"]["image_hidden"]["bias"])
    assert not config.heads.final_silu


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.fixture
def export_again(sd3_bundle):
    """A function (output, **options) that exports the transformer alone, small and quick."""

    def call(output, format="diffusers", **options):
        return export(output, format=format, source=sd3_bundle, components=["transformer"], **options)

    return call


@bad_input
def test_an_older_export_is_not_overwritten_unasked(export_again, tmp_path, refuses):
    export_again(tmp_path / "out")
    refuses(lambda: export_again(tmp_path / "out"), "exists already", "--overwrite")
    export_again(tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@bad_input
@pytest.mark.parametrize("name", ["mine.txt", "transformer/notes.md", "vae/.hidden", "other/config.json"])
def test_the_users_own_files_are_never_removed(name, export_again, tmp_path, refuses):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).write_text("precious")
    for overwrite in (False, True):
        refuses(lambda overwrite=overwrite: export_again(tmp_path / "out", overwrite=overwrite), name, "not replaced")
    assert (tmp_path / "out" / name).read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@bad_input
@pytest.mark.parametrize(
    "format, output, words",
    [
        ("diffusers", "file", ["is not a folder"]),
        ("unialign", "link", ["is a link", "--output"]),
        ("stability", "single", ["ends in .safetensors"]),
        ("stability", "folder.safetensors", ["ends in .safetensors"]),
        ("stability", "pipe.safetensors", ["is not a file"]),
        ("stability", "there.safetensors", ["exists already", "--overwrite"]),
        ("diffusers", "file/out", ["cannot write", "file/out"]),
        ("stability", "file/out.safetensors", ["cannot write", "file/out.safetensors"]),
        ("gguf", "x", ["unknown format 'gguf'"]),
    ],
)
def test_an_output_that_cannot_be_is_refused_up_front(
    format, output, words, export_again, tmp_path, refuses, monkeypatch
):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "there.safetensors").write_text("precious")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe.safetensors")
    monkeypatch.setattr(exporting, "write_tensors", lambda *_: pytest.fail("it began to write"))
    before = sorted(tmp_path.rglob("*"))
    message = refuses(lambda: export_again(tmp_path / output, format), *words)
    assert "partial" not in message and "Errno" not in message
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("format, name", [("diffusers", "out"), ("stability", "out.safetensors")])
def test_an_export_that_fails_leaves_what_was_there(format, name, export_again, tmp_path, monkeypatch):
    """The older output, and folders of the user with names like those of scratch files."""
    for own in (f"{name}.partial", f"{name}.old"):
        (tmp_path / own).mkdir()
        (tmp_path / own / "mine").write_text("precious")
    export_again(tmp_path / name, format)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write = safetensors_file.Writer.write

    def full(self, key, array):
        if "proj_out" in key or "final_layer" in key:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, key, array)

    monkeypatch.setattr(safetensors_file.Writer, "write", full)
    with pytest.raises(OSError, match="is full; nothing was kept"):
        export_again(tmp_path / name, format, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    export_again(tmp_path / name, format, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, f"{name}.partial", f"{name}.old"])


@pytest.mark.slow
def test_diffusers_own_pipeline_opens_the_export_and_makes_our_latents(sd3_bundle, tmp_path):
    import diffusers
    import torch

    export(tmp_path / "out", format="diffusers", source=sd3_bundle)
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))  # CLIP
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "out", local_files_only=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.text_encoder is None and pipeline.tokenizer_2 is None
    assert pipeline.scheduler.config.shift == 3.0
    ids = pipeline.tokenizer_3(["a red star"], padding="max_length", max_length=12).input_ids
    tokenizer = load_tokenizer()
    assert ids == [tokenizer.encode("a red star", 12).tolist()]  # padded with end-of-text, id 1

    with torch.no_grad():
        text = pipeline.text_encoder_3(torch.tensor(ids))[0]
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    expected = pipeline(
        prompt_embeds=text,
        pooled_prompt_embeds=torch.zeros(1, 2048),
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=3,
        guidance_scale=1.0,
        height=32,
        width=32,
        output_type="latent",
    ).images.numpy()

    config, params = bundle.load(sd3_bundle, components=["transformer", "text_encoder"])
    encoder = TextEncoder(dataclasses.replace(config.text_encoder, dtype="float32"))
    ours = jax.jit(encoder.apply)({"params": params["text_encoder"]}, jax.numpy.asarray(ids))
    np.testing.assert_allclose(ours, text.numpy(), atol=1e-5 * np.abs(text.numpy()).max())
    module = MMDiT(dataclasses.replace(config.transformer, dtype="float32"))
    velocity = jax.jit(
        lambda latents, sigma: module.apply({"params": params["transformer"]}, latents, ours, sigma).velocity
    )
    latents, sigmas = noise, flow.sampling_sigmas(3)
    for now, following in zip(sigmas, sigmas[1:], strict=False):
        latents = latents + (following - now) * velocity(latents, np.full(1, now, np.float32))
    np.testing.assert_allclose(latents, expected.transpose(0, 2, 3, 1), atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_the_released_pipeline_opens_the_export(released_bundle, released_class, tmp_path, monkeypatch):
    """With stand-ins for its two classes, which diffusers finds by the names in model_index.json."""
    import diffusers
    import torch

    class UniAlignmentPipeline(diffusers.DiffusionPipeline):
        def __init__(self, transformer, scheduler, vae, text_encoder, tokenizer):
            super().__init__()
            parts = {"transformer": transformer, "scheduler": scheduler, "vae": vae}
            self.register_modules(**parts, text_encoder=text_encoder, tokenizer=tokenizer)

    module = types.ModuleType("modules.unialignment_model")
    module.SD3JointModelFlexible, module.ModelMixin = released_class, diffusers.ModelMixin
    monkeypatch.setitem(sys.modules, "modules", types.ModuleType("modules"))
    monkeypatch.setitem(sys.modules, "modules.unialignment_model", module)
    export(tmp_path / "out", format="unialign", source=released_bundle)
    index = json.loads((tmp_path / "out/model_index.json").read_text())
    assert index["_class_name"] == "UniAlignmentPipeline"
    assert index["transformer"] == ["modules.unialignment_model", "SD3JointModelFlexible"]
    pipeline = UniAlignmentPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert isinstance(pipeline.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.tokenizer(["a"], padding="max_length", max_length=4).input_ids[0][-2:] == [1, 1]
    assert pipeline.vae.config.latent_channels == 4 and pipeline.text_encoder.config.d_model == 24
    name = tmp_path / "out/transformer/diffusion_pytorch_model.safetensors"
    found, expected = pipeline.transformer.state_dict(), load_file(name)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], torch.from_numpy(value), rtol=0, atol=0)


def test_a_tokenizer_is_exported_without_what_can_run(released_bundle, tmp_path):
    """Of settings that came with it only harmless ones are kept; texts are padded as the models are trained."""
    import transformers

    given = tmp_path / "given"
    load_tokenizer().save(given)
    hostile = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil", "model_max_length": 99}
    added = {"0": {"content": "<pad>", "special": True}, "1": {"content": "</s>", "special": True}}
    (given / "tokenizer_config.json").write_text(
        json.dumps(hostile | {"pad_token": "<pad>", "added_tokens_decoder": added})
    )
    (given / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    exporting.write_tokenizer(tmp_path / "out", given)
    settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert "auto_map" not in settings and settings["tokenizer_class"] == "T5Tokenizer"
    assert settings["model_max_length"] == 99 and settings["pad_token"] == "</s>"
    for kind in (transformers.AutoTokenizer, transformers.T5TokenizerFast):
        tokenizer = kind.from_pretrained(tmp_path / "out", local_files_only=True)
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 1, 2)
        ids = tokenizer(["a red star"], padding="max_length", max_length=9).input_ids[0]
        assert ids == load_tokenizer().encode("a red star", 9).tolist()
        assert len(tokenizer) == load_tokenizer().vocab_size
    assert load_tokenizer(tmp_path / "out").encode("a red star", 9).tolist() == ids


def test_heads_without_the_last_silu_are_said_and_come_back_without(released_bundle, tmp_path):
    config, params = bundle.load(released_bundle, components=["transformer", "heads"])
    heads = dataclasses.replace(config.heads, final_silu=False, pool=False)
    trained = dataclasses.replace(config, heads=heads, text_encoder=None, autoencoder=None)
    bundle.save(tmp_path / "trained", trained, params)
    lines = export(tmp_path / "out", format="unialign", source=tmp_path / "trained")
    assert len(lines) == 2 and "end without a SiLU" in lines[0]
    convert("unialign", tmp_path / "out", tmp_path / "again", components=["transformer"])
    assert bundle.read_config(tmp_path / "again").heads == heads
    settings = json.loads((tmp_path / "out/transformer/config.json").read_text())
    (tmp_path / "out/transformer/config.json").write_text(json.dumps(settings | {"unialign_jax_heads": {"pool": 1}}))
    with pytest.raises(ValueError, match="unialign_jax_heads has pool 1, expected"):
        convert("unialign", tmp_path / "out", tmp_path / "other", components=["transformer"])


@bad_input
@pytest.mark.parametrize("format", ["unialign", "diffusers", "stability"])
def test_text_positions_are_not_lost_unasked(format, positioned_bundle, tmp_path, refuses):
    call = lambda **options: export(tmp_path / "out", format=format, source=positioned_bundle, **options)  # noqa: E731
    refuses(call, "positioned has text positions", format, "--drop-text-positions")
    refuses(lambda: call(components=["transformer"]), "--drop-text-positions")
    assert not list(tmp_path.iterdir())


def test_text_positions_are_dropped_when_asked_and_the_rest_is_as_without(positioned_bundle, tiny_bundle, tmp_path):
    options = {"format": "unialign", "components": ["transformer"]}
    lines = export(tmp_path / "out", source=positioned_bundle, drop_text_positions=True, **options)
    assert lines == ["the text positions, without which images and texts change"]
    assert export(tmp_path / "plain", source=tiny_bundle, **options) == []
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        paths = (tmp_path / folder / "transformer" / name for folder in ("out", "plain"))
        assert len({path.read_bytes() for path in paths}) == 1, name
    convert("unialign", tmp_path / "out", tmp_path / "again", components=["transformer"])
    assert bundle.read_config(tmp_path / "again").transformer.text_positions == 0
    # Other components are none of its business.
    assert export(tmp_path / "t5", format="unialign", source=positioned_bundle, components=["text_encoder"]) == []


@pytest.mark.slow
def test_a_runs_bundle_keeps_its_text_positions(run, tmp_path):
    """Raw and averaged; its captions are then the likeliest, unless it says otherwise."""
    workdir, state = run
    settings = json.loads((workdir / "config.json").read_text())
    settings["model"] |= {"text_positions": 24}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(settings))
    table = np.random.default_rng(0).normal(size=(24, 32)).astype(np.float32)
    transformer = {**state.params["transformer"], "text_positions": table}
    state = state._replace(
        params={**state.params, "transformer": transformer}, ema={**state.ema, "text_positions": table + 1}
    )
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(state, 1)
    checkpoints.close()
    for weights, expected in (("raw", table), ("ema", table + 1)):
        bundle_from_run(tmp_path / weights, tmp_path / "run", weights=weights)
        config, params = bundle.load(tmp_path / weights, components=["transformer"])
        np.testing.assert_array_equal(params["transformer"]["text_positions"], expected)
        assert config.transformer.text_positions == 24
        own = config.sampling_defaults
        assert (own["caption_decoding"], own["caption_temperature"]) == ("top_k", 0)
    assert any('"text_positions": 24' in line for line in inspect(tmp_path / "raw"))
    with pytest.raises(ValueError, match="has text positions, for which unialign has no place"):
        export(tmp_path / "out", format="unialign", run=tmp_path / "run")


@pytest.mark.slow
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


@pytest.mark.slow
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
