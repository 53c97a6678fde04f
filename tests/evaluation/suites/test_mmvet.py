"""MM-Vet: the user's data, the judge's questions and grades, the table of capabilities, the official files."""

import csv
import json

import pytest
from PIL import Image

from unialign_jax.evaluation.suite import Request, Scorer
from unialign_jax.evaluation.suites.mmvet import MMVet, read_grade, read_results

PROMPT = "Compare.\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\nx? | -1 | 1 | 0.0\n"
QUESTIONS = {
    "v1_0": {"question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"], "imagename": "v1_0.png"},
    "v1_1": {"question": "Who?", "answer": "Ann<OR>Anna", "capability": ["rec", "know"], "imagename": "v1_1.png"},
    "v1_2": {"question": "Where?", "answer": "left", "capability": ["rec"], "imagename": "v1_2.jpg"},
}
RESULTS = {"v1_0": {"text": "x = -1"}, "v1_1": {"text": "Anna"}, "v1_2": {"text": "right"}}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "mm-vet"
    (folder / "images").mkdir(parents=True)
    (folder / "mm-vet.json").write_text(json.dumps(QUESTIONS))
    for entry in QUESTIONS.values():
        Image.new("RGB", (8, 6), "blue").save(folder / "images" / entry["imagename"])
    return folder


@pytest.fixture
def request_of(data, tmp_path):
    prompt = tmp_path / "mm-vet_evaluator.py"
    prompt.write_text(f"import argparse\nraise SystemExit('never executed')\nprompt = {PROMPT!r}\n")

    def make(mode="official", **extra):
        extra = {"judge_prompt": str(prompt), "runs": None, "results": None} | extra
        return Request(data, tmp_path / "run", mode=mode, extra=extra)

    return make


def by_question(**said):
    """A reply for each question by its first word."""
    return lambda body: next(text for word, text in said.items() if f"\n{word}" in body["messages"][0]["content"])


def test_items_and_the_official_file_of_answers(request_of):
    suite, request = MMVet(), request_of()
    items = suite.items(request)
    suite.prepare(request, items)
    job = items[2].jobs[0]
    assert job == {"id": "v1_2", "task": "vqa", "image": f"{request.output / 'images/v1_2.jpg'}", "question": "Where?"}
    assert (request.output / "images/v1_2.jpg").is_file()
    assert items[0].facts["capability"] == ["ocr", "math"]
    request.made.mkdir()
    suite.arrange(request, items, RESULTS)
    assert json.loads((request.made / "model.json").read_text()) == {
        "v1_0": "x = -1", "v1_1": "Anna", "v1_2": "right",
    }  # fmt: skip
    assert any("218 questions, these data have 3" in note for note in suite.notes(request))
    command = suite.official_command(request)
    assert "OPENAI_BASE_URL" in command and f"--result_path {request.made}" in command


def test_grades_by_capability_and_by_combination(request_of, judge_server, text_judge):
    suite, request, progress = MMVet(), request_of(), []
    judge_server.reply = by_question(What="0.5", Who="1.0", Where="0.2 or so")
    scorer = Scorer(text_judge, progress=progress.append)
    scores = suite.score(request, suite.items(request), RESULTS, scorer)
    figures = suite.figures(scores, "official")
    expected = {"total": 170 / 3, "rec/score": 60, "ocr/score": 50, "know/score": 100, "math/score": 50}
    expected |= {"only ocr+math/score": 50, "only rec+know/score": 100, "only rec/score": 20, "unread": 0}
    assert figures == pytest.approx(expected, abs=1e-9)
    assert sum(progress) == 3
    body = next(body for body in judge_server.bodies if "What" in body["messages"][0]["content"])
    assert body["messages"] == [{"role": "user", "content": f"{PROMPT}\nWhat is x? | -1 <AND> -5 | x = -1 | "}]
    assert (body["max_tokens"], body["temperature"]) == (3, 0)
    grades = json.loads((request.made / "model_judge-1-grade-1runs.json").read_text())
    assert grades["v1_2"] == {"model": ["judge-1"], "content": ["0.2 or so"], "score": [0.2]}
    table = list(csv.reader((request.made / "model_judge-1-cap-score-1runs.csv").open()))
    assert table == [
        ["", "rec", "ocr", "math", "know", "total", "std", "runs"],
        ["model", "60.0", "50.0", "50.0", "100.0", "56.7", "0.0", "[56.7]"],
    ]
    table = list(csv.reader((request.made / "model_judge-1-cap-int-score-1runs.csv").open()))
    assert table[0][1:4] == ["ocr_math", "rec_know", "rec"] and table[1][1:4] == ["50.0", "100.0", "20.0"]


def test_several_runs_are_averaged_and_have_a_deviation(request_of, judge_server, text_judge):
    suite, request = MMVet(), request_of(runs=3)
    said = iter([0.1, 0.4, 0.4, 0.5, 0.5, 0.5, 0.0, 0.9, 0.3])  # a question's runs one after another
    judge_server.reply = lambda body: str(next(said))
    scores = suite.score(request, suite.items(request), RESULTS, Scorer(text_judge))
    assert [score.facts["scores"] for score in scores] == [[0.1, 0.4, 0.4], [0.5, 0.5, 0.5], [0.0, 0.9, 0.3]]
    figures = suite.figures(scores, "official")
    assert figures["total"] == pytest.approx(40.0, abs=1e-9)  # runs 20, 60, 40
    assert figures["std of runs"] == pytest.approx((800 / 3) ** 0.5, abs=1e-9)
    assert [len(judge_server.bodies), len(set(text_judge.journal.judgements))] == [9, 9]
    graded = request.made / "model_judge-1-grade-3runs.json"
    read = request_of(results=str(graded))
    again = suite.score(read, suite.items(read), {}, Scorer())
    assert suite.figures(again, "official") == figures
    assert read_results(graded, 2)[1]["v1_0"][1].value == 0.4 and len(read_results(graded, 2)[1]["v1_0"]) == 2


