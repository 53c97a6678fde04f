"""The released JSONL format: good rows become records, bad rows are counted with their line."""

import gzip
import io
import json
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data import images, jsonl
from unialign_jax.data.jsonl import BadRow, check_source
from unialign_jax.data.preparation import pieces
from unialign_jax.data.records import Record
from unialign_jax.data.sources import json_lists
from unialign_jax.data.sources.parts import SourceOptions
from unialign_jax.data.sources.pictures import ImageRules

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


def read(paths, kind, report=None, max_side=None, threads=1):
    """The records that a preparation makes of JSONL files, before it packs them; `report` counts the rows."""
    source, report = SourceOptions(kind, free_paths=True, rows_per_part=16), report or pieces.Counts()
    job = pieces.Job(kind, "json", "", source, images=ImageRules(max_side=max_side), threads=threads)
    for path in paths:
        for part in json_lists.list_parts(str(path), path.name, source):
            for row, found in pieces._read_rows(job, part):
                report.num_rows += 1
                if isinstance(found, BadRow):
                    report.add_bad(row.place, found)
                    continue
                report.notes.update(found[1])
                report.num_records += len(found[0])
                yield from (record for record, _ in found[0])


def test_text_to_image(folder):
    row = {"image": ["images/b.jpg"], "conversations": says(" a caption ", "<image>"), "img_w": [60], "dataset": "x"}
    absolute = {"image": str(folder / "images" / "a.png"), "conversations": says("another")}
    records = list(read([write(folder, [row, "", absolute])], "text_to_image"))
    assert records == [
        Record("rows.jsonl:1", image(folder, "b.jpg"), caption="a caption"),
        Record("rows.jsonl:3", image(folder, "a.png"), caption="another"),
    ], "stored as they are"


@pytest.mark.parametrize("kind", ["edit", "perception"])
def test_edit(folder, kind):
    row = {"image": ["images/a.png", "images/b.jpg"], "conversations": says("after"), "instruction": "change it"}
    (record,) = read([write(folder, [row])], kind)
    expected = Record("rows.jsonl:1", image(folder, "b.jpg"), (image(folder, "a.png"),), "after", "change it")
    assert record == expected


def test_personalization(folder):
    row = {
        "original_images": ["images/a.png", "images/b.jpg", "images/c.png"],
        "generated_images": ["images/b.jpg"],
        "edit_prompt": '"\\"put "them" together\\" ',
        "caption": "all of them",
    }
    (record,) = read([write(folder, [row])], "personalization")
    assert record.conditions == tuple(image(folder, name) for name in ("a.png", "b.jpg", "c.png"))
    assert (record.instruction, record.caption) == ('put "them" together', "all of them")


def test_every_turn_of_a_conversation_is_a_record(folder):
    turns = says("<image>\nWhat is it?", "A cat.") + says("Sure?", "Yes.") + says("Why?", "It purrs.")
    unnamed = [{"value": "What?"}, {"value": "A dog."}, {"value": "And?"}, {"value": "A bone."}]
    report = pieces.Counts()
    rows = [{"image": "images/a.png", "conversations": said} for said in (turns, unnamed)]
    records = list(read([write(folder, rows)], "vqa", report=report))
    assert [(record.key, record.question, record.answer) for record in records] == [
        ("rows.jsonl:1", "What is it?", "A cat."),
        ("rows.jsonl:1/2", "Sure?", "Yes."),
        ("rows.jsonl:1/3", "Why?", "It purrs."),
        ("rows.jsonl:2", "What?", "A dog."),
        ("rows.jsonl:2/2", "And?", "A bone."),
    ]
    assert {record.image for record in records} == {image(folder, "a.png")}
    assert (report.num_rows, report.num_records, report.num_bad, report.notes) == (2, 5, 0, {})


def test_turns_that_are_no_pair_are_left_out_and_counted(folder):
    system, human = {"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hello?"}
    robot = {"from": "gpt", "value": "Hm."}
    turns = [system, human, *says("What?", "A cat."), robot, *says("Why?", " "), *says("How?", "So."), human]
    report = pieces.Counts()
    path = write(folder, [{"image": "images/a.png", "conversations": turns}])
    records = list(read([path], "vqa", report=report))
    assert [(record.question, record.answer) for record in records] == [("What?", "A cat."), ("How?", "So.")]
    assert report.notes == {"turn(s) without a question or without an answer left out": 4}


