"""GenEval: its data, its layout, and its figures on cases worked by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialign_jax.evaluation.objects import Found
from unialign_jax.evaluation.suite import Request, Scorer
from unialign_jax.evaluation.suites.geneval import CHECKED, GenEval, look

DATA = Path(__file__).resolve().parents[4] / "shared/data/eval/geneval"
COW = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}
COUNTED = {
    "tag": "counting",
    "include": [{"class": "cow", "count": 2}],
    "exclude": [{"class": "cow", "count": 3}],
    "prompt": "a photo of two cows",
}
EXTRA = {"images_per_prompt": 4, "prompts": None, "detector": None, "color_model": None, "results": None}


def run_of(folder, entries=(COW, COUNTED), **changes):
    """(request, items) of a run over prompts of one's own."""
    data = folder / "mine.jsonl"
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    extra = EXTRA | changes.pop("extra", {})
    request = Request(**{"data": data, "output": folder / "run", "extra": extra} | changes)
    return request, GenEval().items(request)


def official(folder, verdicts, entries=(COW, COUNTED)):
    """A results.jsonl as the official scorer writes it: {(item, image): correct}."""
    path = folder / "results.jsonl"
    lines = [
        {
            "filename": f"/somewhere/{item:05d}/samples/{image:05d}.png",
            "tag": entries[item]["tag"],
            "prompt": entries[item]["prompt"],
            "correct": correct,
            "reason": "" if correct else "expected cow>=1, found 0",
            "metadata": json.dumps(entries[item]),
            "details": "{}",
        }
        for (item, image), correct in verdicts.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.skipif(not DATA.is_dir(), reason="GenEval's prompts are not here (../shared/data/eval)")
def test_the_official_prompts():
    request = Request(data=DATA, output=Path("run"), extra=EXTRA)
    items = GenEval().items(request)
    counts = {tag: sum(item.group == tag for item in items) for tag in dict.fromkeys(item.group for item in items)}
    assert counts == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert sum(len(item.jobs) for item in items) == GenEval.images == 2212
    assert items[0].text == "a photo of a bench"
    assert [(job["id"], job["seed"]) for job in items[1].jobs] == [(f"00001/samples/0000{i}", 42 + i) for i in range(4)]


def test_metadata_is_one_object_beside_the_samples(tmp_path):
    request, items = run_of(tmp_path)
    (request.made / "00001" / "samples").mkdir(parents=True)
    GenEval().arrange(request, items, {})
    with open(request.made / "00001" / "metadata.jsonl") as file:
        assert json.load(file) == COUNTED
    assert not (request.made / "00000").exists()  # nothing was made for it


def test_figures_are_means_of_images_by_tag(tmp_path):
    """2 of 4 and 1 of 4 right: tags 0.5 and 0.25, overall their mean, 3 of 8 images, both prompts once."""
    verdicts = {(0, i): i < 2 for i in range(4)} | {(1, i): i < 1 for i in range(4)}
    request, items = run_of(tmp_path, extra={"results": official(tmp_path, verdicts)})
    scores = GenEval().score(request, items, {}, Scorer())
    figures = GenEval().figures(scores, "official")
    expected = {"overall": 0.375, "single_object/correct": 0.5, "counting/correct": 0.25, "images": 0.375, "prompts": 1}
    assert figures == pytest.approx(expected, abs=1e-9)
    assert list(figures) == list(expected)
    assert scores[0].images[0] == "model/00000/samples/00000.png" and "found 0" in scores[0].answer


@pytest.mark.parametrize("mode, counting", [("official", 1.0), ("corrected", 0.5)])
def test_images_without_a_result(tmp_path, mode, counting):
    """Official mode averages over what is there; corrected mode counts two missing images of four as wrong."""
    verdicts = {(0, i): False for i in range(4)} | {(1, i): True for i in range(2)}
    request, items = run_of(tmp_path, mode=mode, extra={"results": official(tmp_path, verdicts)})
    figures = GenEval().figures(GenEval().score(request, items, {}, Scorer()), mode)
    assert figures["counting/correct"] == pytest.approx(counting, abs=1e-9)
    assert figures["overall"] == pytest.approx(counting / 2, abs=1e-9)


def test_a_prompt_without_any_result_failed(tmp_path):
    request, items = run_of(tmp_path, extra={"results": official(tmp_path, {(0, 0): True})})
    scores = GenEval().score(request, items, {}, Scorer())
    assert scores[1].failed and not scores[1].values
    assert GenEval().figures(scores, "official")["overall"] == 1.0
    assert math.isnan(GenEval().figures(scores[1:], "official")["overall"])


def made(request, items):
    """Pictures of as many white pixels as an image's number."""
    for item in items:
        for number, job in enumerate(item.jobs):
            path = request.made / f"{job['id']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.zeros((8, 8, 3), np.uint8)
            pixels[0, :number] = 255
            Image.fromarray(pixels).save(path)


def cows(image):
    """A detector that sees a cow for every white pixel."""
    number = int((np.asarray(image)[0, :, 0] == 255).sum())
    return {"cow": [Found((0.0, 0.0, 8.0, 8.0), 0.95)] * number} if number else {}


def test_our_scorer_writes_what_the_official_one_does_and_resumes(tmp_path):
    """0, 1, 2, 3 cows: one cow is there in three images, two cows and not three in one."""
    request, items = run_of(tmp_path)
    made(request, items)
    checked = look(request, items, cows, None, "fake")
    assert [checked[job["id"]]["correct"] for job in items[0].jobs] == [False, True, True, True]
    assert [checked[job["id"]]["correct"] for job in items[1].jobs] == [False, False, True, False]
    path = request.output / CHECKED
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 8 and json.loads(lines[0]["metadata"]) == COW
    assert json.loads(lines[1]["details"]) == {"cow": [[0.0, 0.0, 8.0, 8.0, 0.95]]}

    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]) + '{"filename": "torn')
    seen = []

    def counting_cows(image):
        seen.append(image)
        return cows(image)

    again = look(request, items, counting_cows, None, "fake")
    assert len(seen) == 3 and [again[name]["correct"] for name in checked] == [e["correct"] for e in checked.values()]
    assert len(path.read_text().splitlines()) == 8
    look(request, items, counting_cows, None, "another detector")
    assert len(seen) == 3 + 8
    # The official summary reads this file too, by filename, tag and correct.
    request, items = run_of(tmp_path, extra={"results": str(path)})
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:8]))
    figures = GenEval().figures(GenEval().score(request, items, {}, Scorer()), "official")
    assert figures["overall"] == pytest.approx((3 / 4 + 1 / 4) / 2, abs=1e-9)


