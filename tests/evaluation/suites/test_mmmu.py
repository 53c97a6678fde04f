"""MMMU: the official reading of answers, the official goldens, the user's data, the official files."""

import io
import json
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unialign_jax.evaluation import running
from unialign_jax.evaluation.suite import Request, Scorer
from unialign_jax.evaluation.suites.mmmu import MMMU, SUBJECTS, chosen_letter, open_answers, open_is_correct

SHARED = Path(__file__).resolve().parents[4] / "shared/data/eval/mmmu"
COLORS = {"A": "red", "B": "dark blue", "C": "green"}
# The example outputs of github.com/MMMU-Benchmark/MMMU: the overall score that its scripts print (bb0b95a), and the
# right answers of each subject, counted by a shortened copy of its parser, outside this repository.
GOLDEN = {
    "llava1.5_13b": (
        0.3667,
        [8, 15, 10, 18, 16, 15, 7, 6, 12, 6, 18, 11, 7, 6, 11, 4, 12, 17, 22, 10, 5, 12, 10, 5, 11, 8, 9, 11, 12, 16],
    ),
    "qwen_vl": (
        0.3611,
        [12, 12, 9, 14, 17, 10, 11, 8, 9, 7, 18, 6, 7, 6, 13, 9, 6, 12, 24, 8, 9, 10, 10, 10, 11, 13, 10, 8, 13, 13],
    ),
}


@pytest.mark.parametrize("model", GOLDEN)
@pytest.mark.parametrize("layout", ["folder", "file"])
def test_the_official_example_outputs_score_as_the_official_code_scores_them(model, layout, tmp_path, launch_command):
    if not SHARED.is_dir():
        pytest.skip("the example outputs of MMMU are not there")
    results = SHARED / "example_outputs" / model / ("" if layout == "folder" else "total_val_output.json")
    arguments = ["mmmu", "score", f"--results={results}", f"--output={tmp_path}/run"]
    if layout == "file":
        arguments.append(f"--answers={SHARED / 'answer_dict_val.json'}")
    assert launch_command("evaluate").main(arguments) == 0
    suite = MMMU()
    scores = running.read_scores(tmp_path / "run/official/scores.jsonl")
    overall, right = GOLDEN[model]
    figures = suite.figures(scores, "official")
    assert round(figures["overall"], 4) == overall
    assert figures == pytest.approx(
        figures | {f"{subject}/accuracy": count / 30 for subject, count in zip(SUBJECTS, right, strict=True)}, abs=1e-9
    )
    table = json.loads((tmp_path / "run/official/official_table.json").read_text())
    assert table["Overall"] == {"num": 900, "acc": round(overall, 3)}
    domain = [right[SUBJECTS.index(name)] for name in ("Art", "Art_Theory", "Design", "Music")]
    assert table["Overall-Art and Design"] == {"num": 120, "acc": round(sum(domain) / 120, 3)}
    assert table["Math"] == {"num": 30, "acc": round(right[SUBJECTS.index("Math")] / 30, 3)}
    assert len(table) == 37


def test_corrected_mode_counts_the_official_guesses_as_wrong(tmp_path):
    if not SHARED.is_dir():
        pytest.skip("the example outputs of MMMU are not there")
    suite, scores = MMMU(), {}
    for mode in ("official", "corrected"):
        extra = {"results": str(SHARED / "example_outputs/qwen_vl"), "answers": None, "several_images": "first"}
        request = Request(Path(extra["results"]), tmp_path, mode=mode, extra=extra)
        scores[mode] = suite.score(request, suite.items(request), {}, Scorer())
    changed = [a for a, b in zip(*scores.values(), strict=True) if a.values != b.values]
    assert changed and all(score.facts["unread"] and score.values == {"correct": 1.0} for score in changed)