def test_answers_that_are_no_grade_are_asked_five_times_as_the_official_code_does(request_of, judge_server, text_judge):
    suite = MMVet()
    judge_server.reply = by_question(What="good", Who="1.5", Where="1")
    official, corrected = request_of(), request_of("corrected")
    scores = suite.score(official, suite.items(official), RESULTS, Scorer(text_judge))
    asked = [body for body in judge_server.bodies if "\nWhat" in body["messages"][0]["content"]]
    assert [body["temperature"] for body in asked] == [0, 0, 0.5, 1.0, 1.5]
    ends = [body["messages"][0]["content"].endswith("(digit): ") for body in asked]
    assert ends == [False, True, True, True, True]
    assert [score.values for score in scores] == [{"score": 0.0}, {"score": 0.0}, {"score": 1.0}]
    figures = suite.figures(scores, "official")
    assert figures["total"] == pytest.approx(100 / 3, abs=1e-9) and figures["unread"] == 2
    count = len(judge_server.bodies)
    scores = suite.score(corrected, suite.items(corrected), RESULTS, Scorer(text_judge))
    assert len(judge_server.bodies) == count  # both modes share the journal
    assert [bool(score.failed) for score in scores] == [True, True, False]
    assert suite.figures(scores, "corrected")["total"] == 100.0


@pytest.mark.parametrize("text, value", [("1", 1.0), ("0.3", 0.3), ("0.0 (wrong)", 0.0), (" 0.5", 0.5), ("1e-1", 0.1)])
def test_the_first_word_is_the_grade(text, value):
    assert read_grade(text) == value


@pytest.mark.bad_input
@pytest.mark.parametrize("text", ["good", "1.1", "-0.1", "nan", "0.5/1", "", "score: 1"])
def test_what_is_no_grade(text, refuses):
    refuses(lambda: read_grade(text), "expected a number from 0 to 1")


def test_answers_of_another_program_are_graded(request_of, judge_server, text_judge, tmp_path):
    (tmp_path / "answers.json").write_text(json.dumps({"v1_0": "x = 3", "v1_1": "Bob"}))
    suite, request = MMVet(), request_of(results=str(tmp_path / "answers.json"))
    judge_server.reply = by_question(What="0.1", Who="0.0")
    scores = suite.score(request, suite.items(request), {}, Scorer(text_judge))
    assert [score.values for score in scores] == [{"score": 0.1}, {"score": 0.0}, {}]
    assert "has no answer" in scores[2].failed and scores[0].answer == "x = 3"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: (f / "mm-vet.json").unlink(), ["has no mm-vet.json", "mm-vet.zip"]),
        (lambda f: (f / "mm-vet.json").write_text('{"v1_0": {"quest'), ["mm-vet.json is not JSON"]),
        (lambda f: (f / "mm-vet.json").write_text("{}"), ["has no questions"]),
        (lambda f: (f / "mm-vet.json").write_text('{"1": {"prompt": "add a cat"}}'), ["'1' has no imagename"]),
        (lambda f: (f / "images/v1_1.png").unlink(), ["lacks 1 of 3 images (images/v1_1.png)"]),
    ],
)
def test_data_that_are_refused(change, words, request_of, data, refuses):
    change(data)
    refuses(lambda: MMVet().items(request_of()), *words)


@pytest.mark.bad_input
def test_scoring_that_is_refused(request_of, data, tmp_path, refuses, text_judge):
    suite, scorer = MMVet(), Scorer(text_judge)
    items = suite.items(request_of())

    def score(scorer=scorer, **extra):
        return lambda: suite.score(request_of(**extra), items, RESULTS, scorer)

    refuses(score(Scorer()), "scored by a judge", "--judge=URL")
    refuses(score(judge_prompt=None), "--judge-prompt", "mm-vet_evaluator.py")
    early = lambda: MMVet().check_scoring(request_of(judge_prompt=None), True)  # noqa: E731
    refuses(early, "--judge-prompt", "mm-vet_evaluator.py")  # before the answers are made
    (tmp_path / "prompt.txt").write_text("How good is it?")
    refuses(score(judge_prompt=str(tmp_path / "prompt.txt")), "prompt.txt", "Ground truth")
    (tmp_path / "code.py").write_text("prompts = 3")
    refuses(score(judge_prompt=str(tmp_path / "code.py")), "code.py has no prompt")
    refuses(score(runs=0), "--runs is 0")
    (tmp_path / "grades.json").write_text('{"v1_0": {"score": [0.5]}}')
    refuses(score(results=str(tmp_path / "grades.json"), runs=5), "'v1_0' has 1 grades, --runs asks for 5")
    refuses(score(results=str(data / "mm-vet.json")), "neither an answer nor grades")
