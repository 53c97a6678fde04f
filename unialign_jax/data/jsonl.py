"""Reading the released UniAlignment code's JSONL files as records.

One JSON object per line, by stream kind (image paths are relative to the file's folder, or absolute):

    text_to_image    {"image": [path], "conversations": [{"value": caption}, ...]}
    edit, perception {"image": [source, target], "instruction": text, "conversations": [{"value": caption}, ...]}
    personalization  {"original_images": [path, ...], "generated_images": [target], "edit_prompt": text,
                      "caption": text}
    vqa              {"image": path, "conversations": [{"from": "human", "value": question},
                                                       {"from": "gpt", "value": answer}]}

The captions are the target's. Other fields are ignored. Of a longer conversation the first turn is read, as in the
reference.
"""

import collections
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from unialign_jax.data import images as images_lib
from unialign_jax.data.kinds import find_kind
from unialign_jax.data.records import Record

_KEPT_FORMATS = ("JPEG", "PNG")
_JPEG_QUALITY = 95
_SHOWN_BAD_ROWS = 5


class BadRow(ValueError):
    """A row that gives no record. `reason` is a short class of faults, the message says which file or field."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


@dataclass
class ReadReport:
    """What became of the rows so far."""

    num_rows: int = 0
    num_bad: int = 0
    reasons: collections.Counter = field(default_factory=collections.Counter)
    first_bad: list[str] = field(default_factory=list)

    def add_bad(self, path: Path, line: int, error: BadRow) -> None:
        self.num_bad += 1
        self.reasons[error.reason] += 1
        if len(self.first_bad) < _SHOWN_BAD_ROWS:
            self.first_bad.append(f"{path}:{line}: {error}")


def read_jsonl(
    paths: Sequence[str | os.PathLike],
    kind: str,
    *,
    report: ReadReport | None = None,
    max_bad_fraction: float = 0.1,
    max_side: int | None = None,
    num_threads: int = 4,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Iterator[Record]:
    """Records from JSONL files, in order. Every image is decoded once, so that only sound ones get through.

    Args:
      paths: the files.
      kind: the stream kind, which says how a row is read.
      report: filled as rows are read; bad rows are skipped and counted there.
      max_bad_fraction: the largest share of bad rows that is still a success.
      max_side: shrink images whose longer side is larger, in pixels; None keeps them.
      num_threads: images read and decoded at the same time.
      on_bytes: called with the bytes of each line read, for a progress bar.

    Raises:
      ValueError: at the end, when more than `max_bad_fraction` of the rows are bad or there are no rows.
    """
    find_kind(kind)
    if kind not in READERS:
        raise ValueError(f"{kind} records cannot be read from JSONL: make them in Python, see records.write_records")
    report = ReadReport() if report is None else report
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        waiting = collections.deque()

        def finish_first() -> Iterator[Record]:
            path, line, future = waiting.popleft()
            report.num_rows += 1
            try:
                yield future.result()
            except BadRow as error:
                report.add_bad(path, line, error)

        for path in map(Path, paths):
            with open(path, "rb") as file:
                for line, content in enumerate(file, start=1):
                    on_bytes(len(content))
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


def load_image(path: Path, max_side: int | None = None) -> bytes:
    """An image file as PNG or JPEG bytes, proved to decode.

    PNG and JPEG files are returned as they are; others, and what is shrunk to `max_side`, are encoded anew
    (shrunk JPEG as JPEG, everything else as PNG).

    Raises:
      BadRow: the file is missing or no regular file, cannot be decoded, or is larger than images.py allows.
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


def _read_row(content: bytes, path: Path, line: int, kind: str, max_side: int | None) -> Record:
    try:
        row = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise BadRow("not a JSON object", str(error)) from None
    if not isinstance(row, dict):
        raise BadRow("not a JSON object", f"found a {type(row).__name__}")

    def images(field_name: str, at_least: int) -> list[bytes]:
        found = row.get(field_name)
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list) or len(found) < at_least or not all(isinstance(p, str) for p in found):
            raise BadRow("images missing", f'expected "{field_name}" with at least {at_least} path(s), found {found!r}')
        for image_path in found:
            if "://" in image_path:
                raise BadRow("image is a URL", f"{image_path}: download it first")
        return [load_image(path.parent / image_path, max_side) for image_path in found]

    return READERS[kind](f"{path.name}:{line}", row, images)


def _read_captioned(key, row, images) -> Record:
    return Record(key, images("image", 1)[0], caption=_turn(row, 0))


def _read_changed(key, row, images) -> Record:
    source, target = images("image", 2)[:2]
    return Record(key, target, (source,), caption=_turn(row, 0), instruction=_text(row, "instruction"))


def _read_composed(key, row, images) -> Record:
    return Record(
        key,
        images("generated_images", 1)[0],
        tuple(images("original_images", 1)),
        caption=_text(row, "caption"),
        instruction=_text(row, "edit_prompt").replace('\\"', "").strip('"').strip(),
    )


def _read_question(key, row, images) -> Record:
    question = _turn(row, 0).replace("<image>", "").strip()
    if not question:
        raise BadRow("text missing", 'the first turn of "conversations" holds no question')
    return Record(key, images("image", 1)[0], question=question, answer=_turn(row, 1))


# The kinds that the format has, each with (record's key, row, function of a field of images) -> record.
READERS = {
    "text_to_image": _read_captioned,
    "edit": _read_changed,
    "perception": _read_changed,
    "personalization": _read_composed,
    "vqa": _read_question,
}


def _turn(row: dict, index: int) -> str:
    conversations = row.get("conversations")
    try:
        value = conversations[index]["value"]
    except (TypeError, KeyError, IndexError):
        value = None
    if not isinstance(value, str) or not value.strip():
        raise BadRow("text missing", f'expected a text in "conversations"[{index}]["value"], found {value!r}')
    return value.strip()


def _text(row: dict, name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("text missing", f'expected a text in "{name}", found {value!r}')
    return value.strip()
