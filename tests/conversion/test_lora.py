"""LoRAs in files: ours in diffusers' SD3, those of diffusers, PEFT and Kohya in ours, and what is refused."""

import copy
import dataclasses
import functools
import json
import logging
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from unialign_jax import Pipeline, bundle
from unialign_jax.conversion import lora as lora_files
from unialign_jax.conversion.importing import convert
from unialign_jax.models import presets
from unialign_jax.models.lora import LoraConfig, adapted, adapters_by_path, init_adapters, targets_of
from unialign_jax.models.mmdit import MMDiT
from unialign_jax.training import base_model
from unialign_jax.training.checkpoints import Checkpoints
from unialign_jax.training.state import TrainState

pytestmark = pytest.mark.slow

ATTENTION = (r"blocks/.*/(qkv|out)/kernel$",)
EVERYTHING = (".*",)


@pytest.fixture(scope="module")
def sd3_bundle(sd3_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    convert("sd3", sd3_folder, folder / "converted")
    config, params = bundle.load(folder / "converted")
    tokenizer = bundle.tokenizer_path(folder / "converted")
    small = dataclasses.replace(config, image_size=64)  # its positions are too few for 512 pixels
    bundle.save(folder / "sd3", small, params, tokenizer=tokenizer)
    return folder / "sd3"


@pytest.fixture(scope="module")
def shapes(sd3_bundle):
    return lora_files.transformer_shapes(bundle.read_config(sd3_bundle), sd3_bundle)


def drawn(tree, seed=0):
    """The tree with every leaf normal, of deviation 0.1."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.1 * generator.normal(size=leaf.shape)).astype(np.float32), tree)


@pytest.fixture(scope="module")
def make_run(sd3_bundle, small_config, tmp_path_factory):
    """A function (targets, dora) -> the folder of a run of random adapters of rank 4, alpha 6, over `sd3_bundle`."""

    @functools.cache
    def make(targets=ATTENTION, dora=False):
        described = bundle.read_config(sd3_bundle)
        config = small_config("finetune")
        config.model = dataclasses.asdict(described.transformer)
        config.text_encoder = dataclasses.asdict(described.text_encoder)
        config.autoencoder = dataclasses.asdict(described.autoencoder)
        config.init_from = config.frozen_from = str(sd3_bundle)
        config.lora.update({"rank": 4, "alpha": 6.0, "targets": targets, "dora": dora})
        abstract = bundle.abstract_params(described, ["transformer"])["transformer"]
        adapters = drawn(init_adapters(LoraConfig.of(config.lora.to_dict()), abstract, jax.random.key(0)))
        workdir = tmp_path_factory.mktemp("run")
        checkpoints = Checkpoints(workdir)
        state = TrainState(jnp.int32(3), {"transformer": adapters}, {}, {"count": jnp.int32(3)})
        checkpoints.save(state, 3)
        checkpoints.close()
        (workdir / "config.json").write_text(config.to_json_best_effort())
        base_model.write_base(base_model.find_base(str(sd3_bundle), "raw", -1), workdir)
        return workdir, adapters

    return make


@pytest.fixture(scope="module")
def inputs():
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((2, 8, 8, 4)).astype(np.float32)
    return latents, generator.standard_normal((2, 7, 24)).astype(np.float32), np.array([0.05, 0.9], np.float32)


@pytest.fixture(scope="module")
def our_velocity(sd3_bundle, inputs):
    """The velocity of a pipeline's transformer, [2, 8, 8, 4]."""
    config = dataclasses.replace(bundle.read_config(sd3_bundle).transformer, dtype="float32")
    apply = jax.jit(MMDiT(config).apply)
    return lambda pipeline: np.asarray(
        apply({"params": pipeline._weights.get("transformer")["transformer"]}, *inputs)[0]
    )


def torch_velocity(model, inputs):
    import torch

    latents, text, sigma = inputs
    with torch.no_grad():
        made = model(
            hidden_states=torch.from_numpy(np.ascontiguousarray(latents.transpose(0, 3, 1, 2))),
            encoder_hidden_states=torch.from_numpy(text),
            pooled_projections=torch.zeros(2, 2048),
            timestep=1000 * torch.from_numpy(sigma),
        )
    return made.sample.numpy().transpose(0, 2, 3, 1)


def assert_same(found, expected, before):
    """Equal to 1e-4 of the largest value, and far from what it was without the adapters."""
    size = np.abs(expected).max()
    assert np.abs(before - expected).max() > 0.05 * size
    np.testing.assert_allclose(found, expected, atol=1e-4 * size, rtol=0)


@pytest.mark.parametrize(("targets", "dora"), [(ATTENTION, False), (EVERYTHING, False), (ATTENTION, True)])
def test_diffusers_makes_our_velocity_with_our_file(
    targets, dora, make_run, torch_models, sd3_bundle, our_velocity, inputs, launch_command, tmp_path, capsys
):
    pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    run, _ = make_run(targets, dora)
    file = tmp_path / "ours.safetensors"
    assert launch_command("convert").main(["export-lora", f"--run={run}", f"--output={file}"]) == 0
    left_out = capsys.readouterr().out
    assert "text/out/kernel, its last block" in left_out and ("text_head" in left_out) == (targets == EVERYTHING)
    model = copy.deepcopy(torch_models.sd3)
    model.load_lora_adapter(load_torch(file), prefix="transformer")
    expected = torch_velocity(model, inputs)
    before = torch_velocity(torch_models.sd3, inputs)
    for source in (run, file):
        pipeline = Pipeline.from_bundle(sd3_bundle)
        pipeline.load_lora(source)
        assert_same(our_velocity(pipeline), expected, before)


def load_torch(file):
    from safetensors.torch import load_file

    return load_file(file)


@pytest.mark.parametrize("settings", [{"r": 4, "lora_alpha": 6}, {"r": 3, "lora_alpha": 4, "use_dora": True}])
def test_a_lora_of_diffusers_makes_its_velocity_here(
    settings, torch_models, sd3_bundle, our_velocity, inputs, tmp_path
):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    import torch

    torch.manual_seed(2)
    model = copy.deepcopy(torch_models.sd3)
    layers = ["attn.to_q", "attn.to_out.0", "attn.add_k_proj", "ff.net.2", "norm_out.linear", "norm1_context.linear"]
    if not settings.get("use_dora"):
        layers.append("pos_embed.proj")
    settings = settings | {"alpha_pattern": {"attn.to_q": 9}}
    model.add_adapter(peft.LoraConfig(target_modules=layers, init_lora_weights=False, **settings))
    model.save_lora_adapter(tmp_path / "diffusers")  # with settings in the file's metadata
    folder = tmp_path / "peft"  # with settings beside the file
    peft_state = peft.get_peft_model_state_dict(model, adapter_name="default")
    folder.mkdir()
    tensors = {f"base_model.model.{key}": np.ascontiguousarray(v.detach().numpy()) for key, v in peft_state.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    expected, before = torch_velocity(model, inputs), torch_velocity(torch_models.sd3, inputs)
    pipeline = Pipeline.from_bundle(sd3_bundle)
    for source in (tmp_path / "diffusers", folder):
        pipeline.load_lora(source, name="it")
        assert_same(our_velocity(pipeline), expected, before)
    pipeline.unload_lora("it")
    assert_same(our_velocity(pipeline), before, expected)


@pytest.mark.parametrize("layout", lora_files.LAYOUTS)
@pytest.mark.parametrize("dora", [False, True])
def test_a_file_changes_the_weights_as_its_run_does(layout, dora, make_run, sd3_bundle, shapes, tmp_path):
    targets = (r"blocks/.*/(qkv|out|modulation)/kernel$", "text_head", "image_head_modulation")
    run, adapters = make_run(targets, dora)
    file = tmp_path / "lora.safetensors"
    lora_files.export_lora(file, run, layout=layout)
    lora = lora_files.open_lora(file, bundle.read_config(sd3_bundle).transformer, shapes)
    expected = adapters_by_path(adapters)
    assert lora.changes.keys() == expected.keys() - ({"text_head/kernel"} if layout != "unialign" else set())
    for path, leaf in bundle.read_leaves(sd3_bundle, "transformer"):
        if path not in lora.changes:
            continue
        changed = adapted(path, leaf, jax.tree.map(np.asarray, expected[path]), 1.5)
        found = lora(path, leaf)
        assert np.isfinite(changed).all() and np.isfinite(found).all()  # where outputs of SD3 have no weights too
        if layout != "unialign" and "/text/" in path and "qkv" not in path:  # SD3's last text half ends earlier
            if "modulation" in path:
                np.testing.assert_allclose(found[-1, :, :2], changed[-1, :, :2], atol=1e-5)
                np.testing.assert_array_equal(found[-1, :, 2:], leaf[-1, :, 2:])
            changed, found = changed[:-1], found[:-1]
        np.testing.assert_allclose(found, changed, atol=2e-5 * np.abs(changed).max(), rtol=0)
        assert np.abs(changed - leaf[: len(changed)]).max() > 0.01


def test_dora_of_outputs_without_weights(sd3_bundle, shapes, tmp_path):
    """Of the last block's text modulation, six parts of which SD3 has two: a norm for zeros leaves zeros."""
    name, magnitude = (
        "transformer.transformer_blocks.2.norm1_context.linear",
        np.linspace(0.5, 1, 768, dtype=np.float32),
    )
    tensors = {f"{name}.lora_A.weight": np.ones((2, 128)), f"{name}.lora_B.weight": np.zeros((768, 2))}
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    save_file(tensors | {f"{name}.lora_magnitude_vector": magnitude}, tmp_path / "dora.safetensors")
    lora = lora_files.open_lora(tmp_path / "dora.safetensors", bundle.read_config(sd3_bundle).transformer, shapes)
    path = "blocks/joint/text/modulation/kernel"
    (leaf,) = [leaf for found, leaf in bundle.read_leaves(sd3_bundle, "transformer") if found == path]
    found = lora(path, leaf)
    np.testing.assert_allclose(np.linalg.norm(found[-1, :, :2], axis=0).ravel(), magnitude[:256], rtol=1e-5)
    assert not leaf[-1, :, 2:].any() and not found[-1, :, 2:].any()  # no NaN, which is true


def test_kohyas_q_k_and_v_are_one_layer_with_the_change_of_three(make_run, tmp_path):
    run, _ = make_run()
    files = {}
    for layout in ("kohya", "diffusers"):
        lora_files.export_lora(tmp_path / f"{layout}.safetensors", run, layout=layout)
        files[layout] = load_file(tmp_path / f"{layout}.safetensors")
    name = "lora_unet_joint_blocks_1_context_block_attn_qkv"
    down, up, alpha = (files["kohya"][f"{name}.{kind}"] for kind in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape == (12, 128) and up.shape == (384, 12) and alpha == 18.0  # 3 x rank 4, 3 x alpha 6
    three = "transformer.transformer_blocks.1.attn.add_{}_proj.lora_{}.weight"
    products = [files["diffusers"][three.format(n, "B")] @ files["diffusers"][three.format(n, "A")] for n in "qkv"]
    np.testing.assert_allclose(alpha / 12 * up @ down, np.concatenate(products), atol=1e-6)


def of_sd_scripts(width, text_width, channels, rank=2):
    """{layer: (down, up, alpha)} as networks/lora_sd3.py of sd-scripts trains it, blocks by default, ends by emb_dims.

    The names are those of Stability's modules with "_" for ".". qkv is one layer; with split_qkv its file has three
    times the rank, and up's parts along a diagonal. The patch embedding is a convolution.
    """
    generator = np.random.default_rng(11)
    normal = lambda *shape: (0.2 * generator.normal(size=shape)).astype(np.float32)  # noqa: E731
    linear = lambda inputs, outputs, alpha: (normal(rank, inputs), normal(outputs, rank), alpha)  # noqa: E731
    split = np.zeros((3 * width, 3 * rank), np.float32)
    for part in range(3):
        split[part * width : (part + 1) * width, part * rank : (part + 1) * rank] = normal(width, rank)
    return {
        "joint_blocks_0_x_block_attn_qkv": linear(width, 3 * width, 1.0),
        "joint_blocks_0_x_block_attn_proj": linear(width, width, 1.0),
        "joint_blocks_0_x_block_mlp_fc1": linear(width, 4 * width, 2.0),
        "joint_blocks_0_x_block_mlp_fc2": linear(4 * width, width, 2.0),
        "joint_blocks_0_x_block_adaLN_modulation_1": linear(width, 6 * width, 4.0),
        "joint_blocks_1_context_block_attn_qkv": (normal(3 * rank, width), split, 3.0),
        "joint_blocks_1_context_block_mlp_fc2": linear(4 * width, width, 1.0),
        "joint_blocks_2_context_block_attn_qkv": linear(width, 3 * width, 1.0),
        "joint_blocks_2_context_block_adaLN_modulation_1": linear(width, 2 * width, 1.0),  # the last has two parts
        "context_embedder": linear(text_width, width, 1.0),
        "t_embedder_mlp_2": linear(width, width, 1.0),
        "x_embedder_proj": (normal(rank, channels, 2, 2), normal(width, rank, 1, 1), 1.0),
        "final_layer_adaLN_modulation_1": linear(width, 2 * width, 1.0),
        "final_layer_linear": linear(width, 4 * channels, 1.0),
    }


def add_to_sd3(model, layers):
    """Adds alpha / rank * up @ down to the weights of diffusers' SD3."""
    import torch

    state = model.state_dict()
    ends = {"context_embedder": "context_embedder", "x_embedder_proj": "pos_embed.proj"}
    ends |= {"t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2", "final_layer_linear": "proj_out"}
    ends["final_layer_adaLN_modulation_1"] = "norm_out.linear"
    x_block = {"attn_proj": "attn.to_out.0", "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2"}
    x_block |= {"adaLN_modulation_1": "norm1.linear"}
    context_block = {"mlp_fc2": "ff_context.net.2", "adaLN_modulation_1": "norm1_context.linear"}
    for layer, (down, up, alpha) in layers.items():
        change = alpha / len(down) * (up.reshape(-1, len(down)) @ down.reshape(len(down), -1))
        match = re.fullmatch(r"joint_blocks_(\d)_(x|context)_block_(\w+)", layer)
        if match and match[3] == "attn_qkv":
            names = [f"to_{part}" if match[2] == "x" else f"add_{part}_proj" for part in "qkv"]
            parts = zip(names, np.split(change, 3), strict=True)
            changes = {f"transformer_blocks.{match[1]}.attn.{name}": part for name, part in parts}
        else:
            block = {"x": x_block, "context": context_block}[match[2]] if match else {}
            name = f"transformer_blocks.{match[1]}.{block[match[3]]}" if match else ends[layer]
            if change.shape[0] == 2 * change.shape[1]:  # Stability has shift and scale, diffusers scale and shift
                change = np.concatenate(np.split(change, 2)[::-1])
            changes = {name: change}
        for name, part in changes.items():
            weight = state[f"{name}.weight"]
            weight += torch.from_numpy(part.reshape(weight.shape))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_file_of_sd_scripts_makes_diffusers_velocity_here(
    dtype, torch_models, sd3_bundle, our_velocity, inputs, tmp_path, caplog
):
    """By hand in the names that sd-scripts gives, with adapters of encoders that are not here."""
    sd3 = torch_models.sd3.config
    width, text_width, channels = sd3.caption_projection_dim, sd3.joint_attention_dim, sd3.in_channels
    layers = of_sd_scripts(width, text_width, channels)
    layers = {
        name: (down.astype(dtype).astype(np.float32), up.astype(dtype).astype(np.float32), alpha)
        for name, (down, up, alpha) in layers.items()
    }
    model = copy.deepcopy(torch_models.sd3)
    add_to_sd3(model, layers)
    layers["y_embedder_mlp_0"] = (np.ones((2, 2048), np.float32), np.ones((width, 2), np.float32), 1.0)
    tensors = {}
    others = ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"]
    others = {name: (np.ones((2, 8)), np.ones((8, 2)), 1.0) for name in others}
    for name, (down, up, alpha) in ({f"lora_unet_{name}": value for name, value in layers.items()} | others).items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down.astype(dtype), up.astype(dtype)
        tensors[f"{name}.alpha"] = np.array(alpha).astype(dtype)  # of shape []
    save_file(tensors, tmp_path / "kohya.safetensors", {"ss_network_module": "networks.lora_sd3"})
    pipeline = Pipeline.from_bundle(sd3_bundle)
    pipeline.load_lora(tmp_path / "kohya.safetensors")
    assert_same(our_velocity(pipeline), torch_velocity(model, inputs), torch_velocity(torch_models.sd3, inputs))
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "6 tensors of adapters of text encoders" in told[0] and "lora_te1_text_model" in told[0]
    assert "3 tensors of adapters of SD3's layers for CLIP's pooled vector" in told[1] and "y_embedder" in told[1]
    assert len(told) == 2


def test_several_loras_add_up_and_merging_is_the_same(make_run, sd3_bundle, tmp_path, launch_command):
    run, adapters = make_run()
    other = tmp_path / "other.safetensors"
    down, up = drawn([np.empty((2, 128)), np.empty((128, 2))], seed=5)
    key = "base_model.model.transformer_blocks.0.attn.to_v"
    save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, other)
    before = bundle.load(sd3_bundle)[1]["transformer"]
    pipeline = Pipeline.from_bundle(sd3_bundle)
    pipeline.load_lora(run, scale=0.5, name="one")
    pipeline.load_lora(other, scale=-2)
    assert pipeline.loras == {"one": 0.5, "other": -2.0}
    path = "blocks/joint/image/qkv/kernel"
    kernel, found = (np.asarray(flatten_dict(tree, sep="/")[path]) for tree in (before, weights(pipeline)))
    adapter = jax.tree.map(np.asarray, adapters_by_path(adapters)[path])
    expected = kernel + 0.5 * (adapted(path, kernel, adapter, 1.5) - kernel)
    expected[0, :, 2] += -2 * (up @ down).T.reshape(128, 2, 64)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    merged = tmp_path / "merged"
    arguments = [f"--bundle={sd3_bundle}", f"--lora={run}:0.5", f"--lora={other}", "--scale=-2", f"--output={merged}"]
    assert launch_command("convert").main(["merge-lora", *arguments]) == 0
    jax.tree.map(np.testing.assert_array_equal, bundle.load(merged)[1]["transformer"], weights(pipeline))
    assert [entry["scale"] for entry in bundle.read_config(merged).provenance["loras"]] == [0.5, -2.0]
    pipeline.unload_lora()
    jax.tree.map(np.testing.assert_array_equal, weights(pipeline), before)


def weights(pipeline):
    return jax.tree.map(np.asarray, pipeline._weights.get("transformer")["transformer"])


def test_quantised_weights_are_changed_before_they_are_rounded(make_run, sd3_bundle, tmp_path):
    run, _ = make_run()
    lora_files.merge_lora(tmp_path / "merged", sd3_bundle, [(run, 1.0)])
    pipeline = Pipeline.from_bundle(sd3_bundle, quantize="int8", low_memory=True)
    pipeline.load()
    pipeline.load_lora(run)
    merged = Pipeline.from_bundle(tmp_path / "merged", quantize="int8")
    jax.tree.map(np.testing.assert_array_equal, weights(pipeline), weights(merged))


def test_rank_16_at_full_size_has_the_parameters_that_arithmetic_says():
    config = presets.MMDIT["unialign_2b"]
    abstract = bundle.abstract_params(bundle.BundleConfig(transformer=config), ["transformer"])["transformer"]
    lora = LoraConfig(rank=16, alpha=16.0, targets=ATTENTION)
    made = jax.eval_shape(lambda: init_adapters(lora, abstract, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(made))
    # 24 blocks of two streams with q, k, v and out, each 1536 to 1536: A and B of 16 x 1536.
    assert count == 24 * 2 * 4 * 2 * 16 * 1536 == 9_437_184
    assert 4 * count == 37_748_736  # bytes in float32: 0.45% of the 8.4 GB of the transformer
    everything = jax.eval_shape(
        lambda: init_adapters(dataclasses.replace(lora, targets=EVERYTHING), abstract, jax.random.key(0))
    )
    width, blocks = 1536, 24 * 2
    sizes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width), (width, 6 * width)]
    ends = [(4096, width), (256, width), (width, width), (width, 2 * width), (width, 64), (width, 32100)]
    expected = 16 * (blocks * sum(a + b for a, b in sizes) + sum(a + b for a, b in ends))
    assert sum(leaf.size for leaf in jax.tree.leaves(everything)) == expected


def test_new_adapters_change_nothing_and_targets_are_patterns():
    config = presets.MMDIT["tiny"]
    shapes = lora_files.transformer_shapes(bundle.BundleConfig(transformer=config), "")
    lora = LoraConfig(rank=2, alpha=2.0, targets=("image/mlp_in", "text_head"), dora=True)
    assert targets_of(lora, shapes) == ["blocks/joint/image/mlp_in/kernel", "text_head/kernel"]
    base = drawn({path: np.empty(shapes[path]) for path in targets_of(lora, shapes)})
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), unflatten_dict(base, sep="/"))
    adapters = adapters_by_path(init_adapters(lora, abstract, jax.random.key(0)))
    for path, kernel in base.items():
        np.testing.assert_allclose(adapted(path, kernel, adapters[path], 1.0), kernel, rtol=1e-6)


