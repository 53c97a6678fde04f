"""Records on disk: their schema, writing them as a TFDS data set of ArrayRecord files, reading them by index.

A data folder holds the records of one stream kind: a TFDS data set (`dataset_info.json`, `features.json`, shards
`*.array_record-*`) and our own `records.json`, which says the schema version, the kind, the number of records, the
teacher's width and each shard's length, so that opening a folder reads one small file whatever its size.
"""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unialign_jax.data.kinds import find_kind

SCHEMA_VERSION = 1
METADATA_FILE = "records.json"
PREPARE_COMMAND = "python launch/prepare_data.py --help"

_SPLIT = "train"
_CHUNK = 128  # records handed to TFDS at a time
_TEXT_FIELDS = ("key", "caption", "instruction", "question", "answer")
_TEACHER_FIELDS = ("teacher_image", "teacher_text")


class RecordError(ValueError):
    """One record cannot be read or decoded. The rest of its data set may be whole."""


@dataclass(frozen=True)
class Record:
    """One record, with its images still encoded.

    Attributes:
      key: names the record in messages; unique within a data set by convention.
      image: the target image, PNG or JPEG bytes.
      conditions: source or reference images, in order.
      caption: text about the target image.
      instruction: the edit instruction, the perception task, or the personalization prompt.
      question, answer: for vqa.
      teacher_image, teacher_text: float16 [T] features of the frozen teacher, both or neither.
    """

    key: str
    image: bytes
    conditions: tuple[bytes, ...] = ()
    caption: str = ""
    instruction: str = ""
    question: str = ""
    answer: str = ""
    teacher_image: np.ndarray | None = None
    teacher_text: np.ndarray | None = None


@dataclass(frozen=True)
class Metadata:
    """What `records.json` says. `parameters` is how the data were made, as the writer gave it."""

    kind: str
    num_records: int
    num_bytes: int
    teacher_width: int
    shards: tuple[dict, ...] = field(repr=False)
    parameters: dict


def write_records(
    directory: str | os.PathLike,
    records: Iterable[Record],
    *,
    kind: str,
    parameters: dict | None = None,
    overwrite: bool = False,
    shard_bytes: int = 256 << 20,
) -> Metadata:
    """Writes `records` in their order as one data folder. Nothing is kept in memory beyond a chunk of records.

    The folder appears when it is whole: everything is written beside it and renamed at the end, and removed if the
    iterator or a record fails.

    Args:
      directory: the folder to make; its parents are made too.
      records: any iterable; all or none of them carry teacher features, all of one width.
      kind: a key of `kinds.KINDS`; says which fields must be filled.
      parameters: JSON-able facts on how the data were made.
      overwrite: replace an existing data folder (and only a data folder).
      shard_bytes: about how many bytes of records go into one file.

    Raises:
      FileExistsError: the folder exists and `overwrite` is off, or it is not a data folder.
      ValueError: unknown kind, no records, or a record that misses a field of its kind (named by key).
    """
    find_kind(kind)
    directory = Path(os.path.abspath(directory))
    refuse_existing(directory, overwrite=overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}.unfinished-", dir=directory.parent))
    try:
        unfinished.chmod(0o755)  # mkdtemp makes private folders
        metadata = _write_folder(unfinished, iter(records), kind, parameters or {}, shard_bytes)
        if directory.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{directory.name}.replaced-", dir=directory.parent))
            directory.rename(replaced / directory.name)
            unfinished.rename(directory)
            shutil.rmtree(replaced)
        else:
            unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return metadata


def refuse_existing(directory: str | os.PathLike, *, overwrite: bool) -> None:
    """Raises FileExistsError unless `directory` is free, empty, or a data folder that may be overwritten."""
    directory = Path(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / METADATA_FILE).is_file():
        raise FileExistsError(f"{directory} exists and is not a data folder: choose another output folder")
    if not overwrite:
        raise FileExistsError(f"{directory} already holds records: choose another folder or pass --overwrite")


