"""lmms-eval, unmodified, asks the server: docs/evaluation.md's command on a task of four pictures."""

import importlib.util
import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image, ImageDraw

from unialign_jax.inference.pipeline import Pipeline

COLORS = ("red", "blue", "green", "yellow")
QUESTION = "what color is the circle?"
TASK = """\
task: circles
dataset_path: parquet
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 1024, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
UTILS = """\
import io

from PIL import Image


def visual(row):
    return [Image.open(io.BytesIO(row["image"]))]


def text(row, lmms_eval_specific_kwargs=None):
    return row["question"]
"""


def circle(color):
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=color)
    return image


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is None, reason="lmms_eval is not installed")
def test_lmms_eval_scores_the_answers_that_python_gets(running, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [circle(color) for color in COLORS]
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    rows = pa.table({"image": encoded, "question": [QUESTION] * 4, "answer": list(COLORS)})
    pq.write_table(rows, tmp_path / "rows.parquet")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/circles.yaml").write_text(TASK.format(rows=tmp_path / "rows.parquet"))
    (tmp_path / "tasks/utils.py").write_text(UTILS)
    from unialign_jax.serving import api
    from unialign_jax.serving.engine import Engine

    pipeline = Pipeline.from_bundle("demo", max_batch=2)
    with running(api.make_app(Engine([pipeline]), model="demo")) as url:
        settings = f"model=demo,base_url={url}/v1,api_key=x,timeout=600,num_concurrent=1"
        command = [sys.executable, "-m", "lmms_eval", "--model=openai", f"--model_args={settings}", "--tasks=circles"]
        command += [f"--include_path={tmp_path / 'tasks'}", "--batch_size=1", f"--output_path={tmp_path / 'scores'}"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OPENAI_API_KEY": "x"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = next((tmp_path / "scores").rglob("*_results.json"), None)
    assert scores, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(scores.read_text())["results"]["circles"]["exact_match,none"]
    answers = [pipeline.answer(image, QUESTION, temperature=0.0)[0] for image in images]
    assert found == sum(answer == color for answer, color in zip(answers, COLORS, strict=True)) / 4
