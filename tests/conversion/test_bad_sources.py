"""Sources that are damaged, incomplete or of another architecture: said in words, and no bundle is left."""

import errno
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unialign_jax import bundle
from unialign_jax.conversion import importing, sources
from unialign_jax.conversion.importing import convert

bad_input = pytest.mark.bad_input
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(sd3_folder, tmp_path):
    """A copy of the diffusers folder, to be damaged."""
    return shutil.copytree(sd3_folder, tmp_path / "sd3")


@pytest.fixture
def refuses(tmp_path):
    """A function that converts, expects the error to match, and nothing to be left of the bundle."""

    def check(source, match, kind="sd3", error=ValueError, **options):
        before = set(tmp_path.iterdir())
        with pytest.raises(error, match=match) as raised:
            convert(kind, source, tmp_path / "bundle", **options)
        assert set(tmp_path.iterdir()) == before
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return check


def change(path, update=None, remove=()):
    tensors = load_file(path)
    tensors = {key: value for key, value in tensors.items() if key not in remove} | (update or {})
    save_file(tensors, path)


@bad_input
@pytest.mark.parametrize("keep, match", [(0.7, "is cut short: .* bytes of"), (0.0, "not a safetensors file")])
def test_a_truncated_file(folder, refuses, keep, match):
    path = folder / TRANSFORMER
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    refuses(folder, match)


@bad_input
@pytest.mark.parametrize(
    "content, match",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>gated</html>", "error page"),
        (b"PK\x03\x04 a pickle", "PyTorch pickle"),
    ],
)
def test_a_file_of_another_kind(folder, refuses, content, match):
    (folder / TRANSFORMER).write_bytes(content)
    refuses(folder, match)


@bad_input
def test_missing_shards_are_named(folder, refuses):
    shards = sorted((folder / "text_encoder_3").glob("*-of-*.safetensors"))
    shards[1].unlink()
    refuses(folder, f"lacks 1 of the {len(shards)} shards .* {shards[1].name}")
    (folder / "text_encoder_3/model.safetensors.index.json").unlink()  # their names tell as much
    refuses(folder, f"lacks 1 of the {len(shards)} shards .* {shards[1].name}")


@bad_input
def test_every_missing_unknown_and_misshapen_tensor_is_listed(folder, refuses):
    key = "transformer_blocks.1.attn.to_q.weight"
    change(
        folder / TRANSFORMER,
        {"adapter.weight": np.zeros((2, 3), np.float32), "proj_out.bias": np.zeros(5, np.float32)},
        remove=[key, "context_embedder.bias"],
    )
    message = refuses(folder, "does not fit the layout sd3-diffusers")
    assert f"missing tensor {key} (for blocks/joint/image/qkv/kernel)" in message
    assert "missing tensor context_embedder.bias (for text_embed/bias)" in message
    assert "unknown tensor adapter.weight (2, 3)" in message
    assert "proj_out.bias has shape (5,), expected (16,)" in message


@bad_input
def test_a_whole_block_that_is_missing(folder, refuses):
    keys = [key for key in load_file(folder / TRANSFORMER) if key.startswith("transformer_blocks.1.")]
    change(folder / TRANSFORMER, remove=keys)
    refuses(folder, r"lacks its blocks \[1\]")


