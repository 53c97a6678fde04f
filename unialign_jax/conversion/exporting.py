"""From a bundle or a training run back to PyTorch's files, and from a run to a bundle.

There are three formats. "unialign" is the released folder (transformer/, vae/, text_encoder/, tokenizer/, scheduler/),
which has a place for every parameter but text positions. "diffusers" is SD3's folder and "stability" its single file.
They make the same images from a prompt, but have no place for the text head, for the last block's text half (which only
the text head reads) and for the alignment heads.
"""

import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from unialign_jax import bundle
from unialign_jax.conversion import autoencoder, rules, safetensors_file, text_encoder, transformer
from unialign_jax.conversion.importing import DTYPES, check_fit, check_space, with_progress
from unialign_jax.conversion.rules import Table
from unialign_jax.files import check_inside, read_json, refuse_existing, replacing_folder, write_json
from unialign_jax.models.mmdit import AlignmentHeadsConfig, MMDiTConfig
from unialign_jax.training import runs
from unialign_jax.training.runs import StoredTree

FORMATS = ("unialign", "diffusers", "stability")
CLASSES = {"unialign": "SD3JointModelFlexible", "diffusers": "SD3Transformer2DModel"}
SHIFT = 3.0  # of the noise levels, in the schedulers of SD3 and of the release
EOS = "</s>"  # also pads texts, as in training
# The settings that an exported tokenizer keeps. Others can name classes, code and other files.
TOKENIZER_SETTINGS = (
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "extra_ids",
    "legacy",
    "model_max_length",
)


def open_bundle(directory: str | Path) -> dict[str, StoredTree]:
    """The components of a bundle, whose files are checked against the hashes when they are read."""
    config = bundle.read_config(directory)
    trees = {}
    for name in config.components:
        metadata = bundle.component_metadata(directory, name)
        trees[name] = StoredTree(
            getattr(config, name),
            {path: tuple(leaf.shape) for path, leaf in metadata.items()},
            {path: np.dtype(leaf.dtype) for path, leaf in metadata.items()},
            lambda paths, name=name: bundle.read_leaves(directory, name, paths),
        )
    return trees


