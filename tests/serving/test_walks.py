"""docs/serving.md's commands as they are printed, against the demo model."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("openai", reason="openai is not installed")

from unialign_jax.inference.pipeline import Pipeline
from unialign_jax.serving import api
from unialign_jax.serving.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "serving.md").read_text()
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def demo(running):
    with running(api.make_app(Engine([Pipeline.from_bundle("demo", max_batch=2)]), model="demo")) as url:
        yield url


def block(language):
    found = re.search(rf"<!-- test -->\n```{language}\n(.*?)```", TEXT, re.DOTALL)[1]
    assert ADDRESS in found
    return found


@pytest.mark.slow
def test_the_clients(demo, tmp_path):
    if shutil.which("curl"):
        script = block("bash").replace(ADDRESS, demo).replace("python -c", f"{sys.executable} -c")
        output = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True
        )
        assert output.returncode == 0, output.stderr
        assert Image.open(tmp_path / "circle.png").size == (64, 64)
        assert json.loads((tmp_path / "edited.json").read_text())["data"][0]["seed"] == 3
        assert "unialign_done_total" in output.stdout
    script = block("python").replace(ADDRESS, demo)
    output = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    answer, _, caption = output.stdout.strip().partition(" | ")
    assert answer and caption
    if shutil.which("curl"):  # the same seed and options
        assert Image.open(tmp_path / "circle_7.png").tobytes() == Image.open(tmp_path / "circle.png").tobytes()
