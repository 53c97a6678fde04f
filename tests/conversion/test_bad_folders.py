"""Folders made to harm or put together clumsily: JSON of any kind, links, indices, tokenizers that bring code."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from unialign_jax import bundle, bundle_config
from unialign_jax.conversion import importing, sources
from unialign_jax.conversion.importing import convert
from unialign_jax.conversion.teacher import config_from_qwen, preprocessor_settings
from unialign_jax.data.tokenizer import load_tokenizer

bad_input = pytest.mark.bad_input
EVIL = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nclass Evil: pass\n"


# config.json and indices, of the wrong type or depth

WRONG_JSON = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "text": b'"config"',
    "cut short": b'{"num_layers": 3',
    "not UTF-8": b"\xff\xfe{}",
    "deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "a number of 5,000 digits": b'{"num_layers": ' + b"9" * 5000 + b"}",
}


@bad_input
@pytest.mark.parametrize("case", WRONG_JSON)
def test_a_config_that_is_no_json_object(case, tmp_path, refuses):
    (tmp_path / "config.json").write_bytes(WRONG_JSON[case])
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    refuses(lambda: sources.open_part(tmp_path), str(tmp_path / "config.json"))


@bad_input
@pytest.mark.parametrize("case", [*WRONG_JSON, "no map", "an empty map", "a map of lists", "a map that is text"])
def test_an_index_that_is_none(case, tmp_path, refuses):
    more = {"no map": {}, "an empty map": {}, "a map of lists": {"a": ["x"]}, "a map that is text": "x"}
    content = {"weight_map": more[case]} if case in more else None
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(WRONG_JSON.get(case) or json.dumps({} if case == "no map" else content).encode())
    refuses(lambda: sources.read_tensors(tmp_path), str(path))


@bad_input
@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "", "a\0b", 3]
)
def test_an_index_that_names_files_elsewhere(name, tmp_path, refuses):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for file in (tmp_path / "model.safetensors", folder / "sub/model.safetensors"):
        save_file({"x": np.zeros(1)}, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    refuses(
        lambda: sources.read_tensors(folder), "index.json says that 'x' lies in", "expected a file beside the index"
    )


@bad_input
def test_shards_that_contradict_each_other(tmp_path, refuses):
    for i in (1, 2):
        save_file({"x": np.full(1, i)}, tmp_path / f"model-{i:05d}-of-00002.safetensors")
    refuses(lambda: sources.read_tensors(tmp_path), "both hold x")
    save_file({"y": np.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"x": "model-00002-of-00002.safetensors", "y": "model-00001-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refuses(lambda: sources.read_tensors(tmp_path), "names 2 tensors that its shards do not hold: x, y")


@bad_input
def test_a_name_that_calls_for_a_hundred_thousand_shards(tmp_path, refuses):
    save_file({"x": np.zeros(1)}, tmp_path / "model-00001-of-99999.safetensors")
    refuses(lambda: sources.read_tensors(tmp_path), "calls for 99,999 shards")


@bad_input
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "loop"])
def test_what_is_not_a_file(kind, tmp_path, refuses):
    path = tmp_path / "config.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("config.json" if kind == "loop" else "nowhere")
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    refuses(lambda: sources.open_part(tmp_path), str(path))


# Settings that fit no model

SETTINGS = [
    ("transformer", "attention_head_dim", value) for value in ("64", 0, -64, 64.0, True, [64], {}, 48, 1, 2**70)
] + [
    ("transformer", "sample_size", 0),
    ("transformer", "sample_size", "128"),
    ("transformer", "sample_size", 1),
    ("transformer", "sample_size", 8),  # another positional table
    ("transformer", "pos_embed_max_size", []),
    ("transformer", "pos_embed_max_size", -1),
    ("transformer", "num_layers", "3"),
    ("transformer", "num_attention_heads", 3),
    ("transformer", "in_channels", 16),
    ("transformer", "joint_attention_dim", 4096),
    ("vae", "scaling_factor", "1.5"),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", float("nan")),
    ("vae", "scaling_factor", -1.5),
    ("vae", "scaling_factor", 10**400),
    ("vae", "shift_factor", []),
    ("vae", "shift_factor", float("inf")),
    ("vae", "norm_num_groups", 0),
    ("vae", "norm_num_groups", 7),
    ("vae", "norm_num_groups", "4"),
    ("text_encoder_3", "relative_attention_max_distance", 0),
    ("text_encoder_3", "relative_attention_max_distance", 2),
    ("text_encoder_3", "relative_attention_max_distance", "128"),
    ("text_encoder_3", "layer_norm_epsilon", 1e-5),
    ("text_encoder_3", "layer_norm_epsilon", "1e-6"),
]


@bad_input
@pytest.mark.parametrize("part, key, value", SETTINGS)
def test_a_setting_that_fits_no_model(part, key, value, sd3_folder, tmp_path, refuses):
    component = {"transformer": "transformer", "vae": "autoencoder", "text_encoder_3": "text_encoder"}[part]
    folder = tmp_path / part
    folder.mkdir()
    for file in (sd3_folder / part).iterdir():
        (folder / file.name).symlink_to(file)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(settings | {key: value}))
    options = {"components": [component], "tokenizer": sd3_folder / "tokenizer_3"}
    refuses(lambda: convert("sd3", folder, tmp_path / "out", **options), part)
    assert not (tmp_path / "out").exists()


# Tensors that fit no model

SHAPES = [
    ("transformer", "pos_embed.proj.weight", (128,)),
    ("transformer", "pos_embed.proj.weight", (128, 4, 2, 3)),
    ("transformer", "context_embedder.weight", ()),
    ("transformer", "context_embedder.weight", (128, 24, 1)),
    ("transformer", "transformer_blocks.0.ff.net.0.proj.weight", (512,)),
    ("transformer", "transformer_blocks.0.ff.net.0.proj.weight", (500, 128)),
    ("transformer", "transformer_blocks.999999.ff.net.0.proj.weight", (4, 4)),
    ("transformer", "transformer_blocks.99999999999999999999.x", (1,)),
    ("transformer", "transformer_blocks.x.y", (1,)),
    ("transformer", "pos_embed.pos_embed", (1,)),
    ("transformer", "pos_embed.pos_embed", (1, 7, 128)),
    ("vae", "decoder.conv_in.weight", (16,)),
    ("vae", "encoder.down_blocks.0.resnets.0.conv1.weight", ()),
    ("vae", "encoder.down_blocks.0.resnets.0.conv1.weight", (7, 8, 3, 3)),
    ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q.weight", (24,)),
    ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.q.weight", (25, 24)),
    ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32,)),
    ("text_encoder_3", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (1, 3)),
    ("text_encoder_3", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", (2, 2, 2)),
    ("text_encoder_3", "encoder.block.123456.layer.0.layer_norm.weight", (1,)),
    ("text_encoder_3", "encoder.block..layer", (1,)),
    ("text_encoder_3", "shared.weight", (5,)),
]


@bad_input
@pytest.mark.parametrize("part, key, shape", SHAPES)
def test_a_tensor_that_fits_no_model(part, key, shape, sd3_folder, tmp_path, refuses):
    component = {"transformer": "transformer", "vae": "autoencoder", "text_encoder_3": "text_encoder"}[part]
    folder = tmp_path / part
    folder.mkdir()
    shutil.copy(sd3_folder / part / "config.json", folder)
    tensors = {k: v for file in (sd3_folder / part).glob("*.safetensors") for k, v in load_file(file).items()}
    save_file(tensors | {key: np.ones(shape, np.float32)}, folder / "model.safetensors")
    options = {"components": [component], "tokenizer": sd3_folder / "tokenizer_3"}
    refuses(lambda: convert("sd3", folder, tmp_path / "out", **options), part)
    assert not (tmp_path / "out").exists()


QWEN = {"model_type": "qwen2_5_vl", "vision_config": {"depth": 2, "fullatt_block_indexes": [1]}}


@bad_input
@pytest.mark.parametrize(
    "change, preprocessor",
    [
        ({"model_type": ["qwen2_5_vl"]}, {}),
        ({"vision_config": None}, {}),
        ({"vision_config": [1]}, {}),
        ({"vision_config": {"depth": "32"}}, {}),
        ({"vision_config": {"depth": 10**9}}, {}),
        ({"vision_config": {"hidden_size": 0}}, {}),
        ({"vision_config": {"hidden_size": 30}}, {}),
        ({"vision_config": {"num_heads": 2.0}}, {}),
        ({"vision_config": {"fullatt_block_indexes": "7"}}, {}),
        ({"vision_config": {"fullatt_block_indexes": [99]}}, {}),
        ({"vision_config": {"fullatt_block_indexes": [True]}}, {}),
        ({"vision_config": {"rope_parameters": 3}}, {}),
        ({"vision_config": {"rope_parameters": {"rope_theta": "10000"}}}, {}),
        ({"vision_config": {"window_size": 1}}, {}),
        ({"vision_config": {"hidden_act": {"a": 1}}}, {}),
        ({"text_config": "x"}, {}),
        ({"vocab_size": -1}, {}),
        ({"hidden_size": "3584"}, {}),
        ({}, {"image_mean": 0.5}),
        ({}, {"image_mean": [0.5, 0.5, 0.5]}),
        ({}, {"image_std": None}),
        ({}, {"size": [1, 2]}),
        ({}, {"min_pixels": "3136"}),
        ({}, {"min_pixels": 10**6, "max_pixels": 10**3}),
    ],
)
def test_a_teachers_config_that_is_none(change, preprocessor, refuses):
    # The published sizes, but for what is changed.
    refuses(lambda: config_from_qwen(QWEN | change, preprocessor, "qwen/config.json"), "qwen/config.json")


@bad_input
@pytest.mark.parametrize("content", [b"[]", b"{", b'{"image_processor": 3}'])
def test_a_teachers_preprocessor_that_is_none(content, tmp_path, refuses):
    (tmp_path / "processor_config.json").write_bytes(content)
    refuses(lambda: preprocessor_settings(tmp_path), "processor_config.json")


@bad_input
@pytest.mark.parametrize(
    "teacher",
    [
        3,
        [],
        {"depth": "2"},
        {"depth": 10**7},
        {"width": 0},
        {"width": 30},
        {"patch_size": None},
        {"window_size": 0},
        {"full_attention_layers": [99]},
        {"full_attention_layers": 3},
        {"full_attention_layers": [[1]]},
        {"dtype": 3},
        {"colour": "red"},
    ],
)
def test_a_teachers_folder_with_a_wrong_architecture(teacher, tmp_path, refuses):
    content = {"format": bundle_config.FORMAT, "version": bundle_config.VERSION, "teacher": teacher}
    (tmp_path / "config.json").write_text(json.dumps(content))
    refuses(lambda: bundle.load(tmp_path), str(tmp_path))


# Tokenizers


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A tokenizer's folder that brings code, answers "y" to every question, and a function that says if it ran."""
    folder, marker = tmp_path / "hostile", tmp_path / "ran"
    load_tokenizer().save(folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "t5", "auto_map": {"AutoConfig": "evil.Evil"}})
    )
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", answers)
    yield folder
    assert not marker.exists(), "the folder's code was run"
    assert answers.tell() == 0, "a question was asked"


