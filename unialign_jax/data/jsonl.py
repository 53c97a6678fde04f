"""Reading the released UniAlignment code's JSONL files as records.

There is one JSON object per line; READERS has an example row and the reader of each kind. Image paths are relative to
the file's folder, or absolute, and may lead anywhere. Other fields are ignored. Bad rows are counted and reported, and
do not stop the others.
"""

import collections
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from unialign_jax.data import images as images_lib
from unialign_jax.data import signatures
from unialign_jax.data.kinds import find_kind
from unialign_jax.data.records import Record
from unialign_jax.files import check_regular, first_line, one_line, parse_json

MAX_LINE = 2**24  # bytes of a row
MAX_TEXT = 100_000  # characters of one text
MAX_CONDITIONS = 64  # images that one row may name beside its target

_KEPT_FORMATS = ("JPEG", "PNG")
_JPEG_QUALITY = 95
_SHOWN_BAD_ROWS = 5
IMAGE_MARK = "<image>"  # stands in a turn for the image


class BadRow(ValueError):
    """A row without a record. `reason` names the class of the fault; the message, one line, names file or field."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {one_line(detail)}")
        self.reason = reason


@dataclass
class ReadReport:
    """Counts of the rows so far.

    Attributes:
      num_rows, num_bad, num_records: rows read, those that gave no record, and the records of the others.
      reasons: how many rows were bad, by reason.
      first_bad: the first of them as "file:line: reason: detail".
      notes: how often something else happened that the user should know.
    """

    num_rows: int = 0
    num_bad: int = 0
    num_records: int = 0
    reasons: collections.Counter = field(default_factory=collections.Counter)
    first_bad: list[str] = field(default_factory=list)
    notes: collections.Counter = field(default_factory=collections.Counter)

    def add_bad(self, path: Path, line: int, error: BadRow) -> None:
        self.num_bad += 1
        self.reasons[error.reason] += 1
        if len(self.first_bad) < _SHOWN_BAD_ROWS:
            self.first_bad.append(f"{one_line(str(path))}:{line}: {error}")


def read_jsonl(
    paths: Sequence[str | os.PathLike],
    kind: str,
    *,
    report: ReadReport | None = None,
    max_bad_fraction: float = 0.1,
    max_side: int | None = None,
    num_threads: int = 4,
    on_bytes: Callable[[int], None] = lambda count: None,
    check: Callable[[Record], None] = lambda record: None,
) -> Iterator[Record]:
    """Records from JSONL files, in order. Every image is decoded once, to leave out damaged ones.

    Args:
      paths: the files.
      kind: the stream kind, which says how a row is read.
      report: filled as rows are read; bad rows are skipped and counted there.
      max_bad_fraction: the largest share of bad rows that is still a success.
      max_side: shrink images whose longer side is larger, in pixels; None keeps them.
      num_threads: images read and decoded at the same time.
      on_bytes: called with the bytes of each line read, for a progress bar.
      check: called with each record; raises BadRow to leave it out.

    Raises at the start as `check_source` does, and ValueError at the end when there are no rows, or when more than
    `max_bad_fraction` of them are bad.
    """
    find_kind(kind)
    if kind not in READERS:
        raise ValueError(f"{kind} records cannot be read from JSONL: make them in Python, see records.write_records")
    for path in paths:
        check_source(path)
    paths = [Path(path) for path in paths]
    report = ReadReport() if report is None else report
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        waiting = collections.deque()

        def finish_first() -> Iterator[Record]:
            path, line, future = waiting.popleft()
            report.num_rows += 1
            kept = []
            try:
                records, notes = future.result()
                for record in records:
                    try:
                        check(record)
                        kept.append(record)
                    except BadRow as error:
                        if len(records) == 1:
                            raise
                        notes.append(f"record(s) of rows with several left out: {error.reason}")
            except BadRow as error:
                report.add_bad(path, line, error)
                return
            report.num_records += len(kept)
            report.notes.update(notes)
            yield from kept

        for path in paths:
            with open(path, "rb") as file:
                for line, content in enumerate(lines_of(file, on_bytes), start=1):
                    if not content.strip():
                        continue
                    waiting.append((path, line, pool.submit(_read_row, content, path, line, kind, max_side)))
                    if len(waiting) > 4 * num_threads:
                        yield from finish_first()
        while waiting:
            yield from finish_first()

    if report.num_rows == 0:
        raise ValueError(f"no rows in {', '.join(map(str, paths))}")
    if report.num_bad > max_bad_fraction * report.num_rows or report.num_bad == report.num_rows:
        raise ValueError(
            f"{report.num_bad} of {report.num_rows} rows are bad, more than the share of {max_bad_fraction:g} "
            f"that is allowed; first: {report.first_bad[0]}"
        )


def check_source(path: str | os.PathLike) -> int:
    """The size in bytes of a file that looks like JSONL by its first bytes.

    Raises FileNotFoundError when there is none, and ValueError, with what to give instead, for a folder, a device, or a
    file of another format.
    """
    if "://" in str(path):
        raise ValueError(f"source {path} is a URL: download it first")
    path = Path(path)
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".jsonl", ".json"))
        holds = f"it holds {', '.join(found[:3])}{' and others' if found[3:] else ''}" if found else "it holds none"
        raise ValueError(f"source {path} is a folder, expected a file of JSONL or a pattern of them; {holds}")
    try:
        size = check_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"source {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"source {error}") from None
    with open(path, "rb") as file:
        head = file.read(signatures.HEAD)
    name = signatures.guess(head)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        name = f"a JSON array (`jq -c '.[]' {path.name} > rows.jsonl` gives its objects)"
    elif head.startswith((b"\xff\xfe", b"\xfe\xff")) or (not name and b"\0" in head):
        name = "no text in UTF-8"
    if name:
        raise ValueError(f"source {path} is {name}, expected a file of JSONL: one JSON object a line")
    return size


def lines_of(file: IO[bytes], on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than MAX_LINE its first MAX_LINE + 1 bytes."""
    while line := file.readline(MAX_LINE + 1):
        on_bytes(len(line))
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
            on_bytes(len(rest))
        yield line


