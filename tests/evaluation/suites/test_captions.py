"""Captions of a user's images: the file of references, the score, and COCO's formats."""

import json

import pytest
from PIL import Image

from unialign_jax.evaluation.suite import Request, Scorer
from unialign_jax.evaluation.suites.captions import Captions


def request_of(folder, *rows):
    path = folder / "captions.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    for name in ("cat", "dog"):
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
    output = folder / "run"
    output.mkdir(exist_ok=True)
    return Request(path, output)


ROWS = (
    {"image": "cat.png", "references": ["One two three four.", "a mouse"]},
    {"image": "dog.png", "references": ["five six seven eight"], "id": "kept"},
)
RESULTS = {"000000": {"text": "one two, three four"}, "000001": {"text": "five six seven eight"}}


def test_scores(tmp_path):
    """The first says one of its two references: half of 10; the second its only one."""
    request = request_of(tmp_path, *ROWS)
    items = Captions().items(request)
    assert [item.jobs[0]["task"] for item in items] == ["caption"] * 2
    counted = []
    scores = Captions().score(request, items, RESULTS, Scorer(progress=counted.append))
    assert [score.values["cider_d"] for score in scores] == pytest.approx([5, 10], abs=1e-9) and sum(counted) == 2
    assert Captions().figures(scores, "official") == {"cider_d": pytest.approx(7.5, abs=1e-9)}
    assert (request.output / scores[0].images[0]).resolve() == (tmp_path / "cat.png").resolve()


def test_files_of_coco(tmp_path):
    request = request_of(tmp_path, *ROWS)
    Captions().arrange(request, Captions().items(request), {"000000": RESULTS["000000"]})
    captions = json.loads((request.output / "captions.json").read_text())
    references = json.loads((request.output / "references.json").read_text())
    assert captions == [{"image_id": 0, "caption": "one two, three four"}]
    assert [image["id"] for image in references["images"]] == [0]
    assert references["annotations"] == [
        {"id": 1, "image_id": 0, "caption": "One two three four."},
        {"id": 2, "image_id": 0, "caption": "a mouse"},
    ]
    assert "captions.json" in Captions().official_command(request)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "row, words",
    [
        ('{"image": "cat.pn', ["line 1", "is not JSON"]),
        ({"image": "cow.png", "references": ["a cow"]}, ["line 1", "there is no image", "cow.png"]),
        ({"image": "cat.png", "references": "a cat"}, ["references is 'a cat'", "list of texts"]),
        ({"image": "cat.png", "references": ["..."]}, ["references is ['...']"]),
        ({"images": ["cat.png"], "references": ["a cat"]}, ["image is None"]),
    ],
)
def test_files_that_hold_no_references(tmp_path, refuses, row, words):
    refuses(lambda: Captions().items(request_of(tmp_path, row)), *words)


@pytest.mark.bad_input
def test_an_empty_file(tmp_path, refuses):
    refuses(lambda: Captions().items(request_of(tmp_path)), "is empty", "references")
