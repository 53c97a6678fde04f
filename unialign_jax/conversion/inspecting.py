"""Descriptions of a file, a folder, a bundle or a run, as lines of text."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unialign_jax import bundle
from unialign_jax.conversion import exporting, rules, sources, transformer
from unialign_jax.conversion.importing import config_and_table
from unialign_jax.files import one_line
from unialign_jax.training import runs


def inspect(path: str | Path, *, keys: bool = False) -> Iterator[str]:
    """Describes `path`; with `keys` also every array, or every PyTorch key and the parameter that it becomes.

    Raises ValueError or FileNotFoundError for a path of no known kind.
    """
    path = Path(path)
    if bundle.is_bundle(path):
        yield from inspect_bundle(path, keys)
    elif (path / "checkpoints").is_dir():
        yield from inspect_run(path, keys)
    else:
        yield from inspect_source(path, keys)


def check_hashes(path: Path) -> None:
    """Raises ValueError unless `path` is a bundle whose files are as they were written."""
    if not bundle.is_bundle(path):
        raise ValueError(f"{path} is not a bundle, so that there are no recorded hashes to verify")
    problems = bundle.verify(path)
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path} is not as it was written: {'; '.join(problems[:8])}{more}")


def inspect_bundle(path: Path, keys: bool) -> Iterator[str]:
    config = bundle.read_config(path)
    yield f"{path}: a bundle of {', '.join(config.components) or 'no component'}"
    for name, tree in exporting.open_bundle(path).items():
        yield from describe_tree(name, tree, keys)
    yield from describe_use(vars(config))
    tokenizer = bundle.tokenizer_path(path)
    yield f"tokenizer: {', '.join(sorted(f.name for f in tokenizer.iterdir())) if tokenizer else 'none'}"
    try:
        lines = list(describe_provenance(config.provenance))
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise ValueError(f"{path}/config.json: provenance is not what the writer of a bundle records") from None
    yield from map(one_line, lines)


def describe_provenance(provenance: dict) -> Iterator[str]:
    """The sources of a bundle's parts."""
    for name, entry in provenance.get("components", {}).items():
        yield f"{name} came from {entry['source'] or 'nowhere (drawn anew)'}, layout {entry['layout']}"
        for target, about in entry["computed"].items():
            yield f"    computed: {target}: {about}"
        for pattern, about in entry["dropped"].items():
            yield f"    left out: {pattern}: {about}"
    for name, about in provenance.get("dropped", {}).items():
        yield f"left out: {name}: {about}"
    if "mask_embedding" in provenance:
        yield "mask embedding: {file}, in row {row} of the T5 table".format(**provenance["mask_embedding"])
    for entry in provenance.get("files", ()):
        yield f"source file {entry['name']}: {entry['size']:,} bytes, sha256 {entry['sha256']}"
    if "versions" in provenance:
        yield "written with " + ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())


def inspect_run(path: Path, keys: bool) -> Iterator[str]:
    step = runs.latest_step(path)
    yield f"{path}: a training run; its newest whole checkpoint is that of step {step}"
    for name, tree in runs.open_run(path, step=step).items():
        yield from describe_tree(name, tree, keys)
    yield from describe_use(runs.describe(path, runs.read_settings(path)))
    if runs.has_average(path, step):
        yield "it keeps an average of the transformer: --weights=ema exports that"
    else:
        yield "it keeps no average of the weights"


def describe_use(about: dict) -> Iterator[str]:
    """The tasks and sizes that a model was trained for, and the defaults of sampling."""
    tasks = about["tasks"]
    yield f"trained for: {'not recorded' if tasks is None else ', '.join(tasks) or 'no task'}"
    yield f"trained at {about['image_size']} pixels and {about['text_length']} tokens; sampled by " + (
        ", ".join(f"{key} {value}" for key, value in about["sampling"].items()) or "the usual settings"
    )


def describe_tree(name: str, tree: runs.StoredTree, keys: bool) -> Iterator[str]:
    count = sum(int(np.prod(shape)) for shape in tree.shapes.values())
    yield f"{name}: {count:,} parameters, {', '.join(sorted({str(d) for d in tree.dtypes.values()})) or 'none stored'}"
    yield f"    {json.dumps(vars(tree.config))}"
    if keys:
        for path, shape in tree.shapes.items():
            yield f"    {path} {list(shape)} {tree.dtypes[path]}"


def inspect_source(path: Path, keys: bool) -> Iterator[str]:
    source = sources.open_source(path)
    for part in source.parts.values():
        count = sum(info.size for info in part.tensors.values())
        dtypes = Counter(info.dtype for info in part.tensors.values())
        yield f"{part.component}: layout {part.layout}, {len(part.tensors)} tensors, {count:,} values"
        yield f"    dtypes {', '.join(f'{name} ({number})' for name, number in dtypes.most_common())}"
        yield f"    in {', '.join(file.name for file in part.files)}"
        config, table = config_and_table(part)
        tables = [table, transformer.heads_table()] if part.layout == "unialign" else [table]
        yield f"    {json.dumps(vars(config))}"
        if keys:
            yield from describe_keys(part, tables)
    for name, about in source.dropped.items():
        yield f"left out: {name}: {about}"
    yield f"tokenizer: {source.tokenizer or 'none'}"


def describe_keys(part: sources.Part, tables: list[rules.Table]) -> Iterator[str]:
    meanings = {}
    for table in tables:
        for dropped in table.dropped:
            for key in rules.matches(part.tensors, dropped.pattern):
                meanings[key] = f"left out: {dropped.about}"
        for entry in rules.expand(table):
            index = rules.index_text(entry.index)
            meanings[entry.source] = f"{entry.target}{index} ({entry.transform.name})"
        for fill in table.fills:
            for key in fill.sources:
                meanings.setdefault(key, f"{fill.target}{rules.index_text(fill.index)} ({fill.about})")
    for key, info in part.tensors.items():
        yield f"    {key} {list(info.shape)} {info.dtype} -> {meanings.get(key, 'UNKNOWN')}"