def test_captions_are_told_from_requests(folder):
    """The caption is the first turn, as in the reference, unless that one asks about the <image>, as LLaVA's do."""
    said = {
        "a cat": [says("a cat", "<image>"), says("a cat"), says("a cat", ""), says("a cat", "Here it is.")],
        "a dog": [
            says("<image>\nDescribe it.", "a dog"),
            says("Describe it.\n<image>", "a dog"),
            says("<image>", "a dog"),
        ],
    }
    rows = [(caption, turns) for caption, several in said.items() for turns in several]
    report = pieces.Counts()
    path = write(folder, [{"image": ["images/a.png"], "conversations": turns} for _, turns in rows])
    records = list(read([path], "text_to_image", report=report))
    assert [record.caption for record in records] == [caption for caption, _ in rows]
    assert report.notes == {"row(s) with two texts and no <image>: the first was taken as the caption": 1}


def test_records_that_do_not_fit_are_left_out(prepare, folder):
    """A record of several is noted, the only one of a row makes it a bad row."""
    rows = [says("yes?", "two words") + says("no?", "one"), says("no?", "one"), says("yes?", "two words")]
    path = write(folder, [{"image": "images/a.png", "conversations": turns} for turns in rows])
    found = prepare(path, "vqa", "--min-words=2", "--max-bad-fraction=0.5")
    assert [(record.key, record.question) for record in found.records] == [
        ("rows.jsonl:1", "yes?"),
        ("rows.jsonl:3", "yes?"),
    ]
    assert "1 record(s) of rows with several left out: text too short" in found.said
    assert f"{path}:2: text too short: " in found.said


def test_other_formats_become_png(folder):
    rows = [{"image": [f"images/{name}"], "conversations": says("x")} for name in ("d.bmp", "e.webp")]
    for record, name in zip(read([write(folder, rows)], "text_to_image"), ("d.bmp", "e.webp"), strict=True):
        with Image.open(io.BytesIO(record.image)) as stored, Image.open(folder / "images" / name) as original:
            assert stored.format == "PNG"
            np.testing.assert_array_equal(np.asarray(stored), np.asarray(original.convert("RGB")))


def test_max_side(folder):
    rows = [{"image": [f"images/{name}"], "conversations": says("x")} for name in ("a.png", "b.jpg")]
    path = write(folder, rows)
    small = list(read([path], "text_to_image", max_side=30))
    for record, image_format in zip(small, ("PNG", "JPEG"), strict=True):
        with Image.open(io.BytesIO(record.image)) as stored:
            assert (stored.format, stored.size) == (image_format, (30, 20))
    kept = list(read([path], "text_to_image", max_side=60))
    assert [record.image for record in kept] == [image(folder, "a.png"), image(folder, "b.jpg")]


def test_bad_rows_are_skipped_and_reported(folder):
    good = {"image": ["images/a.png"], "conversations": says("fine")}
    bad = {
        "not a JSON object": ["{oops", "[1, 2]"],
        "images missing": [
            {"conversations": says("x")},
            *({"image": i, "conversations": says("x")} for i in ([], [None])),
        ],
        "image is a URL": [{"image": ["https://x.org/a.jpg"], "conversations": says("x")}],
        "image file cannot be read": [{"image": ["images/none.png"], "conversations": says("x")}],
        "image cannot be decoded": [{"image": ["images/cut.jpg"], "conversations": says("x")}],
        "text missing": [{"image": ["images/a.png"]}, {"image": ["images/a.png"], "conversations": says("  ")}],
    }
    rows = [good, *(row for rows in bad.values() for row in rows), *[good] * 20]
    report = pieces.Counts()
    path = write(folder, rows)
    records = list(read([path], "text_to_image", report=report, threads=3))
    assert [record.key for record in records] == ["rows.jsonl:1", *(f"rows.jsonl:{i}" for i in range(12, 32))]
    assert (report.num_rows, report.num_bad) == (31, 10)
    assert report.reasons == {reason: len(rows) for reason, rows in bad.items()}
    assert len(report.first_bad) == 5
    assert report.first_bad[0].startswith(f"{path}:2: not a JSON object")
    assert report.first_bad[2].startswith(f"{path}:4: images missing")


def test_too_many_bad_rows(folder, prepare):
    good = {"image": ["images/a.png"], "conversations": says("fine")}
    sources = {"some": [good] * 8 + ["{"] * 2, "all": ["{"] * 2, "empty": ["", ""]}
    paths = {name: write(folder, rows, f"{name}.jsonl") for name, rows in sources.items()}
    assert len(prepare(paths["some"], "text_to_image", "--max-bad-fraction=0.2").records) == 8
    with pytest.raises(SystemExit, match=r"2 of 10 rows are bad, .* share of 0.1 that is allowed; first: .*jsonl:9"):
        prepare(paths["some"], output="too many")
    with pytest.raises(SystemExit, match="2 of 2 rows are bad"):
        prepare(paths["all"], "text_to_image", "--max-bad-fraction=1.0", output="all")
    with pytest.raises(SystemExit, match="no rows in .*empty.jsonl"):
        prepare(paths["empty"], output="none")


