"""launch/evaluate.py compare and list: hand-made runs side by side, what they must share, hours by a measured rate."""

import contextlib
import json
import re
import shlex
from pathlib import Path

import pytest

from unialign_jax.evaluation import comparing, listing
from unialign_jax.evaluation.shapes_suite import Shapes
from unialign_jax.evaluation.suite import Request, Score, Suite, write_scores
from unialign_jax.evaluation.suites import SUITES, find_suite


@pytest.fixture
def make_run(tmp_path):
    """A function (name, values, ...) -> the folder of a run of the shapes suite, whose scores are the values."""

    def make(name, values, *, suite="shapes", first=0, text="text {}", **settings):
        folder = tmp_path / name
        folder.mkdir()
        content = {
            "suite": suite,
            "request": {"mode": "", "seed": 1},
            "model": {"dtype": "float32"},
            "data": {"a": "1"},
        }
        content["items"] = len(values)
        (folder / "settings.json").write_text(json.dumps(content | settings))
        scores = [
            Score(f"{first + n}", "text_to_image", {"exact": value, "leading": value}, text.format(first + n))
            for n, value in enumerate(values)
        ]
        write_scores(folder / content["request"]["mode"] / "scores.jsonl", scores)
        return folder

    return make


def compared(*folders, **options):
    return comparing.compare([comparing.open_run(folder) for folder in folders], **options)


def test_the_difference_of_runs_is_that_of_their_common_items(make_run):
    # The second run does one of four hard items better and none worse; the third has two items alone.
    one, two = make_run("one", [0.0, 1.0, 0.0, 1.0]), make_run("two", [1.0, 1.0, 0.0, 1.0])
    found = compared(one, two)
    name = "text_to_image/exact"
    assert [run["figures"][name]["value"] for run in found["runs"]] == [0.5, 0.75]
    assert found["runs"][0]["difference"] is None
    gap = found["runs"][1]["difference"][name]
    # A resample draws the better item 0 to 4 times of 4: with chance 0.316 never, and 0.0039 each time.
    assert (gap["value"], gap["low"]) == (0.25, 0.0) and gap["high"] == 0.75
    third = make_run("three", [1.0, 0.0, 0.0], first=2)
    found = compared(one, third)
    assert found["items"] == 2 and [run["figures"][name]["value"] for run in found["runs"]] == [0.5, 0.5]
    assert any("has 4 items, of which 2 are compared" in warning for warning in found["warnings"])
    assert any("has 3 items, of which 2 are compared" in warning for warning in found["warnings"])


def test_other_data_and_settings_are_warned_of(make_run):
    one = make_run("one", [1.0, 0.0])
    same = make_run("same", [1.0, 0.0], seconds_per_job=3, unialign_jax="9")
    assert compared(one, same)["warnings"] == []
    request = {"mode": "", "seed": 2}
    other = make_run("other", [1.0, 0.0], data={"a": "2"}, request=request, model={"dtype": "bfloat16"}, items=9)
    said = "\n".join(compared(one, other)["warnings"])
    assert f"a is not the same file in {one} and {other}" in said
    assert "seed is '1'" in said and "'2'" in said and "dtype is 'float32'" in said
    assert "has 2 of the suite's 9 items" in said


def test_files_of_results_are_of_each_model_its_own(make_run):
    def made(name, results):
        return make_run(name, [1.0, 0.0], request={"mode": "", "extra": {"results": results, "detector": None}})

    one, two, three = made("one", "/home/me/one"), made("two", "/home/me/two"), made("three", None)
    assert compared(one, two)["warnings"] == []
    [said] = compared(one, three)["warnings"]
    assert said.startswith("extra results is 'a file' in") and "None" in said


@pytest.mark.bad_input
def test_runs_that_cannot_be_compared(make_run, refuses, tmp_path, command_refuses):
    one = make_run("one", [1.0, 0.0])
    away = make_run("away", [1.0], first=7)
    refuses(lambda: compared(one, away), "no items in common")
    other = make_run("other", [1.0, 0.0], text="another {}")
    refuses(lambda: compared(one, other), "item 0 is 'text 0'", "'another 0'", "different data")
    strange = make_run("strange", [1.0], suite="chess")
    refuses(lambda: comparing.open_run(strange), "a run of 'chess'", "no suite here")
    refuses(lambda: comparing.open_run(one, "official"), "has no scores of mode official")
    refuses(lambda: comparing.open_run(tmp_path), "is no run of a suite")
    command_refuses("evaluate", ["compare", one], "alone is no comparison")
    command_refuses("evaluate", ["compare", one, one, f"--output={tmp_path}/x.txt"], "expected .md or .json")
    command_refuses("evaluate", ["compare", one, one, f"--output={tmp_path}/no/x.md"], "there is no folder")
    (tmp_path / "mine.md").write_text("mine")
    command_refuses("evaluate", ["compare", one, one, f"--output={tmp_path}/mine.md"], "is there already")
    assert (tmp_path / "mine.md").read_text() == "mine"


