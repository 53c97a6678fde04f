"""DPG-Bench: its data, its grids, and its figures with the defects of the official code, worked by hand."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialign_jax.evaluation.answering import LocalJudge
from unialign_jax.evaluation.judging import Journal, Unparsed
from unialign_jax.evaluation.suite import Item, Request, Scorer
from unialign_jax.evaluation.suites import dpg
from unialign_jax.evaluation.suites.dpg import Dpg, aggregate, grids, read_questions, yes_or_no

DATA = Path(__file__).resolve().parents[4] / "shared/data/eval/dpg"
EXTRA = {"dpg_csv": None, "vqa": None, "results": None}
# (item, number, dependency, tuple, question), in the order of the table.
ROWS = [
    ("first", 1, "0", "entity - whole (cat)", "Is there a cat?"),
    ("first", 2, "1", "attribute - color (cat, red)", "Is the cat red?"),
    ("first", 3, "0", "entity - whole (mat)", "Is there a mat?"),
    ("second", 1, "0", "entity - whole (dog)", "Is there a dog?"),
    ("second", 2, "0", "entity - whole (tree)", "Is there a tree?"),
    ("second", 3, "1,2", "relation - spatial (dog, tree)", "Is the dog under the tree?"),
    ("second", 4, "3", "attribute - color (tree, green)", "Is the tree green?"),
]


def table(folder, rows=ROWS):
    path = folder / "dpg_bench.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            "item_id text keywords proposition_id dependency category_broad category_detailed tuple".split()
            + ["question_natural_language"]
        )
        for item, number, dependency, category, question in rows:
            writer.writerow([item, "a text,\nof two lines", "", number, dependency, "", "", category, question])
    return path


def said(questions, *crops):
    """Answers of each crop, in the questions' order: "yn" is yes, no."""
    return [{n: {"y": "yes", "n": "no"}[a] for n, a in zip(questions, crop, strict=True)} for crop in crops]


def test_official_mode_does_not_read_the_first_row(tmp_path):
    assert list(read_questions(table(tmp_path))["first"]) == [2, 3]
    assert list(read_questions(table(tmp_path), "corrected")["first"]) == [1, 2, 3]
    third = read_questions(table(tmp_path))["second"][3]
    assert third.parents == (1, 2) and third.category == "relation - spatial"


def test_official_mode_drops_what_depends_on_the_first_row(tmp_path):
    questions = read_questions(table(tmp_path))["first"]
    with pytest.raises(KeyError):
        aggregate(questions, said(questions, "yy"), "official")
    # A parent that is no before the one that is not there hides it: (3, 1) with 3 = no.
    rows = [
        *ROWS[:1],
        ("first", 3, "0", "entity - whole (mat)", "?"),
        ("first", 2, "3,1", "attribute - color (x)", "?"),
    ]
    questions = read_questions(table(tmp_path, rows))["first"]
    assert aggregate(questions, said(questions, "ny"), "official")[0] == [0.0]


def test_official_mode_takes_the_last_run_of_an_items_rows(tmp_path):
    rows = [ROWS[0], ROWS[3], ROWS[2], ROWS[4]]
    assert list(read_questions(table(tmp_path, rows))["second"]) == [2]
    assert list(read_questions(table(tmp_path, rows), "corrected")["second"]) == [1, 2]


def test_a_child_needs_all_its_parents(tmp_path):
    """Crops: all yes 4/4; tree no: 3 and, after it, 4 are zeroed, 1/4; relation no: 4 is zeroed, 2/4."""
    questions = read_questions(table(tmp_path))["second"]
    answers = said(questions, "yyyy", "ynyy", "yyny", "nnnn")
    crops, categories = aggregate(questions, answers, "official")
    assert crops == pytest.approx([1.0, 0.25, 0.5, 0.0], abs=1e-9)
    # Of the last crop alone, before zeroing.
    assert categories == {"entity - whole": [0, 0], "relation - spatial": [0], "attribute - color": [0]}
    crops, categories = aggregate(questions, answers, "corrected")
    assert crops == pytest.approx([1.0, 0.25, 0.5, 0.0], abs=1e-9)
    assert categories == {
        "entity - whole": [1, 1, 1, 0, 1, 1, 0, 0],
        "relation - spatial": [1, 0, 0, 0],
        "attribute - color": [1, 0, 0, 0],
    }


