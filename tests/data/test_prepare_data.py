"""The command: what it writes, what it says, how it fails."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from unialign_jax.data.records import open_records

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "prepare_data.py"


@pytest.fixture(scope="module")
def command():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def source(tmp_path):
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "a.png")
    rows = [{"image": ["a.png"], "conversations": [{"value": f"caption {i}"}]} for i in range(19)]
    rows.append({"image": ["gone.png"], "conversations": [{"value": "lost"}]})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_shapes_twice(command, tmp_path, capsys):
    arguments = ["--format=shapes", f"--output={tmp_path / 'out'}", "--num-records=3", "--image-size=16"]
    command(arguments)
    said = capsys.readouterr().out
    assert said.count("written, 3") == 5
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    command(arguments)
    assert capsys.readouterr().out.count("already there, 3") == 5
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(SystemExit, match="error: .* exists already; .*--overwrite"):
        command([*arguments, "--seed=5"])
    assert len(open_records(tmp_path / "out" / "vqa")) == 3
    command([*arguments, "--seed=5", "--overwrite", "--stream=vqa"])
    assert open_records(tmp_path / "out" / "vqa").metadata.parameters["seed"] == 5
    assert open_records(tmp_path / "out" / "edit").metadata.parameters["seed"] == 0


def test_jsonl_with_a_bad_row(command, source, tmp_path, capsys):
    output = tmp_path / "out"
    command(["--format=jsonl", f"--source={source}", "--stream=text_to_image", f"--output={output}"])
    said = capsys.readouterr().out
    assert "written, 19 text_to_image records" in said
    assert "skipped 1 of 20 rows:\n  1 x image file cannot be read" in said
    assert f"{source}:20: image file cannot be read: {tmp_path / 'gone.png'}" in said
    assert open_records(output)[18].caption == "caption 18"
    with pytest.raises(SystemExit, match="exists already"):
        command(["--format=jsonl", f"--source={source}", "--stream=text_to_image", f"--output={output}"])


def test_too_many_bad_rows_leave_nothing(command, source, tmp_path, capsys):
    output = tmp_path / "deep" / "out"
    arguments = [f"--source={source}", "--stream=text_to_image", f"--output={output}", "--max-bad-fraction=0.01"]
    with pytest.raises(SystemExit, match="error: 1 of 20 rows are bad"):
        command(["--format=jsonl", *arguments])
    assert os.listdir(output.parent) == []
    assert "skipped 1 of 20 rows" in capsys.readouterr().out


def test_many_files_by_pattern(command, source, tmp_path):
    (tmp_path / "rows2.jsonl").write_text(source.read_text().splitlines()[0] + "\n")
    command(
        ["--format=jsonl", f"--source={tmp_path}/rows*.jsonl", "--stream=text_to_image", f"--output={tmp_path / 'o'}"]
    )
    assert len(open_records(tmp_path / "o")) == 20


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--format=jsonl", "--source=none.jsonl", "--stream=edit"], "error: source none.jsonl does not exist"),
        (["--format=jsonl", "--stream=edit"], "--format=jsonl needs --source and --stream"),
        (["--format=shapes", "--source=x"], "takes no --source"),
        (["--format=shapes", "--num-records=0"], "--num-records is 0, expected at least 1"),
        (["--format=parquet"], "invalid choice: 'parquet'"),
    ],
)
def test_bad_arguments(command, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command([*arguments, f"--output={tmp_path / 'out'}"])
    assert stopped.value.code not in (0, None)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_runs_from_a_checkout(tmp_path):
    """As a user calls it, from another folder, without the package installed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--format=jsonl", "--source=none", "--stream=vqa", f"--output={tmp_path / 'o'}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert run.returncode == 1
    assert run.stderr == "error: source none does not exist\n"
    assert run.stdout == ""