def test_order_over_many_rows_and_files(folder):
    rows = [{"image": ["images/a.png"], "conversations": says(f"number {i}")} for i in range(60)]
    paths = [write(folder, rows[:40], "1.jsonl"), write(folder, rows[40:], "2.jsonl")]
    records = list(read(paths, "text_to_image", threads=3))
    assert [record.caption for record in records] == [f"number {i}" for i in range(60)]


@pytest.mark.parametrize("name, kind", [("photos_t2i.jsonl", "text_to_image"), ("photos_edit.jsonl", "edit")])
def test_photographs(name, kind):
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"the photographs are not here ({path})")
    report = pieces.Counts()
    records = list(read([path], kind, report=report))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == len(rows) == 150 and report.num_bad == 0
    for record, row in list(zip(records, rows, strict=True))[::50]:
        assert record.image == (path.parent / row["image"][-1]).read_bytes()
        assert record.caption == row["conversations"][0]["value"].strip()
        assert record.instruction == row.get("instruction", "")


# --- bad rows --------------------------------------------------------------------------------------------------------

CAPTION = [{"value": "a caption"}]
TEXT_TO_IMAGE = {"image": ["images/a.png"], "conversations": CAPTION}
EDIT = {"image": ["images/a.png", "images/b.jpg"], "instruction": "change it", "conversations": CAPTION}
COMPOSED = {
    "original_images": ["images/a.png"],
    "generated_images": ["images/b.jpg"],
    "edit_prompt": "together",
    "caption": "all",
}
VQA = {"image": "images/a.png", "conversations": says("What?", "A cat.")}
GOOD = {"text_to_image": TEXT_TO_IMAGE, "edit": EDIT, "personalization": COMPOSED, "vqa": VQA}


def of(kind, **changes):
    return GOOD[kind] | changes


