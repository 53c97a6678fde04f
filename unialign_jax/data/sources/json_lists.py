"""Lists in JSON: one object a line (`.jsonl`), or an array of objects (`.json`) of any length, read in a stream."""

import json
from collections.abc import Iterator

from unialign_jax.data import jsonl, signatures
from unialign_jax.data.jsonl import MAX_LINE, BadRow
from unialign_jax.data.sources import locations
from unialign_jax.data.sources.parts import Part, Row, SourceOptions, in_chunks, make_key
from unialign_jax.files import parse_json

_CHUNK = 2**20
_BOM = b"\xef\xbb\xbf"
_SPACES = b" \t\r\n"


def list_parts(path: str, label: str, options: SourceOptions) -> Iterator[Part]:
    rows = _elements(path) if is_array(path) else _lines(path)
    for chunk in in_chunks(rows, options.rows_per_part):
        yield Part(path, label, rows=chunk)


def read_part(part: Part, options: SourceOptions) -> Iterator[Row]:
    base = locations.parent(part.path)
    for number, content in part.rows:
        key = make_key(part.label, number)
        place = f"{locations.shown(part.path)}:{number}"
        try:
            if len(content) > MAX_LINE:
                raise BadRow("row too long", f"it has more than {MAX_LINE:,} bytes")
            try:
                yield Row(key, parse_json(content, "it"), base, place=place)
            except ValueError as error:
                raise BadRow("not a JSON object", str(error)) from None
        except BadRow as error:
            yield Row(key, {}, base, fault=error, place=place)


def is_array(path: str) -> bool:
    """Whether a file begins with an array. Raises ValueError for a folder, and for a file that is no list in JSON."""
    if locations.is_url(path):
        if not locations.exists(path):
            raise FileNotFoundError(f"source {path} does not exist")
        locations.size(path)
    with locations.open_file(path) if _is_file(path) else _refuse(path) as file:
        head = file.read(signatures.HEAD)
    if head.removeprefix(_BOM).lstrip().startswith(b"["):
        return True
    if not locations.is_url(path):
        jsonl.check_source(path)
    elif signatures.guess(head) or b"\0" in head:
        raise ValueError(f"source {path} is {signatures.guess(head) or 'no text in UTF-8'}, expected a list in JSON")
    return False


def _is_file(path: str) -> bool:
    if locations.is_url(path):
        return True
    try:
        locations.size(path)
    except (OSError, ValueError):
        return False
    return True


def _refuse(path: str):
    jsonl.check_source(path)  # says why
    raise ValueError(f"source {path} cannot be read")


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    with locations.open_file(path) as file:
        for number, content in enumerate(jsonl.lines_of(file), start=1):
            if content.strip():
                yield number, content


def _elements(path: str) -> Iterator[tuple[int, bytes]]:
    """The elements of an array, as their bytes. What follows one that cannot be read is lost, and it says so.

    Latin-1 makes a character of every byte; JSON's own signs are the same in it.
    """
    scan = json.JSONDecoder(strict=False).raw_decode
    with locations.open_file(path) as file:
        buffer = file.read(_CHUNK).removeprefix(_BOM).lstrip(_SPACES)[1:].decode("latin-1")
        at, number, ended = 0, 1, False
        while True:
            while at < len(buffer) and buffer[at] in " \t\r\n,":
                at += 1
            if buffer[at : at + 1] == "]":
                return
            end = None
            try:
                if at < len(buffer):
                    end = scan(buffer, at)[1]
            except ValueError:  # cut by the end of the buffer, or broken
                pass
            except RecursionError:
                ended = True
            if end is not None and (end < len(buffer) or ended):
                yield number, buffer[at:end].encode("latin-1")
                at, number = end, number + 1
            elif ended or len(buffer) - at > MAX_LINE:
                rest = buffer[at : at + 200].encode("latin-1")
                # Not an object, so that it is told as a bad row.
                yield number, b"the array is cut short or broken here, and what follows is lost: " + rest
                return
            else:
                more = file.read(_CHUNK).decode("latin-1")
                ended = not more
                buffer, at = buffer[at:] + more, 0
