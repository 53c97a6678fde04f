"""GenEval 2: its data, its questions, and its figures worked by hand."""

import json
from pathlib import Path

import pytest

from unialign_jax.evaluation.judging import PARSED, Judgement
from unialign_jax.evaluation.suite import Request, Scorer
from unialign_jax.evaluation.suites.geneval2 import GenEval2, is_right

COWS = {
    "prompt": "three plastic cows",
    "atom_count": 3,
    "vqa_list": [
        ["How many cows are in the image?", "three"],
        ["Are the cows plastic?", "Yes"],
        ["Are there any cows in the image?", "Yes"],
    ],
    "skills": ["count", "attribute", "object"],
}
DOG = {"prompt": "a dog", "atom_count": 1, "vqa_list": [["Is there a dog?", "Yes"]], "skills": ["object"]}


def run_of(folder, *entries, results=None):
    data = folder / "mine.jsonl"
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries or (COWS, DOG)))
    (folder / "run").mkdir(exist_ok=True)
    request = Request(data, folder / "run", extra={"results": results})
    return request, GenEval2().items(request)


def test_official_scores(tmp_path):
    """gm of (0.5, 1, 0.25) is 0.5, am 1.75 / 3; of (0.81) both are 0.81."""
    path = tmp_path / "score_lists.json"
    path.write_text(json.dumps([[0.5, 1.0, 0.25], [0.81]]))
    request, items = run_of(tmp_path, results=str(path))
    figures = GenEval2().figures(GenEval2().score(request, items, {}, Scorer()), "official")
    expected = {
        "gm": 100 * (0.5 + 0.81) / 2,
        "am": 100 * (1.75 / 3 + 0.81) / 2,
        "attribute/am": 100,
        "count/am": 50,
        "object/am": 100 * (0.25 + 0.81) / 2,
        "1 atoms/gm": 81,
        "3 atoms/gm": 50,
    }
    assert figures == pytest.approx(expected, abs=1e-9) and list(figures) == list(expected)


def test_answers_of_a_judge(tmp_path):
    """Three, yes, no: am 2/3, gm 0. A prompt with a question that has no answer has no score."""
    request, items = run_of(tmp_path)
    asked = []

    class Judge:
        def ask(self, questions, progress):
            asked.extend(questions)
            answers = iter(["3.", "Yes", "no", None])
            found = []
            for question in questions:
                text = next(answers)
                status = PARSED if text else "failed"
                found.append(Judgement("", question.item, question.name, status, value=text, answer=text or ""))
                progress(found[-1])
            return found

    counted = []
    scores = GenEval2().score(request, items, {}, Scorer(Judge(), progress=counted.append))
    assert asked[0].text == "How many cows are in the image? Answer in one word." and sum(counted) == 2
    assert [path.name for path in asked[3].images] == ["00001.png"]
    assert scores[0].values == {"am": pytest.approx(2 / 3, abs=1e-9), "gm": 0.0} and not scores[0].failed
    assert scores[1].failed and not scores[1].values
    assert GenEval2().figures(scores, "official")["am"] == pytest.approx(200 / 3, abs=1e-9)


@pytest.mark.parametrize(
    "answer, wanted, right",
    [
        ("Three", "three", True),
        ("3", "three", True),
        ("13", "three", False),
        ("Yes.", "Yes", True),
        ("No", "Yes", False),
    ],
)
def test_right_answers(answer, wanted, right):
    assert is_right(answer, wanted) is right


def test_paths_for_the_official_code(tmp_path):
    request, items = run_of(tmp_path)
    GenEval2().arrange(request, items, {"00001": {}})
    paths = json.loads((request.output / "image_paths.json").read_text())
    assert list(paths) == ["a dog"] and Path(paths["a dog"]) == request.made.absolute() / "00001.png"
    assert "--method soft_tifa_gm" in GenEval2().official_command(request)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "entry, words",
    [
        ({"tag": "counting", "include": [], "prompt": "a photo of a cow"}, ["line 1 is no prompt of GenEval 2"]),
        (COWS | {"skills": ["count"]}, ["as many skills"]),
    ],
)
def test_data_of_something_else(tmp_path, refuses, entry, words):
    refuses(lambda: run_of(tmp_path, entry), *words)


@pytest.mark.bad_input
def test_half_of_the_data_and_other_results(tmp_path, refuses):
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps(DOG) + "\n")
    refuses(lambda: GenEval2().items(Request(tmp_path, tmp_path)), "has 1 prompts", "800")
    path = tmp_path / "score_lists.json"
    path.write_text("[[0.5]]")
    request, items = run_of(tmp_path, results=str(path))
    refuses(lambda: GenEval2().score(request, items, {}, Scorer()), "[0.5] for prompt 0", "expected 3 scores")
    request, items = run_of(tmp_path)
    refuses(lambda: GenEval2().score(request, items, {}, Scorer()), "--judge=URL", "evaluation.py")
