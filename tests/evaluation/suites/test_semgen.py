"""SemGen-Bench: its items and layout, what the judge sees in either mode, the official files, bad data."""

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.endpoint import Endpoint
from unialign_jax.evaluation.judging import Journal, Judge
from unialign_jax.evaluation.suite import Request, Score, Scorer
from unialign_jax.evaluation.suites.semgen import NEGATIVE, SemGen

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared" / "data"
EXTRA = {"viescore_prompts": None, "results": None, "images": None}


@pytest.fixture
def data(make_data, tmp_path):
    make_data("semgen", tmp_path / "data", lines=3)
    return tmp_path / "data"


@pytest.fixture
def make_request(data, tmp_path):
    """A function (changes) -> a request of the data."""

    def make(**changes):
        extra = EXTRA | {"viescore_prompts": str(data / "prompts")} | changes.pop("extra", {})
        return Request(data=data, output=tmp_path / "run", extra=extra, **changes)

    return make


def written_by(folder):
    with open(folder, newline="") as file:
        return list(csv.DictReader(file))


def test_items_follow_the_official_protocol(make_request):
    request = make_request()
    items = SemGen().items(request)
    assert [item.id for item in items[:4]] == ["t2i_long/0", "t2i_long/1", "t2i_long/2", "t2i_complex/0"]
    assert {item.group for item in items} == {"t2i_long", "t2i_complex", "edit_multi", "edit_complex"}
    assert items[1].jobs == (
        {
            "id": "fullset/t2i_long/1",
            "task": "text_to_image",
            "prompt": "t2i_long of 2",
            "negative_prompt": NEGATIVE,
            "seed": 1,
            "steps": 50,
            "guidance_scale": 7.0,
            "height": 512,
            "width": 512,
        },
    )
    [job] = items[-1].jobs
    assert (job["id"], job["task"], job["instruction"]) == ("fullset/edit_complex/2", "edit", "edit_complex of 3")
    assert (job["guidance_scale"], job["steps"], job["negative_prompt"]) == (9.0, 50, NEGATIVE)
    assert job["image"] == str(request.made / "fullset/edit_complex/2_SRCIMG.png")


@pytest.mark.parametrize("mode, sizes", [("official", [(512, 512)] * 2), ("corrected", [(40, 30), (24, 48)])])
def test_sources_are_squashed_or_kept(make_request, data, mode, sizes):
    request, suite = make_request(mode=mode), SemGen()
    items = suite.items(request)
    suite.prepare(request, [item for item in items if item.facts["key"] < 2])
    folder = request.made / "fullset" / "edit_multi"
    assert sorted(path.name for path in folder.iterdir()) == ["0_SRCIMG.png", "1_SRCIMG.png"]
    for key, size in enumerate(sizes):
        with Image.open(folder / f"{key}_SRCIMG.png") as image, Image.open(data / f"images/{key + 1}.jpg") as photo:
            assert image.size == size
            if mode == "corrected":
                assert np.array_equal(np.asarray(image), np.asarray(photo))
            else:
                expected = photo.resize((512, 512), Image.Resampling.BICUBIC)
                assert np.array_equal(np.asarray(image), np.asarray(expected))
    before = {path: path.stat().st_mtime_ns for path in request.made.rglob("*.png")}
    suite.prepare(request, items)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert len(list(request.made.rglob("*_SRCIMG.png"))) == 6
    small = make_request(mode=mode, options={"height": 32, "width": 48})  # another size is asked for
    suite.prepare(small, items)
    with Image.open(folder / "0_SRCIMG.png") as image:
        assert image.size == ((48, 32) if mode == "official" else (40, 30))


# Scores


@pytest.fixture
def run(make_request, chat_server, judge_answer, tmp_path):
    """A function (mode, changes) -> (scores, the bodies that the judge was sent) of made-up images."""
    chat_server.name_of = lambda body: json.dumps(body)
    chat_server.behave = lambda name, times: (200, {}, chat_server.answer(judge_answer(json.loads(name))))

    def score(mode="official", **changes):
        request, suite = make_request(mode=mode, options={"height": 32, "width": 48}, **changes), SemGen()
        items = suite.items(request)
        if not request.made.exists():
            suite.prepare(request, items)
            for number, item in enumerate(items):
                path = request.made / f"{item.jobs[0]['id']}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 32), (number, 0, 0)).save(path)
        endpoint = Endpoint(chat_server.url, "m", attempts=2, first_pause=0.01)
        judge = Judge(endpoint, Journal(tmp_path / "judgements.jsonl"))
        chat_server.requests.clear()
        try:
            scores = suite.score(request, items, {}, Scorer(judge))
        finally:
            judge.close()
        return scores, [body for _, _, body in chat_server.requests]

    return score


