"""ImgEdit-Bench: what is asked, how answers are read in both modes, and figures worked by hand."""

import json
import math

import pytest
from PIL import Image

from unialign_jax.evaluation.judging import PARSED, UNPARSED, Judgement, Unparsed
from unialign_jax.evaluation.suite import Item, Request, Score, Scorer
from unialign_jax.evaluation.suites.imgedit import TYPES, ImgEdit, corrected_score, official_score, respects

NAMES = ["Prompt Compliance", "Visual Naturalness", "Physical & Detail Integrity"]
RUBRIC = "Rate it.\nExample Response Format:\nBrief reasoning: at most 20 words.\n" + "".join(
    f"{name}: A number from 1 to 5.\n" for name in NAMES
)
RUBRIC += "editing instruction is : <edit_prompt>.\n"


def answer(*scores, reasoning="Brief reasoning: it is good."):
    return "\n".join([reasoning, *(f"{name}: {score}" for name, score in zip(NAMES, scores, strict=True))])


def copy_of_data(folder, count=737, photos=True, **changes):
    """A user's copy with edits of all types in turn over three photographs."""
    (folder / "Basic").mkdir(parents=True)
    edits = {
        str(number): {
            "id": f"animal/{number % 3}.jpg",
            "prompt": f"edit {number}",
            "edit_type": TYPES[number % 9],
        }
        for number in range(count)
    }
    edits |= changes
    (folder / "Basic" / "basic_edit.json").write_text(json.dumps(edits))
    (folder / "Basic" / "prompts.json").write_text(json.dumps(dict.fromkeys(TYPES, RUBRIC)))
    if photos:
        (folder / "singleturn" / "animal").mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 6), (number, 0, 0)).save(folder / "singleturn" / "animal" / f"{number}.jpg")
    return folder


@pytest.mark.parametrize(
    "text, official, corrected",
    [
        (answer(5, 4, 4), 4.33, 13 / 3),
        (answer("4.", 3, 3), 3.0, 10 / 3),  # "4." is no digit: the official mean is over two lines
        (answer("3/5", 5, 5), 5.0, 13 / 3),
        (answer("4.5", 4, 4), 4.0, 12.5 / 3),
        (answer("**4**", 2, 2), 2.0, 8 / 3),
        (answer(4, 4, 4, reasoning="score: 1"), 3.25, 4.0),  # a line of the reasoning counts officially
        (answer(4, 4, 4).replace("Prompt Compliance: ", "Prompt Compliance:"), 4.0, 4.0),
        (answer(4, 4, 4).replace("\n", "\r\n  "), 4.0, 4.0),
        (answer(9, 4, 4), 5.67, None),  # out of range
        ("Prompt Compliance: 4\nVisual Naturalness: 2", 3.0, None),  # one is missing
        ("**Prompt Compliance**: 4\n**Visual Naturalness:** 3\n- Physical & Detail Integrity: 2/5.", 4.0, 3.0),
        (answer(1, 1, 1) + "\n" + answer(5, 5, 5), 3.0, 5.0),  # said twice: the last counts
        ("I cannot rate this.", None, None),
        ("", None, None),
    ],
)
def test_how_answers_are_read(text, official, corrected):
    assert official_score(text) == official
    assert corrected_score(text, NAMES) == (None if corrected is None else pytest.approx(corrected, abs=1e-9))


def test_a_rubric_names_what_it_asks_for():
    assert respects(RUBRIC) == NAMES
    # A rubric of another form: every line of a name and a score but the reasoning.
    assert corrected_score("Brief reasoning: 3\nFidelity: 4\nStyle: 2", []) == 3.0


def test_an_edit_is_asked_about_with_its_source_first(tmp_path):
    request = Request(copy_of_data(tmp_path / "data"), tmp_path / "run", extra={"results": None})
    items = ImgEdit().items(request)
    assert len(items) == 737 and items[10].group == "style" and items[10].id == "10"
    [job] = items[10].jobs
    assert job["image"].endswith("data/singleturn/animal/1.jpg") and job["instruction"] == "edit 10"

    class Judge:
        def ask(self, questions, progress):
            self.questions = questions
            return [Judgement("", q.item, q.name, PARSED, answer=answer(5, 4, 3), value="") for q in questions]

    judge = Judge()
    request.made.mkdir(parents=True)
    scores = ImgEdit().score(request, items[:2], {}, Scorer(judge))
    question = judge.questions[1]
    assert question.text == RUBRIC.replace("<edit_prompt>", "edit 1") and not question.images_first
    assert [path.name for path in question.images] == ["1.jpg", "1.png"]
    assert question.read(answer(1, 2, "3.")) == answer(1, 2, "3.")
    with pytest.raises(Unparsed):
        question.read("nothing")
    assert [score.values for score in scores] == [{"score": 4.0}] * 2
    assert (tmp_path / "run" / scores[1].images[0]).resolve() == (tmp_path / "data/singleturn/animal/1.jpg").resolve()
    # step1 splits each value into lines: it must be a text for every key.
    assert json.loads((request.made / "result.json").read_text()) == {"0": answer(5, 4, 3), "1": answer(5, 4, 3)}