BAD_ROWS = [
    # the row itself
    ("text_to_image", b"{", "not a JSON object"),
    ("text_to_image", b"null", "not a JSON object"),
    ("text_to_image", b"17", "not a JSON object"),
    ("text_to_image", b'"text"', "not a JSON object"),
    ("text_to_image", b"a.jpg,a caption", "not a JSON object"),
    ("text_to_image", b"\xff\xfe{}", "not a JSON object"),
    ("text_to_image", b"\x80\x81", "not a JSON object"),
    ("text_to_image", b"{}{}", "not a JSON object"),
    ("text_to_image", b"{'image': 1}", "not a JSON object"),
    ("text_to_image", b'{"image": ' + b"9" * 5000 + b"}", "not a JSON object"),
    ("text_to_image", b"[" * 200_000, "not a JSON object"),
    ("text_to_image", b'{"a": ' * 100_000, "not a JSON object"),
    ("text_to_image", b'{"image": ' + b"[" * 900 + b"]" * 900 + b"}", "images missing"),
    ("text_to_image", b'{"image": "' + b"x" * 2000 + b'\x00"}', "not a JSON object"),
    ("text_to_image", {}, "images missing"),
    ("text_to_image", {"image": "images/a.png"}, "text missing"),
    # images
    ("text_to_image", of("text_to_image", image=None), "images missing"),
    ("text_to_image", of("text_to_image", image=7), "images missing"),
    ("text_to_image", of("text_to_image", image={"path": 7}), "images missing"),
    ("text_to_image", of("text_to_image", image=[["images/a.png"]]), "images missing"),
    ("text_to_image", of("text_to_image", image=[7, "images/a.png"]), "images missing"),
    ("text_to_image", of("text_to_image", image=[""]), "images missing"),
    ("text_to_image", of("text_to_image", image="images"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="images/a\0.png"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="images/\ud800.png"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="images/\udc80.png"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="a\nb.png"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="\x1b[2J\x1b[31mred.png"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="x" * 5000), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="/dev/zero"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="/dev/stdin"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="../../../../../../../dev/zero"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="pipe"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="images/a.png/b.png"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="loop"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="huge.png"), "image file cannot be read"),
    ("text_to_image", of("text_to_image", image="/etc/passwd"), "image cannot be decoded"),
    ("text_to_image", of("text_to_image", image="rows.jsonl"), "image cannot be decoded"),
    ("text_to_image", of("text_to_image", image="empty.png"), "image cannot be decoded"),
    ("text_to_image", of("text_to_image", image="strip.png"), "image cannot be decoded"),
    ("text_to_image", of("text_to_image", image="images/cut.jpg"), "image cannot be decoded"),
    ("text_to_image", of("text_to_image", image="file:///etc/passwd"), "image is a URL"),
    ("text_to_image", of("text_to_image", image="data:image/png;base64,AAAA"), "image is a URL"),
    # texts
    ("text_to_image", of("text_to_image", conversations="a caption"), "text missing"),
    ("text_to_image", of("text_to_image", conversations={"value": "a caption"}), "text missing"),
    ("text_to_image", of("text_to_image", conversations=["a caption"]), "text missing"),
    ("text_to_image", of("text_to_image", conversations=[[]]), "text missing"),
    ("text_to_image", of("text_to_image", conversations=[{"value": ["a"]}]), "text missing"),
    ("text_to_image", of("text_to_image", conversations=[{"value": 3.5}]), "text missing"),
    ("text_to_image", of("text_to_image", conversations=[{"value": "\u2003\n"}]), "text missing"),
    ("text_to_image", of("text_to_image", conversations=says("<image>")), "text missing"),
    ("text_to_image", of("text_to_image", conversations=[{"value": "half \ud83d"}]), "text is not Unicode"),
    ("text_to_image", of("text_to_image", conversations=[{"value": "\udcff"}]), "text is not Unicode"),
    ("text_to_image", of("text_to_image", conversations=[{"value": "x" * 100_001}]), "text too long"),
    ("edit", of("edit", image=["images/a.png"]), "images missing"),
    ("edit", of("edit", image="images/a.png"), "images missing"),
    ("edit", of("edit", image=["images/none.png", "images/a.png"]), "image file cannot be read"),
    ("edit", of("edit", instruction=["change it"]), "text missing"),
    ("edit", of("edit", instruction="\ud800"), "text is not Unicode"),
    ("edit", of("edit", instruction=None), "text missing"),
    ("personalization", of("personalization", original_images=[]), "images missing"),
    ("personalization", of("personalization", original_images=["images/a.png"] * 65), "too many images"),
    (
        "personalization",
        of("personalization", original_images=["images/a.png", "/dev/zero"]),
        "image file cannot be read",
    ),
    ("personalization", of("personalization", generated_images={}), "images missing"),
    ("personalization", of("personalization", edit_prompt='"\\" "'), "text missing"),
    ("personalization", of("personalization", edit_prompt={"a": 1}), "text missing"),
    ("personalization", of("personalization", caption=7), "text missing"),
    ("vqa", of("vqa", conversations=says("What?")), "text missing"),
    ("vqa", of("vqa", conversations=says("What?", "")), "text missing"),
    ("vqa", of("vqa", conversations=says("<image>", "A cat.")), "text missing"),
    ("vqa", of("vqa", conversations=[{"from": "gpt", "value": "A cat."}]), "text missing"),
    ("vqa", of("vqa", conversations=[{"from": ["human"], "value": "What?"}, {"value": "A cat."}]), "text missing"),
    ("vqa", of("vqa", conversations=says("What\ud800?", "A cat.")), "text is not Unicode"),
    ("vqa", of("vqa", conversations=says("What?", "\udfff")), "text is not Unicode"),
    ("vqa", of("vqa", conversations=[]), "text missing"),
    ("vqa", of("vqa", image=["images/none.png"]), "image file cannot be read"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize("number", range(len(BAD_ROWS)))
def test_a_bad_row_is_told_and_costs_no_other(folder, number):
    """Whatever is in it, the rows before and after it become records, and the report has one line on it."""
    kind, row, reason = BAD_ROWS[number]
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "empty.png").write_bytes(b"")
    with open(folder / "huge.png", "wb") as file:
        file.truncate(2**40)
    Image.new("L", (1, 30_000)).save(folder / "strip.png")
    good = json.dumps(GOOD[kind]).encode()
    bad = row if isinstance(row, bytes) else json.dumps(row).encode()
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join([good, bad, good]))
    report = pieces.Counts()
    records = list(read([path], kind, report=report, threads=2))
    assert [record.key for record in records] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert (report.num_rows, report.num_bad, report.reasons) == (3, 1, {reason: 1})
    (line,) = report.first_bad
    assert line.startswith(f"{path}:2: {reason}: ") and line.isprintable() and len(line) < 500
    line.encode()
    assert "object at 0x" not in line and "<_io" not in line


