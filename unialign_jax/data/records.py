"""Records on disk: their schema, writing them as a TFDS data set of ArrayRecord files, reading them by index.

A data folder holds the records of one stream kind: a TFDS data set (`dataset_info.json`, `features.json`, shards
`*.array_record-*`) and our own `records.json` with the schema version, the kind, the number of records, the teacher's
width and each shard's length. Opening a folder reads that one small file only.
"""

import bisect
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from unialign_jax.data.caches import is_cache
from unialign_jax.data.kinds import KINDS, find_kind
from unialign_jax.files import check_regular, first_line, read_json, replacing_folder

SCHEMA_VERSION = 1
METADATA_FILE = "records.json"
REPORT_FILES = ("report.json", "report.html")  # beside the records, of `preparation`
PREPARE_COMMAND = "python launch/prepare_data.py --help"
CAPTION_COMMAND = "python launch/prepare_data.py caption"

_SPLIT = "train"
_SHARD = re.compile(r"unialign_\w+-train\.array_record-[\w-]+")
_CHUNK = 128  # records handed to TFDS at a time
_TEXT_FIELDS = ("key", "caption", "instruction", "question", "answer")
_TEACHER_FIELDS = ("teacher_image", "teacher_text")


class RecordError(ValueError):
    """One record cannot be read or decoded. The others of its data set may be sound."""


@dataclass(frozen=True)
class Record:
    """One record, with its images still encoded.

    Attributes:
      key: the record's name in messages; unique within a data set by convention.
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
    """The content of `records.json`. `parameters` are the writer's own facts on how the data were made."""

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
    optional: tuple[str, ...] = (),
    shard_bytes: int = 256 << 20,
) -> Metadata:
    """Writes `records` in their order as one data folder. One chunk of records is in memory at a time.

    The folder appears when it is whole (see `files.replacing_folder`). If the iterator or a record fails, nothing is
    left.

    Args:
      directory: the folder to write; its parents are created.
      records: any iterable; all or none of them carry teacher features, all of one width.
      kind: a key of `kinds.KINDS`, which tells the fields that must be filled.
      parameters: JSON-able facts on how the data were made.
      overwrite: whether to replace an existing data folder, if it contains nothing else.
      optional: fields of the kind that may be empty. With "caption", the parameter `without_caption` becomes the
        number of records that have none.
      shard_bytes: bytes of records in one file, about.

    Raises FileExistsError when the folder exists and may not be replaced, OSError when it cannot be written, and
    ValueError for an unknown kind, for no records, and for a record, named by key, that lacks a field of its kind.
    """
    find_kind(kind)
    with replacing_folder(directory, overwrite=overwrite, foreign=foreign_names) as unfinished:
        return _write_folder(unfinished, iter(records), kind, parameters or {}, shard_bytes, optional)


def foreign_names(directory: Path) -> list[str]:
    """The names in a folder that `write_records` does not write. A folder with any is not replaced."""
    own = (METADATA_FILE, "dataset_info.json", "features.json", *REPORT_FILES)
    return sorted(
        entry.name
        for entry in directory.iterdir()
        if not (is_cache(entry) or (entry.is_file() and (entry.name in own or _SHARD.fullmatch(entry.name))))
    )


def is_data_folder(directory: str | os.PathLike) -> bool:
    """Whether a folder has the metadata of a data folder, sound or not."""
    return (Path(directory) / METADATA_FILE).is_file()


