"""What the tests of evaluation share: a made-up copy of each suite's data, small and in the true layout."""

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


def geneval(folder):
    """evaluation_metadata.jsonl with a prompt of two tags."""
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "two_object",
            "include": [{"class": "cow", "count": 1}, {"class": "cup", "count": 1}],
            "prompt": "both",
        },
    ]
    folder.mkdir(parents=True)
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"--data={folder}", "--images-per-prompt=1"]


MAKERS = {"semgen": semgen, "geneval": geneval, "gedit": gedit}
SCORING = {}
# Words of a judge's prompt -> a good answer to it.
ANSWERS = {
    "[score1, score2]": '{"score": [9, 8], "reasoning": "it follows"}',
    "[score]": '{"score": [6], "reasoning": "it follows"}',
    "[naturalness, artifacts]": '{"score": [9, 4], "reasoning": "natural"}',
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