def export(
    output: str | Path,
    *,
    format: str,
    source: str | Path | None = None,
    run: str | Path | None = None,
    weights: str = "raw",
    components: Iterable[str] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
    drop_text_positions: bool = False,
) -> list[str]:
    """Writes PyTorch's files. Returns the parameters for which the format has no place, one line each.

    Args:
      output: a folder ("unialign", "diffusers") or a .safetensors file ("stability").
      source: a bundle; beside `run`, that of the text encoder, the VAE and the tokenizer.
      run: a training run's folder, whose newest checkpoint has the transformer and the heads.
      weights: "raw" or "ema", of a run.
      components: those of "transformer", "text_encoder", "autoencoder" to write; all that there are when None.
      dtype: "float32", "float16" or "bfloat16" to write; as stored when None.
      drop_text_positions: whether to leave out a table of text positions. No format has a place for it, and images and
        texts change without it, so a transformer that has one is refused otherwise.

    Raises ValueError or OSError when the export is impossible or fails; `output` is then as it was before.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}, expected one of {', '.join(FORMATS)}")
    if source is None and run is None:
        raise ValueError("give a bundle or a run to export")
    trees = open_bundle(source) if source is not None else {}
    if run is not None:
        trees = {name: tree for name, tree in trees.items() if name != "heads"} | runs.open_run(run, weights)
    exportable = [name for name in trees if name in STABILITY_PREFIXES]
    chosen = tuple(components or exportable)
    missing = [name for name in chosen if name not in exportable]
    if missing or not chosen:
        lacking = ", ".join(missing or STABILITY_PREFIXES)
        raise ValueError(f"{source or run} has no {lacking}; it has {', '.join(exportable or trees)}")
    if "transformer" in chosen and trees["transformer"].config.text_positions and not drop_text_positions:
        raise ValueError(
            f"the transformer of {run or source} has text positions, for which {format} has no place: "
            "--drop-text-positions leaves them out, and images and texts change"
        )
    writers = [plan_component(name, trees, format, DTYPES[dtype] if dtype else None) for name in chosen]
    output = Path(output).absolute()
    check_output(output, format, overwrite)
    tokenizer = bundle.tokenizer_path(source) if source is not None and "text_encoder" in chosen else None
    size = sum(piece.size for piece in writers)
    check_space(output, size)
    try:
        with tqdm(total=size, unit="B", unit_scale=True, disable=None if progress else True) as bar:
            if format == "stability":
                write_tensors(output, {STABILITY_PREFIXES[piece.component]: piece for piece in writers}, bar)
            else:
                with replacing_folder(output, overwrite=overwrite, foreign=strangers) as folder:
                    write_folder(folder, format, writers, tokenizer, bar)
    except OSError as error:
        bundle.explain_full_disk(error, output)
        raise
    return left_out(trees, chosen, format)


def bundle_from_run(
    output: str | Path,
    run: str | Path,
    *,
    weights: str = "raw",
    source: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Writes a bundle of a training run's newest checkpoint, with the run's tokenizer.

    Args:
      source: the bundle of the text encoder and the autoencoder; those that the run was trained with when None.
      dtype: "float32", "float16" or "bfloat16" to store transformer and heads; as in the checkpoint when None.

    Raises as `export` does, and ValueError when the parts do not fit each other.
    """
    runs.latest_step(run)  # refuses a folder that is no run's
    opened = runs.open_to_sample(run, weights, frozen_from=source)
    config, trained = opened.config, ("transformer", "heads")
    check_fit(config, opened.tokenizer)
    check_space(output, 4 * sum(leaf.size for leaf in jax.tree.leaves(bundle.abstract_params(config, trained))))
    with (
        bundle.Writer(output, overwrite=overwrite) as writer,
        tqdm(unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        for name in config.components:
            bar.set_description(name)
            leaves = opened.leaves(name)
            if dtype and name in trained:
                leaves = ((path, leaf.astype(DTYPES[dtype])) for path, leaf in leaves)
            writer.add(name, getattr(config, name), with_progress(leaves, bar))
        writer.add_tokenizer(opened.tokenizer)
        writer.sizes = {key: getattr(config, key) for key in bundle.SIZES}
        writer.tasks, writer.sampling = config.tasks, config.sampling
        writer.provenance = {"kind": "run", "run": Path(run).name, "step": opened.step, "weights": weights}
        if opened.frozen_from:
            writer.provenance["frozen_from"] = Path(opened.frozen_from).name


def left_out(trees: dict[str, StoredTree], chosen: Collection[str], format: str) -> list[str]:
    """The parameters for which a format has no place, one line each. Only text positions affect the image velocity."""
    if "transformer" not in chosen:
        return []
    lines = []
    if trees["transformer"].config.text_positions:
        lines.append("the text positions, without which images and texts change")
    if format == "unialign":
        if "heads" not in trees:
            return lines
        kept = {
            "final_silu": "that the alignment heads end without a SiLU, which the released class applies (in training)",
            "pool": "that the alignment heads read single tokens, which the released class pools first (in training)",
        }
        return lines + [line for field, line in kept.items() if not getattr(trees["heads"].config, field)]
    lines += ["the text head (captions and answers)", "the text half of the last block, which only the text head reads"]
    return lines + (["the alignment heads (training only)"] if "heads" in trees else [])


def check_output(output: Path, format: str, overwrite: bool) -> None:
    """Raises FileExistsError, ValueError or OSError when `output` may not or cannot be written."""
    if format != "stability":
        refuse_existing(output, overwrite=overwrite, foreign=strangers)
        return
    if output.suffix != ".safetensors" or output.is_dir():
        raise ValueError(f"{output}: the format stability is one file, expected a name that ends in .safetensors")
    if output.exists() and not output.is_file():
        raise FileExistsError(f"{output} is there and is not a file; choose another --output")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists already; choose another --output, or give --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror}") from None


def strangers(folder: Path) -> list[str]:
    """The names of files in a folder that no export wrote."""
    own = {"model_index.json", "scheduler/scheduler_config.json"}
    for name in ("transformer", "vae"):
        own |= {f"{name}/config.json", f"{name}/diffusion_pytorch_model.safetensors"}
    for suffix in ("", "_3"):
        own |= {f"text_encoder{suffix}/config.json", f"text_encoder{suffix}/model.safetensors"}
        own |= {f"tokenizer{suffix}/{name}" for name in bundle.TOKENIZER_FILES}
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [name for path in found if (name := str(path.relative_to(folder))) not in own or path.is_symlink()]


class Piece(NamedTuple):
    """A component in PyTorch's layout: its tensors by key, and the function that makes them."""

    component: str
    config: object
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]
    write: Callable[[], bundle.Leaves]  # gives (key, array) pairs
    heads: AlignmentHeadsConfig | None = None  # when the transformer's tensors include them

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in self.tensors.values())


