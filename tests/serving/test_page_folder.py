"""The folder of the page's files: what goes, and what stays."""

import os
import time
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed")

from unialign_jax.serving import page_folder
from unialign_jax.serving.page_folder import Folder
from unialign_jax.serving.page_worker import Worker
from unialign_jax.serving.requests import Limits

ENGINE = SimpleNamespace(loras={}, pipeline=SimpleNamespace(config=SimpleNamespace(image_size=64)))
DAY = 24 * 3600


def written(folder, name, size, age):
    """A file of an age in seconds."""
    path = folder / name / "image.png"
    path.parent.mkdir()
    path.write_bytes(bytes(size))
    os.utime(path, times=(time.time() - age,) * 2)
    return path


def names(folder):
    return {path.parent.name for path in folder.rglob("*.png")}


def test_what_nobody_used_for_a_day_goes_and_examples_stay(tmp_path):
    folder = Folder(tmp_path)
    written(tmp_path, "example", 10, 9 * DAY)
    folder.keep_all()
    written(tmp_path, "old", 10, DAY + 60)
    written(tmp_path, "young", 10, DAY - 60)
    folder.sweep()
    assert names(tmp_path) == {"example", "young"}


def test_old_files_go_when_a_file_comes(tmp_path, monkeypatch):
    folder = Folder(tmp_path)
    written(tmp_path, "old", 10, 2 * DAY)
    assert folder.make_room(5) and names(tmp_path) == {"old"}  # it looks once a minute
    later = time.monotonic() + 61
    monkeypatch.setattr(page_folder.time, "monotonic", lambda: later)
    assert folder.make_room(5) and names(tmp_path) == set()


def test_the_oldest_go_first_where_there_is_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(page_folder, "MOST_BYTES", 1000)
    folder = Folder(tmp_path)
    written(tmp_path, "example", 100, 900)
    folder.keep_all()
    for number in range(9):
        assert folder.make_room(100)
        written(tmp_path, str(number), 100, 800 - number)
    assert names(tmp_path) == {"example", *"012345678"}
    assert folder.make_room(100) and names(tmp_path) == {"example", *"12345678"}
    written(tmp_path, "9", 100, 0)
    assert folder.make_room(500) and names(tmp_path) == {"example", *"6789"}
    assert not folder.make_room(901) and names(tmp_path) == {"example", *"6789"}  # nothing goes in vain
    assert folder.make_room(900) and names(tmp_path) == {"example"}


def test_half_of_a_small_disk_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(page_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=600))
    assert Folder(tmp_path).most == 300


def test_folders_without_files_go_later(tmp_path):
    folder = Folder(tmp_path)
    path = written(tmp_path, "old", 10, 2 * DAY)
    folder.sweep()
    assert path.parent.is_dir()  # Gradio may be about to write into it
    os.utime(path.parent, times=(time.time() - 3601,) * 2)
    folder.sweep()
    assert list(tmp_path.iterdir()) == []


def test_links_are_not_followed(tmp_path):
    outside = written(tmp_path, "outside", 10, 2 * DAY)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(outside.parent)
    Folder(tmp_path / "inside").sweep()
    assert outside.exists()


def test_an_image_that_is_made_again_is_young_again(tmp_path):
    worker = Worker(ENGINE, tmp_path, model="tiny", limits=Limits(), stamp={})
    first, other = (worker.keep(Image.new("RGB", (4, 4), color), 1) for color in ("red", "blue"))
    for path in (first, other):
        os.utime(path, times=(time.time() - 2 * DAY,) * 2)
    assert worker.keep(Image.new("RGB", (4, 4), "red"), 1) == first
    worker.folder.sweep()
    assert first.exists() and not other.exists()
    assert worker.keep(Image.new("RGB", (4, 4), "blue"), 1) == other and other.exists()


def test_an_image_for_which_there_is_no_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(page_folder, "MOST_BYTES", 10)
    worker = Worker(ENGINE, tmp_path, model="tiny", limits=Limits(), stamp={})
    with pytest.raises(OSError, match="the folder of the page's pictures is full"):
        worker.keep(Image.new("RGB", (4, 4)), 1)
