"""The `caption` command end to end: a folder with missing captions, an HTTP server that fails, and a stream."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from unialign_jax.data.records import REPORT_FILES, Record, open_records, write_records
from unialign_jax.data.streams import Stream, StreamConfig
from unialign_jax.data.tokenizer import load_tokenizer

GREYS = (10, 20, 30, 40, 20)  # of the images; the fourth has a caption, and two are the same
OWN = "a caption of its own"


def png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 60, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(prepare, tmp_path):
    """A data folder made of images, of which most have no caption."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, grey in enumerate(GREYS):
        (pictures / f"{number}.png").write_bytes(png(grey))
    (pictures / "3.txt").write_text(OWN)
    return prepare(pictures, "text_to_image", "--missing-captions").folder


@pytest.fixture
def caption(launch_command, server, capsys):
    """A function (folder, *options) -> (the exit status, what was printed)."""

    def run(folder, *options):
        capsys.readouterr()
        given = [f"--input={folder}", f"--endpoint={server.url}", "--model=m", "--attempts=1", *options]
        try:
            launch_command("prepare_data").main(["caption", *given])
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        return status, capsys.readouterr().out

    return run


def records_of(folder):
    found = open_records(folder)
    return [found[number] for number in range(len(found))]


def without_caption(folder):
    return open_records(folder).metadata.parameters["without_caption"]


def open_stream(folder, kind="text_to_image"):
    return Stream(StreamConfig("mine", kind, str(folder)), load_tokenizer(None))


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_missing_captions_are_filled_and_nothing_else_changes(folder, caption, server):
    before, reports = records_of(folder), {name: (folder / name).read_bytes() for name in REPORT_FILES}
    parameters = open_records(folder).metadata.parameters
    assert without_caption(folder) == 4
    status, said = caption(folder, "--input-price=1", "--output-price=10")
    assert status == 0 and "3 images captioned (300 tokens read, 21 written, 0.00 in all), 0 failed" in said
    assert server.asked == {10: 1, 20: 1, 30: 1}
    after = records_of(folder)
    expected = ["grey 10", "grey 20", "grey 30", OWN, "grey 20"]
    assert [record.caption for record in after] == expected
    for old, new in zip(before, after, strict=True):
        assert (old.key, old.image) == (new.key, new.image)
    assert {name: (folder / name).read_bytes() for name in REPORT_FILES} == reports
    found = open_records(folder).metadata.parameters
    assert found["captions"]["model"] == "m" and found["without_caption"] == 0
    assert {key: found[key] for key in parameters if key != "without_caption"} == {
        key: value for key, value in parameters.items() if key != "without_caption"
    }
    whole = bytes_of(folder)
    status, said = caption(folder)
    assert status == 0 and "every record has a caption" in said
    assert bytes_of(folder) == whole and sum(server.asked.values()) == 3


def test_a_command_that_failed_resumes(folder, caption, server):
    server.behave = lambda grey, times: (500, {}, b"") if grey == 20 else (200, {}, server.answer(f"grey {grey}"))
    status, said = caption(folder)
    assert status == f"error: 2 records of {folder} have no caption yet: the same command asks again"
    assert "2 images captioned" in said and "1 x status 500" in said
    assert [record.caption for record in records_of(folder)] == ["grey 10", "", "grey 30", OWN, ""]
    assert without_caption(folder) == 2
    server.behave = lambda grey, times: (200, {}, server.answer("at last"))
    assert caption(folder)[0] == 0
    assert [record.caption for record in records_of(folder)] == ["grey 10", "at last", "grey 30", OWN, "at last"]
    assert server.asked == {10: 1, 20: 2, 30: 1} and without_caption(folder) == 0


def test_a_refusal_leaves_the_folder_as_it_is(folder, caption, server):
    whole = bytes_of(folder)
    server.behave = lambda grey, times: (401, {}, b"wrong key")
    status, _ = caption(folder)
    assert status.startswith("error: ") and "status 401" in status and "\n" not in status
    assert bytes_of(folder) == whole


def test_a_stream_refuses_records_without_captions(folder, caption):
    with pytest.raises(ValueError, match="stream mine: 4 of the 5 records of .* have no caption.* caption --input="):
        open_stream(folder)
    caption(folder)
    assert len(open_stream(folder)) == 5


def test_each_part_knows_its_own_number(prepare, tmp_path, picture):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(6):
        (pictures / f"{number}.jpg").write_bytes(picture(number, size=(64, 64) if number % 2 else (96, 64)))
        if number > 1:
            (pictures / f"{number}.txt").write_text("text")
    (pictures / "0.txt").write_text("")
    folder = prepare(pictures, "text_to_image", "--missing-captions", "--holdout=0.3").folder
    parts = [folder, folder.with_name(f"{folder.name}-holdout")]
    numbers = [sum(not record.caption for record in records_of(part)) for part in parts]
    assert [without_caption(part) for part in parts] == numbers and sum(numbers) == 2
    plain = prepare(pictures, "text_to_image", "--max-bad-fraction=0.5", output="plain").folder
    assert "without_caption" not in open_records(plain).metadata.parameters


def test_kinds_without_captions_are_not_asked_for_them(tmp_path):
    record = Record("a", png(10), question="What?", answer="grey")
    write_records(tmp_path / "vqa", [record], kind="vqa", optional=("caption",))
    assert without_caption(tmp_path / "vqa") == 1
    assert len(open_stream(tmp_path / "vqa", "vqa")) == 1


def test_a_folder_with_caches_is_refused(folder, caption, server):
    (folder / "latents").mkdir()
    (folder / "latents" / "cache.json").write_text(json.dumps({}))
    status, _ = caption(folder)
    assert "has caches of its records as they are (latents)" in status
    assert not server.asked