def plan_component(name: str, trees: dict[str, StoredTree], format: str, dtype: np.dtype | None) -> Piece:
    tree = trees[name]
    layers, heads = [(tree, export_table(name, tree.config, format))], None
    if name == "transformer" and format == "unialign" and "heads" in trees:
        layers.append((trees["heads"], transformer.heads_table()))
        heads = trees["heads"].config
    tensors, sources = {}, []
    for part, table in layers:
        shapes = rules.export_shapes(table, part.shapes)
        by_key = {entry.source: part.dtypes[entry.target] for entry in rules.expand(table)}
        usual = max(set(part.dtypes.values()), key=list(part.dtypes.values()).count)
        tensors |= {key: (np.dtype(dtype or by_key.get(key, usual)), shape) for key, shape in shapes.items()}
        sources.append((part, table))
    return Piece(name, tree.config, tensors, lambda: export_all(sources), heads)


def export_table(name: str, config: Any, format: str) -> Table:
    """The table of a component in a format. Raises ValueError for an autoencoder that the format cannot hold."""
    if name == "text_encoder":
        return text_encoder.t5_table(config)
    if name == "autoencoder":
        if config.kind != "kl":
            raise ValueError(f"a {config.kind} autoencoder has no weights to export: leave it out by --components")
        if not config.blocks_per_level:
            raise ValueError(f"{format} has no autoencoder without blocks at a level: leave it out by --components")
        return autoencoder.autoencoder_table("ldm" if format == "stability" else "diffusers", config)
    if format == "unialign":
        return transformer.unialign_table(config)
    return transformer.sd3_export_table(format, config)


def export_all(sources: Iterable[tuple[StoredTree, Table]]) -> bundle.Leaves:
    """The (key, array) pairs of all tensors, constants included."""
    for part, table in sources:
        used = {entry.target for entry in rules.expand(table)}
        for path, leaf in part.leaves([path for path in part.shapes if path in used]):
            yield from rules.export_tensors(table, path, leaf)
            del leaf
        for constant in table.constants:
            yield constant.key, constant.make()


def write_tensors(path: Path, prefixed: dict[str, Piece], bar: tqdm) -> None:
    """Writes one safetensors file of {prefix of the keys: component}."""
    tensors = {prefix + key: entry for prefix, piece in prefixed.items() for key, entry in piece.tensors.items()}
    with safetensors_file.Writer(path, tensors) as writer:
        for prefix, piece in prefixed.items():
            bar.set_description(piece.component)
            for key, array in piece.write():
                dtype, _ = piece.tensors[key]
                writer.write(prefix + key, array)
                bar.update(array.size * dtype.itemsize)


STABILITY_PREFIXES = {
    "transformer": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text_encoder": "text_encoders.t5xxl.transformer.",
}


