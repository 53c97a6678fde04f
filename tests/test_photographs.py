"""The main job on real input: JSONL with photographs -> data folder -> training at 128 px."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image

from unialign_jax.data.text_lengths import cuts_of
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.training.loop import open_streams, train
from unialign_jax.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = ROOT.parent / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not here (../shared/data)")
@pytest.mark.parametrize(
    ("file", "kind", "stage"), [("photos_t2i", "text_to_image", "stage1"), ("photos_edit", "edit", "stage2")]
)
def test_photographs_can_be_prepared_and_trained_on(file, kind, stage, small_config, tmp_path):
    command = [sys.executable, ROOT / "launch" / "prepare_data.py", "--format=jsonl", f"--stream={kind}"]
    command += [f"--source={PHOTOGRAPHS / file}.jsonl", f"--output={tmp_path / 'data'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "150" in done.stdout

    config = small_config(stage, num_steps=2, batch_size=4, image_size=128, samples__count=2)
    config.loss_weights.intrinsic_modal = 0.0  # photographs come without teacher features
    for name, stream in config.streams.items():
        stream.weight = float(name == kind)
    config.streams[kind].path = str(tmp_path / "data")
    train(config, tmp_path / "run", progress=False, devices=jax.devices()[:1])
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) and "intrinsic_modal" not in row for row in rows)
    sheet = Image.open(tmp_path / "run" / "samples" / f"{kind}_000002.png")
    assert sheet.width > 2 * 2 * 128


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen2.5-VL of random weights, as the transformers library saves it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e6}
    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 28, "num_heads": 2, "out_hidden_size": 24}
    vision["fullatt_block_indexes"] = [1]
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    folder = tmp_path_factory.mktemp("qwen")
    transformers.Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    characters = {"<|endoftext|>": 0} | {chr(i): i for i in range(1, 256)}
    tokenizers.Tokenizer(tokenizers.models.BPE(characters, [])).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs are not here (../shared/data)")
def test_all_four_losses_train_on_photographs_with_whole_captions(qwen, launch_command, small_config, tmp_path):
    """README's commands: features of a teacher in its true layout, and a text length that cuts no caption."""
    prepare = launch_command("prepare_data").main
    source = f"--source={PHOTOGRAPHS / 'photos_t2i.jsonl'}"
    prepare([source, "--stream=text_to_image", f"--output={tmp_path / 'data'}"])
    launch_command("convert").main(["teacher", f"--source={qwen}", f"--output={tmp_path / 'teacher'}"])
    prepare(["encode", f"--input={tmp_path / 'data'}", f"--teacher={tmp_path / 'teacher'}", "--image-size=128"])

    config = small_config("stage1", num_steps=2, batch_size=4, image_size=128, text_length=384, samples__count=0)
    config.model.text_positions = 384
    config.heads.teacher_width = 24
    config.streams.text_to_image.path = str(tmp_path / "data")
    config.loss_weights.intrinsic_modal = 0.1
    stream = open_streams(config, load_tokenizer())["text_to_image"]
    assert not cuts_of(stream)
    train(config, tmp_path / "run", progress=False, devices=jax.devices()[:1])
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        for name in ("flow_matching", "masked_text", "cross_modal", "intrinsic_modal"):
            assert np.isfinite(row[name]) and row[name] > 0
