"""launch/generate.py as a user calls it: every task, a jobs file, what it prints, refuses and keeps."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialign_jax import Pipeline
from unialign_jax.bundle_config import write_content
from unialign_jax.models.sizes import ImageSizes

SCRIPT = Path(__file__).resolve().parents[2] / "launch/generate.py"


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("generate_command", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_cache_at_home(monkeypatch):
    """The tests' own compilation cache stays."""
    monkeypatch.setattr("unialign_jax.parallel.compiled.keep_compiled", lambda directory: None)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    return Pipeline.from_bundle(tiny_bundle, max_batch=2)


@pytest.fixture
def opened(command, pipeline, monkeypatch):
    """The command opens the pipeline that the tests have: what is compiled once stays compiled."""
    monkeypatch.setattr(command.Model, "open", lambda self, devices=1: [pipeline])
    return pipeline


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((32, 32))
    image.save(tmp_path / "photo.png")
    return image


def pixels(image):
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return np.asarray(opened.convert("RGB")).astype(int)
    return np.asarray(image).astype(int)


def run(command, *arguments):
    """The command's exit status, also where argparse ends it."""
    try:
        return command.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.slow
def test_jobs_of_every_task(command, opened, tiny_bundle, photo, tmp_path, capsys):
    rows = [
        {"id": "a", "task": "text_to_image", "prompt": "a red circle", "seed": 5, "steps": 2},
        {"id": "e", "task": "edit", "instruction": "make it blue", "image": "photo.png", "steps": 2},
        {"id": "p", "task": "perceive", "kind": "depth", "image": "photo.png", "steps": 2},
        {"task": "draw"},
        {"id": "r", "task": "personalize", "prompt": "it", "images": ["photo.png"], "slots": 1, "steps": 2},
        {"id": "c", "task": "caption", "image": "photo.png", "steps": 2, "seed": 3},
        {"id": "v", "task": "vqa", "question": "what colour?", "image": "photo.png", "steps": 2, "max_tokens": 4},
        {"id": "b", "task": "text_to_image", "prompt": "a blue square", "seed": 6, "steps": 2},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [f"--bundle={tiny_bundle}", f"--jobs={tmp_path}/jobs.jsonl", f"--output={tmp_path}/out", "--batch=2"]
    assert run(command, *arguments) == 1
    assert f"7 of 8 jobs are done, 1 failed: {tmp_path}/out/results.jsonl" in capsys.readouterr().out
    lines = {entry["id"]: entry for entry in map(json.loads, open(tmp_path / "out/results.jsonl"))}
    assert [name for name, entry in lines.items() if entry["status"] == "failed"] == ["000004"]

    images = opened.generate(["a red circle", "a blue square"], seeds=[5, 6], steps=2)
    for name, image in zip("ab", images, strict=True):
        np.testing.assert_array_equal(pixels(tmp_path / f"out/{name}.png"), pixels(image))
    for name, (image,) in (
        ("e", opened.edit("make it blue", photo, seeds=0, steps=2)),
        ("p", opened.perceive("depth", photo, seeds=0, steps=2)),
        ("r", opened.personalize("it", [photo], slots=1, seeds=0, steps=2)),
    ):
        np.testing.assert_array_equal(pixels(tmp_path / f"out/{name}.png"), pixels(image))
    assert lines["c"]["text"] == opened.caption(photo, steps=2, seeds=3)[0]
    assert lines["v"]["text"] == opened.answer(photo, "what colour?", steps=2, max_tokens=4, seeds=0)[0]

    with Image.open(tmp_path / "out/p.png") as image:
        parameters = json.loads(image.text["parameters"])
    expected = {
        "task": "perception",
        "kind": "depth",
        "id": "p",
        "seed": 0,
        "steps": 2,
        "solver": "euler",
        "height": 32,
    }
    expected |= {"guidance_scale": 7.0, "bundle": tiny_bundle.name, "quantize": None, "unialign_jax": "0.1.0"}
    assert expected.items() <= parameters.items()
    assert parameters["prompt"].startswith("Provide a detailed depth map")

    assert lines["a"]["hash"] and parameters["job_hash"] == lines["p"]["hash"]
    assert run(command, *arguments) == 1  # the bad one is still bad
    said = capsys.readouterr().out
    assert "7 of 8 jobs are done already" in said and "7 of 8 jobs are done, 1 failed" in said


@pytest.mark.slow
def test_two_devices_make_what_one_makes(command, tiny_bundle, pipeline, tmp_path):
    rows = [{"id": f"j{i}", "task": "text_to_image", "prompt": f"p{i}", "seed": i, "steps": 2} for i in range(6)]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"--jobs={tmp_path}/jobs.jsonl", f"--output={tmp_path}/two", "--batch=2", "--devices=2"]
    assert run(command, f"--bundle={tiny_bundle}", *options) == 0
    images = pipeline.generate([row["prompt"] for row in rows], seed=list(range(6)), steps=2)
    for row, image in zip(rows, images, strict=True):
        assert (pixels(tmp_path / "two" / f"{row['id']}.png") == pixels(image)).all()


