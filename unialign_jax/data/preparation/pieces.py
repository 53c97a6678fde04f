"""A part of a source becomes a piece: its records in one file, what is known of each, and what was rejected and why.

`make_piece` is what a process, or a worker of Beam, does with one part. A piece is four files, of which the last one
written says that it is whole:

    NAME.array_record   the records, as they are stored, in the source's order
    NAME.npz            an array for each column of `COLUMNS`, an entry a record, and tokens of texts
    NAME.samples        a few records to look at, for the report
    NAME.json           counts, reasons of rejection, texts' lengths
"""

import base64
import collections
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from unialign_jax.data import records as records_lib
from unialign_jax.data.jsonl import BadRow
from unialign_jax.data.preparation.maps import map_records
from unialign_jax.data.records import Record
from unialign_jax.data.sources import FORMATS, locations
from unialign_jax.data.sources.parts import Part, SourceOptions
from unialign_jax.data.sources.pictures import ImageRules, Picture, thumbnail
from unialign_jax.data.sources.rows import read_row
from unialign_jax.data.text_lengths import TextLengths
from unialign_jax.data.tokenizer import Tokenizer, load_tokenizer
from unialign_jax.files import one_line

# of a record: its key's and its row's key's hash, that of its picture, size of the picture, bytes, has it a caption
COLUMNS = {
    "key": np.uint64,
    "row": np.uint64,
    "picture": np.uint64,
    "width": np.uint32,
    "height": np.uint32,
    "num_bytes": np.uint64,
    "captioned": np.bool_,
}
SHOWN_BAD_ROWS = 5
_SAMPLES = (0, 1, 2, 3, 8, 16, 32, 64, 128, 192)  # numbers of records
_THUMBNAIL = 160  # pixels


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know.

    Attributes:
      kind: the stream kind.
      format: a key of `sources.FORMATS`.
      work: the folder of the unfinished work, or its URL.
      source: how sources are read.
      images: which images get through.
      min_words, max_words: a caption's or an answer's length in words; `max_words` None for no limit.
      tokenizer: the folder of a tokenizer, "shapes" for the packaged one, None for none.
      text_length: the model's, to count what it cuts.
      threads: rows read at the same time by one process.
      maps: which maps of each image become perception records; empty where rows are the records.
      map_models: map -> "package.module:function" that makes it.
    """

    kind: str
    format: str
    work: str
    source: SourceOptions
    images: ImageRules = ImageRules()
    min_words: int = 0
    max_words: int | None = None
    tokenizer: str | None = None
    text_length: int | None = None
    threads: int = 1
    maps: tuple[str, ...] = ()
    map_models: dict[str, str] = field(default_factory=dict)


@dataclass
class Counts:
    """What became of the rows of one or several pieces.

    Attributes:
      num_rows, num_bad, num_records: rows read, those that gave no record, and the records of the others.
      reasons: how many rows were bad, by reason.
      first_bad: the first of them as "place: reason: detail".
      notes: how often something else happened that the user should know.
      texts: the tally of each text field, see `text_lengths.TextLengths`.
    """

    num_rows: int = 0
    num_bad: int = 0
    num_records: int = 0
    reasons: collections.Counter = field(default_factory=collections.Counter)
    first_bad: list[str] = field(default_factory=list)
    notes: collections.Counter = field(default_factory=collections.Counter)
    texts: dict[str, dict] = field(default_factory=dict)

    def add_bad(self, place: str, error: BadRow) -> None:
        self.num_bad += 1
        self.reasons[error.reason] += 1
        if len(self.first_bad) < SHOWN_BAD_ROWS:
            self.first_bad.append(f"{place}: {error}")

    def add(self, other: "Counts") -> None:
        """Adds the numbers of another piece; its texts are left to `TextLengths.merge`."""
        self.num_rows += other.num_rows
        self.num_bad += other.num_bad
        self.num_records += other.num_records
        self.reasons.update(other.reasons)
        self.notes.update(other.notes)
        self.first_bad = (self.first_bad + other.first_bad)[:SHOWN_BAD_ROWS]


def hash_text(text: str) -> int:
    """64 bits of a text, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def piece_path(work: str, name: str, ending: str) -> str:
    return locations.join(work, "pieces", f"{name}.{ending}")


def read_counts(work: str, name: str) -> Counts:
    values = json.loads(locations.read_bytes(piece_path(work, name, "json"), 2**28))
    values["reasons"], values["notes"] = map(collections.Counter, (values["reasons"], values["notes"]))
    return Counts(**values)


def read_samples(work: str, name: str) -> list[dict]:
    """Records of a piece to look at: their keys, their texts, and JPEGs in base64."""
    return json.loads(locations.read_bytes(piece_path(work, name, "samples"), 2**28))


def read_table(work: str, name: str) -> dict[str, np.ndarray]:
    """The columns of a piece."""
    with locations.open_file(piece_path(work, name, "npz")) as file, np.load(file, allow_pickle=False) as table:
        return {column: table[column] for column in table.files}


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(None if name == "shapes" else name)


def text_lengths(job: Job) -> TextLengths:
    return TextLengths(job.kind, _tokenizer(job.tokenizer) if job.tokenizer else None, job.text_length)


