"""The main job on real input: JSONL with photographs -> data folder -> training at 128 px."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from unialign_jax.training.loop import train
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
