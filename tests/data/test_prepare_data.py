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
        (["--format=shapes", "--num-records=0"], "--num-records is 0, expected 1 to 1000000000"),
        (["--format=csv"], "invalid choice: 'csv'"),
        (["--format=parquet"], "--format=parquet needs --source and --stream"),
        (["--stream=edit"], "needs --source and --stream"),
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


def rows_file(folder, rows, name="rows.jsonl"):
    Image.new("RGB", (20, 20), (9, 9, 9)).save(folder / "a.png")
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def question(asked, answered):
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    return {"image": "a.png", "conversations": turns}


def test_cut_texts_are_counted(command, tmp_path, capsys):
    """Over all records: words always, tokens and cuts with the tokenizer and the length of the run to come."""
    rows = [{"image": ["a.png"], "conversations": [{"value": "red " * words}]} for words in (2, 6, 20, 40)]
    path = rows_file(tmp_path, rows)
    arguments = ["--format=jsonl", f"--source={path}", "--stream=text_to_image"]
    command([*arguments, f"--output={tmp_path / 'words'}"])
    said = capsys.readouterr().out
    assert "caption: 4 texts of 17 words on average (67 characters), 40 at most\n" in said and "are cut" not in said
    command([*arguments, f"--output={tmp_path / 'tokens'}", "--tokenizer=shapes", "--text-length=11"])
    said = capsys.readouterr().out
    assert "17 tokens on average, 40 at most" in said
    # 10 of 20 and 30 of 40 tokens go, of 68 in all.
    assert "2 of 4 captions do not fit text_length 11 and are cut: 40 of 68 tokens (59%) are lost" in said
    assert 'rows.jsonl:3 ends after "red red red red red red red red red red"' in said
    command([*arguments, f"--output={tmp_path / 'all'}", "--tokenizer=shapes", "--text-length=41"])
    assert "are cut" not in capsys.readouterr().out
    assert len(open_records(tmp_path / "tokens")) == len(open_records(tmp_path / "all")) == 4, "they are kept"


def test_questions_that_leave_no_answer_are_left_out_with_a_count(command, tmp_path, capsys):
    rows = [question("red " * 9, "blue"), question("red " * 40, "blue"), question("red?", "blue " * 40)]
    path = rows_file(tmp_path, rows)
    arguments = ["--format=jsonl", f"--source={path}", "--stream=vqa", "--max-bad-fraction=0.5"]
    command([*arguments, f"--output={tmp_path / 'o'}", "--tokenizer=shapes", "--text-length=24"])
    said = capsys.readouterr().out
    assert "1 x question longer than the text length" in said and "rows.jsonl:2: question longer" in said
    assert "1 of 2 answers do not fit text_length 24" in said and "questions do not fit" not in said
    source = open_records(tmp_path / "o")
    assert [source[i].key for i in range(len(source))] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_turns_are_told(command, tmp_path, capsys):
    turns = question("red?", "yes")["conversations"] * 3 + [{"from": "human", "value": "and?"}]
    path = rows_file(tmp_path, [{"image": "a.png", "conversations": turns}])
    command(["--format=jsonl", f"--source={path}", "--stream=vqa", f"--output={tmp_path / 'o'}"])
    said = capsys.readouterr().out
    assert "1 rows gave 3 records" in said
    assert "1 turn(s) without a question or without an answer left out" in said


def test_bars_are_not_drawn_into_pipes(command, source, tmp_path, capsys):
    command(["--format=jsonl", f"--source={source}", "--stream=text_to_image", f"--output={tmp_path / 'o'}"])
    command(["--format=shapes", "--num-records=2", "--image-size=16", f"--output={tmp_path / 's'}"])
    assert capsys.readouterr().err == ""


