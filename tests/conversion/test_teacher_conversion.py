"""Qwen2.5-VL folders, as the transformers library writes them, to the teacher's folder and back into memory."""

import dataclasses
import errno
import functools
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from unialign_jax import bundle
from unialign_jax.conversion import safetensors_file
from unialign_jax.conversion.rules import export_tensors
from unialign_jax.conversion.teacher import config_from_qwen, convert_teacher, qwen_table
from unialign_jax.data.tokenizer import load_backend, tokenize
from unialign_jax.models.teacher import TeacherConfig, encode_images, encode_texts
from unialign_jax.parallel import sharding
from unialign_jax.parallel.mesh import make_mesh

WORDS = ("<|endoftext|>", "a", "red", "cat", "sits")
VOCAB_SIZE, WIDTH = 50, 24
IMAGE = np.random.default_rng(0).integers(0, 256, (84, 140, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def qwen():
    """A whole tiny Qwen2.5-VL of the library, bfloat16."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": WIDTH,
            "intermediate_size": 256,  # large enough for shards of its own
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6},
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 28,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        attn_implementation="eager",
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms of one and biases of zero would hide a mistaken rule
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "visual" in name:
                parameter.copy_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module")
def source(qwen, tmp_path_factory):
    """The folder as the library saves it, in several shards under the names of transformers 4."""
    folder = tmp_path_factory.mktemp("qwen")
    qwen.save_pretrained(folder, max_shard_size="20KB")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "teacher"
    convert_teacher(source, output)
    return output


def tensors_of(folder) -> dict:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def copy_with(source, target, *, tensors=None, rename=None, **config):
    """A copy of the folder with one safetensors file, other keys or settings."""
    target.mkdir()
    shutil.copy(source / "tokenizer.json", target)
    content = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    tensors = tensors_of(source) if tensors is None else tensors
    save_file({(rename or str)(key): value for key, value in tensors.items()}, target / "model.safetensors")
    return target


def transformers_5(key):
    if key.startswith("visual."):
        return f"model.{key}"
    return key.replace("model.", "model.language_model.") if key.startswith("model.") else key


def load(directory, **options):
    """The teacher's architecture and parameters."""
    config, params = bundle.load(directory, **options)
    return config.teacher, params["teacher"]


def leaves_equal(one, other):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and bool(np.array_equal(x, y)), one, other))


def test_features_equal_the_transformers_library(qwen, converted):
    """Weights as stored (bfloat16), computed in float32 on both sides, from pixels and words to features."""
    import torch
    from transformers import Qwen2VLImageProcessorPil

    config, params = load(converted, dtype=jnp.float32)
    config = dataclasses.replace(config, dtype="float32")
    inputs = Qwen2VLImageProcessorPil()(images=[IMAGE], return_tensors="pt")  # a size that needs no resizing
    ids, is_token = tokenize(bundle.read_tokenizer(converted, load=load_backend), ["a red cat sits", "cat"])
    model = qwen.float()
    with torch.no_grad():
        image = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.mean(dim=0)
        embeddings = model.get_input_embeddings()
        text = torch.stack([embeddings(torch.tensor(row)).mean(dim=0) for row in ([1, 2, 3, 4], [3])])
    qwen.to(torch.bfloat16)

    found = jax.jit(functools.partial(encode_images, config=config))(params, IMAGE[None])[0]
    np.testing.assert_allclose(found, image, rtol=0, atol=1e-5 * image.abs().max())
    found = encode_texts(params, jnp.asarray(ids), jnp.asarray(is_token))
    np.testing.assert_allclose(found, text, rtol=0, atol=1e-6 * text.abs().max())