def read_metadata(directory: str | os.PathLike) -> Metadata:
    """The content of a folder's `records.json`.

    Raises FileNotFoundError when the folder is missing. Raises ValueError when it is empty or not a data folder, is of
    another schema version, when a field of `records.json` is wrong, and when a shard is missing or cut short.
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
    again = f"write the folder again, see `{PREPARE_COMMAND}`"
    try:
        metadata = _parse_metadata(read_json(path), path)
    except ValueError as error:
        raise ValueError(f"{error}: {again}") from None
    for shard in metadata.shards:
        file = directory / shard["file"]
        try:
            found = check_regular(file)
        except FileNotFoundError:
            found = None
        if found != shard["num_bytes"]:
            state = "is missing" if found is None else f"has {found} bytes"
            raise ValueError(f"{file} {state}, expected {shard['num_bytes']} bytes: copy or write the folder again")
    if metadata.num_records == 0:
        raise ValueError(f"data folder {directory} has no records: {again}")
    return metadata


def _parse_metadata(content: dict, path: Path) -> Metadata:
    """The object that `records.json` holds, every field checked. Raises ValueError, beginning with `path`."""
    if content.get("version") != SCHEMA_VERSION:
        found = f"holds records of version {content['version']!r:.40}" if "version" in content else "names no version"
        raise ValueError(f"{path} {found}, this code reads version {SCHEMA_VERSION}")

    def check(holder, expected, prefix=""):
        if not isinstance(holder, dict):
            raise ValueError(f"{path} has {holder!r:.40} among its {prefix.rstrip('.')}, expected objects")
        for name, kind in expected.items():
            if name not in holder:
                raise ValueError(f"{path} lacks {prefix}{name}")
            value = holder[name]
            if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and not 0 <= value < 2**63):
                wanted = {str: "a text", int: "a whole number of 0 or more", dict: "an object", list: "an array"}[kind]
                raise ValueError(f"{path} has {value!r:.40} for {prefix}{name}, expected {wanted}")

    fields = {"kind": str, "num_records": int, "num_bytes": int, "teacher_width": int, "parameters": dict}
    check(content, fields | {"shards": list})
    if content["kind"] not in KINDS:
        raise ValueError(f"{path} has {content['kind']!r:.40} for kind, expected one of {', '.join(KINDS)}")
    for shard in content["shards"]:
        check(shard, {"file": str, "num_records": int, "num_bytes": int}, "shards.")
        if not _SHARD.fullmatch(shard["file"]):
            raise ValueError(f"{path} has {shard['file']!r:.80} for a shard, expected the name of a file beside it")
    total = sum(shard["num_records"] for shard in content["shards"])
    if total != content["num_records"]:
        raise ValueError(f"{path} has {content['num_records']} for num_records, its shards hold {total}")
    return Metadata(**{name: content[name] for name in fields}, shards=tuple(content["shards"]))


class RecordSource:
    """Random access to the records of one folder: `len(source)`, `source[index] -> Record`. Safe in threads."""

    def __init__(self, directory: str | os.PathLike):
        # Importing these takes a second or so, and only reading needs them.
        import grain
        from tensorflow_datasets.proto import tf_example_pb2

        self.directory = Path(directory)
        self.metadata = read_metadata(directory)
        # "[0:n]" spares a look into every file for its length.
        self._records = grain.sources.ArrayRecordDataSource(
            [f"{self.directory / shard['file']}[0:{shard['num_records']}]" for shard in self.metadata.shards]
        )
        self._ends = list(itertools.accumulate(shard["num_records"] for shard in self.metadata.shards))
        self._parse = tf_example_pb2.Example.FromString

    def __len__(self) -> int:
        return self.metadata.num_records

    def __getitem__(self, index: int) -> Record:
        """The record at `index`.

        Raises IndexError outside of [0, len), and RecordError when the bytes on disk are not a record.
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
            file = self.metadata.shards[bisect.bisect(self._ends, index)]["file"]
            raise RecordError(f"record {index} of {self.directory} is damaged ({file}): {first_line(error)}") from error

    def __repr__(self) -> str:
        return f"RecordSource({str(self.directory)!r}, kind={self.metadata.kind!r}, records={len(self)})"


def open_records(directory: str | os.PathLike) -> RecordSource:
    """Opens a data folder for reading by index. Raises as `read_metadata` does."""
    return RecordSource(directory)


def _write_folder(
    directory: Path,
    records: Iterator[Record],
    kind: str,
    parameters: dict,
    shard_bytes: int,
    optional: tuple[str, ...],
) -> Metadata:
    import tensorflow_datasets as tfds

    chunk = list(itertools.islice(records, _CHUNK))
    if not chunk:
        raise ValueError(f"there are no {kind} records to write")
    teacher_width = 0 if chunk[0].teacher_image is None else len(chunk[0].teacher_image)
    mean_bytes = sum(_num_bytes(record) for record in chunk) / len(chunk)

    # TFDS's writer for data of unknown length. (Its GeneratorBasedBuilder first holds up to 1 GB of examples in
    # memory to shuffle them and needs TensorFlow beyond that; the order on disk does not matter to us.)
    info = dataset_info(directory, kind)
    writer = tfds.core.SequentialWriter(
        info, max_examples_per_shard=max(1, round(shard_bytes / mean_bytes)), file_format="array_record"
    )
    writer.initialize_splits([_SPLIT])
    without_caption = 0
    while chunk:
        without_caption += sum(not record.caption for record in chunk)
        writer.add_examples({_SPLIT: [to_example(record, kind, teacher_width, optional) for record in chunk]})
        chunk = list(itertools.islice(records, _CHUNK))
    writer.close_all()

    split = info.splits[_SPLIT]
    shards = tuple(
        {"file": path.name, "num_records": length, "num_bytes": path.stat().st_size}
        for path, length in zip(map(Path, split.filepaths), split.shard_lengths, strict=True)
    )
    if "caption" in optional:
        parameters = parameters | {"without_caption": without_caption}
    return write_metadata(directory, kind, shards, parameters, teacher_width)


def dataset_info(directory: str | os.PathLike, kind: str):
    """TFDS's description of a data folder of that kind."""
    import tensorflow_datasets as tfds

    return tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(
            name=f"unialign_{kind}",
            version=tfds.core.Version(f"{SCHEMA_VERSION}.0.0"),
            data_dir=str(directory),
            module_name=__name__,
        ),
        description=f"UniAlignment records of kind {kind}.",
        features=_features(tfds),
    )


def write_metadata(
    directory: Path, kind: str, shards: tuple[dict, ...], parameters: dict, teacher_width: int = 0
) -> Metadata:
    """Writes `records.json`. A shard has `file`, `num_records` and `num_bytes`."""
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


def to_example(record: Record, kind: str, teacher_width: int, optional: tuple[str, ...] = ()) -> dict:
    """The record as TFDS's encoder takes it. Raises ValueError for a field of its kind that is missing."""
    missing = [name for name in find_kind(kind).fields if name not in optional and not getattr(record, name)]
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