def test_strange_texts_reach_the_terminal_as_one_plain_line(command, tmp_path, capsys):
    rows = [{"image": ["a.png"], "conversations": [{"value": "\x1b[31mred\x07 " * 20}]}] * 3
    rows.append({"image": ["\x1b[2J\n.png"], "conversations": [{"value": "a"}]})
    path = rows_file(tmp_path, rows)
    arguments = ["--format=jsonl", f"--source={path}", "--stream=text_to_image", "--max-bad-fraction=0.5"]
    command([*arguments, f"--output={tmp_path / 'o'}", "--tokenizer=shapes", "--text-length=8"])
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and "\\x1b[2J\\n.png" in said


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--image-size=10000000"], ["--image-size is 10000000", "16 to 4096"]),
        (["--image-size=15"], ["--image-size is 15"]),
        (["--image-size=-64"], ["--image-size is -64"]),
        (["--image-size=64.5"], ["--image-size", "64.5"]),
        (["--image-size=" + "9" * 5000], ["--image-size"]),
        (["--num-records=0"], ["--num-records is 0"]),
        (["--num-records=1e6"], ["--num-records", "1e6"]),
        (["--num-records=99999999999999"], ["--num-records is 99999999999999"]),
        (["--seed=-1"], ["--seed is -1"]),
        ([f"--seed={2**70}"], ["--seed is 1180591620717411303424"]),
        (["--seed=one"], ["--seed"]),
        (["--teacher-width=100000000"], ["--teacher-width is 100000000"]),
        (["--teacher-width=-1"], ["--teacher-width is -1"]),
        (["--threads=0"], ["--threads is 0"]),
        (["--threads=1000000"], ["--threads is 1000000"]),
        (["--max-side=0"], ["--max-side is 0"]),
        (["--max-bad-fraction=nan"], ["--max-bad-fraction is nan", "0 to 1"]),
        (["--max-bad-fraction=-0.1"], ["--max-bad-fraction is -0.1"]),
        (["--max-bad-fraction=10"], ["--max-bad-fraction is 10"]),
        (["--max-bad-fraction=10%"], ["--max-bad-fraction"]),
        (["--stream=video"], ["--stream", "video"]),
        (["--stream="], ["--stream"]),
        (["--tokenizer=shapes"], ["takes no --source, --tokenizer"]),
        (["--format=csv"], ["--format", "csv"]),
        (["--recursive"], ["--recursive"]),
        (["stray"], ["stray"]),
    ],
    ids=range(26),
)
def test_bad_command_lines(command_refuses, tmp_path, arguments, words):
    """At once, with nothing written."""
    command_refuses("prepare_data", ["--format=shapes", f"--output={tmp_path / 'o'}", *arguments], *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--source={}"], ["is a folder", "it holds rows.jsonl"]),
        (["--source={}/none.jsonl"], ["none.jsonl does not exist"]),
        (["--source={}/*.csv"], ["no file matches the pattern", "*.csv"]),
        (["--source={}/*"], ["a.png is a PNG image"]),
        (["--source=/dev/zero"], ["/dev/zero", "device"]),
        (["--source={}/rows.jsonl/rows.jsonl"], ["rows.jsonl/rows.jsonl"]),
        (["--source=s3://bucket/rows.jsonl"], ["s3://bucket/rows.jsonl cannot be opened", "s3fs"]),
        (["--source="], ["needs --source"]),
        (["--source={}/rows.jsonl", "--text-length=32"], ["--text-length needs --tokenizer"]),
        (["--source={}/rows.jsonl", "--tokenizer=shapes", "--text-length=1"], ["--text-length is 1"]),
        (["--source={}/rows.jsonl", "--tokenizer=shapes", "--text-length=100000"], ["--text-length is 100000"]),
        (["--source={}/rows.jsonl", "--tokenizer={}/nowhere"], ["nowhere holds no tokenizer"]),
        (["--source={}/rows.jsonl", "--tokenizer={}"], ["holds no tokenizer"]),
        (["--source={}/rows.jsonl", "--holdout=0.9"], ["--holdout is 0.9", "0 to 0.5"]),
        (["--source={}/rows.jsonl", "--min-side=0"], ["--min-side is 0"]),
        (["--source={}/rows.jsonl", "--max-aspect=nan"], ["--max-aspect is nan"]),
        (["--source={}/rows.jsonl", "--processes=0"], ["--processes is 0"]),
        (["--source={}/rows.jsonl", "--near-duplicates=64"], ["--near-duplicates is 64"]),
        (["--source={}/rows.jsonl", "--runner-options=--x"], ["--runner-options needs --runner"]),
        (["--source={}/rows.jsonl", "--class-names={}/none"], ["none"]),
        (["--source={}/rows.jsonl", "--animated=maybe"], ["--animated", "maybe"]),
        (["--source={}/rows.jsonl", "--output={}/a.png"], ["a.png is there and is not a folder"]),
        (["--source={}/rows.jsonl", "--output={}/a.png/o"], ["cannot write", "a.png/o"]),
        (["--source={}/rows.jsonl", "--output={}"], ["not written by this command (a.png"]),
        (["--source={}/rows.jsonl", "--output={}", "--overwrite"], ["not written by this command (a.png"]),
        (["--source={}/rows.jsonl", "--output=/proc/nowhere/o"], ["cannot write /proc/nowhere/o"]),
    ],
    ids=range(26),
)
def test_bad_sources_and_outputs(command_refuses, source, tmp_path, arguments, words):
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    arguments = [argument.format(tmp_path) for argument in arguments]
    output = [] if any("--output" in argument for argument in arguments) else [f"--output={tmp_path / 'o'}"]
    command_refuses("prepare_data", ["--format=jsonl", "--stream=text_to_image", *output, *arguments], *words)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_pattern_that_is_also_a_name(command, source, tmp_path):
    source.rename(tmp_path / "rows[1].jsonl")
    command(
        ["--format=jsonl", f"--source={tmp_path}/rows[1].jsonl", "--stream=text_to_image", f"--output={tmp_path / 'o'}"]
    )
    assert len(open_records(tmp_path / "o")) == 19
