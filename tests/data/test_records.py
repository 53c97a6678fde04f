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
from unialign_jax.data.shapes import shapes_example, write_shapes

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
from unialign_jax.data.shapes import write_shapes
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
    for path in (REPO / "unialign_jax" / "data").glob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.strip().startswith(("import jax", "from jax", "import tensorflow as", "from flax")), path


def test_refuses_to_overwrite(folder, tmp_path):
    with pytest.raises(FileExistsError, match="edits already holds records: .* --overwrite"):
        write_records(folder, make_records(3), kind="edit")
    assert len(open_records(folder)) == 20
    write_records(folder, make_records(3), kind="edit", overwrite=True)
    assert len(open_records(folder)) == 3
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not a data folder"):
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
        ([], "edit", "no edit records"),
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
        ({"num_records": 0}, "has no records"),
        ({"kind": None}, "lacks 'kind'"),
        (None, "records.json cannot be read"),
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
    with pytest.raises(RecordError, match="record 11 of .*edits is damaged"):
        source[11]
    for index in (10, 12):
        assert_same(source[index], list(make_records(20))[index])