@bad_input
def test_sd35_medium_and_large_are_told_apart_from_sd3(tmp_path, refuses):
    diffusers = pytest.importorskip("diffusers")
    import torch

    for heads, dual, match in (
        (24, (0, 1), r"SD3.5-medium: 2 blocks of width 1536 with .*qk-norm.* and .*blocks 0 to 1 \(dual attention\)"),
        (38, (), r"SD3.5-large: 2 blocks of width 2432 with normed queries and keys \(qk-norm\), which SD3"),
    ):
        with torch.device("meta"):
            model = diffusers.SD3Transformer2DModel(
                num_layers=2,
                num_attention_heads=heads,
                caption_projection_dim=heads * 64,
                qk_norm="rms_norm",
                dual_attention_layers=dual,
            )
        # Only names and shapes count: a header, and a hole where the tensors would be.
        write_header_only(tmp_path / "sd35.safetensors", {k: tuple(v.shape) for k, v in model.state_dict().items()})
        refuses(tmp_path / "sd35.safetensors", match, components=["transformer"])
        stability = {"model.diffusion_model.context_embedder.bias": (heads * 64,)}
        stability |= {f"model.diffusion_model.joint_blocks.{i}.context_block.attn.qkv.weight": (1, 1) for i in range(2)}
        stability |= {f"model.diffusion_model.joint_blocks.{i}.x_block.attn.ln_q.weight": (64,) for i in range(2)}
        stability |= {f"model.diffusion_model.joint_blocks.{i}.x_block.attn2.qkv.weight": (1, 1) for i in dual}
        write_header_only(tmp_path / "sd35.safetensors", stability)
        refuses(tmp_path / "sd35.safetensors", match, components=["transformer"])


def write_header_only(path, shapes):
    header, position = {}, 0
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


@bad_input
def test_something_else_altogether(tmp_path, refuses):
    save_file({"conv.weight": np.zeros((2, 2))}, tmp_path / "other.safetensors")
    refuses(tmp_path / "other.safetensors", "neither an SD3 or UniAlignment transformer.* begin with conv.weight")
    refuses(tmp_path / "nowhere", "no such file or folder", error=FileNotFoundError)
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles/pytorch_model.bin").write_bytes(b"PK")
    refuses(tmp_path / "pickles", "holds pytorch_model.bin but no safetensors")


@bad_input
def test_the_wrong_command_is_said(sd3_folder, released_folder, refuses):
    refuses(released_folder, "not SD3's: use `convert.py unialign`")
    refuses(sd3_folder, "use `convert.py sd3`", kind="unialign")


@bad_input
def test_parts_that_are_missing_are_asked_for(folder, sd3_folder, refuses, tmp_path):
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder_3")
    refuses(folder, "no text_encoder and no autoencoder: give it by --text-encoder; give it by --vae")
    refuses(
        folder,
        r"holds autoencoder \(diffusers\), expected text_encoder",
        text_encoder=sd3_folder / "vae",
        vae=sd3_folder / "vae",
    )
    shutil.rmtree(folder / "tokenizer_3")
    options = {"vae": sd3_folder / "vae", "text_encoder": sd3_folder / "text_encoder_3"}
    refuses(folder, "no T5 tokenizer: give its folder .* by --tokenizer", **options)
    convert("sd3", folder, tmp_path / "bundle", tokenizer=sd3_folder / "tokenizer_3", **options)
    assert bundle.verify(tmp_path / "bundle") == []


def test_parts_that_are_not_asked_for_may_be_damaged(folder, tmp_path, refuses):
    next((folder / "text_encoder_3").glob("*-of-*.safetensors")).unlink()
    (folder / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    (folder / "text_encoder/model.safetensors").unlink()
    convert("sd3", folder, tmp_path / "bundle", components=["transformer"])
    assert bundle.read_config(tmp_path / "bundle").components == ("transformer",)
    shutil.rmtree(tmp_path / "bundle")
    refuses(folder, "unknown component 'unet', expected some of transformer", components=["unet"])


@bad_input
def test_parts_of_different_models(folder, refuses):
    config = json.loads((folder / "text_encoder_3/config.json").read_text())
    shutil.rmtree(folder / "text_encoder_3")
    transformers = pytest.importorskip("transformers")
    other = transformers.T5EncoderModel(transformers.T5Config(**config | {"d_model": 48}))
    other.save_pretrained(folder / "text_encoder_3")
    refuses(folder, "the transformer reads text of width 24, the text encoder gives 48")


@bad_input
def test_another_positional_table(folder, refuses):
    table = load_file(folder / TRANSFORMER)["pos_embed.pos_embed"]
    change(folder / TRANSFORMER, {"pos_embed.pos_embed": table[:, ::-1].copy()})
    refuses(folder, "differs from SD3's positional table")


@bad_input
def test_an_older_vae(folder, refuses):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    change(path, {"quant_conv.weight": np.zeros((8, 8, 1, 1), np.float32)})
    refuses(folder, "quantisation convolutions, so it is not SD3's VAE")


@bad_input
def test_a_config_that_contradicts_the_tensors(folder, refuses):
    path = folder / "transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 24}))
    refuses(folder, "config.json says num_layers 24, the tensors say 3")


def test_a_full_disk_is_seen_before_and_while_writing(sd3_folder, refuses, monkeypatch):
    usage = shutil.disk_usage(sd3_folder)
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refuses(sd3_folder, "GB free, .* GB are needed", error=OSError)
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle.ocp.partial, "finalize", full)
    refuses(sd3_folder, "is full; nothing was kept", error=OSError)