def test_zeroing_goes_in_the_order_of_the_table(tmp_path):
    """4 before its parent 3: when 4 is looked at, 3 is still yes, so 4 keeps its yes."""
    rows = [ROWS[0], ROWS[3], ROWS[4], ROWS[6], ROWS[5]]
    questions = read_questions(table(tmp_path, rows))["second"]
    assert list(questions) == [1, 2, 4, 3]
    answers = [{1: "no", 2: "yes", 3: "yes", 4: "yes"}]
    assert aggregate(questions, answers, "official")[0] == pytest.approx([2 / 4], abs=1e-9)
    in_order = {number: questions[number] for number in (1, 2, 3, 4)}
    assert aggregate(in_order, answers, "official")[0] == pytest.approx([1 / 4], abs=1e-9)


def test_the_table_of_questions_is_known_by_its_hash(tmp_path):
    path = tmp_path / "q.csv"
    path.write_bytes(b"hello\n")
    request = Request(tmp_path, tmp_path / "run", extra=EXTRA | {"dpg_csv": str(path)})
    # sha256sum of a file with "hello" and a line end.
    known = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    assert Dpg().describe_scoring(request) == {"dpg_csv_sha256": known}


class Answers:
    """A judge that knows a row of answers for each image."""

    def __init__(self, folder, answers):
        self._answers, self._journal = answers, Journal(folder / "judgements.jsonl")
        self.asked = []

    def ask(self, questions, progress):
        def answer(image, text):
            self.asked.append(text)
            return self._answers[int(np.asarray(image)[0, 0, 0]), text.removesuffix(" Answer yes or no.")]

        return LocalJudge(answer, "fake", self._journal).ask(questions, progress)


def run_of(folder, mode="official", **extra):
    """A run over the two items of ROWS; image i of item k has the red value 10 k + i."""
    request = Request(folder, folder / "run", mode=mode, extra=EXTRA | {"dpg_csv": str(table(folder))} | extra)
    items = [
        Item(name, "", tuple({"id": f"{name}/{index}"} for index in range(4)), name) for name in ("first", "second")
    ]
    for number, item in enumerate(items):
        for index, job in enumerate(item.jobs):
            path = request.made / f"{job['id']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2), (10 * number + index, 0, 0)).save(path)
    return request, items


def answers_of(**crops):
    """{(image's red value, question): answer} of "yn..." strings for each item's crops."""
    return {
        (10 * number + index, question): {"y": "Yes.", "n": "no", "?": "perhaps"}[letter]
        for number, (item, said) in enumerate(crops.items())
        for index, letters in enumerate(said)
        for letter, question in zip(letters, [row[4] for row in ROWS if row[0] == item], strict=True)
    }


ANSWERS = answers_of(first=["yyy", "nyy", "yny", "yyn"], second=["yyyy", "ynyy", "yyny", "yyyn"])


def figures_of(request, items, answers):
    judge = Answers(request.output, answers)
    counted = []
    scores = Dpg().score(request, items, {}, Scorer(judge, progress=counted.append))
    assert sum(counted) == len(items)
    return scores, Dpg().figures(scores, request.mode)


def test_official_figures(tmp_path):
    """The first item is dropped. The second: crops 1, 1/4, 1/2, 3/4. Categories: of its last crop, yyyn."""
    request, items = run_of(tmp_path)
    scores, figures = figures_of(request, items, ANSWERS)
    assert "question 1" in scores[0].failed and not scores[0].values
    expected = {
        "dpg": 100 * (1 + 0.25 + 0.5 + 0.75) / 4,
        "L1/attribute": 0,
        "L1/entity": 100,
        "L1/relation": 100,
        "L2/attribute - color": 0,
        "L2/entity - whole": 100,
        "L2/relation - spatial": 100,
    }
    assert figures == pytest.approx(expected, abs=1e-9)


def test_corrected_figures(tmp_path):
    """First item: crops 3/3, 1/3 (no cat, so it is not red), 2/3, 2/3. Categories: of all crops, zeroed."""
    request, items = run_of(tmp_path, "corrected")
    scores, figures = figures_of(request, items, ANSWERS)
    assert not any(score.failed for score in scores)
    # Entities: cat ynyy, mat yyyn, dog yyyy, tree ynyy. Colors: red yn(n)y, zeroed in crop 1; green y, 0, 0, n.
    expected = {
        "dpg": 100 * ((1 + 1 / 3 + 2 / 3 + 2 / 3) / 4 + 0.625) / 2,
        "L1/attribute": 100 * (2 + 1) / 8,
        "L1/entity": 100 * (3 + 3 + 4 + 3) / 16,
        "L1/relation": 100 * 2 / 4,
        "L2/attribute - color": 100 * (2 + 1) / 8,
        "L2/entity - whole": 100 * (3 + 3 + 4 + 3) / 16,
        "L2/relation - spatial": 100 * 2 / 4,
    }
    assert figures == pytest.approx(expected, abs=1e-9)