@pytest.mark.parametrize(
    "response, letter",
    [
        ("B", "B"),
        (" B ", "B"),
        ("B.", "B"),
        ("B.,", "B"),  # the comma goes first, then the full stop
        ("B,.", None),  # the full stop goes last, and the comma stays
        ("(A)", "A"),
        ("It is (A), not (C)", "C"),  # the last one that is named
        ("(C) and then (A)", "A"),
        ("(C) is better than A or B", "C"),  # brackets before letters
        ("between A and B it is B for sure", "B"),
        ("b", None),  # small letters are no options
        ("the car in the picture is Dark Blue", "B"),  # of more than five words, by text
        ("not dark blue but rather green", "C"),  # the last of two texts
        ("it is the dark blue", None),  # five words
        ("it is a very dark blue", "B"),  # six
        ("red", None),
        ("", None),
        ("A cat", "A"),  # " A " at the start
    ],
)
def test_the_option_that_an_answer_names(response, letter):
    assert chosen_letter(response, COLORS) == letter


@pytest.mark.parametrize(
    "response, found",
    [
        ("42", [42.0]),
        ("The answer is 12.971 g.", ["12.971 g", 12.97]),
        ("1,234 people", ["1,234 people", 1234.0, 234.0]),
        ("about 1.5e3", ["about 1.5e3", 1500.0, 1.0, 3.0]),
        ("-0.5", [-0.5]),
        ("x = 5", [5.0]),
        ("It is 3. The sum is 7", [7.0]),  # sentences are not split, as the text is in small letters by then
        ("x = 5\nso done", ["done"]),  # "=" counts in the last line alone
        ("thus 4\nfinal result: 5", ["result: 5", 4.0, 5.0]),
        ("C", [" c", "c "]),
        ("so 4 is \nfine", ["so 4 is \nfine", 4.0]),  # an empty tail is the shortest, and says nothing
    ],
)
def test_what_an_open_answer_may_mean(response, found):
    assert set(open_answers(response)) == set(found)


@pytest.mark.parametrize(
    "answer, response, is_correct",
    [
        ("12.97", "The answer is 12.971 g", True),
        ("12.97", "12.98", False),
        ("1234", "It is 1,234.", True),
        ("6.5", "0.0015 mol", False),
        (["Tampa", "Florida"], "somewhere in florida", True),
        (["24/7", "3.429"], "so it is 3.43", True),
        ("hormone", "It is a growth hormone", True),  # a wanted text inside
        ("C", "vitamin C", True),
        ("C", "chloride", False),  # one letter needs a space beside it
        ("4", "There are 14 of them", False),
    ],
)
def test_open_answers_that_are_right(answer, response, is_correct):
    assert open_is_correct(answer, response) is is_correct


def png(color, size=(8, 6)):
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def row(subject, number=1, **changes):
    """A question as the data of Hugging Face have it."""
    picture = {"bytes": png("red"), "path": "a.png"}
    return {
        "id": f"validation_{subject}_{number}",
        "question": "What colour is <image 1>?",
        "options": "['red', 'dark blue']",
        "image_1": picture,
        "image_2": None,
        "answer": "A",
        "question_type": "multiple-choice",
    } | changes


PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def table(rows):
    texts = ("id", "question", "options", "answer", "question_type")
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in texts}
    columns |= {name: pa.array([row[name] for row in rows], PICTURE) for name in ("image_1", "image_2")}
    return pa.table(columns)