def load_image(path: Path, max_side: int | None = None) -> bytes:
    """An image file as PNG or JPEG bytes that can be decoded.

    PNG and JPEG files are returned as they are. Other files, and images that are shrunk to `max_side`, are encoded anew
    (shrunk JPEG as JPEG, everything else as PNG). Raises BadRow when the file is missing or not regular, cannot be
    decoded, or is larger than images.py allows.
    """
    try:
        data = images_lib.read_bytes(path)
    except (OSError, ValueError) as error:
        raise BadRow("image file cannot be read", str(error)) from None
    try:
        with images_lib.open_image(data, str(path)) as image:
            image_format = image.format
            is_small = max_side is None or max(image.size) <= max_side
            is_kept = image_format in _KEPT_FORMATS and is_small
            image = images_lib.loaded_rgb(image, str(path))
    except ValueError as error:
        raise BadRow("image cannot be decoded", str(error)) from None
    if is_kept:
        return data
    if not is_small:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if image_format == "JPEG":
        image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


# --- rows ------------------------------------------------------------------------------------------------------------


def _read_row(content: bytes, path: Path, line: int, kind: str, max_side: int | None) -> tuple[list[Record], list[str]]:
    """The records of one row, and notes for the report. Raises BadRow, whatever is wrong."""
    try:
        if len(content) > MAX_LINE:
            raise BadRow("row too long", f"it has more than {MAX_LINE:,} bytes")
        try:
            row = parse_json(content, "it")
        except ValueError as error:
            raise BadRow("not a JSON object", str(error)) from None
        # A file's name need not be UTF-8.
        return READERS[kind].read(_Row(row, path, f"{one_line(path.name)}:{line}", max_side))
    except BadRow:
        raise
    except Exception as error:  # no row may end the preparation of the others
        raise BadRow("cannot be read", f"{type(error).__name__}: {first_line(error)}") from error


class _Row(NamedTuple):
    """A row as its reader sees it: its fields as texts and images, each checked."""

    fields: dict
    path: Path  # of the file
    key: str
    max_side: int | None

    def images(self, name: str, first: int = 0, at_most: int = 1) -> list[bytes]:
        """At least one and up to `at_most` of the images that a field names, from number `first` on."""
        found = self.fields.get(name)
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or len(found) <= first or not all(isinstance(p, str) and p for p in found):
            raise BadRow("images missing", f'expected "{name}" with at least {first + 1} path(s), found {found!r:.200}')
        paths = found[first : first + at_most]
        for image_path in paths:
            if "://" in image_path or image_path.startswith("data:"):
                raise BadRow("image is a URL", f"{image_path:.200}: download it first")
        return [load_image(self.path.parent / image_path, self.max_side) for image_path in paths]

    def text(self, name: str) -> str:
        return checked_text(self.fields.get(name), f'"{name}"')

    def turns(self) -> list[dict]:
        """The turns of the conversation, without those of a system."""
        found = self.fields.get("conversations")
        if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
            raise BadRow("text missing", f'expected a list of turns in "conversations", found {found!r:.200}')
        return [turn for turn in found if turn.get("from") != "system"]


