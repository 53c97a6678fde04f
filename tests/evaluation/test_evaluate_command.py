"""launch/evaluate.py as a user calls it: every task of the shapes world, what it writes, what it refuses."""

import json

import pytest

from unialign_jax.evaluation.shapes_run import TASKS


@pytest.fixture(scope="module")
def scored(launch_command, tiny_bundle, tmp_path_factory):
    """The scores of a model with random weights, two scenes a task."""
    output = tmp_path_factory.mktemp("scores") / "tiny"
    status = launch_command("evaluate").main(
        ["shapes", f"--bundle={tiny_bundle}", f"--output={output}", "--scenes=2", "--steps=2", "--batch=2"]
    )
    assert status == 0
    return output


@pytest.mark.slow
def test_every_task_has_its_figures_and_its_sheet(scored):
    content = json.loads((scored / "scores.json").read_text())
    assert list(content["scores"]) == list(TASKS)
    assert content["settings"]["image"] == {"steps": 2} and content["settings"]["text"] == {}  # the model's own
    expected = {
        "text_to_image": {"background", "count", "color", "shape", "size", "place", "exact"},
        "caption": {"parses", "true", "exact"},
        "edit": {"exact", "unchanged"},
    }
    for task, names in expected.items():
        assert set(content["scores"][task]) == names
    assert all(score["count"] == 2 for score in content["scores"]["text_to_image"].values())
    assert content["scores"]["text_to_image"]["exact"]["mean"] == 0  # random weights draw no scene
    every = {"settings.json", "scores.jsonl", "report.json", "report.md", "report.html", "pictures"}
    assert every < {path.name for path in scored.iterdir()}
    sheets = {path.name for path in scored.iterdir()} - {"scores.json"} - every
    assert sheets == {f"worst_{task}.{'md' if task in ('caption', 'vqa') else 'png'}" for task in TASKS}


@pytest.mark.slow
def test_the_report_has_the_same_means_with_intervals(scored, launch_command, tmp_path):
    means = json.loads((scored / "scores.json").read_text())["scores"]
    report = json.loads((scored / "report.json").read_text())
    assert report["items"]["in_this_run"] == 2 * len(TASKS) and report["bootstrap"]["resamples"] == 1000
    assert set(report["figures"]) == {f"{task}/{name}" for task in means for name in means[task]}
    for task in means:
        for name, score in means[task].items():
            figure = report["figures"][f"{task}/{name}"]
            assert figure["value"] == pytest.approx(score["mean"], abs=1e-12)
            assert figure["low"] <= figure["value"] <= figure["high"]
    page = (scored / "report.html").read_text()
    assert page.count("no readable picture") == 0 and page.count("<img") >= 2 * len(TASKS)
    same = tmp_path / "same.json"
    assert launch_command("evaluate").main(["compare", str(scored), str(scored), f"--output={same}"]) == 0
    for figure in json.loads(same.read_text())["runs"][1]["difference"].values():
        assert figure == {"value": 0.0, "low": 0.0, "high": 0.0}


@pytest.mark.slow
def test_scores_that_are_there_are_not_replaced_unasked(scored, tiny_bundle, command_refuses):
    before = (scored / "scores.json").read_text()
    arguments = ["shapes", f"--bundle={tiny_bundle}", f"--output={scored}", "--scenes=2"]
    command_refuses("evaluate", arguments, str(scored), "--overwrite")
    (scored / "notes.txt").write_text("mine")
    command_refuses("evaluate", [*arguments, "--overwrite"], "notes.txt")
    assert (scored / "scores.json").read_text() == before


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, words",
    [
        ({"--tasks": "drawing"}, ["'drawing'", "text_to_image"]),
        ({"--scenes": "0"}, ["--scenes is 0", "at least 1"]),
        ({"--batch": "-1"}, ["--batch is -1"]),
        ({"--bundle": "nowhere"}, ["nowhere", "no such bundle"]),
        ({"--weights": "raw"}, ["--weights goes with a run's folder"]),
        ({"--decoding": "guess", "--tasks": "caption"}, ["decoding is 'guess'"]),
        ({"--temperature": "nan", "--tasks": "caption"}, ["temperature is nan"]),
        ({"--steps": "0", "--tasks": "text_to_image"}, ["steps is 0"]),
    ],
)
def test_what_cannot_be_scored(command_refuses, tiny_bundle, tmp_path, change, words):
    output = tmp_path / "scores"
    options = {"--bundle": tiny_bundle, "--output": output, "--scenes": "1"} | change
    command_refuses("evaluate", ["shapes", *(f"{key}={value}" for key, value in options.items())], *words)
    assert not output.exists()