# --- Bad inputs ---

LAYER = "transformer.transformer_blocks.0.attn.to_q"


def pair(rank=4, width=128, rank_of_up=None, layer=LAYER):
    up = np.zeros((width, rank_of_up or rank), np.float32)
    return {f"{layer}.lora_A.weight": np.zeros((rank, width), np.float32), f"{layer}.lora_B.weight": up}


BAD = {
    "another model's width": (pair(width=256), ("256", "128", "another model")),
    "another model's layers": (pair(layer="transformer.transformer_blocks.7.attn.to_q"), ("blocks.7", "another")),
    "ranks that do not fit": (pair(rank_of_up=3), ("(4, 128)", "(128, 3)", "rank")),
    "half of it": ({k: v for k, v in pair().items() if "lora_A" in k}, ("only one", "up is missing")),
    "another kind": (pair() | {"lora_unet_x.hada_w1_a": np.zeros((2, 2), np.float32)}, ("hada_w1_a", "LoRA")),
    "text encoders alone": (pair(layer="text_encoder.layers.0.q"), ("no adapters", "text encoders")),
    "not finite": ({k: v + np.nan for k, v in pair().items()}, ("not finite",)),
    "norms of inputs": (pair() | {f"{LAYER}.dora_scale": np.ones((1, 128), np.float32)}, ("(1, 128)", "each input")),
    "a model, not a LoRA": ({"transformer_blocks.0.attn.to_q.weight": np.zeros((4, 4), np.float32)}, ("to_q.weight",)),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line(name, sd3_bundle, tmp_path, refuses):
    tensors, words = BAD[name]
    save_file(tensors, tmp_path / "bad.safetensors")
    pipeline = Pipeline.from_bundle(sd3_bundle)
    refuses(lambda: pipeline.load_lora(tmp_path / "bad.safetensors"), "bad.safetensors", *words)
    assert pipeline.loras == {}


@pytest.mark.bad_input
def test_bad_calls_are_one_line(sd3_bundle, tiny_bundle, make_run, tmp_path, refuses, command_refuses):
    pipeline = Pipeline.from_bundle(sd3_bundle)
    refuses(lambda: pipeline.load_lora(tmp_path / "none.safetensors"), "none.safetensors", "no such file")
    refuses(lambda: pipeline.load_lora(tmp_path), "no safetensors")
    refuses(lambda: pipeline.load_lora(tmp_path, scale=math.nan), "scale", "nan")
    refuses(lambda: pipeline.unload_lora("it"), "'it'", "none")
    run, _ = make_run()
    refuses(lambda: Pipeline.from_bundle(tiny_bundle).load_lora(run), "another model")
    output = tmp_path / "out.safetensors"
    command_refuses("convert", ["export-lora", f"--run={tmp_path}", f"--output={output}"], "no run's folder")
    command_refuses("convert", ["export-lora", f"--run={run}", f"--output={tmp_path / 'out'}"], ".safetensors")
    merge = ["merge-lora", f"--bundle={sd3_bundle}", f"--output={tmp_path / 'merged'}"]
    command_refuses("convert", [*merge, f"--lora={tmp_path / 'none'}"], "no such file")
    command_refuses("convert", [*merge, f"--lora={run}:nan"], "nan")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.bad_input
def test_a_run_whose_base_has_changed_is_refused(make_run, sd3_bundle, tmp_path, refuses):
    import shutil

    run, _ = make_run()
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    base = base_model.read_base(copied)
    base_model.write_base(base._replace(digest="0" * 16), copied)
    refuses(lambda: Pipeline.from_bundle(copied), str(sd3_bundle), "changed since")
    base_model.write_base(base._replace(source=str(tmp_path / "gone")), copied)
    refuses(lambda: Pipeline.from_bundle(copied), "gone", "base.json")
    (copied / "base.json").unlink()
    refuses(lambda: Pipeline.from_bundle(copied), "base.json")
