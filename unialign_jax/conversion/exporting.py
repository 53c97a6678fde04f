"""From a bundle or a training run back to PyTorch's files.

Three formats. "unialign" is the released folder (transformer/, vae/, text_encoder/, tokenizer/), which holds all that
we have. "diffusers" is SD3's folder and "stability" its single file: they make the same images from a prompt, but have
no place for the text head, for the last block's text half (which nothing but the text head reads) and for the heads.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from unialign_jax import bundle
from unialign_jax.conversion import autoencoder, rules, safetensors_file, text_encoder, transformer
from unialign_jax.conversion.importing import DTYPES, check_fit, check_space, with_progress
from unialign_jax.conversion.rules import Table
from unialign_jax.runs import StoredTree, describe, latest_step, open_run, read_run_tokenizer, read_settings

FORMATS = ("unialign", "diffusers", "stability")
CLASSES = {"unialign": "SD3JointModelFlexible", "diffusers": "SD3Transformer2DModel"}


def open_bundle(directory) -> dict[str, StoredTree]:
    """The components of a bundle; what is read of them is checked against its hashes."""
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
    output,
    *,
    format,
    source=None,
    run=None,
    weights="raw",
    components=None,
    dtype=None,
    overwrite=False,
    progress=False,
) -> list[str]:
    """Writes PyTorch's files and returns what the format had no place for, one line each.

    Args:
      output: a folder ("unialign", "diffusers") or a .safetensors file ("stability").
      format: one of FORMATS.
      source: a bundle; or else
      run: a training run's folder, whose newest checkpoint gives transformer and heads. With a `source` besides, the
        text encoder, the VAE and the tokenizer come from there.
      weights: of a run, "raw" or "ema".
      components: which of "transformer", "text_encoder", "autoencoder" to write; all that there are when None.
      dtype: "float32", "float16" or "bfloat16" to write; as stored when None.

    Raises ValueError, FileNotFoundError, FileExistsError or OSError with what is wrong; the output is then not there.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}, expected one of {', '.join(FORMATS)}")
    if source is None and run is None:
        raise ValueError("give a bundle or a run to export")
    trees = open_bundle(source) if source is not None else {}
    if run is not None:
        trees = {name: tree for name, tree in trees.items() if name != "heads"} | open_run(run, weights)
    chosen = tuple(components or (name for name in trees if name != "heads"))
    missing = [name for name in chosen if name not in trees]
    if missing:
        raise ValueError(f"{source or run} has no {', '.join(missing)}; it has {', '.join(trees)}")
    writers = [plan_component(name, trees, format, DTYPES[dtype] if dtype else None) for name in chosen]
    output = Path(output).absolute()
    if output.exists():
        check_overwrite(output, overwrite)
    size = sum(piece.size for piece in writers)
    check_space(output, size)
    with tqdm(total=size, unit="B", unit_scale=True, disable=not progress) as bar:
        if format == "stability":
            write_single_file(output, writers, bar)
        else:
            tokenizer = bundle.tokenizer_path(source) if source is not None and "text_encoder" in chosen else None
            write_folder(output, format, writers, tokenizer, bar)
    return left_out(trees, chosen, format)


def bundle_from_run(
    output, run, *, weights="raw", source=None, frozen=None, tokenizer=None, dtype=None, overwrite=False, progress=False
):
    """A training run's newest checkpoint as a bundle, ready to sample from.

    Args:
      output: the bundle to write.
      run, weights: as in `export`.
      source: the bundle that the text encoder and the autoencoder are taken from; or else
      frozen: {"text_encoder": (config, params), "autoencoder": (config, params)}.
      tokenizer: a `Tokenizer` in place of the run's own.
      dtype: "float32", "float16" or "bfloat16" to store transformer and heads; as in the checkpoint when None.

    Raises ValueError also when the parts do not fit each other.
    """
    settings, step = read_settings(run), latest_step(run)
    trained = open_run(run, weights, step)
    tokenizer = tokenizer or read_run_tokenizer(settings, run)
    pieces = {
        name: (tree.config, tree.leaves(list(tree.shapes)), DTYPES[dtype] if dtype else None)
        for name, tree in trained.items()
    }
    if source is not None:
        for name, tree in open_bundle(source).items():
            if name not in trained:
                pieces[name] = (tree.config, tree.leaves(list(tree.shapes)), None)
    for name, (config, params) in (frozen or {}).items():
        leaves = ((path, np.asarray(leaf)) for path, leaf in bundle.flatten(params).items())
        pieces.setdefault(name, (config, leaves, None))
    about = describe(run, settings)
    check_fit(bundle.BundleConfig(**{name: config for name, (config, *_) in pieces.items()}), tokenizer)
    size = sum(int(np.prod(shape)) * 4 for tree in trained.values() for shape in tree.shapes.values())
    check_space(output, size)
    with (
        bundle.Writer(output, overwrite=overwrite) as writer,
        tqdm(unit="B", unit_scale=True, disable=None if progress else True) as bar,
    ):
        for name, (config, leaves, wanted) in pieces.items():
            bar.set_description(name)
            writer.add(name, config, with_progress(cast(leaves, wanted), bar))
        writer.add_tokenizer(tokenizer)
        writer.sizes = {key: about[key] for key in bundle.SIZES}
        writer.tasks, writer.sampling = about["tasks"], about["sampling"]
        writer.provenance = {"kind": "run", "run": Path(run).name, "step": step, "weights": weights}
        if source is not None:
            writer.provenance["frozen_from"] = Path(source).name


