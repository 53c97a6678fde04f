"""Caches beside the records: written in parts, resumed, refused when they are of something else."""

import dataclasses
import json

import numpy as np
import pytest

from unialign_jax.data import caches
from unialign_jax.data.records import write_records
from unialign_jax.data.shapes.tasks import write_shapes
from unialign_jax.data.streams import Stream, StreamConfig
from unialign_jax.data.tokenizer import load_tokenizer

WIDTH, COUNT = 6, 11


@pytest.fixture
def folder(tmp_path):
    write_shapes(tmp_path, COUNT, image_size=32, teacher_width=4, streams=("text_to_image",))
    return tmp_path / "text_to_image"


def describe(folder, **changes):
    made = caches.Description(
        name="teacher",
        records=caches.records_digest(folder),
        num_records=COUNT,
        size=(32, 32),
        network="a",
        arrays={"teacher_image": (WIDTH,), "teacher_text": (WIDTH,)},
        rows=4,
        options={},
    )
    return dataclasses.replace(made, **changes)


def rows(description, number):
    """Row i holds i; the text's is negative."""
    values = np.array(description.part(number), np.float16)[:, None].repeat(WIDTH, axis=1)
    return {"teacher_image": values, "teacher_text": -values}


def fill(folder, description, parts=None):
    writer = caches.Writer(folder, description)
    for number in writer.missing() if parts is None else parts:
        writer.write(number, rows(description, number))
    return writer


def stream(folder, **changes):
    settings = {"image_size": 32, "text_length": 16} | changes
    return Stream(StreamConfig("pairs", "text_to_image", str(folder), **settings), load_tokenizer())


def test_a_stream_reads_the_cache_in_place_of_the_records_own_features(folder):
    assert stream(folder).teacher_width == 4
    fill(folder, describe(folder))
    read = stream(folder)
    assert read.teacher_width == WIDTH
    assert read.networks == {"teacher": "a"}
    for index in range(COUNT):
        assert read[index]["teacher_image"].tolist() == [index] * WIDTH
        assert read[index]["teacher_text"].dtype == np.float16
    part = read.part(5, 8)
    assert part[0]["teacher_text"].tolist() == [-5] * WIDTH


def test_a_writer_resumes_with_the_parts_that_are_missing(folder):
    writer = fill(folder, describe(folder), parts=[1])
    (folder / "teacher" / ".teacher_image-00000.npy.x.partial").touch()  # of a killed writer
    assert caches.Writer(folder, describe(folder)).missing() == [0, 2]
    with pytest.raises(ValueError, match="teacher_image-00000.npy is missing, the cache is not whole"):
        stream(folder)
    fill(folder, describe(folder))
    assert writer.missing() == []
    assert stream(folder)[10]["teacher_image"][0] == 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": "b"}, "made by another network"),
        ({"size": (64, 64)}, "images of 32 x 32 pixels, not 64 x 64"),
        ({"options": {"cut": 3}}, "made with other settings"),
        ({"records": "0" * 64}, "made of other records"),
    ],
)
def test_a_cache_of_something_else_is_not_continued(folder, changes, words):
    fill(folder, describe(folder))
    with pytest.raises(ValueError, match=words):
        caches.Writer(folder, describe(folder, **changes))
    caches.Writer(folder, describe(folder, **changes), overwrite=True)
    assert caches.read_description(folder / "teacher") == describe(folder, **changes)


def test_a_stream_refuses_a_cache_that_does_not_fit(folder):
    fill(folder, describe(folder, size=(64, 64)))
    with pytest.raises(ValueError, match="images of 64 x 64 pixels, the stream has 32 x 32"):
        stream(folder)
    with pytest.raises(ValueError, match="has no cached latents"):
        stream(folder, use_teacher=False, use_latents=True)

    path = folder / "teacher" / caches.FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        stream(folder)


def test_a_cache_of_other_records_or_cut_short_is_refused(folder):
    fill(folder, describe(folder))
    file = folder / "teacher" / "teacher_text-00001.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match="teacher_text-00001.npy has .* bytes"):
        stream(folder)
    file.write_bytes(whole)
    records = folder / "records.json"
    records.write_text(records.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match="made of other records"):
        stream(folder)


def test_a_row_of_nan_is_a_record_that_cannot_be_decoded(folder):
    description = describe(folder)
    fill(folder, description, parts=[0, 2])
    damaged = rows(description, 1)
    damaged["teacher_image"][2] = damaged["teacher_text"][2] = np.nan
    caches.Writer(folder, description).write(1, damaged)
    read = stream(folder)
    assert bool(read[6]["replaced"])
    assert read[6]["teacher_image"][0] == 7


def test_a_folder_with_a_cache_may_be_written_again_and_one_with_more_may_not(folder):
    fill(folder, describe(folder))
    records = [stream(folder).records[0]]
    write_records(folder, records, kind="text_to_image", overwrite=True)
    assert not (folder / "teacher").exists()
    (folder / "teacher").mkdir()
    (folder / "teacher" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="teacher"):
        write_records(folder, records, kind="text_to_image", overwrite=True)
