"""Every suite from its data to its report on a tiny model, with a judge that fails at first; and what a kill leaves."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from unialign_jax.evaluation.suite import read_scores
from unialign_jax.evaluation.suites import SUITES, find_suite

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "launch/evaluate.py"
PATIENCE = 60  # seconds that a process of its own may take to start


@pytest.fixture(autouse=True)
def the_tests_own_cache(monkeypatch):
    """Compiled programs stay where the session has them."""
    monkeypatch.setattr("unialign_jax.evaluation.running.keep_compiled", lambda directory: None)
    monkeypatch.setattr("unialign_jax.parallel.compiled.keep_compiled", lambda directory: None)
    monkeypatch.setattr("unialign_jax.data.endpoint.Endpoint.first_pause", 0.01)


@pytest.fixture
def evaluate(launch_command):
    """A function (arguments) -> the exit status of the command."""

    def run(*arguments):
        try:
            return launch_command("evaluate").main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            return stopped.code

    return run


def sampler(suite):
    """Options under which every suite's programs are the same few and small."""
    images = {"text_to_image", "edit"} & set(suite.tasks)
    return ["--batch=1", "--steps=1", *(["--height=32", "--width=32"] if images else ["--max-tokens=8"])]


@pytest.fixture
def judge_options(chat_server, judge_answer):
    """A judge that knows every suite's questions, but fails a third of them once, each in its way."""
    faults = [
        (500, {}, b"out of order"),
        (429, {"Retry-After": "0"}, b""),
        (None, {}, b""),
        (200, {"Content-Length": "100"}, b'{"choices'),
        (200, {}, b"<html>busy</html>"),
        (200, {}, [b" ", b" "]),
        (200, {}, chat_server.answer("I would rather talk about the weather.")),
    ]
    order, lock = [], threading.Lock()

    def behave(name, times):
        with lock:
            order.append(name) if name not in order else None
            number = order.index(name)
        if times == 1 and number % 3 == 0:
            return faults[number // 3 % len(faults)]
        return 200, {}, chat_server.answer(judge_answer(json.loads(name)))

    def name_of(body):
        """The same for all attempts, whatever their temperature."""
        return json.dumps({key: value for key, value in body.items() if key != "temperature"})

    chat_server.name_of, chat_server.behave = name_of, behave
    return [f"--judge={chat_server.url}", "--judge-model=m", "--judge-timeout=5"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_a_suite_from_data_to_report(
    name, evaluate, tiny_bundle, make_data, scoring_options, judge_options, chat_server, tmp_path, capsys
):
    suite, run = find_suite(name), tmp_path / "run"
    data = make_data(name, tmp_path / "data")
    made = [name, "generate", f"--bundle={tiny_bundle}", *data, f"--output={run}", "--limit=1", *sampler(suite)]
    assert evaluate(*made) == 0, capsys.readouterr().err
    results = run / "model" / "results.jsonl"
    before = results.read_bytes()
    assert evaluate(*made) == 0
    assert results.read_bytes() == before  # nothing is made twice

    options = [*scoring_options(name, run), *(judge_options if suite.judge_calls else ())]
    for mode in ("official", "corrected"):
        assert evaluate(name, "score", f"--output={run}", f"--mode={mode}", *options) == 0, capsys.readouterr().err
        asked = sum(chat_server.asked.values())
        scores = read_scores(run / mode / "scores.jsonl")
        assert scores and not any(score.failed for score in scores)
        figures = suite.figures(scores, mode)
        assert 0 <= figures[suite.leading] <= suite.scale
        assert evaluate(name, "score", f"--output={run}", f"--mode={mode}", *options) == 0
        assert sum(chat_server.asked.values()) == asked  # nothing is asked twice
        assert read_scores(run / mode / "scores.jsonl") == scores
        assert evaluate(name, "report", f"--output={run}", f"--mode={mode}") == 0, capsys.readouterr().err
        report = json.loads((run / mode / "report.json").read_text())
        assert report and all((run / mode / f"report.{kind}").stat().st_size for kind in ("md", "html"))
    how = json.loads((run / "settings.json").read_text())["scoring"]["official"]
    assert how["items"] == len(scores) and how["failed"] == 0
    assert not math.isnan(figures[suite.leading])


# Kills


def started(*arguments):
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def wait_until(is_true, process):
    """Waits for what a process does."""
    deadline = time.monotonic() + PATIENCE
    while not is_true():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def semgen_run(launch_command, tiny_bundle, make_data, tmp_path_factory):
    """(folder of a run of SemGen-Bench of eight images, its prompts' option), to be copied."""
    folder = tmp_path_factory.mktemp("semgen")
    data, prompts = make_data("semgen", folder / "data")
    arguments = ["semgen", "generate", f"--bundle={tiny_bundle}", data, f"--output={folder / 'run'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unialign_jax.evaluation.running.keep_compiled", lambda directory: None)
        assert launch_command("evaluate").main([*arguments, *sampler(find_suite("semgen"))]) == 0
    return folder / "run", prompts


@pytest.fixture
def copied_run(semgen_run, tmp_path):
    import shutil

    shutil.copytree(semgen_run[0], tmp_path / "run")
    return tmp_path / "run", semgen_run[1]


@pytest.mark.slow
@pytest.mark.parametrize("sent, status, ends_with", [(signal.SIGKILL, -9, ""), (signal.SIGTERM, 143, "resumes there")])
def test_a_scoring_that_is_killed_loses_no_judgement(
    sent, status, ends_with, evaluate, copied_run, chat_server, judge_answer
):
    run, prompts = copied_run
    go = threading.Event()

    def behave(name, times):
        if len(chat_server.asked) > 5:  # five answers, and the sixth question hangs
            go.wait(PATIENCE)
        return 200, {}, chat_server.answer(judge_answer(json.loads(name)))

    chat_server.behave = behave
    arguments = ["semgen", "score", f"--output={run}", prompts, f"--judge={chat_server.url}", "--judge-model=m"]
    process = started(*arguments, "--judge-concurrency=1")
    wait_until(lambda: len(chat_server.asked) == 6, process)
    if sent == signal.SIGKILL:
        process.kill()
    else:
        process.terminate()
        threading.Timer(0.5, go.set).start()  # what is asked is answered yet, and kept
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == status and said.strip().endswith(ends_with)
    go.set()
    kept = len((run / "judgements.jsonl").read_text().splitlines()) - 1
    assert kept == (5 if sent == signal.SIGKILL else 6) and not (run / "official").exists()
    first = list(chat_server.asked)
    assert evaluate(*arguments) == 0
    times = [chat_server.asked[name] for name in first]
    assert times == [1] * 5 + [2 if sent == signal.SIGKILL else 1]  # the one without an answer alone
    assert len(chat_server.asked) == 16 and set(list(chat_server.asked.values())[6:]) == {1}
    assert len(read_scores(run / "official/scores.jsonl")) == 8


@pytest.mark.slow
def test_a_generation_that_is_killed_makes_nothing_twice(evaluate, tiny_bundle, make_data, tmp_path):
    data, _ = make_data("geneval", tmp_path / "data")
    arguments = ["geneval", "generate", f"--bundle={tiny_bundle}", data, f"--output={tmp_path / 'run'}"]
    arguments += ["--images-per-prompt=20", *sampler(find_suite("geneval")), "--compilation-cache=none"]
    results = tmp_path / "run/model/results.jsonl"
    process = started(*arguments)
    wait_until(lambda: results.exists() and results.read_bytes().count(b"\n") >= 3, process)
    process.kill()
    process.communicate(timeout=PATIENCE)
    done = [json.loads(line) for line in results.read_bytes().split(b"\n")[:-1]]
    assert 3 <= len(done) < 40
    before = {entry["id"]: (results.parent / entry["files"][0]).stat().st_mtime_ns for entry in done}
    assert evaluate(*arguments) == 0
    assert {name: (results.parent / f"{name}.png").stat().st_mtime_ns for name in before} == before
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    assert len({entry["id"] for entry in entries}) == len(entries) == 40
    assert all((results.parent / entry["files"][0]).is_file() for entry in entries)


# Bad input


@pytest.mark.slow
def test_without_a_judge_the_images_are_made_and_kept(command_refuses, tiny_bundle, make_data, tmp_path):
    data, prompts = make_data("semgen", tmp_path / "data")
    run = tmp_path / "run"
    arguments = ["semgen", f"--bundle={tiny_bundle}", data, f"--output={run}", "--limit=1"]
    arguments += sampler(find_suite("semgen"))
    command_refuses("evaluate", [*arguments, "--judge=http://localhost:1/v1", prompts], "--judge-model=NAME")
    command_refuses("evaluate", [*arguments, "--judge=localhost", "--judge-model=m"], "expected a URL")
    judged = ["--judge=http://localhost:1/v1", "--judge-model=m"]
    command_refuses("evaluate", [*arguments, *judged], "--viescore-prompts=DIR")
    command_refuses("evaluate", [*arguments, *judged, prompts, "--judge-attempts=0"], "--judge-attempts is 0")
    assert not run.exists()
    command_refuses("evaluate", arguments, f"evaluate.py semgen score --output={run}", "--judge=URL --judge-model=NAME")
    assert len(list(run.rglob("*.png"))) == 6  # four made, two sources


@pytest.mark.bad_input
@pytest.mark.slow
def test_what_a_run_refuses(command_refuses, evaluate, copied_run, chat_server, tiny_bundle, make_data, tmp_path):
    run, prompts = copied_run
    judged = [f"--judge={chat_server.url}", "--judge-model=m"]
    chat_server.behave = lambda name, times: (401, {}, b"no key")
    score = ["semgen", "score", f"--output={run}"]
    command_refuses("evaluate", [*score, prompts, *judged], "401", "without an API key")
    command_refuses("evaluate", [*score, *judged], "--viescore-prompts=DIR")
    command_refuses("evaluate", ["gedit", "score", f"--output={run}", *judged], "a run of 'semgen'", "this is gedit")
    command_refuses("evaluate", ["semgen", "score", f"--output={tmp_path}", *judged], "no run of a suite")
    (run / "model/fullset/edit_multi/1.png").unlink()
    command_refuses("evaluate", [*score, prompts, *judged], "lacks 1 of 8 results (fullset/edit_multi/1)", "--limit")
    chat_server.behave = lambda name, times: (200, {}, chat_server.answer("[3, 4]"))
    assert evaluate(*score, prompts, *judged, "--limit=1") == 0
    data = json.loads((run / "settings.json").read_text())["request"]["data"]
    more = [f"--bundle={tiny_bundle}", f"--data={data}", *sampler(find_suite("semgen"))]
    command_refuses("evaluate", ["semgen", "generate", *more, f"--output={run}", "--steps=2"], "made with options")
    command_refuses("evaluate", ["semgen", "generate", *more, f"--output={run}", "--mode=corrected"], "made with mode")
    command_refuses(
        "evaluate", ["semgen", "generate", *more, f"--output={tmp_path}"], "was not written by this command"
    )
    other, _ = make_data("geneval", tmp_path / "other")
    arguments = ["geneval", "generate", f"--bundle={tiny_bundle}", other, f"--output={run}"]
    command_refuses("evaluate", arguments, "a run of 'semgen'", "this is geneval")
    command_refuses("evaluate", ["semgen", "generate", *more, f"--output={run}", "--name=../x"], "--name is '../x'")
    (Path(data) / "semgen_bench.jsonl").write_text("{}")
    command_refuses("evaluate", [*score, prompts, *judged], "semgen_bench.jsonl has changed")