@pytest.mark.slow
def test_one_call_makes_what_a_job_makes(command, tiny_bundle, opened, tmp_path, capsys):
    arguments = [f"--bundle={tiny_bundle}", "--task=t2i", "--prompt=a red circle", "--seed=4", "--steps=2", "--count=2"]
    assert run(command, *arguments, f"--output={tmp_path}/new/fox.png") == 0
    said = capsys.readouterr().out
    assert f"wrote {tmp_path}/new/fox_0.png\nwrote {tmp_path}/new/fox_1.png\ndone in" in said
    alone = opened.generate("a red circle", seeds=[4, 5], steps=2, images_per_prompt=2)
    for number, image in enumerate(alone):
        np.testing.assert_array_equal(pixels(tmp_path / f"new/fox_{number}.png"), pixels(image))
    with Image.open(tmp_path / "new/fox_1.png") as image:
        parameters = json.loads(image.text["parameters"])
    assert (parameters["task"], parameters["seed"], "id" in parameters) == ("text_to_image", 5, False)


def test_a_text_is_printed_and_written(command, tiny_bundle, opened, photo, tmp_path, capsys):
    arguments = [f"--bundle={tiny_bundle}", "--task=caption", f"--image={tmp_path}/photo.png", "--steps=2", "--seed=3"]
    (text,) = opened.caption(photo, steps=2, seeds=3)
    assert run(command, *arguments) == 0
    assert capsys.readouterr().out == text + "\n"
    assert run(command, *arguments, f"--output={tmp_path}/caption.txt") == 0
    assert (tmp_path / "caption.txt").read_text() == text + "\n"
    (tmp_path / "caption.txt").write_text("mine")
    assert run(command, *arguments, f"--output={tmp_path}/caption.txt") == 1
    assert "caption.txt is there already" in capsys.readouterr().err
    assert (tmp_path / "caption.txt").read_text() == "mine"
    assert run(command, *arguments, f"--output={tmp_path}/caption.txt", "--overwrite") == 0
    assert (tmp_path / "caption.txt").read_text() == text + "\n"


