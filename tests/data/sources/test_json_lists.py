"""Lists in JSON: LLaVA's arrays of conversations, plain rows, columns by option."""

import json

import pytest

from unialign_jax.data.sources import json_lists
from unialign_jax.data.sources.parts import SourceOptions


@pytest.fixture
def folder(tmp_path, picture):
    (tmp_path / "coco").mkdir()
    for name in "abc":
        (tmp_path / "coco" / f"{name}.jpg").write_bytes(picture(ord(name)))
    return tmp_path


def says(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


LLAVA = [
    {"id": "1", "image": "coco/a.jpg", "conversations": says("<image>\nWhat is it?", "A cat.", "Sure?", "Yes.")},
    {"id": "2", "model": "", "conversations": says("Who are you?", "A text-only row.")},
    {"id": "3", "image": "coco/b.jpg", "conversations": says("Where?\n<image>", "There.")},
]


def test_llava_mix(prepare, folder):
    """LLaVA-1.5's mix: a JSON array, several turns, `<image>` first or last, rows without an image."""
    (folder / "lists").mkdir()
    path = folder / "lists" / "llava_mix.json"
    path.write_text(json.dumps(LLAVA, indent=2))
    found = prepare(path, "vqa", f"--image-root={folder}", "--max-bad-fraction=0.5")
    assert [(record.key, record.question, record.answer) for record in found.records] == [
        ("llava_mix.json:1", "What is it?", "A cat."),
        ("llava_mix.json:1/2", "Sure?", "Yes."),
        ("llava_mix.json:3", "Where?", "There."),
    ]
    assert "1 x images missing" in found.said and f"{path}:2: images missing" in found.said


def test_llava_captions(prepare, folder):
    """LLaVA-Pretrain: a request with `<image>`, then the caption."""
    rows = [{"id": "x", "image": "coco/a.jpg", "conversations": says("Describe it.\n<image>", "a small cat")}]
    (folder / "chat.json").write_text(json.dumps(rows))
    assert prepare(folder / "chat.json").records[0].caption == "a small cat"


def test_chat_templates(prepare, folder):
    """`messages` of roles and parts with `images` beside, and the Cauldron's `texts`."""
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    rows = [
        {"images": ["coco/a.jpg"], "messages": [asked, {"role": "assistant", "content": "A cat."}]},
        {"images": ["coco/b.jpg"], "texts": [{"user": "And this?", "assistant": "A dog."}]},
        {"images": ["coco/a.jpg", "coco/b.jpg"], "texts": [{"user": "Both?", "assistant": "Yes."}]},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = prepare(folder / "rows.jsonl", "vqa", "--max-bad-fraction=0.5")
    assert [(r.question, r.answer) for r in found.records] == [("What is it?", "A cat."), ("And this?", "A dog.")]
    assert "1 x several images" in found.said


@pytest.mark.parametrize(
    "stream, row, options, expected",
    [
        ("text_to_image", {"image": "coco/a.jpg", "caption": "x"}, [], {"caption": "x"}),
        (
            "text_to_image",
            {"img_path": "coco/a.jpg", "alt": "x"},
            ["--image-key=img_path", "--caption-key=alt"],
            {"caption": "x"},
        ),
        ("text_to_image", {"image": "coco/a.jpg", "captions": ["x", "y"]}, [], {"caption": "x"}),
        ("text_to_image", {"input_prompt": "x", "output_image": "coco/a.jpg"}, [], {"caption": "x"}),
        ("vqa", {"image": "coco/a.jpg", "question": "q", "answer": "x"}, [], {"question": "q", "answer": "x"}),
        ("vqa", {"image": "coco/a.jpg", "question": "q", "answers": ["no", "yes", "yes"]}, [], {"answer": "yes"}),
        (
            "vqa",
            {"image": "coco/a.jpg", "ask": "q", "say": "x"},
            ["--question-key=ask", "--answer-key=say"],
            {"answer": "x"},
        ),
        (
            "edit",
            {"before": "coco/b.jpg", "after": "coco/a.jpg", "instruction": "i", "caption": "x"},
            [],
            {"caption": "x", "instruction": "i"},
        ),
        (
            "edit",
            {"x1": "coco/b.jpg", "x2": "coco/a.jpg", "do": "i", "then": "x"},
            ["--source-key=x1", "--image-key=x2", "--instruction-key=do", "--caption-key=then"],
            {"caption": "x", "instruction": "i"},
        ),
        (
            "perception",
            {"image": "coco/b.jpg", "conditioning_image": "coco/a.jpg", "instruction": "i", "caption": "x"},
            [],
            {"instruction": "i"},
        ),
        (
            "personalization",
            {"references": ["coco/b.jpg", "coco/c.jpg"], "target": "coco/a.jpg", "prompt": "i", "caption": "x"},
            [],
            {"instruction": "i"},
        ),
    ],
    ids=range(11),
)
def test_plain_rows(prepare, folder, stream, row, options, expected):
    (folder / "rows.jsonl").write_text(json.dumps(row))
    (record,) = prepare(folder / "rows.jsonl", stream, *options).records
    assert record.image == (folder / "coco" / "a.jpg").read_bytes()
    assert {name: getattr(record, name) for name in expected} == expected
    if stream != "text_to_image" and stream != "vqa":
        assert record.conditions[0] == (folder / "coco" / "b.jpg").read_bytes()


def test_keys_by_column(prepare, folder):
    """Of rows with one key the first is kept, wherever the others are."""
    rows = [{"id": i % 3, "image": "coco/a.jpg", "caption": f"text {i}"} for i in range(7)]
    (folder / "1.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "2.json").write_text(
        json.dumps([{"id": 2, "image": "coco/b.jpg", "caption": "late"}, {"image": "coco/a.jpg"}])
    )
    found = prepare(f"{folder}/[12].json*", "text_to_image", "--key=id", "--max-bad-fraction=0.2")
    assert [(record.key, record.caption) for record in found.records] == [
        ("0", "text 0"),
        ("1", "text 1"),
        ("2", "text 2"),
    ]
    assert "5 record(s) with the key of an earlier one dropped" in found.said and "1 x key missing" in found.said


def test_files_of_one_name_have_their_own_keys(prepare, folder):
    for name in ("x", "y"):
        (folder / name).mkdir()
        (folder / name / "rows.jsonl").write_text(json.dumps({"image": "../coco/a.jpg", "caption": name}))
    found = prepare(f"{folder}/[xy]/rows.jsonl")
    assert [(record.key, record.caption) for record in found.records] == [
        ("x/rows.jsonl:1", "x"),
        ("y/rows.jsonl:1", "y"),
    ]


def elements(path):
    parts = json_lists.list_parts(str(path), "a", SourceOptions("vqa", rows_per_part=1000))
    return [row for part in parts for row in json_lists.read_part(part, None)]


def test_arrays_are_read_in_a_stream(tmp_path, monkeypatch):
    """Whatever falls on the border of a chunk."""
    rows = [
        {"n": n, "text": 'a ] } , " \\ é 猫 \u2028' * (n % 5), "list": [[n], {"x": [1.5, None, True]}]}
        for n in range(200)
    ]
    path = tmp_path / "rows.json"
    for indent in (None, 3):
        path.write_text(
            "\ufeff \n" + json.dumps(rows, indent=indent, ensure_ascii=bool(indent)) + "\n", encoding="utf-8"
        )
        for chunk in (7, 64, 1000, 2**20):
            monkeypatch.setattr(json_lists, "_CHUNK", chunk)
            assert [row.fields for row in elements(path)] == rows
    path.write_text("[]")
    assert elements(path) == []


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "text", ['[{"a": 1}, {"b"', '[{"a": 1}, {"b": oops}, {"c": 3}]', '[{"a": 1}', '[{"a": 1}, ' + "[" * 100_000]
)
def test_arrays_that_break_off(tmp_path, text):
    """What came before is read, and the rest is one bad row."""
    (tmp_path / "rows.json").write_text(text)
    first, rest = elements(tmp_path / "rows.json")
    assert first.fields == {"a": 1}
    assert rest.fault.reason == "not a JSON object" and rest.place.endswith("rows.json:2")


@pytest.mark.bad_input
def test_elements_that_are_no_objects(tmp_path):
    (tmp_path / "rows.json").write_text('[1, "two", {"a": 3}, null, [5]]')
    assert [row.fault and row.fault.reason for row in elements(tmp_path / "rows.json")] == [
        "not a JSON object",
        "not a JSON object",
        None,
        "not a JSON object",
        "not a JSON object",
    ]