@pytest.mark.bad_input
def test_a_row_without_an_end(folder, monkeypatch):
    """A line of any length is read in pieces."""
    for module in (jsonl, json_lists):
        monkeypatch.setattr(module, "MAX_LINE", 1000)
    good = json.dumps(TEXT_TO_IMAGE)
    path = write(folder, [good, "x" * 5000, good, "y" * 1001, good, "z" * 999])
    report = pieces.Counts()
    records = read([path], "text_to_image", report=report)
    assert [record.key for record in records] == ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:5"]
    assert report.reasons == {"row too long": 2, "not a JSON object": 1}
    with open(path, "rb") as file:
        assert max(map(len, jsonl.lines_of(file))) == 1001


@pytest.mark.bad_input
def test_what_nobody_thought_of_is_a_bad_row_too(folder, monkeypatch):
    def fail(data, name):
        raise MemoryError

    monkeypatch.setattr(images, "open_image", fail)
    report = pieces.Counts()
    assert list(read([write(folder, [TEXT_TO_IMAGE] * 2)], "text_to_image", report=report)) == []
    assert report.reasons == {"cannot be read": 2} and "cannot be read: MemoryError" in report.first_bad[0]


@pytest.mark.bad_input
def test_names_that_are_no_text(folder, tmp_path):
    """A file whose name is not UTF-8: its rows have keys that can be stored, its faults lines that can be printed."""
    path = tmp_path / os.fsdecode(b"r\xe9.jsonl")
    path.write_text(json.dumps(TEXT_TO_IMAGE) + "\n{")
    report = pieces.Counts()
    (record,) = read([path], "text_to_image", report=report)
    assert record.key == "r\\udce9.jsonl:1"
    assert report.first_bad[0].isprintable()


# --- sources that are none -------------------------------------------------------------------------------------------


def tar_bytes(mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        tar.addfile(tarfile.TarInfo("0001.jpg"), io.BytesIO(b""))
    return buffer.getvalue()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "name, content, words",
    [
        ("shard.tar", tar_bytes("w"), ["a tar file"]),
        ("shard.tar.gz", tar_bytes("w:gz"), ["a gzip file"]),
        ("rows.jsonl.gz", gzip.compress(b"{}\n"), ["a gzip file"]),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd....", ["a Zstandard file"]),
        ("rows.jsonl.xz", b"\xfd7zXZ\0....", ["an xz file"]),
        ("rows.jsonl.bz2", b"BZh91AY", ["a bzip2 file"]),
        ("rows.zip", b"PK\3\4....", ["a zip file"]),
        ("rows.parquet", b"PAR1\x15\4", ["a Parquet file"]),
        ("rows.arrow", b"ARROW1\0\0", ["an Arrow file"]),
        ("rows.h5", b"\x89HDF\r\n", ["an HDF5 file"]),
        ("rows.html", b"<!DOCTYPE html><html></html>", ["a web page"]),
        ("a.jpg", b"\xff\xd8\xff\xe0....", ["a JPEG image"]),
        ("a.png", b"\x89PNG\r\n", ["a PNG image"]),
        ("rows.jsonl", b"version https://git-lfs.github.com/spec/v1", ["Git LFS pointer"]),
        ("rows.jsonl", "{}\n".encode("utf-16"), ["UTF-8"]),
        ("rows.jsonl", "{}\n".encode("utf-16-le"), ["UTF-8"]),
        ("rows.bin", bytes(range(256)), ["UTF-8"]),
    ],
    ids=range(17),
)
def test_other_formats_are_told_at_once(tmp_path, name, content, words, refuses):
    """And not as so many bad rows."""
    (tmp_path / name).write_bytes(content)
    source = refuses(
        lambda: check_source(str(tmp_path / name)), f"source {tmp_path / name} is ", "one JSON object a line", *words
    )
    with pytest.raises(ValueError) as raised:
        list(read([tmp_path / name], "text_to_image"))
    assert str(raised.value) == source


@pytest.mark.bad_input
@pytest.mark.parametrize("what", ["a folder", "an empty folder", "a device", "a pipe", "nothing", "a broken link"])
def test_sources_that_are_no_files(folder, what, refuses):
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("gone")
    write(folder, [TEXT_TO_IMAGE])
    os.mkfifo(folder / "pipe")
    path, words = {
        "a folder": (folder, ["is a folder", "it holds rows.jsonl"]),
        "an empty folder": (folder / "empty", ["is a folder", "it holds none"]),
        "a device": (Path("/dev/zero"), ["device"]),
        "a pipe": (folder / "pipe", ["pipe"]),
        "nothing": (folder / "none.jsonl", ["none.jsonl does not exist"]),
        "a broken link": (folder / "link", ["link does not exist"]),
    }[what]
    threads = threading.active_count()
    refuses(lambda: list(read([path], "text_to_image")), "source", *words)
    assert threading.active_count() <= threads