def _read_caption(row: _Row) -> tuple[str, list[str]]:
    """The caption of the target, and notes.

    As the reference, the first turn: the other one, if any, says "<image>" or nothing. In LLaVA's captions the first
    turn asks about the "<image>", and the second one is the caption.
    """
    turns = row.turns()
    values = [turn.get("value") for turn in turns[:2]] + [None, None]
    first, second = (value.strip() if isinstance(value, str) else "" for value in values[:2])
    number = 1 if IMAGE_MARK in first and second and second != IMAGE_MARK else 0
    caption = checked_text(values[number], f'"conversations"[{number}]["value"]').replace(IMAGE_MARK, "").strip()
    if not caption:
        raise BadRow("text missing", f'"conversations"[{number}] holds no caption')
    both = first and second and IMAGE_MARK not in first and second != IMAGE_MARK
    return caption, ["row(s) with two texts and no <image>: the first was taken as the caption"] if both else []


def _read_captioned(row: _Row):
    caption, notes = _read_caption(row)
    return [Record(row.key, row.images("image")[0], caption=caption)], notes


def _read_changed(row: _Row):
    caption, notes = _read_caption(row)
    instruction = row.text("instruction")
    (target,) = row.images("image", first=1)
    return [Record(row.key, target, tuple(row.images("image")), caption=caption, instruction=instruction)], notes


def _read_composed(row: _Row):
    caption = row.text("caption")
    prompt = row.text("edit_prompt").strip(' \\"')  # as the reference: what these files have around it
    if not prompt:
        raise BadRow("text missing", 'expected a text in "edit_prompt", found only quotes')
    named = row.fields.get("original_images")
    if isinstance(named, list) and len(named) > MAX_CONDITIONS:
        raise BadRow("too many images", f'"original_images" names {len(named)}, expected at most {MAX_CONDITIONS}')
    (target,) = row.images("generated_images")
    references = tuple(row.images("original_images", at_most=MAX_CONDITIONS))
    return [Record(row.key, target, references, caption=caption, instruction=prompt)], []


def _read_questions(row: _Row):
    """A record for each question that is answered; the first has the row's key, the others the number of the pair."""
    turns, pairs, lone, fault = row.turns(), [], 0, None
    asks = [turn.get("from", "gpt" if i % 2 else "human") in ("human", "user") for i, turn in enumerate(turns)]
    number = 0
    while number < len(turns):
        if not asks[number] or all(asks[number + 1 : number + 2]):
            lone, number = lone + 1, number + 1
            continue
        try:
            question, answer = (
                checked_text(turns[i].get("value"), f'"conversations"[{i}]["value"]') for i in (number, number + 1)
            )
            if not question.replace(IMAGE_MARK, "").strip():
                raise BadRow("text missing", f'"conversations"[{number}] holds no question')
            pairs.append((question.replace(IMAGE_MARK, "").strip(), answer))
        except BadRow as error:
            fault, lone = fault or error, lone + 1
        number += 2
    if not pairs:
        raise fault or BadRow("text missing", 'expected a question and its answer in "conversations"')
    (image,) = row.images("image")
    keys = [row.key, *(f"{row.key}/{i}" for i in range(2, len(pairs) + 1))]
    records = [Record(key, image, question=q, answer=a) for key, (q, a) in zip(keys, pairs, strict=True)]
    return records, ["turn(s) without a question or without an answer left out"] * lone


def checked_text(value: Any, where: str) -> str:
    """A text of a row without the spaces around it. Raises BadRow."""
    if not isinstance(value, str) or not value.strip():
        raise BadRow("text missing", f"expected a text in {where}, found {value!r:.200}")
    if len(value) > MAX_TEXT:
        raise BadRow("text too long", f"{where} has {len(value):,} characters, expected at most {MAX_TEXT:,}")
    half = re.search("[\ud800-\udfff]", value)
    if half:
        raise BadRow("text is not Unicode", f"{where} has half of a character at position {half.start()}")
    if "\0" in value:
        raise BadRow("text holds a NUL", f"{where} has one at position {value.index(chr(0))}")
    return value.strip()


class Reader(NamedTuple):
    """How rows of one kind are read (row -> records, notes), and what they look like."""

    read: Callable[[_Row], tuple[list[Record], list[str]]]
    example: str


_CHANGED = Reader(
    _read_changed,
    '{"image": ["source.jpg", "target.jpg"], "instruction": "...", '
    '"conversations": [{"value": "the target\'s caption"}]}',
)
READERS = {
    "text_to_image": Reader(_read_captioned, '{"image": ["a.jpg"], "conversations": [{"value": "caption"}]}'),
    "edit": _CHANGED,
    "perception": _CHANGED,
    "personalization": Reader(
        _read_composed,
        '{"original_images": ["a.jpg", "b.jpg"], "generated_images": ["c.jpg"], "edit_prompt": "...", '
        '"caption": "the target\'s caption"}',
    ),
    "vqa": Reader(
        _read_questions,
        '{"image": "a.jpg", "conversations": [{"from": "human", "value": "question"}, '
        '{"from": "gpt", "value": "answer"}, ...]}',
    ),
}
