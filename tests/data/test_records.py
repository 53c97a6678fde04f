"""Records: what is written comes back; folders that are not whole say so."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest

from unialign_jax.data import records as records_lib
from unialign_jax.data.records import Record, RecordError, open_records, read_metadata, write_records
from unialign_jax.data.shapes.tasks import shapes_example, write_shapes

REPO = Path(__file__).resolve().parents[2]


def make_records(count, teacher_width=4):
    rng = np.random.default_rng(0)
    for i in range(count):
        teacher = rng.standard_normal((2, teacher_width)).astype(np.float16) if teacher_width else (None, None)
        yield Record(
            key=f"r{i}",
            image=b"\x89PNG" + bytes(rng.integers(0, 256, 300, dtype=np.uint8)),
            conditions=tuple(bytes([j]) * 50 for j in range(i % 3 + 1)),
            caption=f'caption {i} é 猫 "quoted"\n',
            instruction="do it",
            teacher_image=teacher[0],
            teacher_text=teacher[1],
        )


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path / "edits", make_records(20), kind="edit", parameters={"made": "by hand"})
    return tmp_path / "edits"


def assert_same(found: Record, expected: Record):
    for name in Record.__dataclass_fields__:
        a, b = getattr(found, name), getattr(expected, name)
        assert type(a) is type(b)
        np.testing.assert_array_equal(a, b) if isinstance(a, np.ndarray) else (a == b) or pytest.fail(name)


def test_round_trip(folder):
    source = open_records(folder)
    assert len(source) == 20
    for index in (19, 0, 7, 7):
        assert_same(source[index], list(make_records(20))[index])
    metadata = source.metadata
    assert (metadata.kind, metadata.num_records, metadata.teacher_width) == ("edit", 20, 4)
    assert metadata.parameters == {"made": "by hand"}
    assert metadata.num_bytes == sum((folder / shard["file"]).stat().st_size for shard in metadata.shards)
    for index in (-1, 20):
        with pytest.raises(IndexError, match="expected an index from 0 to 19"):
            source[index]


def test_many_shards_keep_the_order(tmp_path):
    metadata = write_records(tmp_path / "d", make_records(300, 0), kind="edit", shard_bytes=20_000)
    assert len(metadata.shards) > 3
    source = open_records(tmp_path / "d")
    assert [source[i].key for i in range(300)] == [f"r{i}" for i in range(300)]
    assert source[0].teacher_image is None and source.metadata.teacher_width == 0


def test_records_stream_through(tmp_path):
    """Never more than a chunk of records is alive, whatever the number."""
    alive = weakref.WeakSet()
    most = 0

    def counted():
        nonlocal most
        for i in range(1000):
            record = Record(f"{i}", b"image", caption="c")
            alive.add(record)
            most = max(most, len(alive))
            yield record

    write_records(tmp_path / "d", counted(), kind="text_to_image")
    assert most <= 3 * records_lib._CHUNK


def test_folder_is_a_tfds_data_set(tmp_path):
    """What we write, TFDS opens and decodes by its own means."""
    import tensorflow_datasets as tfds

    write_shapes(tmp_path, 5, streams=("personalization",))
    builder = tfds.builder_from_directory(str(tmp_path / "personalization"))
    assert builder.info.splits["train"].num_examples == 5
    assert str(builder.info.version) == f"{records_lib.SCHEMA_VERSION}.0.0"
    rows = builder.as_data_source("train")
    for index in range(5):
        expected = shapes_example("personalization", 0, index)
        assert rows[index]["caption"].decode() == expected.caption
        np.testing.assert_array_equal(rows[index]["image"], expected.image)
        np.testing.assert_array_equal(rows[index]["conditions"], np.stack(expected.conditions))


def test_reading_and_writing_import_no_tensorflow(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(REPO)!r})
from unialign_jax.data.shapes.tasks import write_shapes
from unialign_jax.data.records import open_records
from unialign_jax.data.streams import Stream, StreamConfig
from unialign_jax.data.mixture import Mixture
from unialign_jax.data.tokenizer import load_tokenizer
write_shapes({str(tmp_path)!r}, 4, streams=("vqa",))
stream = Stream(StreamConfig("vqa", "vqa", {str(tmp_path / "vqa")!r}), load_tokenizer())
next(Mixture([stream], seed=0, global_batch=2).batches())
assert "tensorflow" not in sys.modules, "TensorFlow was imported"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_data_names_no_jax():
    for path in (REPO / "unialign_jax" / "data").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("import jax", "from jax", "import tensorflow as", "from flax")), path


def test_refuses_to_overwrite(folder, tmp_path):
    with pytest.raises(FileExistsError, match="edits exists already; .* --overwrite"):
        write_records(folder, make_records(3), kind="edit")
    assert len(open_records(folder)) == 20
    write_records(folder, make_records(3), kind="edit", overwrite=True)
    assert len(open_records(folder)) == 3
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"not written by this command \(chapter1.tex\)"):
        write_records(other, make_records(3), kind="edit", overwrite=True)
    assert (other / "chapter1.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    write_records(tmp_path / "empty", make_records(3), kind="edit")
    assert sorted(os.listdir(tmp_path)) == ["edits", "empty", "thesis"], "nothing temporary stays"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_write_leaves_nothing(folder, tmp_path, overwrite):
    def failing():
        yield from make_records(200)
        raise RuntimeError("disk on fire")

    target = folder if overwrite else tmp_path / "new"
    with pytest.raises(RuntimeError, match="disk on fire"):
        write_records(target, failing(), kind="edit", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["edits"]
    assert len(open_records(folder)) == 20


def test_bad_records_are_named(tmp_path):
    good = next(make_records(1))
    cases = [
        ([], "edit", "there are no edit records"),
        ([good], "video", "unknown kind 'video'"),
        (
            [good, Record("lonely", b"x", caption="c", instruction="i", teacher_image=good.teacher_image)],
            "edit",
            "'lonely' has no conditions: a edit",
        ),
        ([good], "vqa", "'r0' has no question, answer"),
        (
            [good, Record("bare", b"x", (b"y",), caption="c", instruction="i")],
            "edit",
            "'bare' has teacher_image of width 0",
        ),
    ]
    for items, kind, message in cases:
        with pytest.raises(ValueError, match=message.replace("a edit", "an? edit")):
            write_records(tmp_path / "d", items, kind=kind)
        assert not os.listdir(tmp_path)


def test_unready_folders_say_what_to_do(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist: write it first, see `python launch/prepare"):
        read_metadata(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds data folders \(edits\): name one of them"):
        read_metadata(tmp_path)
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="void is empty"):
        read_metadata(tmp_path / "void")
    (tmp_path / "void" / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="void is not a data folder .*notes.txt"):
        read_metadata(tmp_path / "void")
    with pytest.raises(ValueError, match="notes.txt is a file"):
        read_metadata(tmp_path / "void" / "notes.txt")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 7}, "holds records of version 7, this code reads version 1: write the folder again"),
        ({"num_records": 0, "shards": []}, "has no records"),
        ({"kind": None}, "records.json lacks kind"),
        (None, "records.json is not JSON"),
    ],
)
def test_other_metadata(folder, change, message):
    path = folder / "records.json"
    content = json.loads(path.read_text())
    if change:
        content = {key: value for key, value in (content | change).items() if value is not None}
    path.write_text(json.dumps(content) if change else "{")
    with pytest.raises(ValueError, match=message):
        open_records(folder)


def test_missing_and_short_shards(folder):
    shard = folder / json.loads((folder / "records.json").read_text())["shards"][0]["file"]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"{shard.name} has {len(data) // 2} bytes, expected {len(data)} bytes"):
        open_records(folder)
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        open_records(folder)


def test_damaged_bytes_are_a_record_error(folder):
    shard = folder / json.loads((folder / "records.json").read_text())["shards"][0]["file"]
    data = bytearray(shard.read_bytes())
    image = list(make_records(20))[11].image
    at = data.find(image[:40])
    assert at > 0, "images are stored as they are"
    data[at + 10 : at + 40] = bytes(30)
    shard.write_bytes(data)
    source = open_records(folder)
    with pytest.raises(RecordError, match=rf"record 11 of .*edits is damaged \({shard.name}\)"):
        source[11]
    for index in (10, 12):
        assert_same(source[index], list(make_records(20))[index])


SHARD = {"file": "unialign_edit-train.array_record-00000", "num_records": 20, "num_bytes": 1}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "content, words",
    [
        ("", ["not JSON"]),
        ("[1]", ["list", "object"]),
        ('"text"', ["str", "object"]),
        ("null", ["NoneType", "object"]),
        ("[" * 100_000, ["nested too deeply"]),
        ('{"version": ' + "[" * 100_000, ["nested too deeply"]),
        ('{"version": ' + "9" * 5000 + "}", ["not JSON"]),
        (b"\xff\xfe\x00", ["not JSON"]),
        (b"\x80abc", ["not JSON"]),
        ({"version": "1"}, ["version '1'"]),
        ({"version": [1]}, ["version [1]"]),
        ({"version": None}, ["version None"]),
        ({"kind": 5}, ["5 for kind", "a text"]),
        ({"kind": ["edit"]}, ["for kind"]),
        ({"kind": "films"}, ["'films' for kind", "text_to_image"]),
        ({"num_records": "20"}, ["'20' for num_records", "a whole number"]),
        ({"num_records": -1}, ["-1 for num_records"]),
        ({"num_records": 2.5}, ["2.5 for num_records"]),
        ({"num_records": True}, ["True for num_records"]),
        ({"num_records": 10**30}, ["for num_records"]),
        ({"num_records": 21}, ["21 for num_records, its shards hold 20"]),
        ({"teacher_width": None}, ["None for teacher_width"]),
        ({"teacher_width": "wide" * 1000}, ["for teacher_width"]),
        ({"parameters": []}, ["[] for parameters"]),
        ({"shards": {}}, ["{} for shards", "an array"]),
        ({"shards": ["unialign_edit"]}, ["'unialign_edit' among its shards"]),
        ({"shards": [{}]}, ["lacks shards.file"]),
        ({"shards": [SHARD | {"file": "../../etc/passwd"}]}, ["'../../etc/passwd' for a shard"]),
        ({"shards": [SHARD | {"file": "/etc/passwd"}]}, ["'/etc/passwd' for a shard"]),
        ({"shards": [SHARD | {"file": "records.json"}]}, ["'records.json' for a shard"]),
        ({"shards": [SHARD | {"file": "unialign_edit-train.array_record-0\n"}]}, ["for a shard"]),
        ({"shards": [SHARD | {"file": "\0"}]}, ["for a shard"]),
        ({"shards": [SHARD | {"num_bytes": "1"}]}, ["'1' for shards.num_bytes"]),
        ({"shards": [SHARD]}, ["bytes, expected 1 bytes"]),
    ],
    ids=range(34),
)
def test_metadata_of_the_wrong_type_or_depth(folder, content, words, refuses):
    path = folder / "records.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refuses(lambda: open_records(folder), str(folder), *words)
    assert len(message) < 500


@pytest.mark.bad_input
@pytest.mark.parametrize("how", ["zeros", "noise", "half", "nothing"])
def test_shards_that_hold_something_else(folder, how, refuses):
    """Of the size that records.json tells, and yet no ArrayRecord file: named when it is read."""
    shard = folder / SHARD["file"]
    size = shard.stat().st_size
    noise = np.random.default_rng(0).bytes(size)
    shard.write_bytes({"zeros": bytes(size), "noise": noise, "half": shard.read_bytes()[: size // 2]}.get(how, b""))
    content = json.loads((folder / "records.json").read_text())
    content["shards"][0]["num_bytes"] = shard.stat().st_size
    (folder / "records.json").write_text(json.dumps(content))
    source = open_records(folder)
    for index in (0, 19):
        refuses(lambda index=index: source[index], f"record {index} of {folder} is damaged ({shard.name})")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["a device", "a folder", "a broken link"])
def test_shards_that_are_no_files(folder, name, refuses):
    shard = folder / SHARD["file"]
    shard.unlink()
    {"a device": lambda: shard.symlink_to("/dev/zero"), "a folder": shard.mkdir}.get(
        name, lambda: shard.symlink_to(folder / "nowhere")
    )()
    refuses(lambda: open_records(folder), shard.name)


@pytest.mark.bad_input
@pytest.mark.parametrize("own", ["notes.txt", ".DS_Store", "backup/photo.jpg", "records.json/x", "features.json.bak"])
def test_own_files_in_a_data_folder_are_not_removed(folder, own, refuses):
    if own.startswith("records.json"):
        (folder / "records.json").unlink()
    (folder / own).parent.mkdir(exist_ok=True)
    (folder / own).write_text("years of work")
    refuses(
        lambda: write_records(folder, make_records(3), kind="edit", overwrite=True),
        own.split("/")[0],
        "not written by this command",
    )
    assert (folder / own).read_text() == "years of work"
    assert sorted(os.listdir(folder.parent)) == ["edits"]


@pytest.mark.bad_input
@pytest.mark.parametrize("place", ["a file", "below a file", "a link", "a long name"])
def test_outputs_that_cannot_be_folders(tmp_path, place, refuses):
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    names = {"a file": "file", "below a file": "file/data", "a link": "link", "a long name": "x" * 300}
    refuses(lambda: write_records(tmp_path / names[place], make_records(3), kind="edit", overwrite=True))
    assert (tmp_path / "file").read_text() == "years of work"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]