@pytest.mark.bad_input
def test_runs_of_other_suites_and_modes(make_run, refuses):
    run = comparing.open_run(make_run("one", [1.0]))

    class Other(Shapes):
        name = "other"

    changed = comparing.dataclasses.replace
    refuses(lambda: comparing.compare([run, changed(run, suite=Other())]), "is a run of shapes", "of other")
    refuses(lambda: comparing.compare([run, changed(run, mode="corrected")]), "give --mode")


def test_the_command_prints_and_writes(make_run, launch_command, tmp_path, capsys):
    one, two = make_run("one", [0.0] * 30), make_run("two", [1.0] * 20 + [0.0] * 10)
    evaluate = launch_command("evaluate").main
    assert evaluate(["compare", str(one), str(two), f"--output={tmp_path}/c.md"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "c.md").read_text()
    row = next(line for line in printed.splitlines() if line.startswith("| text_to_image/exact"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "0.000 [0.000, 0.000]" and cells[2].startswith("0.667 [0.")
    assert cells[3].startswith("+0.667 [0.") and cells[3].endswith("]*")  # 0 is not in the interval
    assert evaluate(["compare", str(one), str(two), f"--output={tmp_path}/c.json"]) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["runs"][1]["difference"]["text_to_image/exact"]["value"] == pytest.approx(2 / 3)


# The documents


def test_the_commands_of_the_documents_can_be_given(launch_command):
    """Where it stops the process: a document has a command whose options are no longer these, or are too few."""
    root, command = Path(__file__).parents[2], launch_command("evaluate")
    texts = [command.EXAMPLES, *((root / name).read_text() for name in ("docs/evaluation.md", "README.md"))]
    text = "\n".join(texts).replace("\\\n", " ")
    commands = re.findall(r"^ {2,4}python launch/evaluate\.py ([^#\n]*)", text, re.MULTILINE)
    known = {*SUITES, "list", "fetch", "compare", "shapes", "fid", "clipscore"}
    given = [shlex.split(command) for command in commands if "--help" not in command]
    given = [words for words in given if words[0] in known and (words[0] != "fetch" or words[1] in known)]
    for arguments in given:
        options = command.parse_arguments(arguments)
        assert options.command == arguments[0]
        if options.command in SUITES and options.part is None:
            extra = {key[6:]: str(value) for key, value in vars(options).items() if key.startswith("extra_") and value}
            request = Request(Path("data"), Path("run"), extra=dict.fromkeys(options.defaults) | extra)
            with contextlib.suppress(FileNotFoundError):  # the user's files
                find_suite(options.command).check_scoring(request, bool(getattr(options, "judge", None)))
    assert {arguments[0] for arguments in given} == known


# list


class Drawing(Suite):
    name, summary, source = "drawing", "draws", "a place"
    images, judge_calls, needs = 7200, 100, "a detector"


class Reading(Suite):
    name, summary, source = "reading", "reads", "another place"
    texts = 3600


def row_of(lines, name):
    return next(line for line in lines if line.startswith(name + " "))


def test_hours_are_counts_by_a_rate():
    suites = [Drawing(), Reading()]
    lines = listing.lines(suites, {}, rate=2.0)
    assert "7,200" in row_of(lines, "drawing") and " 1.0 " in row_of(lines, "drawing")  # 7,200 / 2 s
    assert "a detector" in row_of(lines, "drawing") and " ? " in row_of(lines, "reading")
    lines = listing.lines(suites, {"drawing": 1.0, "reading": 0.5})
    assert " 2.0 " in row_of(lines, "drawing") and " 0.5 " in row_of(lines, "reading")
    assert "images by the run of drawing, 1 a second" in lines[-1]
    assert "--rate" in listing.lines(suites, {})[-1]


def test_list_takes_the_rate_of_a_run(tmp_path, launch_command, capsys, command_refuses):
    (tmp_path / "settings.json").write_text('{"suite": "geneval", "seconds_per_job": 3.6}')
    assert launch_command("evaluate").main(["list", f"--run={tmp_path}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert row_of(printed, "shapes") and "a judge" in row_of(printed, "mmvet")
    assert "2,212" in row_of(printed, "geneval") and " 2.2 " in row_of(printed, "geneval")
    (tmp_path / "settings.json").write_text('{"suite": "geneval"}')
    command_refuses("evaluate", ["list", f"--run={tmp_path}"], "has made nothing yet")
    command_refuses("evaluate", ["list", "--rate=0"], "--rate is 0")
