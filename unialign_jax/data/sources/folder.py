"""Folders of images: a text beside each (`a.jpg`, `a.txt`), or Hugging Face's imagefolder (`metadata.jsonl`, `.csv`).

A folder with a metadata file gives the rows of that file; every other folder its images. Subfolders are read too.
"""

import csv
import io
import os
from collections.abc import Iterator

from unialign_jax.data.jsonl import MAX_LINE, BadRow
from unialign_jax.data.sources import json_lists, locations
from unialign_jax.data.sources.parts import Part, Row, SourceOptions, in_chunks, make_key
from unialign_jax.files import first_line

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".svg")
TEXTS = (".txt", ".caption")
METADATA = ("metadata.jsonl", "metadata.csv")
MAX_TEXT_FILE = 2**22  # bytes


def list_parts(path: str, label: str, options: SourceOptions) -> Iterator[Part]:
    if not locations.is_folder(path):
        raise ValueError(f"source {path} is no folder")
    found = False
    for place, inside, names in locations.walk(path):
        inner = f"{label}/{inside}" if inside else label
        listed = [name for name in METADATA if name in names]
        if listed:
            file = locations.join(place, listed[0])
            inner = f"{inner}/{listed[0]}"
            if listed[0].endswith(".csv"):
                for chunk in in_chunks(_csv_rows(file), options.rows_per_part):
                    yield Part(file, inner, rows=chunk)
            else:
                yield from json_lists.list_parts(file, inner, options)
            found = True
            continue
        texts = {name for name in names if name.lower().endswith(TEXTS)}
        images = ((n, name) for n, name in enumerate(names) if name.lower().endswith(IMAGES))
        rows = ((f"{n}", name, _text_of(name, texts)) for n, name in images)
        for chunk in in_chunks(rows, options.rows_per_part):
            found = True
            yield Part(place, inner, rows=chunk)
    if not found:
        raise ValueError(f"source {path} holds no image and no {' or '.join(METADATA)}")


def read_part(part: Part, options: SourceOptions) -> Iterator[Row]:
    if part.path.endswith(".csv"):
        yield from _read_csv(part)
    elif part.path.endswith(".jsonl") and locations.name_of(part.path) in METADATA:
        yield from json_lists.read_part(part, options)
    else:
        for _, image, text in part.rows:
            yield _beside(part, image, text)


def _text_of(name: str, texts: set[str]) -> str:
    stem = os.path.splitext(name)[0]
    return next((stem + ending for ending in TEXTS if stem + ending in texts), "")


def _beside(part: Part, image: str, text: str) -> Row:
    key = make_key(part.label, _utf8(image), "/")
    fields = {"file_name": image}
    if text:
        try:
            data = locations.read_bytes(locations.join(part.path, text), MAX_TEXT_FILE)
            fields["text"] = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            fault = BadRow("text is not Unicode", f"{text}: {error.reason} at byte {error.start}")
            return Row(key, {}, part.path, fault)
        except (OSError, ValueError) as error:
            return Row(key, {}, part.path, BadRow("text file cannot be read", str(error)))
    return Row(key, fields, part.path, place=locations.shown(locations.join(part.path, image)))


def _utf8(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _csv_rows(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a table after its first, each with that one before it: (number, both)."""
    with locations.open_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(_short(text))
        try:
            head = next(reader, None)
            for row in reader:
                yield reader.line_num, _written(head, row)
        except csv.Error as error:
            yield reader.line_num, f"\0{first_line(error)}"


def _short(text) -> Iterator[str]:
    while line := text.readline(MAX_LINE):
        yield line


def _written(head: list[str], row: list[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([head, row])
    return buffer.getvalue()


def _read_csv(part: Part) -> Iterator[Row]:
    base = locations.parent(part.path)
    for number, content in part.rows:
        key, place = make_key(part.label, number), f"{locations.shown(part.path)}:{number}"
        if content.startswith("\0"):
            yield Row(key, {}, base, BadRow("not a row of CSV", content[1:]), place)
            continue
        (row,) = csv.DictReader(io.StringIO(content, newline=""))
        yield Row(key, {name: value for name, value in row.items() if isinstance(name, str)}, base, place=place)