def asked(bodies, text):
    """The content of the one request that has the text."""
    [content] = [body["messages"][0]["content"] for body in bodies if text in json.dumps(body["messages"])]
    return content


def test_the_official_judge_sees_images_of_prompts_as_edits(run):
    """As the released test_bench_score.py: the prompt for edits, with one image, and the least of two scores."""
    scores, bodies = run("official")
    content = asked(bodies, "t2i_long of 1")
    assert [part["type"] for part in content] == ["image_url", "text"]  # one image, and first, as Qwen2.5-VL's code
    assert content[1]["text"] == "You are a judge.\nTwo images.\n[score1, score2] Editing instruction: t2i_long of 1"
    values = {score.item: score.values for score in scores}
    assert values["t2i_long/0"] == {"SC": 8, "PQ": 4, "O": pytest.approx(math.sqrt(32))}
    assert len(bodies) == 24 and not any(score.failed for score in scores)


def test_the_corrected_judge_sees_them_as_images_of_prompts(run):
    scores, bodies = run("corrected")
    content = asked(bodies, "t2i_long of 1")
    assert content[1]["text"] == "You are a judge.\nOne image.\n[score] Text Prompt: t2i_long of 1"
    values = {score.item: score.values for score in scores}
    assert values["t2i_long/0"] == {"SC": 6, "PQ": 4, "O": pytest.approx(math.sqrt(24))}
    assert values["edit_multi/0"] == {"SC": 8, "PQ": 4, "O": pytest.approx(math.sqrt(32))}
    content = asked(bodies, "edit_multi of 1")
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]


def test_both_modes_share_what_they_ask_alike(run):
    run("official")
    _, bodies = run("corrected")
    assert len(bodies) == 6 and all("Text Prompt" in json.dumps(body) for body in bodies)


def test_the_official_files(run, make_request):
    scores, _ = run("official")
    request = make_request()
    folder = request.output / "official/model/qwen25vl/eval_results_AWQ"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        f"model_{group}_score.csv" for group in ("t2i_long", "t2i_complex", "edit_multi", "edit_complex", "combined")
    }
    rows = written_by(folder / "model_edit_multi_score.csv")
    columns = "data_type,source_image,generated_image,instruction,sementics_score,quality_score"
    assert (folder / "model_edit_multi_score.csv").read_text().splitlines()[0] == columns
    assert rows[1] == {
        "data_type": "edit_multi",
        "source_image": str(request.made / "fullset/edit_multi/1_SRCIMG.png"),
        "generated_image": str(request.made / "fullset/edit_multi/1.png"),
        "instruction": "edit_multi of 2",
        "sementics_score": "8",
        "quality_score": "4",
    }
    assert written_by(folder / "model_t2i_long_score.csv")[0]["source_image"] == ""
    assert len(written_by(folder / "model_combined_score.csv")) == 12
    # Read back, they are the same scores.
    suite = SemGen()
    found = suite.score(make_request(extra={"results": str(folder)}), suite.items(request), {}, Scorer(None))
    assert [score.values for score in found] == [score.values for score in scores]


def test_figures_by_hand():
    """Two groups of two, and a failure: it is left out, as the official scorer drops it."""
    scores = [
        Score("a", "t2i_long", {"SC": 4, "PQ": 9, "O": 6}),
        Score("b", "t2i_long", {"SC": 0, "PQ": 8, "O": 0}),
        Score("c", "edit_multi", {"SC": 9, "PQ": 4, "O": 6}),
        Score("d", "edit_multi", {}, failed="the judge said nothing"),
    ]
    expected = {
        "t2i_long/SC": 2,
        "t2i_long/PQ": 8.5,
        "t2i_long/O": 3,
        "edit_multi/SC": 9,
        "edit_multi/PQ": 4,
        "edit_multi/O": 6,
        "SC": 5.5,
        "PQ": 6.25,
        "O": 4.5,  # and neither the root of SC * PQ, 5.86, nor the mean over items, 4
    }
    for mode in ("official", "corrected"):
        assert SemGen().figures(scores, mode) == pytest.approx(expected, abs=1e-9)
    figures = SemGen().figures(scores[:2] + scores[3:], "official")
    assert math.isnan(figures["edit_multi/O"]) and math.isnan(figures["O"])


