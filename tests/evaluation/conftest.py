"""What the tests of evaluation share: a made-up copy of each suite's data, small and in the true layout."""

import base64
import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

VIESCORE = {
    "context_no_delimit.txt": "You are a judge.",
    "prompts_0shot/two_image_edit_rule.txt": "Two images.",
    "prompts_0shot/tie_rule_SC.txt": "[score1, score2] Editing instruction: <instruction>",
    "prompts_0shot/one_image_gen_rule.txt": "One image.",
    "prompts_0shot/t2i_rule_SC.txt": "[score] Text Prompt: <prompt>",
    "prompts_0shot/rule_PQ.txt": "[naturalness, artifacts]",
}
SEMGEN_GROUPS = ("t2i_long", "t2i_complex", "edit_multi", "edit_complex")


def picture(seed, size):
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size)


def write_texts(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def semgen(folder, lines=2):
    """semgen_bench.jsonl with paths of another machine, images/, and prompts/ of the judge."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(1, lines + 1):
        picture(number, (40, 30) if number % 2 else (24, 48)).save(folder / "images" / f"{number}.jpg")
        texts = {group: f"{group} of {number}" for group in SEMGEN_GROUPS}
        rows.append({"image_id": number, "image_path": f"/home/me/benchmark/images/{number}.jpg"} | texts)
    (folder / "semgen_bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_texts(folder / "prompts", VIESCORE)
    return [f"--data={folder}", f"--viescore-prompts={folder / 'prompts'}"]


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def gedit_rows():
    """Two groups in English and one in Chinese, the last of them not of the intersection."""
    names = [("color_alter", "a1", "en", True), ("color_alter", "a2", "cn", True), ("text_change", "b1", "en", False)]
    return [
        {
            "task_type": group,
            "key": key,
            "instruction": f"change {key}",
            "instruction_language": language,
            "input_image": {"bytes": png(picture(number, (40, 30))), "path": None},
            "input_image_raw": {"bytes": png(picture(number, (80, 60))), "path": None},
            "Intersection_exist": shared,
        }
        for number, (group, key, language, shared) in enumerate(names)
    ]


def gedit(folder):
    """The Parquet file of the data set in its folder `data`, and prompts/ of the judge."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(gedit_rows()), folder / "data" / "train-00000-of-00001.parquet")
    write_texts(folder / "prompts", VIESCORE)
    return [f"--data={folder}", f"--viescore-prompts={folder / 'prompts'}"]


GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a photo of two cups"},
]


def geneval(folder):
    """Lines of the official file, under another name, since that one has 553."""
    folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    return [f"--data={folder / 'prompts.jsonl'}", "--images-per-prompt=1"]


def geneval_scoring(run):
    """A file of the official scorer's results."""
    lines = [
        row | {"filename": f"/x/{number:05d}/samples/00000.png", "correct": number == 0, "reason": ""}
        for number, row in enumerate(GENEVAL)
    ]
    (run.parent / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"--results={run.parent / 'results.jsonl'}"]


