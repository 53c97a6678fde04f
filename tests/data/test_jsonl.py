"""The released JSONL format: good rows become records, bad rows are counted with their line."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.jsonl import ReadReport, read_jsonl
from unialign_jax.data.records import Record

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


@pytest.fixture
def folder(tmp_path):
    """A folder with one image of every sort."""
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg", "c.png", "d.bmp", "e.webp"):
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "images" / "cut.jpg").write_bytes((tmp_path / "images" / "b.jpg").read_bytes()[:300])
    return tmp_path


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def says(*values):
    return [{"from": "human", "value": values[0]}, *({"from": "gpt", "value": value} for value in values[1:])]


def image(folder, name):
    return (folder / "images" / name).read_bytes()


def test_text_to_image(folder):
    row = {"image": ["images/b.jpg"], "conversations": says(" a caption ", "<image>"), "img_w": [60], "dataset": "x"}
    absolute = {"image": str(folder / "images" / "a.png"), "conversations": says("another")}
    records = list(read_jsonl([write(folder, [row, "", absolute])], "text_to_image"))
    assert records == [
        Record("rows.jsonl:1", image(folder, "b.jpg"), caption="a caption"),
        Record("rows.jsonl:3", image(folder, "a.png"), caption="another"),
    ], "stored as they are"


@pytest.mark.parametrize("kind", ["edit", "perception"])
def test_edit(folder, kind):
    row = {"image": ["images/a.png", "images/b.jpg"], "conversations": says("after"), "instruction": "change it"}
    (record,) = read_jsonl([write(folder, [row])], kind)
    expected = Record("rows.jsonl:1", image(folder, "b.jpg"), (image(folder, "a.png"),), "after", "change it")
    assert record == expected


def test_personalization(folder):
    row = {
        "original_images": ["images/a.png", "images/b.jpg", "images/c.png"],
        "generated_images": ["images/b.jpg"],
        "edit_prompt": '\\"put them together\\"',
        "caption": "all of them",
    }
    (record,) = read_jsonl([write(folder, [row])], "personalization")
    assert record.conditions == tuple(image(folder, name) for name in ("a.png", "b.jpg", "c.png"))
    assert (record.instruction, record.caption) == ("put them together", "all of them")


def test_vqa_first_turn(folder):
    turns = says("<image>\nWhat is it?", "A cat.") + says("Sure?", "Yes.")
    (record,) = read_jsonl([write(folder, [{"image": "images/a.png", "conversations": turns}])], "vqa")
    assert (record.question, record.answer) == ("What is it?", "A cat.")


def test_other_formats_become_png(folder):
    rows = [{"image": [f"images/{name}"], "conversations": says("x")} for name in ("d.bmp", "e.webp")]
    for record, name in zip(read_jsonl([write(folder, rows)], "text_to_image"), ("d.bmp", "e.webp"), strict=True):
        with Image.open(io.BytesIO(record.image)) as stored, Image.open(folder / "images" / name) as original:
            assert stored.format == "PNG"
            np.testing.assert_array_equal(np.asarray(stored), np.asarray(original.convert("RGB")))


def test_max_side(folder):
    rows = [{"image": [f"images/{name}"], "conversations": says("x")} for name in ("a.png", "b.jpg")]
    path = write(folder, rows)
    small = list(read_jsonl([path], "text_to_image", max_side=30))
    for record, image_format in zip(small, ("PNG", "JPEG"), strict=True):
        with Image.open(io.BytesIO(record.image)) as stored:
            assert (stored.format, stored.size) == (image_format, (30, 20))
    kept = list(read_jsonl([path], "text_to_image", max_side=60))
    assert [record.image for record in kept] == [image(folder, "a.png"), image(folder, "b.jpg")]


def test_bad_rows_are_skipped_and_reported(folder):
    good = {"image": ["images/a.png"], "conversations": says("fine")}
    bad = {
        "not a JSON object": ["{oops", "[1, 2]"],
        "images missing": [{"conversations": says("x")}, {"image": [], "conversations": says("x")}, {"image": [None]}],
        "image is a URL": [{"image": ["https://x.org/a.jpg"], "conversations": says("x")}],
        "image file cannot be read": [{"image": ["images/none.png"], "conversations": says("x")}],
        "image cannot be decoded": [{"image": ["images/cut.jpg"], "conversations": says("x")}],
        "text missing": [{"image": ["images/a.png"]}, {"image": ["images/a.png"], "conversations": says("  ")}],
    }
    rows = [good, *(row for rows in bad.values() for row in rows), *[good] * 20]
    report = ReadReport()
    path = write(folder, rows)
    records = list(read_jsonl([path], "text_to_image", report=report, max_bad_fraction=0.4, num_threads=3))
    assert [record.key for record in records] == ["rows.jsonl:1", *(f"rows.jsonl:{i}" for i in range(12, 32))]
    assert (report.num_rows, report.num_bad) == (31, 10)
    assert report.reasons == {reason: len(rows) for reason, rows in bad.items()}
    assert len(report.first_bad) == 5
    assert report.first_bad[0].startswith(f"{path}:2: not a JSON object")
    assert report.first_bad[2].startswith(f"{path}:4: images missing")


def test_too_many_bad_rows(folder):
    good = {"image": ["images/a.png"], "conversations": says("fine")}
    path = write(folder, [good] * 8 + ["{"] * 2)
    assert len(list(read_jsonl([path], "text_to_image", max_bad_fraction=0.2))) == 8
    with pytest.raises(ValueError, match=r"2 of 10 rows are bad, .* share of 0.1 that is allowed; first: .*jsonl:9"):
        list(read_jsonl([path], "text_to_image"))
    with pytest.raises(ValueError, match="2 of 2 rows are bad"):
        list(read_jsonl([write(folder, ["{"] * 2)], "text_to_image", max_bad_fraction=1.0))
    with pytest.raises(ValueError, match="no rows in .*empty.jsonl"):
        list(read_jsonl([write(folder, ["", ""], "empty.jsonl")], "text_to_image"))
    with pytest.raises(ValueError, match="unknown kind 'sound'"):
        list(read_jsonl([path], "sound"))


def test_order_and_bytes_over_many_rows_and_files(folder):
    rows = [{"image": ["images/a.png"], "conversations": says(f"number {i}")} for i in range(60)]
    paths = [write(folder, rows[:40], "1.jsonl"), write(folder, rows[40:], "2.jsonl")]
    seen = []
    records = list(read_jsonl(paths, "text_to_image", num_threads=3, on_bytes=seen.append))
    assert [record.caption for record in records] == [f"number {i}" for i in range(60)]
    assert sum(seen) == sum(path.stat().st_size for path in paths)


@pytest.mark.parametrize("name, kind", [("photos_t2i.jsonl", "text_to_image"), ("photos_edit.jsonl", "edit")])
def test_photographs(name, kind):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"the photographs are not here ({path})")
    report = ReadReport()
    records = list(read_jsonl([path], kind, report=report))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == len(rows) == 150 and report.num_bad == 0
    for record, row in list(zip(records, rows, strict=True))[::50]:
        assert record.image == (path.parent / row["image"][-1]).read_bytes()
        assert record.caption == row["conversations"][0]["value"].strip()
        assert record.instruction == row.get("instruction", "")
