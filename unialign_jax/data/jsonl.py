"""The rows of the released UniAlignment code's JSONL files, and what is wrong with one.

There is one JSON object per line; READERS has an example row and the reader of each kind. `sources.json_lists` reads
the files, and `sources.rows` gives the rows to their readers.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from unialign_jax.data import signatures
from unialign_jax.data.records import Record
from unialign_jax.files import check_regular, one_line

MAX_LINE = 2**24  # bytes of a row
MAX_TEXT = 100_000  # characters of one text
MAX_CONDITIONS = 64  # images that one row may name beside its target
IMAGE_MARK = "<image>"  # stands in a turn for the image


class BadRow(ValueError):
    """A row without a record. `reason` names the class of the fault; the message, one line, names file or field."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {one_line(detail)}")
        self.reason = reason


def check_source(path: str) -> None:
    """Raises ValueError for a local folder, a device, or a file that is no JSONL by its first bytes.

    Raises FileNotFoundError where there is nothing.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir() if entry.suffix in (".jsonl", ".json"))
        holds = f"it holds {', '.join(found[:3])}{' and others' if found[3:] else ''}" if found else "it holds none"
        raise ValueError(f"source {path} is a folder, expected a file of JSONL or a pattern of them; {holds}")
    try:
        check_regular(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"source {path} does not exist") from None
    except ValueError as error:
        raise ValueError(f"source {error}") from None
    with open(path, "rb") as file:
        head = file.read(signatures.HEAD)
    name = signatures.guess(head)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (not name and b"\0" in head):
        name = "no text in UTF-8"
    if name:
        raise ValueError(f"source {path} is {name}, expected a file of JSONL: one JSON object a line")


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; of one that is longer than MAX_LINE its first MAX_LINE + 1 bytes."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


# --- rows ------------------------------------------------------------------------------------------------------------


class Row(Protocol):
    """What the reader of a kind asks of a row; each raises BadRow."""

    key: str
    fields: dict

    def images(self, name: str, first: int = 0, at_most: int = 1) -> list[bytes]:
        """At least one and up to `at_most` of the images of a field, from number `first` on."""

    def text(self, name: str) -> str: ...

    def turns(self) -> list[dict]:
        """The turns of the conversation, without those of a system."""


def _read_caption(row: Row) -> tuple[str, list[str]]:
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


def _read_captioned(row: Row):
    caption, notes = _read_caption(row)
    return [Record(row.key, row.images("image")[0], caption=caption)], notes


def _read_changed(row: Row):
    caption, notes = _read_caption(row)
    instruction = row.text("instruction")
    (target,) = row.images("image", first=1)
    return [Record(row.key, target, tuple(row.images("image")), caption=caption, instruction=instruction)], notes


def _read_composed(row: Row):
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


def _read_questions(row: Row):
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

    read: Callable[[Row], tuple[list[Record], list[str]]]
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
