"""Folders of images, with texts beside them or a metadata file."""

import json

import pytest


@pytest.fixture
def pictures(tmp_path, picture):
    folder = tmp_path / "pictures"
    (folder / "b" / "deep").mkdir(parents=True)
    for number, name in enumerate(["a.jpg", "b/c.PNG", "b/deep/d.webp", "e.jpg"]):
        image_format = {"PNG": "PNG", "webp": "WEBP"}.get(name[-4:].strip("."), "JPEG")
        (folder / name).write_bytes(picture(number, image_format))
    (folder / "a.txt").write_text(" a red car \n")
    (folder / "b" / "c.caption").write_text("\ufeffein Fluß", encoding="utf-8")
    (folder / "b" / "deep" / "d.txt").write_text("two\nlines")
    (folder / ".hidden.jpg").write_bytes(b"")
    (folder / "notes.md").write_text("none of ours")
    return folder


def test_a_text_beside_each(prepare, pictures):
    """Folders are walked in order; keys are paths; a picture without a text is a bad row."""
    found = prepare(pictures, "text_to_image", "--max-bad-fraction=0.5")
    assert [(record.key, record.caption) for record in found.records] == [
        ("pictures/a.jpg", "a red car"),
        ("pictures/b/c.PNG", "ein Fluß"),
        ("pictures/b/deep/d.webp", "two\nlines"),
    ]
    assert found.records[0].image == (pictures / "a.jpg").read_bytes(), "stored as it is"
    assert "skipped 1 of 4 rows:\n  1 x text missing" in found.said
    assert f"{pictures}/e.jpg: text missing: expected the caption in caption or text" in found.said


def test_captions_may_be_left_for_later(prepare, pictures):
    found = prepare(pictures, "text_to_image", "--missing-captions")
    assert [record.caption for record in found.records] == ["a red car", "", "ein Fluß", "two\nlines"] or len(
        found.records
    ) == 4
    assert {record.key: record.caption for record in found.records}["pictures/e.jpg"] == ""


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_of_an_imagefolder(prepare, pictures, name):
    rows = [("a.jpg", 'a "red", round car'), ("b/c.PNG", "two\nlines"), ("gone.jpg", "lost")]
    if name.endswith("csv"):
        quoted = ['"{}","{}"'.format(file, text.replace('"', '""')) for file, text in rows]
        (pictures / name).write_text("file_name,text\n" + "\n".join(quoted) + "\n")
    else:
        lines = (json.dumps({"file_name": file, "text": text}) for file, text in rows)
        (pictures / name).write_text("\n".join(lines))
    for inner in ("b/c.caption", "b/deep/d.webp"):
        (pictures / inner).unlink()
    (pictures / "b" / "c.PNG").rename(pictures / "c.png")
    (pictures / "b" / "deep" / "d.txt").unlink()
    (pictures / "b" / "c.PNG").write_bytes((pictures / "c.png").read_bytes())
    found = prepare(pictures, "text_to_image", "--max-bad-fraction=0.7", "--caption-key=text")
    captions = {record.caption for record in found.records}
    assert {'a "red", round car', "two\nlines"} <= captions
    assert "1 x image file cannot be read" in found.said


def test_edits_by_metadata(prepare, pictures):
    """Columns of edits name their images by paths, too."""
    (pictures / "metadata.csv").write_text(
        "source,target,instruction,target_caption\na.jpg,e.jpg,make it blue,a blue car\n"
    )
    (pictures / "b" / "c.PNG").unlink()
    (pictures / "b" / "deep" / "d.webp").unlink()
    (record,) = prepare(pictures, "edit").records
    assert (record.instruction, record.caption) == ("make it blue", "a blue car")
    assert record.image == (pictures / "e.jpg").read_bytes()
    assert record.conditions == ((pictures / "a.jpg").read_bytes(),)


def test_classes_by_name(prepare, tmp_path, pictures):
    (tmp_path / "names.txt").write_text("a photo of a cat\na photo of a dog\n")
    (pictures / "metadata.csv").write_text("file_name,label\na.jpg,1\ne.jpg,0\na.jpg,2\n")
    (pictures / "b" / "c.PNG").unlink()
    (pictures / "b" / "deep" / "d.webp").unlink()
    found = prepare(pictures, "text_to_image", f"--class-names={tmp_path / 'names.txt'}", "--max-bad-fraction=0.5")
    assert [record.caption for record in found.records] == ["a photo of a dog", "a photo of a cat"]
    assert "1 x unknown class" in found.said
