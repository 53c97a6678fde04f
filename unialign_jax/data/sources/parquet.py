"""Parquet files, read by row group; an image is a column of bytes, or a struct of `bytes` and `path`."""

from collections.abc import Iterator
from typing import Any

from unialign_jax.data.jsonl import BadRow
from unialign_jax.data.sources import locations, rows
from unialign_jax.data.sources.parts import Part, Row, SourceOptions, make_key
from unialign_jax.files import first_line

_BATCH = 32  # rows decoded at a time


def list_parts(path: str, label: str, options: SourceOptions) -> Iterator[Part]:
    """A row group is a part. A file that is no Parquet file is a part too, which says so when it is read."""
    import pyarrow.parquet as pq

    if locations.is_folder(path):
        names = [name for name in locations.listing(path) if name.endswith(".parquet")]
        if not names:
            raise ValueError(f"source {path} is a folder without a Parquet file")
        for name in names:
            yield from list_parts(locations.join(path, name), f"{label}/{name}", options)
        return
    if not locations.exists(path):
        raise FileNotFoundError(f"source {path} does not exist")
    first = 1
    try:
        with locations.open_file(path) as file:
            metadata = pq.ParquetFile(file).metadata
            counts = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    except Exception:  # pyarrow raises many kinds; the part tells of it
        counts = [0]
    for number, count in enumerate(counts):
        yield Part(path, label, units=(number,), first=first)
        first += count


def read_part(part: Part, options: SourceOptions) -> Iterator[Row]:
    import pyarrow.parquet as pq

    number = part.first
    base, shown = locations.parent(part.path), locations.shown(part.path)
    try:
        with locations.open_file(part.path) as opened:
            file = pq.ParquetFile(opened, memory_map=False)
            names = file.schema_arrow.names
            wanted = rows.wanted_columns(names, options)
            rows.check_columns(names, options)
            for batch in file.iter_batches(batch_size=_BATCH, row_groups=list(part.units), columns=wanted):
                for position in range(batch.num_rows):
                    yield Row(make_key(part.label, number), values(batch, position), base, place=f"{shown}:{number}")
                    number += 1
    except BadRow as error:
        yield Row(make_key(part.label, number), {}, base, error, shown)
    except Exception as error:  # pyarrow raises many kinds on a damaged file
        locations.raise_if_remote(error, part.path)
        fault = BadRow("Parquet file is broken", f"after row {number - 1}: {first_line(error)}")
        yield Row(make_key(part.label, number), {}, base, fault, shown)


def values(batch: Any, position: int) -> dict:
    """One row of a batch, as Python's values."""
    return {name: batch.column(i)[position].as_py() for i, name in enumerate(batch.schema.names)}
