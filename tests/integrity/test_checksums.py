"""Checksums of a folder's files: every change is found."""

import json
import random

import numpy as np
import pytest

from unialign_jax.integrity import checksums

SIZES = {"empty": 0, "one": 1, "deep/row": 4095, "deep/square": 2**21, "deep/er/beyond": 2**21 + 4097}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(0)
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(generator.bytes(size))
    checksums.record(folder)
    return folder


@pytest.fixture
def folder(written):
    """The folder, restored after the test."""
    before = {path: path.read_bytes() for path in written.rglob("*") if path.is_file()}
    yield written
    for path, content in before.items():
        path.write_bytes(content)
    for path in written.rglob("*"):
        if path.is_file() and path not in before:
            path.unlink()


def flip(path, *bits):
    content = bytearray(path.read_bytes())
    for bit in bits:
        content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_an_unchanged_folder_has_no_difference(folder):
    assert checksums.is_recorded(folder) and checksums.difference(folder) is None
    (folder / "new").write_text("ignored")
    assert checksums.difference(folder) is None
    assert {path.name for path in folder.iterdir()} == {"empty", "one", "deep", "new", checksums.RECORD}


def test_every_flipped_bit_is_found(folder):
    draw = random.Random(0)
    for name in [name for name, size in SIZES.items() if size] * 8:
        bit = draw.randrange(SIZES[name] * 8)
        flip(folder / name, bit)
        assert checksums.difference(folder) == f"{name} is not what was written: its checksum differs"
        flip(folder / name, bit)
    assert checksums.difference(folder) is None


@pytest.mark.parametrize("places", [(0, 1), (0, 512), (7, 7 + 512 * 3, 100)], ids=str)
def test_flips_that_cancel_in_a_row_or_a_column_are_found(folder, places):
    """Flips of the highest bit in two 64-bit words cancel in their sum."""
    flip(folder / "deep/square", *(64 * place + 63 for place in places))
    assert checksums.difference(folder)


def test_every_flipped_bit_of_the_record_is_found(folder):
    path = folder / checksums.RECORD
    draw = random.Random(1)
    for bit in draw.sample(range(path.stat().st_size * 8), 60):
        flip(path, bit)
        assert checksums.difference(folder)
        flip(path, bit)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"files": []}',
        b'{"files": {}}',
        b'{"files": {"one": 1}}',
        b'{"files": {"one": [1]}}',
        b'{"files": {"one": [null, null]}}',
        b'{"files": {"one": ["1", "a"]}}',
        b'{"files": {"../one": [1, "a"]}}',
        b'{"files": {"/dev/zero": [1, "a"]}}',
        b'{"files": {"one": [1, ["a"]]}}',
        b'{"files": ' + b"[" * 100_000,
    ],
    ids=lambda record: record[:40].decode(errors="replace"),
)
def test_a_strange_record_is_damage(folder, record):
    (folder / checksums.RECORD).write_bytes(record)
    reason = checksums.difference(folder)
    assert reason and "\n" not in reason


def test_missing_longer_and_exchanged_files_are_found(folder):
    (folder / "one").write_bytes(b"12")
    assert checksums.difference(folder) == "one has 2 bytes, expected 1"
    (folder / "one").unlink()
    assert checksums.difference(folder) == "one is missing"
    (folder / "one").symlink_to("/dev/zero")
    assert checksums.difference(folder) == "one is missing"
    (folder / "one").unlink()


def test_processes_share_the_reading(folder):
    for name in ("one", "deep/row", "deep/square", "deep/er/beyond"):
        flip(folder / name, 0)
        assert sum(bool(checksums.difference(folder, part, 3)) for part in range(3)) == 1
        flip(folder / name, 0)


def test_the_record_is_plain(folder):
    found = json.loads((folder / checksums.RECORD).read_text())["files"]
    assert {name: size for name, (size, _) in found.items()} == SIZES
    assert all(len(digest) == 64 for _, digest in found.values())