def test_a_damaged_image_is_one_item(run, make_request):
    request, suite = make_request(), SemGen()
    run("official")
    (request.made / "fullset/edit_multi/1.png").write_bytes(b"\x89PNG")
    items = [item for item in suite.items(request) if item.group == "edit_multi"]
    judge = Judge(Endpoint("http://127.0.0.1:9/v1", "m"), Journal(request.output.parent / "judgements.jsonl"))
    scores = suite.score(request, items, {}, Scorer(judge))
    judge.close()
    assert [bool(score.failed) for score in scores] == [False, True, False]
    assert "1.png" in scores[1].failed


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark is not here (../shared/data)")
def test_the_released_benchmark(tmp_path):
    request = Request(SHARED, tmp_path, extra=EXTRA | {"images": str(SHARED / "photos")})
    items = SemGen().items(request)
    assert len(items) == 600 and len({item.id for item in items}) == 600
    assert all(item.text.strip() for item in items)
    longest = max(len(item.text.split()) for item in items if item.group == "t2i_long")
    assert longest == 115  # as docs/evaluation.md says
    photographs = lambda: [note for note in SemGen().notes(request) if "photographs are not" in note]  # noqa: E731
    (tmp_path / "settings.json").write_text('{"request": {"mode": "official"}}')
    assert photographs() == []
    shutil.copytree(SHARED / "photos", tmp_path / "photos")
    (tmp_path / "photos/7.jpg").write_bytes((SHARED / "photos/8.jpg").read_bytes())
    request = dataclasses.replace(request, extra=EXTRA | {"images": str(tmp_path / "photos")})
    assert photographs() == ["1 of the 150 photographs are not the official files."]


# Bad input


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda data: (data / "images/2.jpg").unlink(), ["lacks 1 of 3 images (2.jpg)", "--images"]),
        (lambda data: shutil.rmtree(data / "images"), ["lacks 3 of 3 images"]),
        (lambda data: (data / "semgen_bench.jsonl").unlink(), ["has no semgen_bench.jsonl", "glimmer16/UniAlignment"]),
        (lambda data: (data / "semgen_bench.jsonl").write_text(""), ["is empty"]),
        (
            lambda data: (data / "semgen_bench.jsonl").write_text((data / "semgen_bench.jsonl").read_text()[:-20]),
            ["line 3 is not JSON"],
        ),
        (
            lambda data: (data / "semgen_bench.jsonl").write_text('{"tag": "color", "prompt": "a"}\n'),
            ["line 1 has no image_path"],
        ),
    ],
    ids=["image", "images", "file", "empty", "cut", "another suite's"],
)
def test_data_that_cannot_be_used(make_request, data, refuses, damage, words):
    damage(data)
    refuses(lambda: SemGen().items(make_request()), *words)


@pytest.mark.bad_input
def test_results_that_are_none(make_request, tmp_path, refuses):
    suite, folder = SemGen(), tmp_path / "results"
    folder.mkdir()
    request = make_request(extra={"results": str(folder)})
    items = [item for item in suite.items(request) if item.group == "t2i_long"]
    refuses(lambda: suite.score(request, items, {}, Scorer()), "has 0 files *_t2i_long_score.csv")
    path = folder / "m_t2i_long_score.csv"
    path.write_text("generated_image,overall\n/a/fullset/t2i_long/0.png,3\n")
    refuses(lambda: suite.score(request, items, {}, Scorer()), "has no column sementics_score")
    head = "generated_image,sementics_score,quality_score\n"
    path.write_text(head + "/a/fullset/t2i_long/0.png,3,4\n" * 2)
    refuses(lambda: suite.score(request, items, {}, Scorer()), "two rows of fullset/t2i_long/0.png")
    path.write_text(head + "/a/fullset/t2i_long/0.png,4,9\n/a/fullset/t2i_long/1.png,,9\n")
    scores = suite.score(request, items, {}, Scorer())
    assert scores[0].values == {"SC": 4, "PQ": 9, "O": 6}
    assert "has the scores ''" in scores[1].failed and "no row of fullset/t2i_long/2.png" in scores[2].failed


def test_a_judge_is_needed(make_request, refuses):
    suite, request = SemGen(), make_request()
    items = suite.items(request)
    refuses(lambda: suite.score(request, items, {}, Scorer()), "semgen score", "--judge=URL --judge-model=NAME")