def geneval2(folder):
    """Two prompts, under another name than the official file's, which has 800."""
    folder.mkdir(parents=True)
    asked = {"vqa_list": [["How many cups?", "two"], ["Is it red?", "yes"]], "skills": ["count", "attribute"]}
    rows = [{"prompt": f"{name} red cups", "atom_count": 2} | asked for name in ("two", "a pair of")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--data={folder / 'prompts.jsonl'}"]


def dpg(folder):
    """1,065 prompts in one file."""
    folder.mkdir(parents=True)
    prompts = {f"item{number}": f"a red circle and {number} others" for number in range(1065)}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return [f"--data={folder}"]


def dpg_scoring(run):
    """Questions on the first prompt, after the row that the official code does not read."""
    columns = ("item_id", "proposition_id", "dependency", "category_broad", "tuple", "question_natural_language")
    rows = [
        ("item9", 1, "0", "entity", "entity - whole (x)", "Is it there?"),
        ("item0", 1, "0", "entity", "entity - whole (circle)", "Is there a circle?"),
        ("item0", 2, "1", "attribute", "attribute - color (circle, red)", "Is the circle red?"),
    ]
    with open(run.parent / "questions.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return [f"--dpg-csv={run.parent / 'questions.csv'}"]


RESPECTS = ("Prompt Compliance", "Visual Quality", "Physical Integrity")
EDIT_TYPES = ("extract", "style", "add", "adjust", "background", "replace", "remove", "action", "compose")


def imgedit(folder):
    """737 edits of one image."""
    (folder / "Basic").mkdir(parents=True)
    (folder / "singleturn/animal").mkdir(parents=True)
    picture(0, (32, 32)).save(folder / "singleturn/animal/1.jpg")
    kinds = [EDIT_TYPES[number % 9] for number in range(737)]
    edits = {str(n): {"id": "animal/1.jpg", "prompt": f"edit {n}", "edit_type": kind} for n, kind in enumerate(kinds)}
    rubric = "Rate <edit_prompt>.\n" + "".join(f"{name}: A number from 1 to 5.\n" for name in RESPECTS)
    (folder / "Basic/basic_edit.json").write_text(json.dumps(edits))
    (folder / "Basic/prompts.json").write_text(json.dumps(dict.fromkeys(EDIT_TYPES, rubric)))
    return [f"--data={folder}"]


def mmbench(folder):
    """A question in two rotations, the second with the image of the first."""
    folder.mkdir(parents=True)
    image = base64.b64encode(png(picture(0, (32, 32)))).decode()
    columns = ("index", "question", "A", "B", "answer", "category", "l2-category", "split", "image")
    rows = [
        (7, "What is it?", "cat", "dog", "A", "identity", "logic_reasoning", "dev", image),
        (1_000_007, "What is it?", "dog", "cat", "B", "identity", "logic_reasoning", "dev", "7"),
    ]
    with open(folder / "MMBench_DEV_EN.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([columns, *rows])
    return [f"--data={folder}"]


def mmmu(folder):
    """A question of each subject."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from unialign_jax.evaluation.suites.mmmu import SUBJECTS

    image = {"bytes": png(picture(0, (32, 32))), "path": "a.png"}
    for subject in SUBJECTS:
        row = {
            "id": f"validation_{subject}_1",
            "question": "What colour is <image 1>?",
            "options": "['red', 'blue']",
            "answer": "A",
            "question_type": "multiple-choice",
            "image_1": image,
        }
        (folder / subject).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([row]), folder / subject / "validation-00000-of-00001.parquet")
    return [f"--data={folder}"]


MMVET_PROMPT = (
    "Grade.\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\nx? | -1 | 1 | 0.0\n"
)


def mmvet(folder):
    """Two questions about one image."""
    (folder / "images").mkdir(parents=True)
    picture(0, (32, 32)).save(folder / "images/a.png")
    entry = {"question": "Who?", "answer": "Ann", "capability": ["rec", "ocr"], "imagename": "a.png"}
    (folder / "mm-vet.json").write_text(json.dumps({"v1_0": entry, "v1_1": entry | {"question": "Where?"}}))
    return [f"--data={folder}"]


def mmvet_scoring(run):
    (run.parent / "prompt.txt").write_text(MMVET_PROMPT)
    return [f"--judge-prompt={run.parent / 'prompt.txt'}"]


def captions(folder):
    folder.mkdir(parents=True)
    picture(0, (32, 32)).save(folder / "a.png")
    row = {"image": "a.png", "references": ["a red circle on a white background", "a circle"]}
    (folder / "captions.jsonl").write_text(json.dumps(row) + "\n")
    return [f"--data={folder / 'captions.jsonl'}"]


MAKERS = {
    "semgen": semgen,
    "geneval": geneval,
    "geneval2": geneval2,
    "dpg": dpg,
    "gedit": gedit,
    "imgedit": imgedit,
    "mmbench": mmbench,
    "mmmu": mmmu,
    "mmvet": mmvet,
    "captions": captions,
}
SCORING = {"geneval": geneval_scoring, "dpg": dpg_scoring, "mmvet": mmvet_scoring}
# Words of a judge's prompt -> a good answer to it.
ANSWERS = {
    "[score1, score2]": '{"score": [9, 8], "reasoning": "it follows"}',
    "[score]": '{"score": [6], "reasoning": "it follows"}',
    "[naturalness, artifacts]": '{"score": [9, 4], "reasoning": "natural"}',
    "Answer yes or no": "Yes.",
    "Answer in one word": "two",
    "A number from 1 to 5": "".join(f"{name}: 4\n" for name in RESPECTS),
    "Ground truth": "0.5",
    "Answer of the model": "B",  # of the prompt for MMBench
}


@pytest.fixture(scope="session")
def make_data():
    """A function (name of a suite, folder, more) -> the options that name the made-up data it writes there."""
    return lambda name, folder, **more: MAKERS[name](folder, **more)


@pytest.fixture(scope="session")
def scoring_options():
    """A function (name of a suite, folder of its run) -> options that scoring needs besides a judge."""
    return lambda name, run: SCORING[name](run) if name in SCORING else []


@pytest.fixture(scope="session")
def judge_answer():
    """A function (body of a request) -> a good answer to any suite's question, by what it asks for."""

    def answer(body):
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")
        return next(reply for words, reply in ANSWERS.items() if words in text)

    return answer