def read_metadata(directory: str | os.PathLike) -> Metadata:
    """What a data folder says of itself.

    Raises:
      FileNotFoundError: the folder is missing.
      ValueError: it is empty, not a data folder, of another schema version, or a shard is missing or cut short.
    """
    directory = Path(directory)
    if not directory.exists():
        raise FileNotFoundError(f"data folder {directory} does not exist: write it first, see `{PREPARE_COMMAND}`")
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file: expected a data folder, see `{PREPARE_COMMAND}`")
    path = directory / METADATA_FILE
    if not path.is_file():
        names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
        if not names:
            raise ValueError(f"data folder {directory} is empty: write it first, see `{PREPARE_COMMAND}`")
        inside = [name for name in names if (directory / name / METADATA_FILE).is_file()]
        if inside:
            raise ValueError(f"{directory} holds data folders ({', '.join(inside)}): name one of them")
        raise ValueError(
            f"{directory} is not a data folder (no {METADATA_FILE}, found {', '.join(names[:3])}): "
            f"write one, see `{PREPARE_COMMAND}`"
        )
    try:
        content = json.loads(path.read_text())
        version = content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): write the folder again, see `{PREPARE_COMMAND}`") from None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{directory} holds records of version {version}, this code reads version {SCHEMA_VERSION}: "
            f"write the folder again, see `{PREPARE_COMMAND}`"
        )
    try:
        metadata = Metadata(
            kind=content["kind"],
            num_records=content["num_records"],
            num_bytes=content["num_bytes"],
            teacher_width=content["teacher_width"],
            shards=tuple(content["shards"]),
            parameters=content["parameters"],
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}: write the folder again, see `{PREPARE_COMMAND}`") from None
    for shard in metadata.shards:
        file = directory / shard["file"]
        found = file.stat().st_size if file.is_file() else None
        if found != shard["num_bytes"]:
            state = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{file} {state}, expected {shard['num_bytes']} bytes: copy or write the folder again")
    if metadata.num_records == 0:
        raise ValueError(f"data folder {directory} has no records: write it again, see `{PREPARE_COMMAND}`")
    return metadata