def test_an_answer_that_is_neither(tmp_path):
    """Official code counts it as no; corrected mode gives the item no score."""
    answers = answers_of(first=["yyy"] * 4, second=["yyyy", "yyyy", "yyyy", "yyy?"])
    request, items = run_of(tmp_path)
    assert figures_of(request, items, answers)[1]["dpg"] == pytest.approx(100 * 3.75 / 4, abs=1e-9)
    request, items = run_of(tmp_path, "corrected")
    scores, figures = figures_of(request, items, answers)
    assert "image 3, question 4" in scores[1].failed and "perhaps" in scores[1].failed
    assert figures["dpg"] == pytest.approx(100, abs=1e-9)


def test_answers_are_asked_for_once(tmp_path):
    request, items = run_of(tmp_path, "corrected")
    judge = Answers(request.output, ANSWERS)
    Dpg().score(request, items, {}, Scorer(judge))
    assert len(judge.asked) == 4 * 7
    Dpg().score(request, items, {}, Scorer(judge))
    assert len(judge.asked) == 4 * 7


def test_grids_have_their_samples_pixel_by_pixel(tmp_path):
    """Cropped as the official scorer does: above left, above right, below left, below right."""
    request, items = run_of(tmp_path)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(4)]
    for job, values in zip(items[0].jobs, pixels, strict=True):
        Image.fromarray(values).save(request.made / f"{job['id']}.png")
    done = {job["id"]: {} for job in items[0].jobs} | {"second/0": {}}
    Dpg().arrange(request, items, done)
    assert [path.name for path in grids(request).iterdir()] == ["first.png"]  # of the second, three are missing
    with Image.open(grids(request) / "first.png") as grid:
        assert grid.size == (32, 32)
        for values, box in zip(
            pixels, [(0, 0, 16, 16), (16, 0, 32, 16), (0, 16, 16, 32), (16, 16, 32, 32)], strict=True
        ):
            np.testing.assert_array_equal(np.asarray(grid.crop(box)), values)


def test_a_grid_is_made_anew_when_its_samples_are(tmp_path):
    request, items = run_of(tmp_path)
    done = {job["id"]: {} for item in items for job in item.jobs}
    for name in done:
        os.utime(request.made / f"{name}.png", (1000, 1000))
    Dpg().arrange(request, items, done)
    grid = grids(request) / "first.png"
    os.utime(grid, (2000, 2000))
    before = grid.stat().st_mtime_ns
    Dpg().arrange(request, items, done)
    assert grid.stat().st_mtime_ns == before
    Image.new("RGB", (2, 2), "white").save(request.made / "first/3.png")
    Dpg().arrange(request, items, done)
    assert Image.open(grid).getpixel((3, 3)) == (255, 255, 255)


def test_results_of_the_official_scorer(tmp_path):
    """Its file has a line for each image file that it counted, then the summary."""
    path = tmp_path / "dpg-bench_results.txt"
    path.write_text(
        "/grids, mine/first.png, 1.0, 0.5, 0.25, 0.25, 0.5\n"
        "/grids, mine/second.png, 1.0, 1.0, 1.0, 1.0, 1.0\n"
        "Model: mine\nL1 category scores:\n\tentity: 90.0\nDPG-Bench score: 75.0\n"
    )
    request, items = run_of(tmp_path, results=str(path))
    scores = Dpg().score(request, items, {}, Scorer())
    assert Dpg().figures(scores, "official") == {"dpg": pytest.approx(75.0, abs=1e-9)}
    path.write_text(path.read_text().splitlines()[0] + "\n")
    scores = Dpg().score(request, items, {}, Scorer())
    assert [bool(score.failed) for score in scores] == [False, True]  # not counted: it says so


