"""launch/convert.py as a user calls it: what it writes, prints and refuses."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from unialign_jax import bundle
from unialign_jax.training.state import Networks, init_frozen

SCRIPT = Path(__file__).resolve().parents[2] / "launch/convert.py"


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("convert_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def sd3_bundle(command, sd3_folder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("command") / "sd3"
    assert command(["sd3", f"--source={sd3_folder}", f"--output={directory}", "--heads", "--dtype=bfloat16"]) == 0
    return directory


@pytest.mark.slow
def test_sd3_and_its_flags(sd3_bundle):
    config = bundle.read_config(sd3_bundle)
    assert config.components == ("transformer", "heads", "text_encoder", "autoencoder")
    assert config.dtypes["text_encoder"] == config.dtypes["heads"] == ["bfloat16"]
    assert (sd3_bundle / "tokenizer/tokenizer.json").is_file()


@pytest.mark.slow
def test_there_and_back_again(command, released_folder, tmp_path, capsys):
    assert command(["unialign", f"--source={released_folder}", f"--output={tmp_path / 'bundle'}"]) == 0
    arguments = ["export", f"--bundle={tmp_path / 'bundle'}", "--format=diffusers", f"--output={tmp_path / 'out'}"]
    assert command([*arguments, "--components=transformer"]) == 0
    output = capsys.readouterr().out
    assert f"wrote transformer, heads, text_encoder, autoencoder in {tmp_path / 'bundle'}" in output
    assert "left out, since diffusers has no place for it: the text head (captions and answers)" in output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"transformer", "scheduler", "model_index.json"}
    assert command([*arguments, "--overwrite"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"transformer", "vae", "text_encoder_3", "tokenizer_3", "scheduler", "model_index.json"}


@pytest.mark.slow
def test_a_run_without_a_bundle_takes_its_seeded_encoders_along(command, run, tmp_path, capsys):
    workdir, state = run
    assert command(["inspect", str(workdir)]) == 0
    output = capsys.readouterr().out
    assert "newest whole checkpoint is that of step 12" in output and "it keeps an average" in output
    assert command(["export", f"--run={workdir}", "--format=bundle", f"--output={tmp_path / 'out'}"]) == 0
    config, params = bundle.load(tmp_path / "out")
    assert config.components == ("transformer", "heads", "text_encoder", "autoencoder")
    found = params["text_encoder"]["token_embedding"]
    networks = Networks.create(config.transformer, config.heads, config.text_encoder, config.autoencoder)
    np.testing.assert_array_equal(found, init_frozen(networks)["text_encoder"]["token_embedding"])
    np.testing.assert_array_equal(
        params["transformer"]["text_embed"]["kernel"], state.params["transformer"]["text_embed"]["kernel"]
    )
    assert bundle.verify(tmp_path / "out") == []


def test_text_positions_are_dropped_by_a_flag(command, positioned_bundle, tmp_path, capsys, command_refuses):
    arguments = ["export", f"--bundle={positioned_bundle}", "--components=transformer", f"--output={tmp_path}/out"]
    command_refuses("convert", [*arguments, "--format=diffusers"], "--drop-text-positions")
    assert command([*arguments, "--format=diffusers", "--drop-text-positions"]) == 0
    assert "left out, since diffusers has no place for it: the text positions, without" in capsys.readouterr().out
    arguments = ["export", "--run=a", "--format=bundle", "--output=b", "--drop-text-positions"]
    command_refuses("convert", arguments, "--drop-text-positions goes with PyTorch's formats")


def test_inspect_a_bundle(command, sd3_bundle, capsys):
    assert command(["inspect", str(sd3_bundle), "--verify"]) == 0
    output = capsys.readouterr().out
    assert "a bundle of transformer, heads, text_encoder, autoencoder" in output
    assert "computed: text_head/kernel: normal, deviation 0.02, seed 20250928" in output
    assert "left out: pos_embed.pos_embed: a buffer, computed from its formula" in output
    assert "every file is as it was written" in output
    assert output.count("sha256 ") == len(bundle.read_config(sd3_bundle).provenance["files"])


def test_inspect_a_single_file_with_its_keys(command, sd3_file, capsys):
    assert command(["inspect", str(sd3_file)]) == 1  # its VAE is none that is known without a config.json
    assert "so it is not SD3's VAE" in capsys.readouterr().err


def test_inspect_says_what_every_key_becomes(command, sd3_folder, released_folder, capsys):
    assert command(["inspect", str(sd3_folder), "--keys"]) == 0
    output = capsys.readouterr().out
    assert "transformer: layout diffusers" in output and "text_encoder: layout t5" in output
    line = "transformer_blocks.1.attn.to_k.weight [128, 128] F32 -> blocks/joint/image/qkv/kernel[1, :, 1] (transpose)"
    assert line in output
    assert "norm_out.linear.weight [256, 128] F32 -> image_head_modulation/kernel (transpose, swap scale" in output
    assert "text_embedder.linear_1.bias [128] F32 -> time_embed/out/bias (the pooled embedding of a zero" in output
    assert "UNKNOWN" not in output
    assert command(["inspect", str(released_folder), "--keys"]) == 0
    output = capsys.readouterr().out
    assert "siglip_adapter_img.fc.2.bias [12] F32 -> image_out/bias (reshape)" in output and "UNKNOWN" not in output


def test_errors_are_one_line_and_a_status(command, tmp_path, sd3_bundle, capsys):
    for arguments, match in (
        (["sd3", f"--source={tmp_path}/nowhere", f"--output={tmp_path}/x"], "there is no such file or folder"),
        (["inspect", str(tmp_path / "nowhere")], "there is no such file or folder"),
        (["inspect", str(tmp_path), "--verify"], "holds no safetensors files"),
        (["export", f"--run={tmp_path}", "--format=unialign", f"--output={tmp_path}/x"], "is no run's folder"),
        (["sd3", f"--source={tmp_path}", f"--output={sd3_bundle}"], "holds no safetensors files"),
    ):
        assert command(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and match in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments, words",
    [
        ("sd3 --source={tmp}/nowhere --output={tmp}/x", ["nowhere: there is no such file or folder"]),
        ("sd3 --source={tmp}/pipe --output={tmp}/x", ["pipe is a device, pipe or socket"]),
        ("sd3 --source={tmp}/text --output={tmp}/x", ["text is not a safetensors file"]),
        ("sd3 --source={tmp}/pickle.pth --output={tmp}/x", ["pickle.pth is not a PyTorch file"]),
        ("sd3 --source={tmp}/empty --output={tmp}/x", ["empty holds no safetensors files"]),
        ("sd3 --source={tmp}/bad\0name --output={tmp}/x", ["cannot be opened"]),
        ("sd3 --source={sd3} --output={tmp}/mine", ["mine"]),
        ("sd3 --source={sd3} --output={tmp}/mine --overwrite", ["mine"]),
        ("sd3 --source={sd3} --output={tmp}/text --overwrite", ["text"]),
        ("sd3 --source={sd3} --tokenizer={tmp}/text --output={tmp}/x", ["text is a file, expected the folder"]),
        ("sd3 --source={sd3} --tokenizer={tmp}/empty --output={tmp}/x", ["empty holds no tokenizer"]),
        ("sd3 --source={sd3} --mask-embedding={tmp}/empty --output={tmp}/x", ["empty is a folder, expected a file"]),
        ("sd3 --source={sd3} --mask-embedding={tmp}/text --output={tmp}/x", ["text is not a PyTorch file"]),
        ("sd3 --source={sd3} --mask-embedding={tmp}/no --output={tmp}/x", ["no: there is no such file"]),
        ("sd3 --source={sd3} --vae={tmp}/text --output={tmp}/x", ["text is not a safetensors file"]),
        ("sd3 --source={sd3} --text-encoder={tmp}/empty --output={tmp}/x", ["empty holds no safetensors files"]),
        ("sd3 --source={sd3} --components=unet --output={tmp}/x", ["unknown component 'unet'"]),
        ("sd3 --source={sd3} --dtype=int8 --output={tmp}/x", ["invalid choice"]),
        ("unialign --source={sd3} --output={tmp}/x", ["use `convert.py sd3`"]),
        ("teacher --source={tmp}/text --output={tmp}/x", ["text is not a folder"]),
        ("teacher --source={tmp}/empty --output={tmp}/x", ["empty holds no config.json"]),
        ("export --bundle={tmp}/empty --format=unialign --output={tmp}/x", ["empty is not a bundle"]),
        ("export --bundle={tmp}/nowhere --format=unialign --output={tmp}/x", ["nowhere"]),
        ("export --run={tmp}/empty --format=unialign --output={tmp}/x", ["empty is no run's folder"]),
        ("export --format=unialign --output={tmp}/x", ["needs --bundle or --run"]),
        ("export --bundle={tmp}/empty --format=gguf --output={tmp}/x", ["invalid choice"]),
        ("inspect {tmp}/pipe", ["pipe is a device, pipe or socket"]),
        ("inspect {tmp}/empty", ["empty holds no safetensors files"]),
        ("inspect {tmp}/text", ["text is not a safetensors file"]),
        ("inspect {tmp}/empty --verify", ["empty holds no safetensors files"]),
    ],
)
def test_what_cannot_be_converted_is_one_line(arguments, words, sd3_folder, tmp_path, command_refuses):
    (tmp_path / "text").write_text("precious")
    (tmp_path / "pickle.pth").write_bytes(b"\x80\x02}.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    message = command_refuses("convert", arguments.format(tmp=tmp_path, sd3=sd3_folder).split(), *words)
    assert "Errno" not in message and "partial" not in message
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_damaged_bundle_fails_verification(command, sd3_bundle, tmp_path, capsys):
    import shutil

    damaged = shutil.copytree(sd3_bundle, tmp_path / "damaged")
    largest = max((path for path in damaged.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert command(["inspect", str(damaged), "--verify"]) == 1
    assert "is not as it was written: " in capsys.readouterr().err
    content = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(content | {"version": 2}))
    assert command(["inspect", str(damaged)]) == 1
    assert "version 2" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["sd3"], ["unialign"], ["teacher"], ["export"], ["inspect"]])
def test_help_teaches(command, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command([*arguments, "--help"])
    assert stopped.value.code == 0
    assert len(capsys.readouterr().out) > 300