@pytest.fixture
def data(tmp_path):
    """A question of each subject, two of Art, an open one of Math with two pictures; Music is an Arrow file."""
    folder = tmp_path / "data"
    for subject in SUBJECTS:
        (folder / subject).mkdir(parents=True)
        rows = [row(subject)]
        if subject == "Art":
            rows.append(row(subject, 2, answer="B"))
        if subject == "Math":
            other = {"bytes": png("blue", (4, 3)), "path": "b.png"}
            rows = [row(subject, question="How many?", options="[]", question_type="open", answer="['4', 'four']")]
            rows[0]["image_2"] = other
        if subject == "Music":
            saved = folder / subject / "validation"
            saved.mkdir()
            (folder / subject / "dataset_dict.json").write_text('{"splits": ["dev", "validation"]}')
            (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
            with pa.OSFile(str(saved / "data-00000-of-00001.arrow"), "wb") as file:
                with pa.ipc.new_stream(file, table(rows).schema) as writer:
                    writer.write_table(table(rows))
        else:
            pq.write_table(table(rows), folder / subject / "validation-00000-of-00001.parquet")
    return folder


def request_of(data, tmp_path, **extra):
    extra = {"answers": None, "several_images": "first", "results": None} | extra
    return Request(data, tmp_path / "run", extra=extra)


def answers_of(items, **given):
    return {item.id: {"text": given.get(item.id, "A")} for item in items}


def test_questions_are_asked_in_the_official_words_about_their_first_picture(data, tmp_path):
    suite, request = MMMU(), request_of(data, tmp_path)
    items = suite.items(request)
    assert [item.group for item in items] == sorted([*SUBJECTS, "Art"])
    by_id = {item.id: item for item in items}
    [job] = by_id["validation_Art_2"].jobs
    assert job["question"] == (
        "What colour is <image 1>?\n(A) red\n(B) dark blue\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    [job] = by_id["validation_Math_1"].jobs
    assert job["question"] == "How many?\nAnswer the question using a single word or phrase."
    suite.prepare(request, items)
    with Image.open(job["image"]) as image:
        assert image.size == (8, 6)
    assert sorted(path.name for path in (request.output / "images").iterdir()) == sorted(f"{id}.png" for id in by_id)
    assert any("1 questions have several images" in note and "first alone" in note for note in suite.notes(request))


def test_several_pictures_side_by_side(data, tmp_path):
    suite, request = MMMU(), request_of(data, tmp_path, several_images="tiled")
    items = [item for item in suite.items(request) if item.group == "Math"]
    suite.prepare(request, items)
    with Image.open(items[0].jobs[0]["image"]) as image:
        assert image.size == (8 + 16 + 4, 6)
        assert [image.getpixel(place) for place in ((0, 0), (10, 0), (24, 2), (24, 5))] == [
            (255, 0, 0), (255, 255, 255), (0, 0, 255), (255, 255, 255),
        ]  # fmt: skip


def test_the_official_files_and_the_order_of_guesses(data, tmp_path):
    suite, request = MMMU(), request_of(data, tmp_path)
    items = suite.items(request)
    results = answers_of(
        items, validation_Art_1="no idea", validation_Art_2="who knows", validation_Math_1="Four it is"
    )
    request.made.mkdir(parents=True)
    suite.arrange(request, items, results)
    total = json.loads((request.made / "total_val_output.json").read_text())
    official = random.Random(42)  # as random.seed(42) and random.choice
    guesses = [official.choice(["A", "B"]) for _ in range(2)]
    assert [total["validation_Art_1"], total["validation_Art_2"]] == guesses
    assert total["validation_Math_1"] == "Four it is" and total["validation_Sociology_1"] == "A"
    written = json.loads((request.made / "Art/output.json").read_text())
    assert written[0] == {
        "id": "validation_Art_1",
        "question_type": "multiple-choice",
        "answer": "A",
        "all_choices": ["A", "B"],
        "index2ans": {"A": "red", "B": "dark blue"},
        "response": "no idea",
    }
    [open_one] = json.loads((request.made / "Math/output.json").read_text())
    assert open_one["question_type"] == "short-answer" and open_one["answer"] == ["4", "four"]

    scores = suite.score(request, items, results, Scorer())
    figures = suite.figures(scores, "official")
    expected = [float(guess == answer) for guess, answer in zip(guesses, "AB", strict=True)]
    assert figures["Art/accuracy"] == pytest.approx(sum(expected) / 2, abs=1e-9)
    assert figures["overall"] == pytest.approx((29 + sum(expected)) / 31, abs=1e-9)  # Math: "four" is in "four it is"
    assert figures["unread"] == pytest.approx(2 / 31)
    # The folder that was written is scored alike.
    read = request_of(request.made, tmp_path, results=str(request.made))
    again = suite.score(read, suite.items(read), {}, Scorer())
    assert [score.values for score in again] == [score.values for score in scores]
    before = suite.describe_scoring(read)["results_sha256"]
    shutil.rmtree(request.made / "Math")
    assert suite.describe_scoring(read)["results_sha256"] != before
    assert any("30 questions a subject, these data: " in note and "Math 0" in note for note in suite.notes(read))


def test_the_official_answers_count_where_the_data_have_others(data, tmp_path):
    answers = {
        item.id: {"question_type": "multiple-choice", "ground_truth": "B" if item.group == "Design" else "A"}
        for item in MMMU().items(request_of(data, tmp_path))
    }
    answers["validation_Math_1"] = {"question_type": "short-answer", "ground_truth": ["4", "four"]}
    answers["validation_Art_2"]["ground_truth"] = "B"
    (data / "answer_dict_val.json").write_text(json.dumps(answers))
    suite, request = MMMU(), request_of(data, tmp_path)
    scores = suite.score(request, items := suite.items(request), answers_of(items), Scorer())
    assert {score.item for score in scores if not score.values["correct"]} == {
        "validation_Design_1",
        "validation_Art_2",
        "validation_Math_1",
    }
    notes = suite.notes(request)
    assert any("1 answers of the data files are not those" in note and "validation_Design_1" in note for note in notes)


def change(path, rows):
    path.unlink()
    pq.write_table(table(rows), path)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda folder: (folder / "Art").rename(folder / "Arts"), ["no folder Art", "huggingface.co/datasets/MMMU"]),
        (
            lambda folder: (folder / "Art/validation-00000-of-00001.parquet").unlink(),
            ["Art has no validation*.parquet"],
        ),
        (
            lambda folder: (folder / "Art/validation-00000-of-00001.parquet").write_bytes(b"PAR1 half of a file"),
            ["Art", "damaged or cut short"],
        ),
        (
            lambda folder: pq.write_table(
                pa.table({"prompt": ["a"]}), folder / "Art/validation-00000-of-00001.parquet"
            ),
            ["has no column id, question", "no file of MMMU"],
        ),
        (lambda folder: change(folder / "Art/validation-00000-of-00001.parquet", [row("Math")]), ["a question of Art"]),
        (
            lambda folder: change(folder / "Art/validation-00000-of-00001.parquet", [row("Art", options="red, blue")]),
            ["row 1", "options is 'red, blue'", "a list of texts"],
        ),
        (
            lambda folder: change(folder / "Art/validation-00000-of-00001.parquet", [row("Art", image_1=None)]),
            ["row 1 has no image"],
        ),
        (
            lambda folder: (folder / "Music/validation/data-00000-of-00001.arrow").write_bytes(b"half"),
            ["Music", "damaged or cut short"],
        ),
        (lambda folder: (folder / "answer_dict_val.json").write_text("{}"), ["no answer of validation_Accounting_1"]),
        (lambda folder: (folder / "answer_dict_val.json").write_text('{"a": 1}'), ["'a' lacks question_type"]),
    ],
)
def test_data_that_are_refused(spoil, words, data, tmp_path, refuses):
    spoil(data)
    refuses(lambda: MMMU().items(request_of(data, tmp_path)), *words)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("answers.json", {"validation_Art_1": "A"}, ["--answers=answer_dict_val.json"]),
        ("nowhere", None, ["nowhere", "no such file"]),
        ("folder/notes.txt", "hello", ["no SUBJECT/output.json"]),
        (
            "folder/Art/output.json",
            [{"id": "validation_Art_1", "response": "A"}],
            ["entry 1 lacks answer, question_type"],
        ),
        (
            "folder/Art/output.json",
            [{"id": "a", "question_type": "short-answer", "answer": "4", "response": 4}],
            ["entry 1", "response is 4"],
        ),
    ],
)
def test_answers_that_are_refused(name, content, words, tmp_path, command_refuses):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    results = path if "folder" not in name else tmp_path / "folder"
    command_refuses("evaluate", ["mmmu", f"--results={results}", f"--output={tmp_path / 'run'}"], *words)
    assert not (tmp_path / "run").exists()