class RecordSource:
    """Random access to the records of one folder: `len(source)`, `source[index] -> Record`. Safe in threads."""

    def __init__(self, directory: str | os.PathLike):
        # Both take a second or so to import, and only reading needs them.
        import grain
        from tensorflow_datasets.proto import tf_example_pb2

        self.directory = Path(directory)
        self.metadata = read_metadata(directory)
        # "[0:n]" spares a look into every file for its length.
        self._records = grain.sources.ArrayRecordDataSource(
            [f"{self.directory / shard['file']}[0:{shard['num_records']}]" for shard in self.metadata.shards]
        )
        self._parse = tf_example_pb2.Example.FromString

    def __len__(self) -> int:
        return self.metadata.num_records

    def __getitem__(self, index: int) -> Record:
        """The record at `index` in [0, len).

        Raises:
          IndexError: index out of range.
          RecordError: the bytes on disk cannot be read as a record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.directory}: expected an index from 0 to {len(self) - 1}")
        try:
            features = self._parse(self._records[index]).features.feature
            values = {name: features[name].bytes_list.value for name in features}
            texts = {name: values[name][0].decode("utf-8") for name in _TEXT_FIELDS}
            teacher = {name: _decode_teacher(values[name][0]) for name in _TEACHER_FIELDS}
            return Record(image=values["image"][0], conditions=tuple(values["conditions"]), **texts, **teacher)
        except Exception as error:  # whatever the decoders raise on damaged bytes
            raise RecordError(f"record {index} of {self.directory} is damaged: {_first_line(error)}") from error

    def __repr__(self) -> str:
        return f"RecordSource({str(self.directory)!r}, kind={self.metadata.kind!r}, records={len(self)})"


def open_records(directory: str | os.PathLike) -> RecordSource:
    """Opens a data folder for reading by index. Errors: see `read_metadata`."""
    return RecordSource(directory)


def _write_folder(
    directory: Path, records: Iterator[Record], kind: str, parameters: dict, shard_bytes: int
) -> Metadata:
    import tensorflow_datasets as tfds

    chunk = list(itertools.islice(records, _CHUNK))
    if not chunk:
        raise ValueError(f"no {kind} records to write into {directory.parent}")
    teacher_width = 0 if chunk[0].teacher_image is None else len(chunk[0].teacher_image)
    mean_bytes = sum(_num_bytes(record) for record in chunk) / len(chunk)

    # TFDS's writer for data of unknown length. (Its GeneratorBasedBuilder first holds up to 1 GB of examples in
    # memory to shuffle them and needs TensorFlow beyond that; the order on disk does not matter to us.)
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=f"unialign_{kind}",
            version=tfds.core.Version(f"{SCHEMA_VERSION}.0.0"),
            data_dir=str(directory),
            module_name=__name__,
        ),
        description=f"UniAlignment records of kind {kind}.",
        features=_features(tfds),
    )
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=max(1, round(shard_bytes / mean_bytes)), file_format="array_record"
    )
    writer.initialize_splits([_SPLIT])
    while chunk:
        writer.add_examples({_SPLIT: [_to_example(record, kind, teacher_width) for record in chunk]})
        chunk = list(itertools.islice(records, _CHUNK))
    writer.close_all()

    split = info.splits[_SPLIT]
    shards = tuple(
        {"file": path.name, "num_records": length, "num_bytes": path.stat().st_size}
        for path, length in zip(map(Path, split.filepaths), split.shard_lengths, strict=True)
    )
    metadata = Metadata(
        kind=kind,
        num_records=sum(shard["num_records"] for shard in shards),
        num_bytes=sum(shard["num_bytes"] for shard in shards),
        teacher_width=teacher_width,
        shards=shards,
        parameters=parameters,
    )
    content = {
        "format": "unialign_jax records",
        "version": SCHEMA_VERSION,
        "kind": metadata.kind,
        "num_records": metadata.num_records,
        "num_bytes": metadata.num_bytes,
        "teacher_width": metadata.teacher_width,
        "parameters": metadata.parameters,
        "shards": list(metadata.shards),
    }
    (directory / METADATA_FILE).write_text(json.dumps(content, indent=1) + "\n")
    return metadata


def _features(tfds):
    features = tfds.features
    return features.FeaturesDict(
        {
            "image": features.Image(),
            "conditions": features.Sequence(features.Image()),
            **{name: features.Text() for name in _TEXT_FIELDS},
            # Little-endian float16 bytes: TFDS would store the numbers as float32, twice the size.
            **{name: features.Tensor(shape=(), dtype=np.object_) for name in _TEACHER_FIELDS},
        }
    )


def _to_example(record: Record, kind: str, teacher_width: int) -> dict:
    missing = [name for name in find_kind(kind).fields if not getattr(record, name)]
    if missing:
        raise ValueError(f"record {record.key!r} has no {', '.join(missing)}: a {kind} record needs it")
    example = {name: getattr(record, name) for name in _TEXT_FIELDS}
    example["image"] = record.image
    example["conditions"] = list(record.conditions)
    for name in _TEACHER_FIELDS:
        value = getattr(record, name)
        width = 0 if value is None else np.shape(value)[0]
        if width != teacher_width:
            raise ValueError(f"record {record.key!r} has {name} of width {width}, the first record {teacher_width}")
        example[name] = b"" if value is None else np.asarray(value, dtype="<f2").tobytes()
    return example


def _decode_teacher(value: bytes) -> np.ndarray | None:
    return np.frombuffer(value, dtype="<f2").astype(np.float16) if value else None


def _num_bytes(record: Record) -> int:
    teacher = sum(np.size(getattr(record, name)) for name in _TEACHER_FIELDS if getattr(record, name) is not None)
    texts = sum(len(getattr(record, name)) for name in _TEXT_FIELDS)
    return len(record.image) + sum(map(len, record.conditions)) + texts + 2 * teacher


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
