"""MMBench: the user's table, the official reading of answers, CircularEval, the official files."""

import base64
import csv
import io
import json

import pytest
from PIL import Image

from unialign_jax.evaluation.suite import Request, Scorer
from unialign_jax.evaluation.suites.mmbench import (
    MMBench,
    inferred_option,
    named_option,
    question_prompt,
    quoted_option,
)

CHOICES = {"A": "a red bus", "B": "a dog", "C": "two cats"}
COLUMNS = ("index", "question", "hint", "A", "B", "C", "answer", "category", "l2-category", "split", "image")


def picture(color="red", size=(8, 6), kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def question(index, answer="A", **changes):
    facts = {"index": index, "question": "What is it?", "A": "cat", "B": "dog", "answer": answer, "split": "dev"}
    return facts | {"category": "identity", "l2-category": "logic_reasoning", "image": picture()} | changes


def rotated(first, *rows):
    """The rows of question `first`, the others with its image by reference."""
    return [question(first + k * 1_000_000, **({"image": str(first)} if k else {}) | row) for k, row in enumerate(rows)]


ROWS = [
    *rotated(7, {"answer": "A"}, {"answer": "B", "A": "dog", "B": "cat"}),
    *rotated(9, {"answer": "B"}, {"answer": "A", "A": "dog", "B": "cat"}),
    question(12, "C", C="cow", hint="It says moo.", category="ocr", **{"l2-category": "coarse_perception"}),
]


def write(path, rows, columns=COLUMNS):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def request_of(tmp_path):
    def make(rows=ROWS, name="MMBench_DEV_EN", columns=COLUMNS, **extra):
        data = write(tmp_path / f"{name}.tsv", rows, columns) if rows else tmp_path
        return Request(data, tmp_path / "run", extra={"results": None, "judge_prompt": None} | extra)

    return make


def answers(**given):
    """{index: result}: right for all rows of ROWS but those that are given, as i7="B"."""
    right = {row["index"]: row["answer"] for row in ROWS}
    return {str(index): {"text": given.get(f"i{index}", answer)} for index, answer in right.items()}


@pytest.mark.parametrize(
    "answer, option",
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is: B", "B"),
        ("A or B", None),  # two letters
        ("a", None),
        ("B is what I would choose", None),  # not among the last four words
        ("B it is, really", "B"),
        ("I take B of them all", "B"),  # the fourth from the end
        ("I take B of them all now", None),  # the fifth
        ("Z", "Z"),
        ("Z and A", "A"),
        ("Cannot determine the answer here", "Z"),
        ("B) a dog", "B"),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_names(answer, option):
    assert named_option(answer, CHOICES) == option


@pytest.mark.parametrize(
    "answer, option",
    [
        ("It is A Dog", "B"),  # small and big letters
        ("a dog beside two cats", None),  # two texts
        ("a dog, and that is all that there is to be seen", None),  # 48 characters; twice 9 + 5 + 8 is 44
        ("a dog, and that is all that there is to see.", "B"),  # 44
        ("a horse", None),
    ],
)
def test_the_option_that_an_answer_quotes(answer, option):
    assert quoted_option(answer, CHOICES) == option


def test_letters_go_before_texts():
    assert inferred_option("C, a dog", CHOICES) == "C"
    assert inferred_option("B or C: two cats", CHOICES) == "C"


def test_questions_are_asked_in_the_official_words_with_the_rows_picture(request_of):
    suite, request = MMBench(), request_of()
    items = suite.items(request)
    assert [(item.id, item.group, len(item.jobs)) for item in items] == [
        ("7", "identity", 2), ("9", "identity", 2), ("12", "ocr", 1),
    ]  # fmt: skip
    assert items[2].jobs[0]["question"] == (
        "Hint: It says moo.\nQuestion: What is it?\nOptions:\nA. cat\nB. dog\nC. cow\n"
        "Please select the correct answer from the options above. \n"
    )
    assert items[0].jobs[1]["question"] == (
        "Question: What is it?\nOptions:\nA. dog\nB. cat\nPlease select the correct answer from the options above. \n"
    )
    assert items[0].jobs[1] == items[0].jobs[0] | {"id": "1000007", "question": items[0].jobs[1]["question"]}
    suite.prepare(request, items)
    assert sorted(path.name for path in (request.output / "images").iterdir()) == ["12.png", "7.png", "9.png"]
    with Image.open(items[0].jobs[0]["image"]) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_an_option_that_pandas_takes_for_an_empty_cell_is_left_out(request_of):
    [item] = MMBench().items(request_of([question(1, "A", C="None")]))
    assert list(item.facts["turns"][0]["choices"]) == ["A", "B"]
    assert "None" not in question_prompt(item.facts["turns"][0])


def test_a_question_is_right_if_all_its_rotations_are(request_of):
    suite, request = MMBench(), request_of()
    items = suite.items(request)
    scores = suite.score(request, items, answers(i1000009="B", i12="a big cow"), Scorer())
    assert {score.item: score.values["correct"] for score in scores} == {"7": 1.0, "9": 0.0, "12": 1.0}
    figures = suite.figures(scores, "official")
    expected = {"overall": 2 / 3, "LR/accuracy": 0.5, "CP/accuracy": 1.0, "identity/accuracy": 0.5}
    expected |= {"ocr/accuracy": 1.0, "without rotations": 1.0, "unread": 0.0}
    assert figures == pytest.approx(expected, abs=1e-9)
    assert suite.figures(scores, "corrected") == figures
    table = list(csv.reader((request.made / "model_MMBench_DEV_EN_acc.csv").open()))
    assert table[0] == ["split", "Overall", "CP", "LR", "identity", "ocr"]
    assert table[1] == ["dev", str(2 / 3), "1.0", "0.5", "0.5", "1.0"]


def test_without_a_judge_an_answer_that_names_no_option_is_wrong(request_of):
    suite, request = MMBench(), request_of()
    scores = suite.score(request, suite.items(request), answers(i1000007="hard to say"), Scorer())
    assert scores[0].values == {"correct": 0.0, "first": 1.0} and not scores[0].failed
    assert suite.figures(scores, "official")["unread"] == pytest.approx(1 / 3)


def test_the_judge_is_asked_where_a_question_may_still_be_right(request_of, judge_server, text_judge):
    suite, request = MMBench(), request_of()
    items = suite.items(request)
    results = answers(i7="an animal that purrs", i1000009="B", i9="barks", i12="a beast")
    judge_server.reply = lambda body: "A" if "purrs" in body["messages"][0]["content"] else "Z"
    progress = []
    scores = suite.score(request, items, results, Scorer(text_judge, progress=progress.append))
    assert [score.values["correct"] for score in scores] == [1.0, 0.0, 0.0]  # Z is no option
    asked = [body["messages"][0]["content"] for body in judge_server.bodies]
    assert len(asked) == 2 and not any("barks" in text for text in asked)  # question 9 is wrong already
    assert "What is it?" in asked[0] and "A. cat\nB. dog\n" in asked[0] and "an animal that purrs" in asked[0]
    assert sum(progress) == 3


def test_a_judge_that_names_no_option_is_asked_three_times_and_nothing_is_guessed(request_of, judge_server, text_judge):
    suite, request = MMBench(), request_of()
    items, results = suite.items(request), answers(i12="a beast")
    judge_server.reply = lambda body: "I cannot tell which of these it may be"
    scores = suite.score(request, items, results, Scorer(text_judge))
    assert len(judge_server.bodies) == 3 and scores[2].values["correct"] == 0.0
    guessed = suite.score(request, items, results, Scorer(text_judge, official_guess=True))
    assert len(judge_server.bodies) == 3  # the journal has it
    assert guessed == suite.score(request, items, results, Scorer(text_judge, official_guess=True))


def test_the_users_copy_of_the_official_prompt(request_of, judge_server, text_judge, tmp_path):
    copy = tmp_path / "multiple_choice.py"
    copy.write_text("import nothing\ndef build_prompt(a, b, c):\n    tmpl = ('Match {} '\n        'of {}: {}!')\n")
    suite, request = MMBench(), request_of(judge_prompt=str(copy))
    judge_server.reply = lambda body: "C"
    scores = suite.score(request, suite.items(request), answers(i12="a {} beast"), Scorer(text_judge))
    [body] = judge_server.bodies
    options = "There are several options: \nA. cat\nB. dog\nC. cow\n"
    assert body["messages"][0]["content"] == f"Match What is it? of {options}: a {{}} beast!"
    assert scores[2].values["correct"] == 1.0
    assert len(suite.describe_scoring(request)["judge_prompt_sha256"]) == 64


def test_the_official_file_of_answers_is_written_and_read(request_of, tmp_path):
    suite, request = MMBench(), request_of()
    items = suite.items(request)
    request.made.mkdir(parents=True)
    results = answers(i1000009="B\nor\tso")
    suite.arrange(request, items, results)
    path = request.made / "model_MMBench_DEV_EN.tsv"
    rows = list(csv.DictReader(path.open(newline=""), delimiter="\t"))
    assert [row["index"] for row in rows] == ["7", "9", "12", "1000007", "1000009"]
    assert rows[4]["prediction"] == "B\nor\tso" and rows[0]["A"] == "cat" and "image" not in rows[0]
    read = request_of(results=str(path))
    again = suite.score(read, suite.items(read), {}, Scorer())
    assert [s.values for s in again] == [s.values for s in suite.score(request, items, results, Scorer())]


def test_the_excel_file_of_answers(request_of, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    suite, request = MMBench(), request_of()
    request.made.mkdir(parents=True)
    suite.arrange(request, suite.items(request), answers(i12="=1+1\x07"))
    path = request.made / "model_MMBench_DEV_EN.xlsx"
    cells = list(openpyxl.load_workbook(path).active.iter_rows(values_only=True))
    assert cells[0][-1] == "prediction" and cells[3][0] == 12 and cells[3][-1] == "=1+1"  # a text, no formula
    read = request_of(results=str(path))
    scores = suite.score(read, suite.items(read), {}, Scorer())
    assert [score.values["correct"] for score in scores] == [1.0, 1.0, 0.0]


def test_hits_of_the_official_evaluation_are_taken_as_they_are(request_of, tmp_path):
    found = write(tmp_path / "result.tsv", [{"index": 7.0, "hit": 0}, {"index": 12, "hit": 1}], ("index", "hit"))
    suite, request = MMBench(), request_of(results=str(found))
    scores = suite.score(request, suite.items(request), {}, Scorer())
    assert [score.values.get("correct") for score in scores] == [0.0, None, 1.0]
    assert "has no answer" in scores[1].failed
    assert suite.figures(scores, "official")["overall"] == 0.5


def test_the_test_split_has_a_file_for_the_server_and_no_score(request_of, refuses):
    columns = [name for name in COLUMNS if name != "answer"]
    suite, request = MMBench(), request_of(name="MMBench_TEST_EN", columns=columns)
    items = suite.items(request)
    request.made.mkdir(parents=True)
    suite.arrange(request, items, answers())
    assert (request.made / "model_MMBench_TEST_EN.tsv").is_file()
    refuses(
        lambda: suite.score(request, items, answers(), Scorer()),
        "MMBench_TEST_EN.tsv has no answers", "no score can be given here", "mmbench.opencompass.org.cn",
    )  # fmt: skip


def test_notes_tell_of_other_files_and_of_a_table_without_rotations(request_of):
    notes = MMBench().notes(request_of([question(1)]))
    assert any("its MD5 differs from b6caf113" in note for note in notes)
    assert any("no rotations" in note for note in notes)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "rows, words",
    [
        ([question(1, image="")], ["row 1, image", "expected a whole number"]),
        ([question(1, image="5")], ["image of index 1 is that of 5", "get it again"]),
        ([question(1, image=picture()[:-1])], ["row 1", "cut short"]),
        ([question(1, image="?" * 100)], ["row 1", "no base64"]),
        ([question(1_000_001)], ["index 1000001, a rotation of 1, which it lacks"]),
        ([question(1), question(1)], ["row 2 has the index 1 again"]),
        ([question("one")], ["row 1: index is 'one'"]),
        ([question(1, "D")], ["row 1 (index 1): answer is 'D', expected one of A, B"]),
        ([question(1, A="", B="")], ["row 1 (index 1) has 0 options"]),
        ([question(1), question(2, "")], ["index 2 has no answer, others have"]),
    ],
)
def test_tables_that_are_refused(rows, words, request_of, refuses):
    refuses(lambda: MMBench().items(request_of(rows)), *words)


@pytest.mark.bad_input
def test_files_that_are_refused(request_of, tmp_path, refuses):
    request = request_of()
    path = request.data
    whole = path.read_text()
    path.write_text(whole[: len(whole) - 200])
    refuses(lambda: MMBench().items(request), "cut short")
    path.write_text("prompt\tpicture\na\tb\n")
    refuses(lambda: MMBench().items(request), "has no column index, question, A, B, image", "prompt, picture")
    path.write_text("index\tquestion\tA\tB\timage\n")
    refuses(lambda: MMBench().items(request), "has no rows")
    refuses(lambda: MMBench().items(Request(tmp_path / "x.tsv", tmp_path)), "x.tsv", "no such file")
    refuses(lambda: MMBench().items(Request(tmp_path / "empty", tmp_path)), "empty", "no such file")
    (tmp_path / "two.tsv").write_text("")
    refuses(lambda: MMBench().items(Request(tmp_path, tmp_path)), "2 .tsv files", "--data")


@pytest.mark.bad_input
def test_prompts_and_results_that_are_refused(request_of, tmp_path, refuses, text_judge):
    suite, copy = MMBench(), tmp_path / "prompt.txt"
    request = request_of(judge_prompt=str(copy))
    score = lambda: suite.score(request, suite.items(request), answers(), Scorer(text_judge))  # noqa: E731
    refuses(score, "prompt.txt", "no such file")
    copy.write_text("Which of {} is {}?")
    refuses(score, "has 2 times {}", "expected 3")
    copy = copy.rename(tmp_path / "code.py")
    request = request_of(judge_prompt=str(copy))
    refuses(score, "code.py has no prompt")
    found = write(tmp_path / "result.csv", [{"index": 7}], ("index",))
    request = request_of(results=str(found))
    refuses(score, "neither a column prediction nor a column hit")
    found.write_text(json.dumps({"a": "b"}))
    refuses(score, "has no column index")