def cast(leaves, dtype):
    for path, leaf in leaves:
        yield path, leaf if dtype is None else leaf.astype(dtype)


def left_out(trees, chosen, format) -> list[str]:
    """What SD3's layouts have no place for. None of it touches the image velocity of a prompt."""
    if "transformer" not in chosen or format == "unialign":
        return []
    lines = ["the text head (captions and answers)", "the text half of the last block, which only the text head reads"]
    return lines + (["the alignment heads (training only)"] if "heads" in trees else [])


def check_overwrite(output, overwrite):
    """Raises FileExistsError unless `output` may be replaced: asked for, and nothing but what an export writes."""
    if not overwrite:
        raise FileExistsError(f"{output} exists already; choose another --output, or give --overwrite")
    known = {"transformer", "vae", "text_encoder", "text_encoder_3", "tokenizer", "tokenizer_3"}
    strangers = sorted(path.name for path in output.iterdir() if path.name not in known) if output.is_dir() else []
    if strangers:
        raise FileExistsError(f"{output} holds {strangers[0]}, which no export wrote, so it is not overwritten")


class Piece(NamedTuple):
    """What one component becomes: its tensors, by key, and how to make them."""

    component: str
    config: object
    tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]
    write: Callable  # (yields (key, array))

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in self.tensors.values())


def plan_component(name, trees, format, dtype) -> Piece:
    tree = trees[name]
    layers = [(tree, export_table(name, tree.config, format))]
    if name == "transformer" and format == "unialign" and "heads" in trees:
        layers.append((trees["heads"], transformer.heads_table()))
    tensors, sources = {}, []
    for part, table in layers:
        shapes = rules.export_shapes(table, part.shapes)
        by_key = {entry.source: part.dtypes[entry.target] for entry in rules.expand(table)}
        usual = max(set(part.dtypes.values()), key=list(part.dtypes.values()).count)
        tensors |= {key: (np.dtype(dtype or by_key.get(key, usual)), shape) for key, shape in shapes.items()}
        sources.append((part, table))
    return Piece(name, tree.config, tensors, lambda: export_all(sources))


def export_table(name, config, format) -> Table:
    if name == "text_encoder":
        return text_encoder.t5_table(config)
    if name == "autoencoder":
        if config.kind != "kl":
            raise ValueError(f"a {config.kind} autoencoder has no weights to export: leave it out by --components")
        return autoencoder.autoencoder_table("ldm" if format == "stability" else "diffusers", config)
    if format == "unialign":
        return transformer.unialign_table(config)
    return transformer.sd3_export_table(format, config)


def export_all(sources) -> Iterator[tuple[str, np.ndarray]]:
    for part, table in sources:
        used = {entry.target for entry in rules.expand(table)}
        for path, leaf in part.leaves([path for path in part.shapes if path in used]):
            yield from rules.export_tensors(table, path, leaf)
            del leaf
        for constant in table.constants:
            yield constant.key, constant.make()


def write_tensors(path, prefixed: dict[str, Piece], bar):
    """One safetensors file of several components, each under its prefix."""
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


def write_single_file(output, pieces, bar):
    if output.suffix != ".safetensors" or output.is_dir():
        raise ValueError(f"{output}: the format stability is one file, expected a name that ends in .safetensors")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(output, {STABILITY_PREFIXES[piece.component]: piece for piece in pieces}, bar)


def write_folder(output, format, pieces, tokenizer, bar):
    scratch = output.with_name(output.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    suffix = "_3" if format == "diffusers" else ""  # T5 is SD3's third text encoder
    folders = {"transformer": "transformer", "autoencoder": "vae", "text_encoder": f"text_encoder{suffix}"}
    try:
        for piece in pieces:
            folder = scratch / folders[piece.component]
            folder.mkdir(parents=True)
            name = "model" if piece.component == "text_encoder" else "diffusion_pytorch_model"
            write_tensors(folder / f"{name}.safetensors", {"": piece}, bar)
            settings = SETTINGS[piece.component](piece.config, format)
            (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if tokenizer is not None:
            shutil.copytree(tokenizer, scratch / f"tokenizer{suffix}")
        if output.exists():
            shutil.rmtree(output)
        scratch.rename(output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def transformer_settings(config, format) -> dict:
    settings = {
        "_class_name": CLASSES[format],
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
    return settings | ({"vocab_size": config.vocab_size} if format == "unialign" else {})


def text_encoder_settings(config, _format) -> dict:
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


def autoencoder_settings(config, _format) -> dict:
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