def test_answers_that_cannot_be_read_have_no_score(tmp_path):
    item = Item("1", "add", ({"id": "1"},), "edit", {"source": str(tmp_path / "a.jpg"), "asked": "", "respects": NAMES})
    request = Request(tmp_path, tmp_path, extra={"results": None})
    request.made.mkdir()

    class Judge:
        def __init__(self, **facts):
            self.facts = facts

        def ask(self, questions, progress):
            return [Judgement("", "1", "", **self.facts)]

    [score] = ImgEdit().score(request, [item], {}, Scorer(Judge(status=UNPARSED, answer="no idea", reason="no")))
    assert not score.values and "no idea" in score.failed
    [score] = ImgEdit().score(request, [item], {}, Scorer(Judge(status="failed", reason="status 500")))
    assert not score.values and score.failed == "status 500"
    assert json.loads((request.made / "result.json").read_text()) == {}


def scores_of(**by_type):
    return [
        Score(f"{kind}{number}", kind, {} if value is None else {"score": value}, failed="" if value else "no answer")
        for kind, values in by_type.items()
        for number, value in enumerate(values)
    ]


def test_figures_of_both_modes():
    """add (4.33 + 4.33 + 3) / 3 = 3.8867, rounded 3.89; style 2; failed items count nowhere."""
    scores = scores_of(add=[4.33, 4.33, 3.0, None], style=[2.0], remove=[None])
    assert ImgEdit().figures(scores, "official") == pytest.approx(
        {"overall": (3.89 + 2) / 2, "style/score": 2.0, "add/score": 3.89, "items": 13.66 / 4}, abs=1e-9
    )
    assert ImgEdit().figures(scores, "corrected") == pytest.approx(
        {"overall": (11.66 / 3 + 2) / 2, "style/score": 2.0, "add/score": 11.66 / 3, "items": 13.66 / 4}, abs=1e-9
    )
    assert math.isnan(ImgEdit().figures(scores_of(remove=[None]), "official")["overall"])


def test_the_overall_is_the_mean_of_nine_types():
    """Types weigh the same, however many edits they have: 3.0, 3.1, ... 3.8 of 1, 2, ... 9 edits."""
    scores = scores_of(**{kind: [3.0 + index / 10] * (index + 1) for index, kind in enumerate(TYPES)})
    figures = ImgEdit().figures(scores, "official")
    assert figures["overall"] == pytest.approx(3.4, abs=1e-9)
    assert figures["items"] == pytest.approx(sum((3 + i / 10) * (i + 1) for i in range(9)) / 45, abs=1e-9)


def test_results_of_the_official_code(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"0": answer(5, 5, 5), "1": {"error": "timeout"}}))
    request = Request(copy_of_data(tmp_path / "data"), tmp_path / "run", extra={"results": str(path)})
    scores = ImgEdit().score(request, ImgEdit().items(request)[:3], {}, Scorer())
    assert [score.values.get("score") for score in scores] == [5.0, None, None]
    assert all(score.failed for score in scores[1:])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "options, words",
    [
        ({"count": 700}, ["has 700 edits", "737"]),
        ({"photos": False}, ["no folder singleturn", "Benchmark.tar"]),
        ({"5": {"id": "a.jpg", "prompt": "x", "edit_type": "alter"}}, ["'5'", "'alter'", "GenEditEvalKit"]),
        ({"5": {"id": "a.jpg", "prompt": "x", "edit_type": "add"}}, ["lacks 1 of 4 source images", "a.jpg"]),
        ({"5": "a cat"}, ["'5' is no edit"]),
    ],
)
def test_data_that_are_not_whole(tmp_path, refuses, options, words):
    data = copy_of_data(tmp_path / "data", **options)
    refuses(lambda: ImgEdit().items(Request(data, tmp_path, extra={"results": None})), *words)


@pytest.mark.bad_input
def test_another_suites_folder(tmp_path, refuses):
    (tmp_path / "prompts.json").write_text("{}")
    refuses(lambda: ImgEdit().files(Request(tmp_path, tmp_path)), "basic_edit.json", "github.com")
    data = copy_of_data(tmp_path / "data")
    (data / "Basic" / "prompts.json").write_text('{"add": "rate it"}')
    refuses(lambda: ImgEdit().items(Request(data, tmp_path)), "no rubric of extract")


@pytest.mark.bad_input
def test_what_scoring_needs(tmp_path, refuses):
    request = Request(tmp_path, tmp_path, extra={"results": None})
    refuses(lambda: ImgEdit().score(request, [], {}, Scorer()), "--judge=URL", "--results")
    other = tmp_path / "other.json"
    other.write_text("{}")
    request = Request(tmp_path, tmp_path, extra={"results": str(other)})
    refuses(lambda: ImgEdit().score(request, [], {}, Scorer()), "other.json", "basic_bench.py")