def test_eight_bit_floats_are_read_exactly_unless_they_are_scaled(sd3_folder, sd3_file, tmp_path, refuses):
    options = {"tokenizer": sd3_folder / "tokenizer_3", "components": ["text_encoder"]}
    tensors = {key: value for key, value in load_file(sd3_file).items() if "t5xxl" in key}
    for name, dtype in (("e4m3fn", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)):
        narrow = {key: value.astype(dtype) for key, value in tensors.items()}
        save_narrow(tmp_path / f"{name}.safetensors", narrow)
        convert("sd3", tmp_path / f"{name}.safetensors", tmp_path / name, **options)
        config, params = bundle.load(tmp_path / name, dtype="float32")
        assert config.dtypes["text_encoder"] == ["bfloat16"]
        expected = narrow["text_encoders.t5xxl.transformer.shared.weight"].astype(np.float32)
        np.testing.assert_array_equal(params["text_encoder"]["token_embedding"], expected)
    narrow["text_encoders.t5xxl.transformer.scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    save_narrow(tmp_path / "scaled.safetensors", narrow)
    refuses(tmp_path / "scaled.safetensors", r"scaled eight-bit weights \(scaled_fp8\)", **options)


def save_narrow(path, tensors):
    """Eight-bit floats through PyTorch, which the library's numpy side does not write."""
    import torch
    from safetensors.torch import save_file

    kinds = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
    save_file(
        {key: torch.from_numpy(value.view(np.uint8)).view(kinds[value.dtype.name]) for key, value in tensors.items()},
        path,
    )


def test_stored_dtypes_follow_the_source_or_the_wish(sd3_folder, tmp_path):
    path = tmp_path / "half.safetensors"
    save_file({key: value.astype(np.float16) for key, value in load_file(sd3_folder / TRANSFORMER).items()}, path)
    convert("sd3", path, tmp_path / "half", components=["transformer"])
    # The time embedding's bias is a sum that fp16 would round.
    assert bundle.read_config(tmp_path / "half").dtypes == {"transformer": ["float16", "float32"]}
    assert bundle.component_dtypes(tmp_path / "half", "transformer")["time_embed/out/bias"] == np.float32
    convert("sd3", path, tmp_path / "wide", components=["transformer"], dtype="float32")
    assert bundle.read_config(tmp_path / "wide").dtypes == {"transformer": ["float32"]}


def test_variants_in_one_folder(sd3_folder, tmp_path):
    """The published text_encoder_3 holds float32 shards and fp16 shards beside each other: the plain ones count."""
    folder = shutil.copytree(sd3_folder / "text_encoder_3", tmp_path / "t5")
    shutil.copy(folder / "model.safetensors.index.json", folder / "model.safetensors.index.fp16.json")
    assert sources.open_part(folder).component == "text_encoder"
    (folder / "model.safetensors.index.json").unlink()
    assert sources.open_part(folder).component == "text_encoder"
    shutil.copy(next(folder.glob("*.safetensors")), folder / "a.safetensors")
    shutil.copy(next(folder.glob("*.safetensors")), folder / "b.safetensors")
    with pytest.raises(ValueError, match="holds several models"):
        sources.open_part(folder)
