"""From pieces to a data folder: duplicates dropped, a part held out, shards of an even size, the whole published."""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unialign_jax.data import records as records_lib
from unialign_jax.data.buckets import bucket_name, nearest_buckets
from unialign_jax.data.preparation.pieces import Job, piece_path, read_table
from unialign_jax.data.sources import locations
from unialign_jax.files import replacing_folder

SPLITS = ("train", "holdout")
_READ_BYTES = 2**25  # of records in memory at a time
_BANDS = 4  # of 16 bits of a picture's hash


@dataclass(frozen=True)
class Shard:
    """One file of the data folder to be: which records of which pieces it takes, in order.

    Attributes:
      split: "train" or "holdout".
      bucket: the name of its aspect bucket; "" without buckets.
      number: of the shard in its split and bucket.
      pieces: the name of each piece, and the numbers of its records as the bytes of an int32 array.
    """

    split: str
    bucket: str
    number: int
    pieces: tuple[tuple[str, bytes], ...]

    @property
    def num_records(self) -> int:
        return sum(len(numbers) // 4 for _, numbers in self.pieces)

    def fingerprint(self) -> str:
        """Eight digits that differ when the shard holds something else."""
        return f"{zlib.crc32(repr(self.pieces).encode()):08x}"


@dataclass(frozen=True)
class Choice:
    """Which records are kept, over all pieces in order.

    Attributes:
      split: int8 [records]: 0 for train, 1 for holdout, -1 for one that is dropped.
      duplicates, near_duplicates: how many were dropped.
    """

    split: np.ndarray
    duplicates: int
    near_duplicates: int


def choose(job: Job, names: list[str], *, holdout: float = 0.0, near: int | None = None) -> Choice:
    """Drops what is there twice, and holds some records out.

    Of records with one key the first is kept. Of pictures whose hashes differ in at most `near` bits the first, too
    (None keeps all). Records are held out by the hash of their row's key, so that the choice of one does not depend on
    the others; at least one is, and one is not.
    """
    found = {"key": [], "row": [], "picture": []}
    for name in names:
        table = read_table(job.work, name)
        for column, values in found.items():
            values.append(table[column])
    columns = {column: np.concatenate(values) for column, values in found.items()}
    kept = np.zeros(len(columns["key"]), bool)
    kept[np.unique(columns["key"], return_index=True)[1]] = True
    duplicates = int(len(kept) - kept.sum())
    if near is not None:
        kept[near_duplicates(columns["picture"], kept, near)] = False
    split = np.where(kept, np.int8(0), np.int8(-1))
    if holdout and kept.sum() > 1:
        shares = columns["row"] / 2.0**64
        least, most = shares[kept].min(), shares[kept].max()
        split[kept & (shares <= max(holdout, least)) & (shares < most)] = 1
    return Choice(split, duplicates, int(len(kept) - kept.sum()) - duplicates)


def near_duplicates(hashes: np.ndarray, among: np.ndarray, distance: int) -> np.ndarray:
    """The numbers of pictures whose hash is within `distance` bits of that of an earlier one that is kept.

    Two hashes that differ in at most 3 bits are alike in one of four bands of 16 bits. So only those that share a band
    are compared, and a larger `distance` may miss some. A flat picture's hash (no bit set) says nothing and is kept.
    """
    dropped = np.zeros(len(hashes), bool)
    candidates = np.flatnonzero(among & (hashes != 0))
    for band in range(_BANDS):
        values = (hashes[candidates] >> np.uint64(16 * band)).astype(np.uint16)
        order = np.argsort(values, kind="stable")
        ends = np.flatnonzero(np.diff(values[order])) + 1
        for group in np.split(candidates[order], ends):
            group = np.sort(group)
            # A band alone is shared by many of a large set: whole hashes first, then those that are left.
            firsts = np.sort(group[np.unique(hashes[group], return_index=True)[1]])
            dropped[np.setdiff1d(group, firsts)] = True
            for place, number in enumerate(firsts[:-1]):
                if not dropped[number]:
                    rest = firsts[place + 1 :]
                    dropped[rest[np.bitwise_count(hashes[rest] ^ hashes[number]) <= distance]] = True
    return np.flatnonzero(dropped)


def plan_shards(
    job: Job, names: list[str], choice: Choice, shard_bytes: int, buckets: Sequence[tuple[int, int]] = ()
) -> Iterator[Shard]:
    """The shards of both splits, each of whole pieces until it has `shard_bytes`; the same for the same pieces.

    Args:
      buckets: (height, width) of the aspect buckets; each has shards of its own. Empty for none.
    """
    unfinished, start = {}, 0  # (split, bucket's name) -> number of the shard, its pieces, their bytes
    for name in names:
        table = read_table(job.work, name)
        sizes = table["num_bytes"]
        split_of = choice.split[start : start + len(sizes)]
        start += len(sizes)
        bucket_of = nearest_buckets(table["height"], table["width"], buckets) if buckets else np.zeros(len(sizes))
        for (code, split), bucket in itertools.product(enumerate(SPLITS), range(max(1, len(buckets)))):
            mine = np.flatnonzero((split_of == code) & (bucket_of == bucket)).astype(np.int32)
            if not len(mine):
                continue
            place = split, bucket_name(buckets[bucket]) if buckets else ""
            number, pieces, held = unfinished.pop(place, (0, (), 0))
            pieces, held = (*pieces, (name, mine.tobytes())), held + int(sizes[mine].sum())
            if held >= shard_bytes:
                yield Shard(*place, number, pieces)
                number, pieces, held = number + 1, (), 0
            unfinished[place] = number, pieces, held
    for place, (number, pieces, _) in sorted(unfinished.items()):
        if pieces:
            yield Shard(*place, number, pieces)


def count_without_caption(job: Job, shards: list[Shard]) -> int:
    """The records of some shards that have no caption."""
    return sum(
        int((~read_table(job.work, name)["captioned"][np.frombuffer(numbers, np.int32)]).sum())
        for shard in shards
        for name, numbers in shard.pieces
    )


def shard_path(work: str, shard: Shard) -> str:
    return locations.join(work, "shards", f"{shard.split}{shard.bucket}-{shard.number:05d}-{shard.fingerprint()}")


def pack_shard(job: Job, shard: Shard) -> int:
    """Writes one shard from its pieces, unless it is there; gives the number of its records.

    Raises ValueError where a piece is gone, which one of another run has made its shard of.
    """
    from array_record.python import array_record_module

    if locations.exists(shard_path(job.work, shard)):
        return shard.num_records
    with locations.writing(shard_path(job.work, shard)) as scratch:
        writer = array_record_module.ArrayRecordWriter(scratch, "group_size:1")  # as TFDS writes them
        for name, numbers in shard.pieces:
            numbers = np.frombuffer(numbers, np.int32)
            sizes = read_table(job.work, name)["num_bytes"]
            with locations.reading(piece_path(job.work, name, "array_record")) as path:
                reader = array_record_module.ArrayRecordReader(path)
                # Not more at a time than fits into memory.
                ends = np.cumsum(sizes[numbers]) // _READ_BYTES
                for chunk in np.split(numbers, np.flatnonzero(np.diff(ends)) + 1):
                    for data in reader.read(chunk.tolist()):
                        writer.write(data)
                reader.close()
        writer.close()
    return shard.num_records


def publish(
    job: Job, output: str, shards: list[Shard], *, parameters: dict, overwrite: bool, extra: dict[str, str]
) -> None:
    """Gives the shards of a split the name of a data folder, with their metadata beside.

    Args:
      output: the folder or URL.
      extra: further files of the folder, by name, as texts.

    Raises FileExistsError as `files.replacing_folder`.
    """
    names = {shard: f"unialign_{job.kind}-train.array_record-{shard.number:05d}" for shard in shards}
    described = tuple(
        {"file": name, "num_records": shard.num_records, "num_bytes": locations.size(shard_path(job.work, shard))}
        for shard, name in names.items()
    )
    if locations.is_url(output):
        folder = contextlib.nullcontext(output)
        locations.make_folder(output)
    else:
        folder = replacing_folder(output, overwrite=overwrite, foreign=records_lib.foreign_names)
    with folder as target:
        for shard, name in names.items():
            # Linked or copied, so that a kill from here on costs no shard.
            _take(shard_path(job.work, shard), locations.join(str(target), name))
        with tempfile.TemporaryDirectory() as scratch:
            _write_tfds_files(Path(scratch), job.kind, [shard.num_records for shard in shards], described)
            for name, text in extra.items():
                Path(scratch, name).write_text(text, encoding="utf-8")
            records_lib.write_metadata(Path(scratch), job.kind, described, parameters)
            # The metadata last: a folder without them is not taken for whole.
            written = sorted(os.listdir(scratch), key=lambda name: name == records_lib.METADATA_FILE)
            for name in written:
                with locations.writing(locations.join(str(target), name)) as place:
                    Path(place).write_bytes(Path(scratch, name).read_bytes())


def _take(path: str, target: str) -> None:
    if locations.is_url(target):
        fs, inner = locations.filesystem(target)
        fs.copy(locations.filesystem(path)[1], inner)
        return
    try:
        os.link(path, target)
    except OSError:  # a file system without links
        shutil.copyfile(path, target)


def _write_tfds_files(folder: Path, kind: str, lengths: list[int], described: tuple[dict, ...]) -> None:
    """`dataset_info.json` and `features.json`, as TFDS's SequentialWriter writes them."""
    import tensorflow_datasets as tfds

    info = records_lib.dataset_info(folder, kind)
    info.set_file_format(file_format="array_record", override=False)
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=info.name,
        split="train",
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
    )
    size = sum(shard["num_bytes"] for shard in described)
    split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size, filename_template=template)
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder)


def read_manifest(work: str) -> dict:
    """What `work` says of the command that it belongs to; empty where it says nothing."""
    path = locations.join(work, "job.json")
    return json.loads(locations.read_bytes(path, 2**26)) if locations.exists(path) else {}