def test_a_tokenizers_code_is_never_run(hostile):
    assert load_tokenizer(hostile).encode("a red star", 6).tolist() == load_tokenizer().encode("a red star", 6).tolist()


@bad_input
def test_a_sentencepiece_folders_code_is_never_run(hostile, refuses):
    pytest.importorskip("sentencepiece")
    (hostile / "tokenizer.json").unlink()
    (hostile / "spiece.model").write_bytes(b"not a model")
    refuses(lambda: load_tokenizer(hostile), "spiece.model cannot be read")


def test_a_bundles_or_runs_tokenizers_code_is_never_run(hostile, released_folder, tmp_path):
    """Neither when converting, nor when the bundle's tokenizer is loaded, nor when it is exported."""
    from unialign_jax.conversion import exporting

    options = {"components": ["text_encoder"], "tokenizer": hostile}
    convert("unialign", released_folder, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle/tokenizer/evil.py").exists()
    shutil.copy(hostile / "evil.py", tmp_path / "bundle/tokenizer")
    load_tokenizer(bundle.tokenizer_path(tmp_path / "bundle"))
    exporting.export(tmp_path / "out", format="unialign", source=tmp_path / "bundle")
    names = {path.name for path in (tmp_path / "out/tokenizer").iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert "auto_map" not in (tmp_path / "out/tokenizer/tokenizer_config.json").read_text()


WRONG_TOKENIZERS = {
    **WRONG_JSON,
    "another kind": b'{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}',
    "no model": b'{"version": "1.0"}',
    "an unknown model": b'{"model": {"type": "Evil"}}',
    "a vocabulary of text": b'{"model": {"type": "Unigram", "unk_id": 0, "vocab": "abc"}}',
    "an unknown id beyond": b'{"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}}',
}


@bad_input
@pytest.mark.parametrize("case", WRONG_TOKENIZERS)
def test_a_tokenizer_file_that_is_none(case, tmp_path, refuses):
    (tmp_path / "tokenizer.json").write_bytes(WRONG_TOKENIZERS[case])
    refuses(lambda: load_tokenizer(tmp_path), str(tmp_path / "tokenizer.json"))


@bad_input
@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to nothing", "gigabytes"])
def test_a_tokenizer_file_that_is_no_file(name, kind, tmp_path, refuses):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "gigabytes":
        path.touch()
        os.truncate(path, 2**33)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    refuses(lambda: load_tokenizer(tmp_path), str(path))


@bad_input
def test_a_file_given_as_tokenizer(tmp_path, refuses):
    (tmp_path / "tokenizer.json").write_text("{}")
    refuses(lambda: load_tokenizer(tmp_path / "tokenizer.json"), "is a file, expected the folder")
    refuses(lambda: load_tokenizer(tmp_path / "nowhere"), "holds no tokenizer")


# Links


@bad_input
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model"])
@pytest.mark.parametrize("given", [False, True])
def test_a_tokenizers_link_to_a_file_elsewhere_is_not_followed(name, given, released_folder, tmp_path, refuses):
    folder = tmp_path / "release"
    shutil.copytree(released_folder, folder, copy_function=os.symlink, symlinks=True)
    shutil.rmtree(folder / "tokenizer")
    load_tokenizer().save(folder / "tokenizer")
    (tmp_path / "secret").write_text("password")
    (folder / "tokenizer" / name).unlink(missing_ok=True)
    (folder / "tokenizer" / name).symlink_to("../../secret")
    options = {"tokenizer": folder / "tokenizer"} if given else {}
    message = refuses(lambda: convert("unialign", folder, tmp_path / "out", **options), name, "is a link out of")
    assert "password" not in message and not (tmp_path / "out").exists()


@bad_input
def test_a_tokenizers_folder_that_is_a_link_elsewhere(released_folder, tmp_path, refuses):
    """From a download it is refused; given by the user's own hand it is read."""
    folder = tmp_path / "release"
    shutil.copytree(released_folder, folder, copy_function=os.symlink)
    shutil.rmtree(folder / "tokenizer")
    load_tokenizer().save(tmp_path / "mine")
    (folder / "tokenizer").symlink_to("../mine")
    refuses(lambda: sources.open_source(folder, ["text_encoder"]), "is a link out of")
    shutil.rmtree(folder / "vae")
    (folder / "tokenizer").unlink()
    (tmp_path / "link").symlink_to("mine")
    sources.check_tokenizer(tmp_path / "link", tmp_path / "link")


def test_a_snapshot_in_hugging_faces_cache_is_read(released_folder, tmp_path):
    """There every file is a link into the blobs of the same model, and of no other."""
    cache = tmp_path / "models--glimmer16--UniAlignment"
    snapshot = cache / "snapshots" / "0123abcd"
    for i, file in enumerate(sorted(path for path in released_folder.rglob("*") if path.is_file())):
        blob = cache / "blobs" / f"{i:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(released_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    source = sources.open_source(snapshot)
    assert source.tokenizer == snapshot / "tokenizer"
    assert set(source.parts) == {"transformer", "text_encoder", "autoencoder"}
    sources.check_tokenizer(snapshot / "tokenizer", snapshot / "tokenizer")
    other = tmp_path / "models--other" / "blobs" / "0"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    (snapshot / "tokenizer/tokenizer_config.json").symlink_to(other)
    with pytest.raises(ValueError, match="is a link out of"):
        sources.open_source(snapshot)


# PyTorch's own checkpoints as sources


def test_a_trainers_pth_gives_what_its_safetensors_gives(dual_file, tmp_path):
    """DualDiffusion's trainers write {key: tensor} as consolidated.00-of-01.pth: the bundles are the same."""
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(value) for key, value in load_file(dual_file).items()}
    key = "transformer_blocks.1.attn.to_q.weight"
    tensors[key] = tensors[key].T.contiguous().T  # in another order in memory
    path = tmp_path / "consolidated.00-of-01.pth"
    torch.save(torch.nn.Module.state_dict(holding(tensors)), path)
    convert("unialign", path, tmp_path / "a", components=["transformer"])
    convert("unialign", dual_file, tmp_path / "b", components=["transformer"])
    config, params = bundle.load(tmp_path / "a")
    _, expected = bundle.load(tmp_path / "b")
    found, expected = flatten_dict(params["transformer"], sep="/"), flatten_dict(expected["transformer"], sep="/")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, name)
    assert config.provenance["files"][0]["sha256"] == bundle.sha256(path)


