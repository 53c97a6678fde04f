"""What the page copies as code, run as it is printed: each makes what the request made."""

import hashlib
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from unialign_jax import Pipeline
from unialign_jax.inference import job_runner, jobs
from unialign_jax.serving import snippets
from unialign_jax.serving.requests import Limits, make_work

TEXT = 'It\'s a "red" $HOME `ls` circle; \\ @x <y 100% \n<b>ü 🐈'


def picture(value):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (value, 50, 50)).save(buffer, "PNG")
    return buffer.getvalue()


REQUESTS = {
    "text_to_image": ({"prompt": TEXT, "steps": 2, "n": 2, "negative_prompt": TEXT, "guidance_scale": 2.5}, []),
    "fast": ({"prompt": "a", "quality": "fast", "steps": 2, "size": "32x32"}, []),
    "edit": ({"instruction": TEXT, "steps": 2, "guidance_scale": 2.5}, [picture(9)]),
    "at_sign": ({"instruction": "@/etc/passwd", "steps": 2}, [picture(9)]),
    "perception": ({"kind": "depth", "steps": 2}, [picture(9)]),
    "personalization": ({"prompt": TEXT, "steps": 2}, [picture(9), picture(200)]),
    "caption": ({"steps": 2, "temperature": 0.5}, [picture(9)]),
    "vqa": ({"question": TEXT, "steps": 2, "max_tokens": 9}, [picture(9)]),
}
TASKS = {"fast": "text_to_image", "at_sign": "edit"}


@pytest.fixture(params=REQUESTS)
def work(request, tmp_path, monkeypatch):
    """A request, in a folder with its pictures."""
    fields, data = REQUESTS[request.param]
    work = make_work(TASKS.get(request.param, request.param), fields | {"seed": 7}, data, Limits())
    for name, content in zip(snippets.image_names(work.job), data, strict=True):
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return work


@pytest.fixture
def expected(work, tiny_pipeline):
    samples = [job_runner.Sample(work.job, index) for index in range(work.job.images_per_prompt)]
    return job_runner.call(tiny_pipeline, samples, [list(work.images)] * len(samples))


def assert_made(folder, expected):
    for number, image in enumerate(expected):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"made_{7 + number}.png")), np.asarray(image))


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(work, expected, server, tmp_path):
    script = snippets.as_curl(work.job, server)
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if isinstance(expected[0], str):
        message = json.loads(done.stdout)["choices"][0]["message"]
        assert message["content"] == expected[0]
    else:
        assert_made(tmp_path, expected)


def test_python(work, expected, tiny_pipeline, tmp_path, monkeypatch, capsys):
    opened = []
    monkeypatch.setattr(Pipeline, "from_bundle", lambda name: opened.append(name) or tiny_pipeline)
    exec(snippets.as_python(work.job, "tiny"), {})
    assert opened == ["tiny"]
    if isinstance(expected[0], str):
        assert capsys.readouterr().out == expected[0] + "\n"
    else:
        assert_made(tmp_path, expected)


def test_job_lines(work, tmp_path):
    (tmp_path / "jobs.jsonl").write_text(snippets.as_job(work.job))
    [job] = jobs.read_jobs(tmp_path / "jobs.jsonl")
    assert (job.task, job.text, job.seed) == (work.job.task, work.job.text, 7)
    assert (job.images_per_prompt, job.negative_prompt) == (work.job.images_per_prompt, work.job.negative_prompt)
    assert job.options == work.job.options
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in job.images]
    assert contents == [hashlib.sha256(data).hexdigest() for data in [picture(9), picture(200)][: len(contents)]]
    assert len(contents) == len(work.images)


def test_a_key_is_read_from_the_environment(work):
    script = snippets.as_curl(work.job, "https://example.org", needs_key=True)
    assert '-H "Authorization: Bearer $UNIALIGN_API_KEY"' in script