@functools.lru_cache(maxsize=8)
def _encoder(kind: str, optional: tuple[str, ...]):
    """A function from a record to its bytes in a file, as TFDS's own writers do it."""
    from tensorflow_datasets.core import example_serializer

    features = records_lib.dataset_info("/nowhere", kind).features
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    return lambda record: serializer.serialize_example(
        features.encode_example(records_lib.to_example(record, kind, 0, optional))
    )


def make_piece(job: Job, name: str, part: Part) -> Counts:
    """Reads the rows of a part and writes its piece, unless it is there. Bad rows are counted, and stop nothing.

    Raises OSError or ValueError when the source cannot be reached or the piece cannot be written.
    """
    from array_record.python import array_record_module

    if locations.exists(piece_path(job.work, name, "json")):
        return read_counts(job.work, name)
    counts, lengths, samples = Counts(), text_lengths(job), []
    encode = _encoder(job.kind, ("caption",) * job.source.caption_optional)
    table = {column: [] for column in COLUMNS}
    tokens = {text: [] for text in lengths.fields}
    with locations.writing(piece_path(job.work, name, "array_record")) as scratch:
        # Pieces live for a while, so that they are not compressed.
        writer = array_record_module.ArrayRecordWriter(scratch, "group_size:1,uncompressed")
        for row, found in _read_rows(job, part):
            counts.num_rows += 1
            kept = []
            try:
                if isinstance(found, BadRow):
                    raise found
                records, notes, row_key = found
                for record, picture in records:
                    try:
                        _check_words(job, record)
                        kept.append((record, picture, lengths.check(record)))
                    except BadRow as error:
                        if len(records) == 1:
                            raise
                        notes.append(f"record(s) of rows with several left out: {error.reason}")
            except BadRow as error:
                counts.add_bad(row.place or row.key, error)
                continue
            counts.notes.update(notes)
            for record, picture, sizes in kept:
                data = encode(record)
                writer.write(data)
                values = (record, row_key, picture, len(data))
                for column, value in zip(table.values(), _facts(*values), strict=True):
                    column.append(value)
                for column, size in zip(tokens.values(), sizes, strict=True):
                    column.append(size)
                if counts.num_records in _SAMPLES:
                    samples.append(_sample(record))
                counts.num_records += 1
        writer.close()
    counts.texts = {text: dataclasses.asdict(tally) for text, tally in lengths.fields.items()}
    arrays = {column: np.array(values, COLUMNS[column]) for column, values in table.items()}
    arrays |= {f"tokens_{text}": np.array(sizes, np.int32).reshape(-1, 2) for text, sizes in tokens.items()}
    with locations.writing(piece_path(job.work, name, "npz")) as scratch, open(scratch, "wb") as file:
        np.savez(file, **arrays)
    with locations.writing(piece_path(job.work, name, "samples")) as scratch, open(scratch, "w") as file:
        json.dump(samples, file)
    with locations.writing(piece_path(job.work, name, "json")) as scratch, open(scratch, "w") as file:
        json.dump(vars(counts), file)
    return counts


def _facts(record: Record, row_key: str, picture: Picture, num_bytes: int) -> tuple[int, ...]:
    hashes = hash_text(record.key), hash_text(row_key), picture.hash
    return *hashes, picture.width, picture.height, num_bytes, bool(record.caption)


def _read_rows(job: Job, part: Part) -> Iterator[tuple]:
    """Each row of a part with what `read_row` gives, or the maps of that, or the BadRow that was raised, in order."""

    def read(row):
        try:
            records, notes, key = read_row(row, job.source, job.images)
            if job.maps:
                made = [
                    map_records(record, job.maps, job.map_models, hashed=job.images.hashed) for record, _ in records
                ]
                records = [pair for pairs in made for pair in pairs]
            return row, (records, notes, key)
        except BadRow as error:
            return row, error

    rows = FORMATS[job.format].read_part(part, job.source)
    if job.threads == 1:
        yield from map(read, rows)
        return
    waiting = collections.deque()
    with ThreadPoolExecutor(job.threads) as pool:
        for row in rows:
            waiting.append(pool.submit(read, row))
            if len(waiting) > 2 * job.threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _check_words(job: Job, record: Record) -> None:
    """Raises BadRow for a caption, or an answer, that is shorter or longer than the job wants."""
    text = record.caption or record.answer
    if not job.min_words and job.max_words is None:
        return
    words = len(text.split())
    if words < job.min_words:
        raise BadRow("text too short", f"{words} words, expected at least {job.min_words}")
    if job.max_words is not None and words > job.max_words:
        raise BadRow("text too long", f"{words} words, expected at most {job.max_words}")


def _sample(record: Record) -> dict:
    texts = {name: getattr(record, name) for name in ("instruction", "question", "answer", "caption")}
    pictures = [*record.conditions[:4], record.image]
    return {
        "key": one_line(record.key),
        "texts": {name: one_line(text, 2000) for name, text in texts.items() if text},
        "images": [base64.b64encode(thumbnail(data, _THUMBNAIL)).decode("ascii") for data in pictures],
    }
