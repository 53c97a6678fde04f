"""Hugging Face's `datasets`: saved on disk (read by pyarrow alone), or by name (streamed, by the package itself)."""

from collections.abc import Iterator

from unialign_jax.data.jsonl import BadRow
from unialign_jax.data.sources import locations, rows
from unialign_jax.data.sources.parquet import values
from unialign_jax.data.sources.parts import Part, Row, SourceOptions, make_key
from unialign_jax.files import first_line, parse_json

_BATCH = 32
_MAX_STATE = 2**26


def is_saved(folder: str) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return any(locations.exists(locations.join(folder, name)) for name in ("dataset_dict.json", "state.json"))


def list_parts(path: str, label: str, options: SourceOptions) -> Iterator[Part]:
    if locations.is_url(path) or locations.exists(path):
        if not is_saved(path):
            raise ValueError(f"source {path} was not written by save_to_disk (no dataset_dict.json or state.json)")
        yield from _saved_parts(path, label, options)
        return
    dataset = _open_by_name(path, options)
    for number in range(dataset.num_shards):
        yield Part(path, label, units=(number, dataset.num_shards))


def read_part(part: Part, options: SourceOptions) -> Iterator[Row]:
    yield from _read_file(part, options) if part.path.endswith(".arrow") else _read_by_name(part, options)


def _state(path: str) -> dict:
    return parse_json(locations.read_bytes(path, _MAX_STATE), path)


def _saved_parts(folder: str, label: str, options: SourceOptions) -> Iterator[Part]:
    if locations.exists(locations.join(folder, "dataset_dict.json")):
        splits = _state(locations.join(folder, "dataset_dict.json")).get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise ValueError(f"{folder}/dataset_dict.json names no splits")
        split = options.split or "train"
        if split not in splits:
            raise ValueError(f"{folder} has no split {split}, it has {', '.join(splits)}: name one with --split")
        folder, label = locations.join(folder, split), f"{label}/{split}"
    state = _state(locations.join(folder, "state.json"))
    files = state.get("_data_files")
    if not isinstance(files, list) or not all(
        isinstance(f, dict) and isinstance(f.get("filename"), str) for f in files
    ):
        raise ValueError(f"{folder}/state.json names no data files")
    for file in files:
        name = locations.name_of(file["filename"])
        yield Part(locations.join(folder, name), f"{label}/{name}")


def _read_file(part: Part, options: SourceOptions) -> Iterator[Row]:
    import pyarrow as pa

    number = 1
    base, shown = locations.parent(part.path), locations.shown(part.path)
    try:
        with locations.open_file(part.path) as opened, pa.ipc.open_stream(opened) as reader:
            rows.check_columns(reader.schema.names, options)
            wanted = rows.wanted_columns(reader.schema.names, options)
            for batch in reader:
                chosen = batch.select(wanted)
                for position in range(chosen.num_rows):
                    yield Row(make_key(part.label, number), values(chosen, position), base, place=f"{shown}:{number}")
                    number += 1
    except BadRow as error:
        yield Row(make_key(part.label, number), {}, base, error, shown)
    except Exception as error:  # pyarrow raises many kinds on a damaged file
        locations.raise_if_remote(error, part.path)
        fault = BadRow("Arrow file is broken", f"after row {number - 1}: {first_line(error)}")
        yield Row(make_key(part.label, number), {}, base, fault, shown)


def _open_by_name(name: str, options: SourceOptions):
    """A streamed data set; `OWNER/NAME` or `OWNER/NAME:CONFIGURATION`. Images stay encoded, no code of it is run."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"source {name} needs Hugging Face's package: pip install datasets") from None
    name, _, configuration = name.removeprefix("hf://").removeprefix("datasets/").partition(":")
    try:
        found = datasets.load_dataset(name, configuration or None, split=options.split or "train", streaming=True)
        return found.decode(False)
    except Exception as error:  # no such name, no network, no such split
        raise ValueError(f"source {name} cannot be opened: {first_line(error)}") from None


def _read_by_name(part: Part, options: SourceOptions) -> Iterator[Row]:
    number, (shard, count) = 1, part.units
    label = f"{part.label}/{shard}"
    try:
        dataset = _open_by_name(part.path, options)
        names = list(dataset.column_names or ())
        if names:
            rows.check_columns(names, options)
            dataset = dataset.select_columns(rows.wanted_columns(names, options))
        for fields in dataset.shard(num_shards=count, index=shard):
            yield Row(make_key(label, number), fields)
            number += 1
    except BadRow as error:
        yield Row(make_key(label, number), {}, fault=error)
    except Exception as error:  # the network: the run stops, and resumes here when it is started again
        raise ValueError(f"{part.path}: after row {number - 1} of part {shard}: {first_line(error)}") from error
