"""Checksums of a folder's files: recorded once when the folder is complete, and compared before it is used.

A digest is SHA-256 over the sums of the file's 64-bit words, by rows and by columns of squares of 512 x 512 words
(2 MiB). A flipped bit changes one row sum and one column sum, so it is always found. Damage in several places is
missed only if it cancels in every row and column. SHA-256 over all bytes would slow down a restore noticeably.

Of a folder in a bucket the digests are the CRC32C of its objects as the store tells them, and nothing is read: the
store compares them with the bytes itself.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from unialign_jax.files import first_line, write_json
from unialign_jax.files.places import Place, client, is_remote, place, read_json

RECORD = "checksums.json"  # in the folder: {"files": {relative path: [bytes, digest]}}
_SIDE = 512  # words of a square's row and column


def record(folder: str | os.PathLike) -> None:
    """Writes the checksums of all files below `folder` into it. Raises OSError."""
    folder = place(folder)
    if is_remote(folder):
        (folder / RECORD).write_text(json.dumps({"files": _objects(folder)}, indent=1))
        return
    files = {name: [size, found] for name, (size, found) in _each(digest, sorted(_listing(folder).items()))}
    write_json(folder / RECORD, {"files": files}, indent=1)


def is_recorded(folder: str | os.PathLike) -> bool:
    """Whether `folder` has a record of checksums."""
    path = place(folder) / RECORD
    return path.exists() if is_remote(path) else os.path.lexists(path)


def difference(folder: str | os.PathLike, part: int = 0, parts: int = 1) -> str | None:
    """The first difference between a folder and its record, in words, or None. Files without a record are ignored.

    Several processes share the reading when each gives its own `part` of `parts`.
    """
    folder = place(folder)
    try:
        recorded = {name: (size, digest) for name, (size, digest) in read_json(folder / RECORD)["files"].items()}
        total = sum(size for size, _ in recorded.values())
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        return f"its {RECORD} cannot be read ({first_line(error)})"
    found = _objects(folder) if is_remote(folder) else _listing(folder)
    missing = sorted(recorded.keys() - found.keys())
    if missing or not total:
        return f"{missing[0]} is missing" if missing else f"its {RECORD} names no files"
    try:
        for name, (size, _) in sorted(recorded.items()):
            if (now := found[name][0] if is_remote(folder) else found[name].stat().st_size) != size:
                return f"{name} has {now} bytes, expected {size}"
        largest_first = sorted(recorded, key=lambda name: (-recorded[name][0], name))
        named = [(name, found[name]) for name in largest_first[part::parts]]
        for name, now in named if is_remote(folder) else _each(digest, named):
            if now != recorded[name]:
                return f"{name} is not what was written: its checksum differs"
    except OSError as error:
        return f"a file cannot be read ({first_line(error)})"
    return None


def _listing(folder: Path) -> dict[str, Path]:
    """{relative path: path} of every file below a folder, without the record."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    paths.pop(RECORD, None)
    return paths


def _objects(folder: Place) -> dict[str, tuple[int, str]]:
    """{relative path: bytes and CRC32C} of every object below a folder in a bucket, without the record."""
    found = client(folder).find(str(folder), detail=True)
    root = str(folder).removeprefix("gs://") + "/"
    objects = {name.removeprefix(root): (entry["size"], entry["crc32c"]) for name, entry in found.items()}
    objects.pop(RECORD, None)
    return objects


def _each(function: Callable, named_paths: list[tuple[str, Path]]) -> Iterator[tuple]:
    """(name, function(path)) of each, in threads: reading and summing release the GIL."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        results = threads.map(lambda item: function(item[1]), named_paths)
        yield from zip((name for name, _ in named_paths), results, strict=True)


def digest(path: Path) -> tuple[int, str]:
    """A file's size in bytes, and its digest."""
    total, size = hashlib.sha256(), 0
    buffer = bytearray(_SIDE * _SIDE * 8)
    view, words = memoryview(buffer), np.frombuffer(buffer, "<u8").reshape(_SIDE, _SIDE)
    with open(path, "rb", buffering=0) as file:
        while count := _fill(file, view):
            size += count
            rows = -(-count // (_SIDE * 8))  # the last one is padded with zeros
            view[count : rows * _SIDE * 8] = bytes(rows * _SIDE * 8 - count)
            total.update(words[:rows].sum(axis=1, dtype="<u8").tobytes())
            total.update(words[:rows].sum(axis=0, dtype="<u8").tobytes())
    return size, total.hexdigest()


def _fill(file: BinaryIO, view: memoryview) -> int:
    """Reads until `view` is full or the file ends; returns the number of bytes read."""
    count = 0
    while count < len(view) and (more := file.readinto(view[count:])):
        count += more
    return count