def write_folder(folder: Path, format: str, pieces: list[Piece], tokenizer: Path | None, bar: tqdm) -> None:
    """Fills an empty folder with what PyTorch's pipelines read."""
    suffix = "_3" if format == "diffusers" else ""  # T5 is SD3's third text encoder
    folders = {"transformer": "transformer", "autoencoder": "vae", "text_encoder": f"text_encoder{suffix}"}
    if tokenizer is not None:
        write_tokenizer(folder / f"tokenizer{suffix}", tokenizer)
    for piece in pieces:
        part = folder / folders[piece.component]
        part.mkdir()
        name = "model" if piece.component == "text_encoder" else "diffusion_pytorch_model"
        write_tensors(part / f"{name}.safetensors", {"": piece}, bar)
        write_json(part / "config.json", SETTINGS[piece.component](piece, format))
    if (folder / "transformer").is_dir():
        (folder / "scheduler").mkdir()
        write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
        write_json(folder / "model_index.json", model_index(folder, format))


def write_tokenizer(folder: Path, source: Path) -> None:
    """Writes T5's tokenizer for transformers, set to pad with end-of-text as in training, not with `<pad>`."""
    folder.mkdir()
    for name in ("tokenizer.json", "spiece.model", "added_tokens.json"):
        if (source / name).is_file():
            check_inside(source / name, source)
            shutil.copyfile(source / name, folder / name)
    given = source / "tokenizer_config.json"
    given = read_json(given) if given.is_file() else {}
    names = {"eos_token": EOS, "pad_token": EOS, "unk_token": "<unk>"}
    settings = {"model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    settings |= {key: given[key] for key in TOKENIZER_SETTINGS if key in given}
    write_json(folder / "tokenizer_config.json", settings | names)
    write_json(folder / "special_tokens_map.json", names)


SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": SHIFT,
}


def model_index(folder: Path, format: str) -> dict:
    """The classes of a pipeline's parts, as diffusers reads them; null for a part that `folder` lacks."""
    parts = {
        "scheduler": ["diffusers", SCHEDULER["_class_name"]],
        "transformer": ["diffusers", CLASSES["diffusers"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    encoder, tokenizer = ["transformers", "T5EncoderModel"], ["transformers", "T5TokenizerFast"]
    if format == "unialign":
        name = "UniAlignmentPipeline"
        parts |= {"transformer": ["modules.unialignment_model", CLASSES["unialign"]]}
        parts |= {"text_encoder": encoder, "tokenizer": tokenizer}
    else:
        name = "StableDiffusion3Pipeline"
        parts |= dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), [None, None])
        parts |= {"text_encoder_3": encoder, "tokenizer_3": tokenizer}
    parts = {key: part if (folder / key).is_dir() else [None, None] for key, part in parts.items()}
    return {"_class_name": name, "_diffusers_version": "0.31.0", **dict(sorted(parts.items()))}


def sd3_settings(config: MMDiTConfig) -> dict:
    """A transformer's sizes as arguments of diffusers' SD3Transformer2DModel."""
    return {
        "sample_size": config.base_patches * config.patch_size,
        "patch_size": config.patch_size,
        "in_channels": config.latent_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.head_width,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.text_width,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": transformer.POOLED_WIDTH,
        "out_channels": config.latent_channels,
        "pos_embed_max_size": config.max_patches,
    }


def transformer_settings(piece: Piece, format: str) -> dict:
    config, settings = piece.config, {"_class_name": CLASSES[format]} | sd3_settings(piece.config)
    if format != "unialign":
        return settings
    settings["vocab_size"] = config.vocab_size
    own = {key: getattr(piece.heads, key) for key in transformer.RELEASED_HEADS} if piece.heads else {}
    if own not in ({}, transformer.RELEASED_HEADS):
        settings[transformer.HEADS_SETTINGS] = own  # read by `convert.py unialign`; the released class ignores it
    return settings


def text_encoder_settings(piece: Piece, _format: str) -> dict:
    config = piece.config
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "d_ff": config.mlp_width,
        "d_kv": config.head_width,
        "num_heads": config.num_heads,
        "num_layers": config.depth,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def autoencoder_settings(piece: Piece, _format: str) -> dict:
    config = piece.config
    levels = len(config.block_widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(config.block_widths),
        "layers_per_block": config.blocks_per_level,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "scaling_factor": config.scale,
        "shift_factor": config.shift,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
    }


SETTINGS = {
    "transformer": transformer_settings,
    "text_encoder": text_encoder_settings,
    "autoencoder": autoencoder_settings,
}
