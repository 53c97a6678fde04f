"""A builder that is killed, or whose model fails, goes on and asks nothing twice. The model is a real HTTP server."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from unialign_jax.evaluation.building import stages

from .conftest import ROOT, chat, filled

pytestmark = pytest.mark.slow

COMMAND = """
import sys
from unialign_jax.command_line import Parser, run_command
from unialign_jax.evaluation.building import command
parser = Parser()
command.add_arguments(parser)
sys.exit(run_command(lambda: command.run(parser.parse_args())))
"""


@pytest.fixture
def fresh(model):
    model.forget()
    model.behave = lambda group, text, times: None
    yield model
    model.behave = lambda group, text, times: None


@pytest.mark.slow
def test_killed_while_it_embeds_and_drafts(small, build, fresh, tmp_path):
    """kill -9 in the middle of either stage: then every question was asked once, but for those in flight."""
    folder = tmp_path / "set"
    options = [f"--output={folder}", *small.options[:-1], f"--embedder={fresh.url}", "--embedder-model=gme"]
    options += [f"--judge={fresh.url}", "--judge-model=fake", "--judge-concurrency=2"]
    held = threading.Event()

    def hold_after(kind, count):
        def behave(group, text, times):
            if (group == "embeddings") == (kind == "embeddings") and group != "rubric":
                done = sum(
                    fresh.groups[name] for name in fresh.groups if (name == "embeddings") == (kind == "embeddings")
                )
                if done > count:
                    held.wait(20)

        return behave  # fmt: skip

    for kind, count, file in (("embeddings", 5, "vectors.jsonl"), ("drafts", 9, "answers.jsonl")):
        held.clear()
        fresh.behave = hold_after(kind, count)
        process = subprocess.Popen([sys.executable, "-c", COMMAND, *options], cwd=ROOT, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not (folder / file).exists() or len((folder / file).read_bytes().splitlines()) < count - 3:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.02)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            held.set()
    with open(folder / "answers.jsonl", "a") as file:
        file.write('{"key": "torn')  # as a kill in the middle of a line leaves it
    known = len((folder / "answers.jsonl").read_bytes().splitlines()) - 2  # without the header and the torn line
    assert 5 <= known < 16 and not (folder / "draft").exists()
    fresh.behave = lambda group, text, times: None
    assert build(*options) == 0
    drafting = sum(count for group, count in fresh.groups.items() if group != "embeddings")
    assert 12 <= fresh.groups["embeddings"] <= 12 + 8  # 8 at a time
    assert 20 <= drafting <= 20 + 2
    assert len(stages.read_rows(folder / "validate/items.jsonl")) == 16


@pytest.mark.parametrize("name", stages.NAMES)
def test_interrupted_in_a_stage(small, build, fresh, tmp_path, monkeypatch, name):
    """Whatever stage is interrupted when it has done its work: it is done again, and no endpoint is asked again."""
    folder = tmp_path / "set"
    options = [f"--output={folder}", *small.options, f"--judge={fresh.url}", "--judge-model=fake"]
    real = stages.write_json

    def interrupt(path, content):
        if path.name == "manifest.json" and content["stage"] == name:
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(stages, "write_json", interrupt)
    assert build(*options) == 130
    assert not (folder / name).exists() and all((folder / done).is_dir() for done in before(name))
    monkeypatch.setattr(stages, "write_json", real)
    assert build(*options) == 0
    assert set(fresh.asked.values()) == {1} and sum(fresh.asked.values()) == 20


def before(name):
    return stages.NAMES[: stages.NAMES.index(name)]


def test_an_endpoint_that_fails_at_times(small, build, fresh, tmp_path):
    """The first request for each draft gets 503, or rubbish: it is asked again, and all is well."""
    fresh.behave = lambda group, text, times: (
        None if times > 1 or group == "rubric" else (503, "") if group == "t2i_long" else (200, chat("I cannot."))
    )
    folder = tmp_path / "set"
    options = [f"--output={folder}", *small.options, f"--judge={fresh.url}", "--judge-model=fake"]
    assert build(*options, "--judge-concurrency=16") == 0
    assert all(row["text"] for row in stages.read_rows(folder / "draft/drafts.jsonl"))


def test_an_endpoint_that_fails_for_one_image(small, build, fresh, tmp_path, command_refuses):
    """No draft stage without an answer; what was answered is kept, and the next run asks for the rest alone."""
    folder, failing = tmp_path / "set", []

    def behave(group, text, times):
        with fresh.lock:
            if group == "t2i_long" and (not failing or text == failing[0]):
                failing[:] = [text]
                return 500, "broken"

    fresh.behave = behave
    options = [f"--output={folder}", *small.options, f"--judge={fresh.url}", "--judge-model=fake", "--judge-attempts=1"]
    command_refuses("evaluate", ["build-semgen", *options], "1 of 16 questions got no answer", "status 500", "kept")
    assert not (folder / "draft").exists()
    fresh.forget()
    fresh.behave = lambda group, text, times: None
    assert build(*options) == 0
    assert fresh.groups == {"t2i_long": 1, "rubric": 4}


def test_rubbish_is_flagged_and_a_reviewer_may_write_the_prompt(small, build, fresh, tmp_path, command_refuses):
    rubbish = itertools.cycle(["", "not JSON", '{"edits": ["Add a hat."]}', '{"edits": 3}'])
    fresh.behave = lambda group, text, times: (200, chat(next(rubbish))) if group == "edit_multi" else None
    folder = tmp_path / "set"
    options = [f"--output={folder}", *small.options, f"--judge={fresh.url}", "--judge-model=fake"]
    options += ["--judge-attempts=1", "--judge-concurrency=1"]
    # An empty answer is none: it may come yet. The others are answers that say nothing.
    command_refuses("evaluate", ["build-semgen", *options], "1 of 16 questions got no answer", "empty")
    rubbish = itertools.cycle(["{}"])
    assert build(*options) == 0
    items = stages.read_rows(folder / "validate/items.jsonl")
    flags = [row["flags"] for row in items if row["group"] == "edit_multi"]
    assert [found[0].partition(":")[0] for found in flags] == ["unreadable"] * 4
    assert sum("no JSON object" in found[0] for found in flags) == 1
    command_refuses("evaluate", ["build-semgen", "freeze", "--draft", options[0]], "4 prompts have no text")
    [sheet] = (folder / "review").glob("*.csv")
    accepted = filled(sheet, tmp_path / "accepted.csv", lambda row: {"decision": "accept", "editor": "Ada"})
    command_refuses("evaluate", ["build-semgen", "import-review", options[0], f"--review={accepted}"], "4 rows")
    written = {"decision": "edit", "editor": "Ada", "text": "Add a hat.Remove the dog.Paint the wall blue."}
    done = filled(sheet, tmp_path / "done.csv", lambda row: {"decision": "accept", "editor": "Ada"} if row["prompt"]
                  else written)  # fmt: skip
    assert build("import-review", options[0], f"--review={done}") == 0 and build("freeze", options[0]) == 0
    lines = stages.read_rows(folder / "benchmark/semgen_bench.jsonl")
    assert {line["edit_multi"] for line in lines} == {"Add a hat. Remove the dog. Paint the wall blue."}
    assert {line["status"] for line in lines} == {"human_refined"}


def test_a_key_that_is_refused(small, fresh, tmp_path, command_refuses):
    fresh.behave = lambda group, text, times: (401, "no such key")
    options = [f"--output={tmp_path / 'set'}", *small.options, f"--judge={fresh.url}", "--judge-model=fake"]
    command_refuses("evaluate", ["build-semgen", *options], "status 401", "no such key")
    options += [f"--embedder={fresh.url}", "--embedder-model=gme"]
    command_refuses("evaluate", ["build-semgen", *options], "--embedder", "status 401")


def test_what_a_change_makes_be_done_again(small, build, fresh, tmp_path, capsys):
    """Another rule: validate and what follows. Another filter that keeps the same: nothing after it."""
    options = [f"--output={tmp_path / 'set'}", *small.options, f"--judge={fresh.url}", "--judge-model=fake"]
    assert build(*options) == 0
    capsys.readouterr()
    assert build(options[0], "--long-tokens=250") == 0
    said = capsys.readouterr().out
    assert "validate: done again, since long_tokens was 200 and is 250" in said and "length 4" in said
    assert "export: done again, since validate/items.jsonl has changed" in said and "draft: done before" in said
    sheet = max((tmp_path / "set/review").glob("*.csv"), key=lambda path: path.stat().st_mtime_ns)
    sheet.write_text("half filled in")
    assert build(options[0], "--min-side=33") == 0 and sheet.read_text() == "half filled in"
    said = capsys.readouterr().out
    assert "filter: done again, since min_side was 32 and is 33" in said
    assert "select: done before" in said
    (small_file := tmp_path / "set/draft/drafts.jsonl").write_text(small_file.read_text().replace("two", "three"))
    assert build(options[0]) == 0
    assert "draft/drafts.jsonl was changed after it was written" in capsys.readouterr().out
    assert set(fresh.asked.values()) == {1}


def test_drafts_that_break_a_rule_are_asked_for_again(small, build, fresh, tmp_path):
    """The first draft is short, the second is not: the flags go with the question."""
    fresh.behave = lambda group, text, times: (
        (200, chat('{"prompt": "A short one."}')) if group == "t2i_long" and "turned down" not in text else None
    )
    folder = tmp_path / "set"
    options = [f"--output={folder}", *small.options, f"--judge={fresh.url}", "--judge-model=fake", "--redraft=2"]
    assert build(*options) == 0
    assert fresh.groups["t2i_long"] == 8  # once more each, not twice
    again = [text for _, _, text, _ in fresh.bodies if "turned down" in text]
    assert len(again) == 4 and all("length: 4 tokens, expected at least 200" in text for text in again)
    items = stages.read_rows(folder / "validate/items.jsonl")
    assert {row["attempt"] for row in items if row["group"] == "t2i_long"} == {1} and not any(r["flags"] for r in items)


def test_an_excluded_image_is_replaced_and_no_other_changes(small, build, fresh, tmp_path):
    folder = tmp_path / "set"
    options = [f"--output={folder}", *small.options, f"--judge={fresh.url}", "--judge-model=fake"]
    assert build(*options) == 0
    was = stages.read_rows(folder / "select/images.jsonl")
    fresh.forget()
    assert build(options[0], f"--exclude={was[1]['key']}") == 0
    now = stages.read_rows(folder / "select/images.jsonl")
    assert [old["key"] == new["key"] for old, new in zip(was, now, strict=True)] == [True, False, True, True]
    assert now[1]["image_id"] == 2 and now[1]["cluster"] == was[1]["cluster"]
    assert sum(fresh.asked.values()) == 5  # four drafts and a judgement on reasoning
    assert json.loads((folder / "settings.json").read_text())["settings"]["exclude"] == [was[1]["key"]]