def test_how_the_bundle_is_opened(command, tiny_bundle):
    arguments = ["--task=caption", "--image=x", "--batch=3", "--dtype=bfloat16", "--attention=xla"]
    model = command.Model(command.parse_arguments([f"--bundle={tiny_bundle}", *arguments]))
    (pipeline,) = model.open()
    assert isinstance(pipeline, Pipeline) and pipeline.max_batch == 3
    assert [opened.device.id for opened in model.open(3)] == [0, 1, 2]
    assert len(model.open(None)) == 1  # all, but on a CPU one
    with pytest.raises(ValueError, match="--devices is 9, and this machine has 8"):
        model.open(9)

    def identity(*more):
        return command.Model(command.parse_arguments([f"--bundle={tiny_bundle}", "--task=caption", *more])).identity

    assert identity() == identity("--batch=3", "--low-memory", "--attention=xla")  # these change no result
    assert len({identity(), identity("--dtype=bfloat16"), identity("--quantize=int8")}) == 3


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give --task, or --jobs for many"),
        (["--task=draw"], "invalid choice: 'draw'"),
        (["--task=t2i", "--prompt=a"], "text_to_image needs --output, a name that ends in .png"),
        (["--task=t2i", "--prompt=a", "--output=OUT/a.jpg"], "text_to_image needs --output, a name that ends in .png"),
        (["--task=t2i", "--output=OUT/a.png"], "--prompt is not given; text_to_image needs one"),
        (["--task=t2i", "--prompt=", "--output=OUT/a.png"], '--prompt is "", expected a text that is not empty'),
        (
            ["--task=t2i", "--prompt=a", "--max-tokens=3", "--output=OUT/a.png"],
            "text_to_image takes no --max-tokens; it takes",
        ),
        (["--task=t2i", "--prompt=a", "--kind=pose", "--output=OUT/a.png"], "text_to_image takes no --kind"),
        (["--task=t2i", "--prompt=a", "--steps=many", "--output=OUT/a.png"], '--steps is "many", expected a whole'),
        (["--task=t2i", "--prompt=a", "--guidance-interval=1", "--output=OUT/a.png"], "expected two numbers, 0 <= low"),
        (["--task=t2i", "--prompt=a", "--height=36", "--output=OUT/a.png"], "height is 36, expected a multiple of 8"),
        (["--task=t2i", "--prompt=a", "--output=OUT/photo.png/a.png"], "cannot write into"),
        (["--task=t2i", "--prompt=a", "--output=OUT/folder.png"], "folder.png is a folder, expected the name"),
        (["--task=caption", "--image=OUT/gone.png"], "gone.png: there is no such file"),
        (["--task=caption", "--image=OUT/photo.png", "--image=OUT/photo.png"], "caption needs 1 image (--image), 2"),
        (["--task=perceive", "--image=OUT/photo.png", "--output=OUT/a.png"], "--kind is not given, expected one of"),
        (["--task=vqa", "--image=OUT/photo.png"], "--question is not given; vqa needs one"),
        (["--task=t2i", "--prompt=a", "--batch=0"], "--batch is 0, expected 1 to"),
        (["--jobs=OUT/jobs.jsonl"], "--jobs needs --output, a folder"),
        (["--jobs=OUT/jobs.jsonl", "--steps=3", "--output=OUT/o"], "--steps goes into the lines of the jobs file"),
        (["--jobs=OUT/gone.jsonl", "--output=OUT/o"], "gone.jsonl: there is no such jobs file"),
        (["--jobs=OUT", "--output=OUT/o"], "is a folder, expected a file"),
        (["--jobs=/dev/zero", "--output=OUT/o"], "is a device, pipe or socket"),
        (["--jobs=OUT/one.jsonl", "--output=OUT/photo.png"], "photo.png: File exists"),
        (["--task=t2i", "--prompt=a", "--output=OUT/photo.png"], "photo.png is there already; choose another --output"),
        (["--task=t2i", "--prompt=a", "--count=2", "--output=OUT/b.png"], "b_1.png is there already"),
        (["--task=t2i", "--prompt=a", "--output=OUT/\0/a.png"], "cannot write into"),
        (["--task=t2i", "--prompt=a", "--batch=1e9"], "invalid int value: '1e9'"),
        (["--task=t2i", "--prompt=a", "--batch=100000"], "--batch is 100000, expected 1 to 65536"),
        (
            ["--task=t2i", "--prompt=a", "--seed=1180591620717411303424", "--output=OUT/a.png"],
            "expected a whole number",
        ),
        (
            ["--task=t2i", "--prompt=a", "--seed=-1", "--output=OUT/a.png"],
            "--seed is -1, expected a whole number from 0",
        ),
        (["--task=t2i", "--prompt=a", "--seed=1.5", "--output=OUT/a.png"], '--seed is "1.5", expected a whole number'),
        (["--task=t2i", "--prompt=a", "--seed=" + "9" * 5000, "--output=OUT/a.png"], "--seed is "),
        (
            ["--task=t2i", "--prompt=a", "--guidance-scale=nan", "--output=OUT/a.png"],
            "--guidance-scale is NaN, expected",
        ),
        (["--task=t2i", "--prompt=a", "--guidance-scale=inf", "--output=OUT/a.png"], "--guidance-scale is Infinity"),
        (["--task=t2i", "--prompt=a", "--shift=-inf", "--output=OUT/a.png"], "--shift is -Infinity, expected a number"),
        (["--task=t2i", "--prompt=a", "--height=10000000", "--output=OUT/a.png"], "height is 10000000, expected"),
        (
            ["--task=t2i", "--prompt=a", "--width=0", "--output=OUT/a.png"],
            "--width is 0, expected a whole number of at",
        ),
        (
            ["--task=t2i", "--prompt=a", "--count=1000000", "--output=OUT/a.png"],
            "--images-per-prompt is 1000000, expected",
        ),
        (["--task=t2i", "--prompt=\udcff", "--output=OUT/a.png"], "expected a text that is not empty"),
        (["--task=t2i", "--prompt=a", "--weights=ema", "--output=OUT/a.png"], "--weights goes with a run's folder"),
        (["--task=t2i", "--prompt=a", "--weights=best", "--output=OUT/a.png"], "invalid choice: 'best'"),
        (["--task=edit", "--instruction=a", "--image=OUT", "--output=OUT/a.png"], "is a folder, expected a file"),
        (["--task=edit", "--instruction=a", "--image=/dev/zero", "--output=OUT/a.png"], "is a device, pipe or socket"),
        (
            ["--task=edit", "--instruction=a", "--image=OUT/one.jsonl", "--output=OUT/a.png"],
            "it is no image of a known",
        ),
    ],
)
def test_errors_are_one_line(command, opened, tiny_bundle, photo, tmp_path, capsys, arguments, message):
    (tmp_path / "folder.png").mkdir()
    row = json.dumps({"id": "x", "task": "text_to_image", "prompt": "a"}) + "\n"
    (tmp_path / "jobs.jsonl").write_text(row * 2)
    (tmp_path / "one.jsonl").write_text(row)
    (tmp_path / "b_1.png").write_text("mine")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    arguments = [argument.replace("OUT", str(tmp_path)) for argument in arguments]
    assert run(command, f"--bundle={tiny_bundle}", *arguments) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert "object at 0x" not in error and ".partial" not in error and "Errno" not in error
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_bundle_that_will_not_do(command, tiny_bundle, tmp_path, capsys):
    arguments = ["--task=t2i", "--prompt=a", f"--output={tmp_path}/a.png"]
    lacking = shutil.copytree(tiny_bundle, tmp_path / "lacking")
    content = json.loads((lacking / "config.json").read_text())
    write_content(lacking, content | {"text_encoder": None})
    bare = shutil.copytree(tiny_bundle, tmp_path / "bare")
    shutil.rmtree(bare / "tokenizer")
    for bundle, message in (
        (tmp_path / "nowhere", "there is no such bundle"),
        (tmp_path, "is not a bundle"),
        (lacking, "lacks text_encoder, it has transformer, autoencoder"),
        (bare, "is not as it was written: tokenizer/tokenizer.json is missing"),
    ):
        assert run(command, f"--bundle={bundle}", *arguments) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error
        jobs = tmp_path / "jobs.jsonl"
        jobs.write_text('{"task": "text_to_image", "prompt": "a"}')
        assert run(command, f"--bundle={bundle}", f"--jobs={jobs}", f"--output={tmp_path}/out") == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_keep_what_is_done(command, tiny_bundle, tmp_path, capsys, monkeypatch, request, number, status):
    class Struck:
        sizes, edit_limit = ImageSizes(16, 64), 64

        def load(self):
            pass

        def generate(self, prompts, *, seed, **options):
            if "stop" in prompts:
                os.kill(os.getpid(), number)
            return [Image.new("RGB", (16, 16)) for _ in prompts]

    monkeypatch.setattr(command.Model, "open", lambda self, devices=1: [Struck()])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us with it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    rows = [{"task": "text_to_image", "prompt": prompt} for prompt in ("a", "b", "stop", "c")]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [f"--bundle={tiny_bundle}", f"--jobs={tmp_path}/jobs.jsonl", f"--output={tmp_path}/out", "--batch=1"]
    assert run(command, *arguments) == status
    assert capsys.readouterr().err == ("interrupted: 2 of 4 jobs are done and kept; the same command resumes there\n")
    assert [json.loads(line)["id"] for line in open(tmp_path / "out/results.jsonl")] == ["000001", "000002"]
    arguments = [f"--bundle={tiny_bundle}", "--task=t2i", "--prompt=stop", f"--output={tmp_path}/a.png"]
    assert run(command, *arguments) == status
    assert capsys.readouterr().err == "interrupted: nothing was written\n"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_damaged_weights_are_one_error(command, tiny_bundle, tmp_path, capsys):
    damaged = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, damaged)
    for path in (damaged / "transformer").rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(b"")
    (tmp_path / "jobs.jsonl").write_text(
        '{"task": "text_to_image", "prompt": "a"}\n{"task": "text_to_image", "prompt": "b"}\n'
    )
    assert run(command, f"--bundle={damaged}", f"--jobs={tmp_path}/jobs.jsonl", f"--output={tmp_path}/out") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: {damaged} is not as it was written: transformer/")
    assert "has 0 bytes, expected" in line
    assert (tmp_path / "out/results.jsonl").read_text() == ""


def test_memory_that_is_short_is_said(command, tiny_bundle, tmp_path, capsys, monkeypatch):
    class Full:
        sizes, edit_limit = ImageSizes(16, 64), 64

        def generate(self, prompts, **options):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nand pages more")

    monkeypatch.setattr(command.Model, "open", lambda self, devices=1: [Full()])
    assert run(command, f"--bundle={tiny_bundle}", "--task=t2i", "--prompt=a", f"--output={tmp_path}/a.png") == 1
    assert capsys.readouterr().err == (
        "error: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; try a smaller --batch, --low-memory or "
        "--quantize=int8\n"
    )


def test_help_teaches(command, capsys):
    assert run(command, "--help") == 0
    said = capsys.readouterr().out
    for task in command.TASKS:
        assert f"--task={task} " in said
    for key in command.OPTIONS:
        assert f"--{key.replace('_', '-')} " in said


def test_runs_from_a_checkout(tmp_path):
    """As a user calls it, from another folder, without the package installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--bundle=b", "--task=caption", "--image=none.png"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr == "error: image none.png: there is no such file\n"