def test_details_of_the_official_scorer(tmp_path):
    """The same answers as in test_official_figures, as the official code writes them down."""
    lines = []
    for item, crops in {"first": ["yy"], "second": ["yyyy", "ynyy", "yyny", "yyyn"]}.items():
        questions = [row[4] for row in ROWS[1:] if row[0] == item]
        boxes = ["(0, 0, 2, 2)", "(2, 0, 4, 2)", "(0, 2, 2, 4)", "(2, 2, 4, 4)"]
        for box, letters in zip(boxes, crops, strict=False):
            for question, letter in zip(questions, letters, strict=True):
                lines.append(f"/grids/{item}.png, {box}, {question}, {'yes' if letter == 'y' else 'no'}")
    path = tmp_path / "dpg_detail.txt"
    path.write_text("\n".join(lines) + "\n")
    request, items = run_of(tmp_path, results=str(path))
    figures = Dpg().figures(Dpg().score(request, items, {}, Scorer()), "official")
    assert figures["dpg"] == pytest.approx(62.5, abs=1e-9) and figures["L2/attribute - color"] == 0
    request, items = run_of(tmp_path, "corrected", results=str(path))
    scores = Dpg().score(request, items, {}, Scorer())
    assert "question 1" in scores[0].failed  # the official code never asked it
    assert Dpg().figures(scores, "corrected")["L2/attribute - color"] == pytest.approx(25, abs=1e-9)


@pytest.mark.skipif(not DATA.is_dir(), reason="DPG-Bench's prompts are not here (../shared/data/eval)")
def test_the_official_prompts(tmp_path):
    request = Request(DATA, tmp_path, extra=EXTRA)
    items = Dpg().items(request)
    assert len(items) == 1065 and sum(len(item.jobs) for item in items) == Dpg.images == 4260
    assert [job["id"] for job in items[0].jobs] == ["0/0", "0/1", "0/2", "0/3"]
    # The same as a folder of texts.
    (tmp_path / "prompts").mkdir()
    for name, prompt in json.loads((DATA / "prompts.json").read_text()).items():
        (tmp_path / "prompts" / f"{name}.txt").write_text(prompt + "\n")
    again = {item.id: item.text for item in Dpg().items(Request(tmp_path, tmp_path, extra=EXTRA))}
    assert again == {item.id: item.text.strip() for item in items}


@pytest.mark.parametrize("text", ["yes", "Yes.", " YES, there is", "**yes**"])
def test_words_of_a_judge(text):
    assert yes_or_no(text) == "yes"
    assert yes_or_no("No, it is not. Yes") == "no"
    with pytest.raises(Unparsed):
        yes_or_no("I cannot say yes or no")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("prompts.json", '{"a": "a cat"}', ["has 1 prompts", "1065", "github.com"]),
        ("prompts.json", '{"a": {"id": "animal/1.jpg"}}', ["'a'", "expected a text"]),
        ("prompts.json", '{"a": "a ca', ["is not JSON"]),
        ("notes.md", "", ["has no prompts", "*.txt"]),
    ],
)
def test_data_that_are_no_prompts(tmp_path, refuses, name, content, words):
    (tmp_path / name).write_text(content)
    refuses(lambda: Dpg().items(Request(tmp_path, tmp_path, extra=EXTRA)), *words)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content, words",
    [
        ("question,answer\n", ["has no column item_id"]),
        ("item_id,proposition_id,dependency,tuple,question_natural_language\na,1,0,x,y\na,2", ["line 3", "cut short"]),
        (
            "item_id,proposition_id,dependency,tuple,question_natural_language\na,1,0,x,y\na,two,0,x,y",
            ["line 3", "'two'"],
        ),
    ],
)
def test_tables_that_are_none(tmp_path, refuses, content, words):
    path = tmp_path / "dpg_bench.csv"
    path.write_text(content)
    refuses(lambda: read_questions(path), *words)


@pytest.mark.bad_input
def test_what_scoring_needs(tmp_path, refuses):
    request, items = run_of(tmp_path, dpg_csv=None)
    refuses(lambda: Dpg().score(request, items, {}, Scorer()), "--dpg-csv")
    request, items = run_of(tmp_path)
    refuses(lambda: Dpg().score(request, items, {}, Scorer()), "--judge=URL", "--vqa", "PIC_NUM=4")
    other = tmp_path / "results.txt"
    other.write_text("nothing\n")
    request, items = run_of(tmp_path, results=str(other))
    refuses(lambda: Dpg().score(request, items, {}, Scorer()), "results.txt", "compute_dpg_bench.py")


@pytest.mark.bad_input
def test_grids_of_oblong_images(tmp_path, refuses):
    request = Request(tmp_path, tmp_path, options={"height": 512, "width": 768}, extra=EXTRA)
    refuses(lambda: Dpg().items(request), "square")
    refuses(lambda: dpg.tiled([Image.new("RGB", (4, 2))] * 4), "not squares")
