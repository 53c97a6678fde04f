"""A source in parts: the unit that one process reads alone, and always to the same rows.

A reader of a format is a module with two functions:

    list_parts(path, options) -> iterator of Part     cheap: it looks into a list, a footer or a folder, at no image
    read_part(part, options) -> iterator of Row       what a process does with one of them

A row is a dict of plain values with a stable key. What makes a record of it is in `rows`.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from unialign_jax.data.jsonl import BadRow
from unialign_jax.files import one_line


@dataclass(frozen=True)
class SourceOptions:
    """How sources are read.

    Attributes:
      kind: the stream kind, which says the fields that a row needs.
      columns: the column of a field (`rows.FIELDS`), where the user names it.
      key: the column that names a row; None for the row's place in the source.
      image_root: the folder that image paths are relative to, and may not leave; None for that of the list itself.
      free_paths: whether a path may leave that folder when `image_root` is not given.
      split: the split of a Hugging Face data set.
      class_names: names of classes, by number, which stand for a caption where a row has a class alone.
      caption_optional: whether a record may lack its caption.
      rows_per_part: rows of a part, where a source can be cut anywhere.
    """

    kind: str
    columns: Mapping[str, str] = field(default_factory=dict)
    key: str | None = None
    image_root: str | None = None
    free_paths: bool = False
    split: str | None = None
    class_names: tuple[str, ...] = ()
    caption_optional: bool = False
    rows_per_part: int = 256


@dataclass(frozen=True)
class Part:
    """Some rows of one file.

    Attributes:
      path: the file, or the folder of a data set.
      label: its short name, which begins the keys of its rows; different for each source of a run.
      rows: what the reader needs of each row, for a source that is a list: (number, content).
      units: which row groups or batches of a file that has such; empty for all of it.
      first: the number of the first row.
    """

    path: str
    label: str
    rows: tuple = ()
    units: tuple[int, ...] = ()
    first: int = 1

    def fingerprint(self) -> str:
        """Eight digits that differ when the part holds something else."""
        return f"{zlib.crc32(repr((self.path, self.rows, self.units, self.first)).encode('utf-8', 'replace')):08x}"


@dataclass(frozen=True)
class Row:
    """One row as a reader gives it.

    Attributes:
      key: names it, the same in every run.
      fields: texts, numbers, lists; an image is a path, bytes, or a dict of both.
      base: the folder that its paths are relative to; empty for none.
      fault: why it cannot be read, and then it has no fields.
      place: where it is, for messages; the key unless it says more.
    """

    key: str
    fields: dict
    base: str = ""
    fault: BadRow | None = None
    place: str = ""


def make_key(label: str, number: int | str, sign: str = ":") -> str:
    """The key of a row by its place. A file's name need not be UTF-8."""
    return f"{one_line(label)}{sign}{number}"


def in_chunks(rows: Iterable, most: int, most_bytes: int = 2**23):
    """Tuples of up to `most` rows (number, content), and of about `most_bytes` bytes of content."""
    chunk, held = [], 0
    for row in rows:
        chunk.append(row)
        held += len(row[1])
        if len(chunk) >= most or held >= most_bytes:
            yield tuple(chunk)
            chunk, held = [], 0
    if chunk:
        yield tuple(chunk)