def holding(tensors):
    """A module whose state dictionary is `tensors`."""
    import torch

    root = torch.nn.Module()
    for key, tensor in tensors.items():
        *parents, name = key.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, torch.nn.Module())
            module = module._modules[parent]
        module.register_buffer(name, tensor) if key == "pos_embed.pos_embed" else setattr(
            module, name, torch.nn.Parameter(tensor)
        )
    return root


@bad_input
@pytest.mark.parametrize("content", ["model", "optimizer", "step", "half"])
def test_another_checkpoint_of_pytorch(content, dual_file, tmp_path, refuses):
    torch = pytest.importorskip("torch")
    tensors = {key: torch.from_numpy(value) for key, value in load_file(dual_file).items() if "blocks" not in key}
    saved = {
        "model": {"model": tensors, "step": 3},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]},
        "step": tensors | {"step": 3},
        "half": tensors,
    }[content]
    torch.save(saved, tmp_path / "x.pth")
    options = {"components": ["transformer"]}
    refuses(lambda: convert("unialign", tmp_path / "x.pth", tmp_path / "out", **options), "x.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


@bad_input
def test_problems_without_number_are_one_line(dual_file, tmp_path, refuses):
    tensors = {
        key: value for key, value in load_file(dual_file).items() if "norm1" not in key and "attn.to_" not in key
    }
    tensors |= {f"lora\n{i}": np.zeros(1, np.float32) for i in range(30)}
    save_file(tensors, tmp_path / "x.safetensors")
    message = refuses(
        lambda: convert("unialign", tmp_path / "x.safetensors", tmp_path / "out", components=["transformer"])
    )
    assert "more" in message and len(message) < 4000
    assert importing.MAX_PROBLEMS < 30