def test_every_value_is_kept_in_the_stored_dtype(source, converted):
    """Back through the table, each tensor of the source is bit for bit what the library wrote."""
    config, params = load(converted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    table = qwen_table(config, "transformers 4")
    exported = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        exported |= dict(export_tensors(table, path, np.asarray(leaf)))
    expected = {
        k: v for k, v in tensors_of(source).items() if k.startswith("visual.") or k == "model.embed_tokens.weight"
    }
    assert exported.keys() == expected.keys()
    for key, value in expected.items():
        assert value.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(exported[key], value, err_msg=key)


def test_all_layouts_give_the_same_teacher(source, converted, tmp_path):
    expected = load(converted)
    renamings = {"4": None, "5": transformers_5, "bare": lambda key: key.replace("model.", "language_model.")}
    for name, rename in renamings.items():
        convert_teacher(copy_with(source, tmp_path / name, rename=rename), tmp_path / f"out{name}")
        found = load(tmp_path / f"out{name}")
        assert found[0] == expected[0]
        assert leaves_equal(found[1], expected[1])


def test_only_the_shards_that_are_read_have_to_be_there(source, converted, tmp_path):
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    wanted = {v for k, v in weight_map.items() if k.startswith("visual.") or k == "model.embed_tokens.weight"}
    others = set(weight_map.values()) - wanted
    assert others, "the fixture must have a shard of the language model alone"
    part = shutil.copytree(source, tmp_path / "part")
    for name in others:
        (part / name).unlink()
    convert_teacher(part, tmp_path / "out")
    assert leaves_equal(load(tmp_path / "out")[1], load(converted)[1])
    gone = sorted(wanted)[1]
    (part / gone).unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of the {len(wanted)} shards that .*index.json calls for: {gone}"):
        convert_teacher(part, tmp_path / "out2")


def test_the_folder_says_where_it_came_from_and_notices_changes(source, converted, tmp_path):
    content = json.loads((converted / "config.json").read_text())
    assert content["teacher"]["output_width"] == WIDTH and content["dtypes"] == {"teacher": ["bfloat16"]}
    files = {entry["name"]: entry for entry in content["provenance"]["files"]}
    assert files["config.json"]["sha256"] == bundle.sha256(source / "config.json")
    shard = next(name for name in files if name.endswith(".safetensors"))
    assert files[shard]["size"] == (source / shard).stat().st_size
    assert files[shard]["sha256"] == bundle.sha256(source / shard)
    assert bundle.verify(converted) == []
    changed = shutil.copytree(converted, tmp_path / "changed")
    (changed / "tokenizer" / "tokenizer.json").write_text("{}")
    assert any("tokenizer.json" in line for line in bundle.verify(changed))


def test_loads_onto_a_mesh_in_the_wanted_dtype(converted):
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    found = load(converted, mesh=mesh, dtype=jnp.float32)[1]
    expected = load(converted)[1]
    assert leaves_equal(found, jax.tree.map(lambda x: x.astype(jnp.float32), expected))
    assert len(found["token_embedding"].addressable_shards) == 8
    assert found["token_embedding"].addressable_shards[0].data.shape == (VOCAB_SIZE // 2, WIDTH // 4)
    abstract = bundle.abstract_params(bundle.read_config(converted))
    abstract = sharding.with_shardings(abstract, sharding.tree_shardings(abstract, mesh))
    assert leaves_equal(bundle.restore(converted, abstract)["teacher"], found)
    on_host = dict(bundle.read_leaves(converted, "teacher"))
    np.testing.assert_array_equal(on_host["token_embedding"], expected["token_embedding"])


def test_converts_to_another_dtype_without_torch(source, converted, tmp_path):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from unialign_jax.conversion.teacher import convert_teacher\n"
        f"convert_teacher({str(source)!r}, {str(tmp_path / 'out')!r}, dtype='float32')"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
    found = load(tmp_path / "out")[1]
    assert leaves_equal(found, jax.tree.map(lambda x: x.astype(jnp.float32), load(converted)[1]))


def test_what_goes_wrong_leaves_nothing_behind(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    read, calls = safetensors_file.read_tensor, []

    def full_disk(info):
        calls.append(info)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return read(info)

    monkeypatch.setattr(safetensors_file, "read_tensor", full_disk)
    with pytest.raises(OSError, match="is full; nothing was kept"):
        convert_teacher(source, output)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    convert_teacher(source, output)
    with pytest.raises(FileExistsError, match="exists already"):
        convert_teacher(source, output)
    convert_teacher(source, output, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_damaged_and_foreign_sources_are_refused(source, tmp_path):
    output = tmp_path / "out"

    def refused(folder, error, match):
        with pytest.raises(error, match=match):
            convert_teacher(folder, output)
        assert not output.exists()

    refused(tmp_path / "nowhere", FileNotFoundError, "nowhere is not a folder")
    qwen2 = copy_with(source, tmp_path / "qwen2", model_type="qwen2_vl")
    refused(qwen2, ValueError, "model_type 'qwen2_vl', expected 'qwen2_5_vl'")
    (qwen2 / "config.json").unlink()
    refused(qwen2, FileNotFoundError, "holds no config.json: expected a Qwen2.5-VL folder as it is downloaded")

    cut = shutil.copytree(source, tmp_path / "cut")
    shard = max(cut.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(cut, ValueError, f"{shard.name} is cut short")

    empty = copy_with(source, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    refused(empty, ValueError, "holds no safetensors files")
    (empty / "tokenizer.json").unlink()
    refused(empty, FileNotFoundError, "holds no tokenizer.json")

    tensors = tensors_of(source)
    language = {key: value for key, value in tensors.items() if not key.startswith("visual.")}
    refused(copy_with(source, tmp_path / "text", tensors=language), ValueError, "holds no Qwen2.5-VL: expected visual")

    # Everything that does not fit is listed at once.
    wrong = dict(tensors)
    del wrong["visual.blocks.1.norm2.weight"]
    wrong["visual.blocks.0.extra"] = np.zeros(2, np.float32)
    wrong["visual.merger.mlp.2.bias"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError) as caught:
        convert_teacher(copy_with(source, tmp_path / "wrong", tensors=wrong), output)
    for line in (
        "missing tensor visual.blocks.1.norm2.weight",
        "unknown tensor visual.blocks.0.extra",
        f"visual.merger.mlp.2.bias has shape (7,), expected ({WIDTH},)",
    ):
        assert line in str(caught.value)
    assert not output.exists()


def test_folders_that_hold_no_teacher_are_refused(converted, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such bundle"):
        load(tmp_path / "nowhere")
    other = shutil.copytree(converted, tmp_path / "other")
    content = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(content | {"teacher": content["teacher"] | {"width": 8}}))
    with pytest.raises(ValueError, match="config.json has been changed"):
        load(other)
    with pytest.raises(ValueError, match="does not fit this model: teacher/vision/"):
        load(other, verify=False)
    del content["teacher"]
    (other / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks teacher; it has"):
        load(other, verify=False, components=["teacher"])


@pytest.mark.bad_input
@pytest.mark.parametrize("part", ["teacher", "tokenizer"])
def test_a_flipped_bit_in_a_teacher_is_found(converted, tmp_path, refuses, part):
    other = shutil.copytree(converted, tmp_path / "other")
    largest = max((path for path in (other / part).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    read = {"teacher": load, "tokenizer": lambda folder: bundle.read_tokenizer(folder, load=load_backend)}[part]
    refuses(lambda: read(other), "is not as it was written", str(largest.relative_to(other)))


# What the published config.json of each size says of the parts that the teacher has.
@pytest.mark.parametrize(
    "output_width, mlp_width, vocab_size", [(2048, 3420, 151936), (3584, 3420, 152064), (5120, 3456, 152064)]
)
def test_configs_of_the_published_sizes(output_width, mlp_width, vocab_size):
    vision = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": mlp_width,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": output_width,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    text = {"hidden_size": output_width, "vocab_size": vocab_size}
    pixels = {"min_pixels": 3136, "max_pixels": 12845056}
    expected = TeacherConfig(output_width=output_width, mlp_width=mlp_width, vocab_size=vocab_size)
    head = {"model_type": "qwen2_5_vl", "vision_config": vision}
    assert config_from_qwen(head | text, pixels, "flat, as transformers 4 writes it") == expected
    sizes = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    assert config_from_qwen(head | {"text_config": text}, sizes, "nested, as transformers 5 does") == expected
    with pytest.raises(ValueError, match="here: hidden_act is gelu, the teacher only runs silu"):
        config_from_qwen(head | {"vision_config": vision | {"hidden_act": "gelu"}}, {}, "here")
    with pytest.raises(ValueError, match="expected one width"):
        config_from_qwen(head | text | {"hidden_size": 99}, {}, "here")


def test_tokenize_pads_and_cuts(converted):
    ids, is_token = tokenize(
        bundle.read_tokenizer(converted, load=load_backend), ["red cat", "", "a red cat sits"], length=3
    )
    np.testing.assert_array_equal(ids, [[2, 3, 0], [0, 0, 0], [1, 2, 3]])
    np.testing.assert_array_equal(is_token, [[True, True, False], [False] * 3, [True] * 3])
    assert ids.dtype == np.int32
