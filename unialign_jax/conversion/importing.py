"""From downloaded PyTorch weights to a bundle."""

import errno
import logging
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from unialign_jax import bundle
from unialign_jax.bundle_config import SAMPLING, TASKS, fit_problems
from unialign_jax.conversion import autoencoder, rules, sources, text_encoder, torch_pickle, transformer
from unialign_jax.conversion.rules import Table
from unialign_jax.conversion.sources import Part
from unialign_jax.data.tokenizer import Tokenizer, load_tokenizer
from unialign_jax.files import check_regular
from unialign_jax.models.mmdit import AlignmentHeadsConfig
from unialign_jax.models.text_encoder import TextEncoderConfig

log = logging.getLogger(__name__)

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
MAX_PROBLEMS = 20  # named in one message
MAX_MASK_FILE = 2**26  # bytes; the released one has 9,500
FLAGS = {"text_encoder": "--text-encoder", "autoencoder": "--vae"}


def convert(
    kind: str,
    source: str | Path,
    output: str | Path,
    *,
    text_encoder: str | Path | None = None,
    vae: str | Path | None = None,
    tokenizer: str | Path | None = None,
    mask_embedding: str | Path | None = None,
    components: Iterable[str] | None = None,
    heads: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> bundle.BundleConfig:
    """Converts Stable Diffusion 3 or the released UniAlignment (or DualDiffusion); returns the bundle's configuration.

    Args:
      kind: "sd3": a bundle with the same image velocity, whose text head is yet to be trained. "unialign": with the
        alignment heads where the source has them.
      source: a diffusers folder, one component's folder, or a safetensors file.
      text_encoder: a file or folder of T5, in place of the source's own.
      vae: the same of the VAE.
      tokenizer: T5's tokenizer folder, in place of the source's own.
      mask_embedding: the `.pth` file of the learned mask embedding, which replaces <extra_id_0>'s in the T5 table.
      components: those of "transformer", "text_encoder", "autoencoder" to convert; all three when None.
      heads: whether to draw new alignment heads for a source without them.
      dtype: "float32", "float16" or "bfloat16" to store; the source's own when None.

    Raises ValueError or OSError when the conversion is impossible or fails; `output` is then as it was before.
    """
    wanted = tuple(components or ("transformer", "text_encoder", "autoencoder"))
    unknown = [name for name in wanted if name not in sources.FOLDERS]
    if unknown:
        raise ValueError(f"unknown component {unknown[0]!r}, expected some of {', '.join(sources.FOLDERS)}")
    replacements = {"text_encoder": text_encoder, "autoencoder": vae}
    given = sources.open_source(source, [name for name in wanted if replacements.get(name) is None])
    parts = choose_parts(given, wanted, replacements)
    check_kind(kind, parts.get("transformer"))
    if tokenizer:
        sources.check_tokenizer(tokenizer, tokenizer)
    tokenizer_source = tokenizer or source
    tokenizer = Path(tokenizer) if tokenizer else given.tokenizer
    loaded_tokenizer = load_tokenizer(tokenizer) if tokenizer else None
    if "text_encoder" in parts:
        mask_embedding = mask_embedding or given.mask_embedding
    if "text_encoder" in parts and not tokenizer:
        raise ValueError(
            f"{source} has no T5 tokenizer: give its folder (tokenizer.json or spiece.model) by --tokenizer"
        )
    if mask_embedding and "text_encoder" not in parts:
        raise ValueError("a mask embedding goes into the T5 table, but no text encoder is converted")

    jobs = plan(parts, heads, loaded_tokenizer, DTYPES[dtype] if dtype else None)
    files = {file for part in parts.values() for file in part.files}
    provenance = {"kind": kind, "dropped": given.dropped}
    if mask_embedding:
        job = next(job for job in jobs if job.name == "text_encoder")
        job.mask = read_mask_embedding(mask_embedding, job.config, loaded_tokenizer)
        files.add(Path(mask_embedding))
        provenance["mask_embedding"] = {"file": Path(mask_embedding).name, "row": job.mask.row}
    elif "text_encoder" in parts:
        log.warning(
            "no mask embedding is given: <extra_id_0>'s own embedding stands for masked text (the released one is "
            "mask_token_emb.00-of-01.pth, by --mask-embedding)"
        )
    write(
        output,
        jobs,
        files,
        provenance,
        tokenizer=tokenizer,
        tokenizer_source=tokenizer_source,
        tasks=trained_tasks(kind, [job.name for job in jobs]),
        sampling={key: value for key, (value, *_) in SAMPLING.items()},
        overwrite=overwrite,
        progress=progress,
    )
    return bundle.read_config(output)


def write(
    output: str | Path,
    jobs: "list[Job]",
    files: Iterable[Path],
    provenance: dict,
    *,
    tokenizer: Path | None = None,
    tokenizer_source: str | Path | None = None,
    tasks: tuple[str, ...] | None = None,
    sampling: dict | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Writes the bundle of `jobs`, and meanwhile hashes the source's `files` for its provenance."""
    size = sum(job.size for job in jobs)
    check_space(output, size)
    with ThreadPoolExecutor(1) as executor, bundle.Writer(output, overwrite=overwrite) as writer:
        hashes = {file: executor.submit(bundle.sha256, file) for file in sorted(files)}
        if tokenizer:
            writer.add_tokenizer(tokenizer, tokenizer_source)
        with tqdm(total=size, unit="B", unit_scale=True, disable=None if progress else True) as bar:
            for job in jobs:
                bar.set_description(job.name)
                writer.add(job.name, job.config, with_progress(job.leaves(), bar))
        writer.tasks, writer.sampling = tasks, sampling or {}
        writer.provenance = provenance | {
            "components": {job.name: job.provenance for job in jobs},
            "files": [{"name": f.name, "size": f.stat().st_size, "sha256": h.result()} for f, h in hashes.items()],
        }


def trained_tasks(kind: str, components: Iterable[str]) -> tuple[str, ...] | None:
    """The tasks that a downloaded model was trained for.

    None, for unknown, without alignment heads: it may be DualDiffusion, which was trained for fewer than UniAlignment.
    """
    if kind == "sd3":
        return ("text_to_image",)
    return TASKS if "heads" in components else None


def choose_parts(given: sources.Source, wanted: Iterable[str], replacements: dict) -> dict[str, Part]:
    """The parts to convert, from the source or the paths in `replacements`. Raises ValueError for a missing one."""
    parts = dict(given.parts)
    for component, path in replacements.items():
        if path is not None:
            parts[component] = sources.open_component(path, component)
    missing = [name for name in wanted if name not in parts]
    if missing:
        hints = [f"give it by {FLAGS[name]}" if name in FLAGS else "the --source must hold it" for name in missing]
        raise ValueError(
            f"{given.path} has no {' and no '.join(missing)}: {'; '.join(hints)}"
            + (f"; or convert what there is by --components={','.join(parts)}" if parts else "")
        )
    return {name: parts[name] for name in wanted}


def check_kind(kind: str, part: Part | None) -> None:
    """Raises ValueError when the transformer is not of the `kind` that was asked for."""
    if part is None:
        return
    released = part.layout == "unialign"
    if kind == "sd3" and released:
        raise ValueError(f"{part.name} is a UniAlignment transformer, not SD3's: use `convert.py unialign`")
    if kind == "unialign" and not released:
        raise ValueError(f"{part.name} is SD3's transformer ({part.layout} layout): use `convert.py sd3`")


class Job:
    """One component to write: its architecture, its table, the shapes and dtypes of our arrays.

    The attribute `mask` replaces a row of a text encoder's table.

    Args:
      part: the source; None for a component that is drawn anew.
      abstract: our parameters as a tree of ShapeDtypeStructs.
      dtype: to store; the source's own when None.

    Raises ValueError when the source does not fit the table.
    """

    def __init__(self, name: str, config, table: Table, part: Part | None, abstract: dict, dtype: np.dtype | None):
        self.mask: Mask | None = None
        shapes = {path: tuple(leaf.shape) for path, leaf in flatten_dict(abstract, sep="/").items()}
        self.name, self.config, self.table, self.part, self.shapes = name, config, table, part, shapes
        found = {} if part is None else part.shapes
        problems = rules.problems(table, found, shapes)
        if problems:
            more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
            where = f"{part.name if part else name} does not fit the layout {table.layout}"
            raise ValueError(f"{where}: {'; '.join(problems[:MAX_PROBLEMS])}{more}")
        try:
            for dropped in table.dropped:
                if dropped.check is not None and part:
                    dropped.check(part.read)
        except ValueError as error:
            raise ValueError(f"{part.name}: {error}") from None
        self.dtypes = rules.leaf_dtypes(table, part.dtypes if part else {}, shapes, dtype)
        self.size = sum(int(np.prod(shape)) * self.dtypes[path].itemsize for path, shape in shapes.items())

    def leaves(self) -> bundle.Leaves:
        read = self.part.read if self.part else None
        for path, leaf in rules.import_leaves(self.table, read, self.shapes, self.dtypes):
            if self.mask and path == "token_embedding":
                leaf[self.mask.row] = self.mask.values
            yield path, leaf
            del leaf

    @property
    def provenance(self) -> dict:
        return {
            "layout": self.table.layout,
            "source": Path(self.part.name).name if self.part else None,
            "computed": {f"{fill.target}{rules.index_text(fill.index)}": fill.about for fill in self.table.fills},
            "dropped": {
                dropped.pattern: dropped.about
                for dropped in self.table.dropped
                if self.part and rules.matches(self.part.tensors, dropped.pattern)
            },
        }


def config_and_table(part: Part, vocab_size: int | None = None) -> tuple[object, Table]:
    """The architecture of a part (`vocab_size` where it has no text head), and the table that converts it."""
    if part.component == "text_encoder":
        config = text_encoder.infer_config(part.shapes, part.settings, part.name)
        return config, text_encoder.t5_table(config, part.tensors)
    if part.component == "autoencoder":
        config = autoencoder.infer_config(part.layout, part.shapes, part.settings, part.name)
        return config, autoencoder.autoencoder_table(part.layout, config)
    config = transformer.infer_config(part.layout, part.shapes, part.read, part.settings, part.name, vocab_size)
    released = part.layout == "unialign"
    return config, transformer.unialign_table(config) if released else transformer.sd3_table(part.layout, config)


def plan(parts: dict[str, Part], heads: bool, tokenizer: Tokenizer | None, dtype: np.dtype | None) -> list["Job"]:
    """The components to write. Raises ValueError when they do not fit each other or their sources."""
    configs, pieces = {}, {}
    for name, part in parts.items():
        configs[name], table = config_and_table(part, tokenizer.vocab_size if tokenizer else None)
        pieces[name] = (table, part)
    if "transformer" in parts:
        table, part = pieces["transformer"]
        adapters = {key: info for key, info in part.tensors.items() if key.startswith(transformer.HEADS_PREFIX)}
        rest = part._replace(tensors={key: info for key, info in part.tensors.items() if key not in adapters})
        pieces["transformer"] = (table, rest)
        if adapters:
            configs["heads"] = transformer.infer_heads_config(part.shapes, part.settings, part.name)
            pieces["heads"] = (transformer.heads_table(), part._replace(tensors=adapters))
        elif heads:
            configs["heads"] = AlignmentHeadsConfig()
            pieces["heads"] = None
    config = bundle.BundleConfig(**configs)
    check_fit(config, tokenizer)

    jobs = []
    for name, tree in bundle.abstract_params(config).items():
        table, part = pieces[name] or (transformer.new_heads_table(tree), None)
        jobs.append(Job(name, configs[name], table, part, tree, dtype))
    return jobs


def check_fit(config: bundle.BundleConfig, tokenizer: Tokenizer | None) -> None:
    """Raises ValueError, with the whole list, when components and tokenizer do not fit each other."""
    lines = fit_problems(config, tokenizer)
    if lines:
        raise ValueError("the parts do not fit each other: " + "; ".join(lines))


class Mask(NamedTuple):
    row: int
    values: np.ndarray


def read_mask_embedding(path: str | Path, config: TextEncoderConfig, tokenizer: Tokenizer) -> Mask:
    """The learned mask embedding and the row of the T5 table that it replaces. Raises ValueError if it does not fit."""
    check_regular(path, MAX_MASK_FILE)
    values = torch_pickle.read_single(path)
    if values.shape != (config.width,):
        raise ValueError(f"{path} has shape {values.shape}, the text encoder's embeddings have ({config.width},)")
    if not np.isfinite(values.astype(np.float32)).all():
        raise ValueError(f"{path} holds values that are not finite: fetch it again")
    return Mask(tokenizer.mask_id, values)


def check_space(output: str | Path, size: int) -> None:
    """Raises OSError when the disk has no room for `size` bytes at `output`."""
    folder = next(parent for parent in Path(output).absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < size:
        found = f"{folder} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed"
        raise OSError(errno.ENOSPC, f"{found}: free some space, or choose another --output")


def with_progress(leaves: bundle.Leaves, bar: tqdm) -> bundle.Leaves:
    """The same pairs; the bar moves by the bytes of each array when the next one is asked for."""
    for path, leaf in leaves:
        size = leaf.nbytes
        yield path, leaf
        del leaf
        bar.update(size)