def test_rewritten_prompts_keep_the_clauses(tmp_path):
    longer = tmp_path / "long.jsonl"
    longer.write_text(json.dumps(COW | {"prompt": "A cow in the sun."}) + "\n" + json.dumps(COUNTED) + "\n")
    request, items = run_of(tmp_path, extra={"prompts": str(longer)})
    assert items[0].text == items[0].jobs[0]["prompt"] == items[0].facts["prompt"] == "A cow in the sun."
    assert [path.name for path in GenEval().files(request)] == ["mine.jsonl", "long.jsonl"]
    assert any("dagger" in note for note in GenEval().notes(request))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "lines, words",
    [
        ("", ["is empty", "github.com/djghosh13/geneval"]),
        ('{"tag": "colors", "inclu', ["line 1", "is not JSON"]),
        ('{"id": 3, "question": "what?"}', ["line 1 is no prompt of GenEval", "tag"]),
        ('{"prompt": "a cow", "atom_count": 1, "vqa_list": [], "skills": []}', ["GenEval 2", "geneval2"]),
        (json.dumps(COW | {"include": [{"class": "cow", "count": 0}]}), ["count is 0"]),
        (json.dumps(COW | {"include": [{"class": "cow", "count": 1, "color": "teal"}]}), ["'teal'", "red"]),
        (json.dumps(COW | {"include": [{"class": "cow", "count": 1, "position": ["above", 0]}]}), ["position"]),
    ],
)
def test_data_that_are_no_prompts(tmp_path, refuses, lines, words):
    path = tmp_path / "mine.jsonl"
    path.write_text(lines)
    refuses(lambda: GenEval().items(Request(data=path, output=tmp_path, extra=EXTRA)), *words)


@pytest.mark.bad_input
def test_half_of_the_official_prompts(tmp_path, refuses):
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(COW) + "\n")
    refuses(lambda: GenEval().items(Request(data=tmp_path, output=tmp_path, extra=EXTRA)), "has 1 prompts", "553")


@pytest.mark.bad_input
def test_data_that_are_not_there(tmp_path, refuses):
    refuses(lambda: GenEval().items(Request(data=tmp_path, output=tmp_path, extra=EXTRA)), "no such file")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "entries, words",
    [([COW], ["has 1 prompts", "2"]), ([COW, COW], ["line 2 asks for other objects", "a photo of two cows"])],
)
def test_prompts_rewritten_from_others(tmp_path, refuses, entries, words):
    longer = tmp_path / "long.jsonl"
    longer.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    refuses(lambda: run_of(tmp_path, extra={"prompts": str(longer)}), *words)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "line, words",
    [
        ('{"id": 1}', ["line 1 is no result of GenEval's evaluate_images.py"]),
        (
            json.dumps({"filename": "00000/samples/00000.png", "tag": "colors", "prompt": "x", "correct": True}),
            ["'x'", "a photo of a cow"],
        ),
        ("", ["no result of this run"]),
    ],
)
def test_results_of_something_else(tmp_path, refuses, line, words):
    path = tmp_path / "other.jsonl"
    path.write_text(line)
    request, items = run_of(tmp_path, extra={"results": str(path)})
    refuses(lambda: GenEval().score(request, items, {}, Scorer()), *words)


@pytest.mark.bad_input
def test_without_a_detector_it_names_the_official_command(tmp_path, refuses):
    request, items = run_of(tmp_path)
    refuses(lambda: GenEval().score(request, items, {}, Scorer()), "--detector", "--results", "evaluate_images.py")
