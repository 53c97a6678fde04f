"""Qwen2.5-VL's checkpoints to the teacher's folder, and that folder to the teacher.

Of a checkpoint only the vision tower and the table of input embeddings are read: with a sharded one, only the shards
that hold them have to be there. The folder is written as bundles are, with one component `teacher`.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint import v1 as ocp
from tqdm import tqdm

from unialign_jax import bundle, bundle_config
from unialign_jax.conversion import safetensors_file
from unialign_jax.conversion.importing import DTYPES, Job, check_space, with_progress
from unialign_jax.conversion.rules import DENSE_FROM_HEADS, SAME, Rule, Table, Transform, affine
from unialign_jax.conversion.safetensors_file import read_header
from unialign_jax.conversion.settings import number, section, shown, whole_number
from unialign_jax.conversion.sources import Part, check_tokenizer, read_weight_map
from unialign_jax.data.tokenizer import load_backend
from unialign_jax.files import read_json
from unialign_jax.models.teacher import PIXEL_MEAN, PIXEL_STD, ROTARY_BASE, TeacherConfig, init_teacher
from unialign_jax.parallel import sharding

COMPONENT = "teacher"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PAD_TOKEN = "<|endoftext|>"

# (prefix of the tower, key of the table), by what wrote the file.
LAYOUTS = {
    "transformers 4": ("visual.", "model.embed_tokens.weight"),
    "transformers 5": ("model.visual.", "model.language_model.embed_tokens.weight"),
    "transformers, without a head": ("visual.", "language_model.embed_tokens.weight"),
}
MAX_DEPTH = 1000
FULL_ATTENTION = "full_attention_layers"
# {our field: its name in vision_config}
FIELDS = {
    "depth": "depth",
    "width": "hidden_size",
    "num_heads": "num_heads",
    "mlp_width": "intermediate_size",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
    "window_size": "window_size",
    "full_attention_layers": "fullatt_block_indexes",
    "output_width": "out_hidden_size",
}


class Teacher(NamedTuple):
    """What `load_teacher` gives: call `encode_images(params, images, config)` and `encode_texts(params, ids, ...)`."""

    config: TeacherConfig
    params: dict
    tokenizer: tokenizers.Tokenizer


# Reading Qwen2.5-VL


def config_from_qwen(content, preprocessor, name) -> TeacherConfig:
    """The architecture, from the contents of config.json and of preprocessor_config.json (or {}), of any size.

    What is absent has Qwen's published value; `name` is for messages. Raises ValueError for another model, and for
    settings that this port does not have.
    """
    if content.get("model_type") != "qwen2_5_vl" or content.get("vision_config") is None:
        raise ValueError(
            f"{name} is of model_type {shown(content.get('model_type'))}, expected 'qwen2_5_vl' (Qwen2.5-VL)"
        )
    vision = section(content, "vision_config", name)
    text = section(content, "text_config", name) or content
    rotary_base = number(section(vision, "rope_parameters", name), "rope_theta", ROTARY_BASE, name)
    expected = {
        "hidden_act": (vision.get("hidden_act", "silu"), "silu"),
        "in_channels": (vision.get("in_channels", vision.get("in_chans", 3)), 3),
        "rope_theta": (rotary_base, ROTARY_BASE),
        "image_mean": (preprocessor.get("image_mean", list(PIXEL_MEAN)), list(PIXEL_MEAN)),
        "image_std": (preprocessor.get("image_std", list(PIXEL_STD)), list(PIXEL_STD)),
    }
    for field, (found, needed) in expected.items():
        if found != needed:
            given = shown(found) if isinstance(found, dict) else str(found)[:80]
            raise ValueError(f"{name}: {field} is {given}, the teacher only runs {needed}")
    values = {
        ours: whole_number(vision, theirs, None, name, most=MAX_DEPTH if ours == "depth" else 2**20)
        for ours, theirs in FIELDS.items()
        if theirs in vision and ours != FULL_ATTENTION
    }
    if FIELDS[FULL_ATTENTION] in vision:
        layers = vision[FIELDS[FULL_ATTENTION]]
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise ValueError(f"{name}: {FIELDS[FULL_ATTENTION]} is {shown(layers)}, expected a list of whole numbers")
        values[FULL_ATTENTION] = tuple(layers)
    values["vocab_size"] = whole_number(text, "vocab_size", None, name, most=2**24)
    size = section(preprocessor, "size", name)
    for field, older in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        pixels = whole_number(preprocessor, field, None, name, most=2**30)
        values[field] = pixels or whole_number(size, older, None, name, most=2**30)
    try:
        config = TeacherConfig(**{field: value for field, value in values.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if config.min_pixels > config.max_pixels:
        raise ValueError(f"{name}: min_pixels is {config.min_pixels:,}, more than max_pixels, {config.max_pixels:,}")
    width = whole_number(text, "hidden_size", config.output_width, name)
    if width != config.output_width:
        raise ValueError(
            f"{name}: image features are {config.output_width} wide and text embeddings {width}, expected one width"
        )
    return config


def patch_conv(config) -> Transform:
    """A convolution over frames and pixels [D, 3, t, p, p] as a dense layer over patches flattened in this order."""
    kernel = (3, config.temporal_patch_size, config.patch_size, config.patch_size)
    return Transform(
        "3-D patch conv to dense",
        lambda x, shape: x.reshape(x.shape[0], -1).T,
        lambda y: y.T.reshape(y.shape[1], *kernel),
    )


def qwen_table(config: TeacherConfig, layout: str) -> Table:
    tower, embedding = LAYOUTS[layout]
    every = range(config.depth)
    block, target = tower + "blocks.{layer}", "vision/layers"
    return Table(
        layout=f"Qwen2.5-VL ({layout})",
        rules=[
            Rule(f"{tower}patch_embed.proj.weight", "vision/patch_embed/kernel", patch_conv(config)),
            Rule(f"{block}.norm1.weight", f"{target}/attention_norm/scale", SAME, every),
            *affine(f"{block}.attn.qkv", f"{target}/qkv", layers=every),
            *affine(f"{block}.attn.proj", f"{target}/out", DENSE_FROM_HEADS, layers=every),
            Rule(f"{block}.norm2.weight", f"{target}/mlp_norm/scale", SAME, every),
            *affine(f"{block}.mlp.gate_proj", f"{target}/mlp_gate", layers=every),
            *affine(f"{block}.mlp.up_proj", f"{target}/mlp_up", layers=every),
            *affine(f"{block}.mlp.down_proj", f"{target}/mlp_out", layers=every),
            Rule(f"{tower}merger.ln_q.weight", "vision/merger_norm/scale", SAME),
            *affine(f"{tower}merger.mlp.0", "vision/merger_hidden"),
            *affine(f"{tower}merger.mlp.2", "vision/merger_out"),
            Rule(embedding, "token_embedding", SAME),
        ],
    )


def find_layout(keys, name) -> str:
    """Which of LAYOUTS has these keys. Raises ValueError when none has."""
    for layout, (tower, embedding) in LAYOUTS.items():
        if f"{tower}patch_embed.proj.weight" in keys and embedding in keys:
            return layout
    example = ", ".join(sorted(keys)[:3])[:200]
    raise ValueError(
        f"{name} holds no Qwen2.5-VL: expected visual.patch_embed.proj.weight and model.embed_tokens.weight (or both "
        f"as transformers 5 names them), found {len(keys)} tensors: {example} ..."
    )


def open_qwen(source: Path) -> Part:
    """The tower and the table in a folder of one or more safetensors files.

    Raises FileNotFoundError for a folder without weights and for shards that are not there, ValueError for another
    model or a damaged file.
    """
    if (source / INDEX).is_file():
        files = read_weight_map(source / INDEX)
    elif (source / SINGLE).is_file():
        files = dict.fromkeys(read_header(source / SINGLE), SINGLE)
    else:
        raise FileNotFoundError(f"{source} holds no weights: expected {SINGLE}, or {INDEX} with its shards")
    layout = find_layout(files.keys(), source)
    tower, embedding = LAYOUTS[layout]
    wanted = {key: name for key, name in files.items() if key.startswith(tower) or key == embedding}
    shards = sorted(set(wanted.values()))
    missing = [name for name in shards if not (source / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{source} lacks {', '.join(missing)}; the vision tower and the embeddings lie in {', '.join(shards)}"
        )
    headers = {name: read_header(source / name) for name in shards}
    absent = [key for key, name in wanted.items() if key not in headers[name]]
    if absent:
        raise ValueError(f"{source / wanted[absent[0]]} lacks {absent[0]}, which {INDEX} says it holds")
    tensors = {key: headers[name][key] for key, name in wanted.items()}
    unreadable = sorted({info.dtype for info in tensors.values()} - set(safetensors_file.FLOATS))
    if unreadable:
        raise ValueError(f"{source} holds tensors of dtype {', '.join(unreadable)}, expected floats")
    return Part(COMPONENT, layout, tensors, {}, str(source))


def preprocessor_settings(source: Path) -> dict:
    """The image processor's settings from the file of transformers 4 or of 5; {} without either."""
    if (source / "preprocessor_config.json").is_file():
        return read_json(source / "preprocessor_config.json")
    if (source / "processor_config.json").is_file():
        path = source / "processor_config.json"
        return section(read_json(path), "image_processor", path)
    return {}


# Writing and loading the teacher's folder


def convert_teacher(source, output, *, tokenizer=None, dtype=None, overwrite=False, progress=False) -> TeacherConfig:
    """Writes the teacher's folder from a Qwen2.5-VL folder (3B, 7B, 32B or 72B) and returns its architecture.

    Args:
      source: the downloaded folder: config.json, safetensors (one file, or an index with shards), tokenizer.json.
      output: the folder to write; it appears when it is whole.
      tokenizer: the folder of tokenizer.json, when `source` has none.
      dtype: "float32", "float16" or "bfloat16" to store; the source's own (bfloat16) when None.
      overwrite: whether an older folder at `output` is replaced.
      progress: whether to draw a progress bar.

    One array is in memory at a time; the largest is the table of embeddings (1.1 GB for 7B, read and written: twice).
    Raises ValueError, FileNotFoundError, FileExistsError or OSError with what is wrong and what to do; the output is
    then not there.
    """
    source, tokenizer = Path(source), Path(tokenizer or source)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: expected a Qwen2.5-VL folder as it is downloaded")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json: expected a Qwen2.5-VL folder as it is downloaded")
    config = config_from_qwen(read_json(source / "config.json"), preprocessor_settings(source), source / "config.json")
    if not (tokenizer / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{tokenizer} holds no tokenizer.json; download it, or give its folder by --tokenizer")
    check_tokenizer(tokenizer, tokenizer)
    load_backend(tokenizer / "tokenizer.json")  # what it may not be, it is not copied as
    part = open_qwen(source)
    shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_teacher(config), sep="/").items()}
    job = Job(COMPONENT, config, qwen_table(config, part.layout), part, shapes, DTYPES[dtype] if dtype else None)
    check_space(output, job.size)

    with ThreadPoolExecutor(1) as executor, bundle.Writer(output, overwrite=overwrite) as writer:
        hashes = {file: executor.submit(bundle.sha256, file) for file in [source / "config.json", *part.files]}
        with tqdm(total=job.size, unit="B", unit_scale=True, disable=None if progress else True, desc=COMPONENT) as bar:
            writer.add(COMPONENT, config, with_progress(job.leaves(None), bar))
        writer.add_tokenizer(tokenizer)
        writer.provenance = {
            "kind": COMPONENT,
            "components": {COMPONENT: job.provenance},
            "files": [{"name": f.name, "size": f.stat().st_size, "sha256": h.result()} for f, h in hashes.items()],
        }
    return config


def abstract_teacher(config):
    return jax.eval_shape(lambda key: init_teacher(key, config), jax.random.key(0))


def load_teacher(directory, *, mesh=None, dtype=None, verify=True) -> Teacher:
    """The teacher from a folder that `convert_teacher` wrote.

    Args:
      mesh: where the parameters go, split by `sharding.TABLE`; the first device when None.
      dtype: what to cast them to while reading; as stored when None.
      verify: whether its files are compared with the hashes that were recorded when it was written.

    Raises FileNotFoundError or ValueError, in one line, for a folder that is no whole teacher, or is damaged.
    """
    directory = Path(directory).absolute()
    bundle.read_config(directory, verify=verify)  # refuses what is no folder of this format and version
    recorded = bundle_config.read_content(directory, verify)["files"] if verify else {}
    path = directory / "config.json"
    content = section(read_json(path), COMPONENT, path)
    if not content:
        raise ValueError(
            f"{directory} is a bundle without a teacher: convert Qwen2.5-VL with launch/convert.py teacher"
        )
    config = parse_teacher(content, path)
    wanted = flatten_dict(abstract_teacher(config), sep="/")
    stored = bundle.component_metadata(directory, COMPONENT)
    if {path: leaf.shape for path, leaf in wanted.items()} != {
        path: tuple(leaf.shape) for path, leaf in stored.items()
    }:
        raise ValueError(f"{directory}/{COMPONENT} does not hold what its config.json describes: convert it again")
    abstract = unflatten_dict(
        {path: jax.ShapeDtypeStruct(leaf.shape, dtype or stored[path].dtype) for path, leaf in wanted.items()}, sep="/"
    )
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    with bundle.verifying(directory, COMPONENT, recorded):
        try:
            params = ocp.load(
                directory / COMPONENT, sharding.with_shardings(abstract, sharding.tree_shardings(abstract, mesh))
            )
        except Exception as error:
            raise ValueError(
                f"{directory}/{COMPONENT} is damaged, convert it again ({str(error).splitlines()[0]})"
            ) from error
    with bundle.verifying(directory, "tokenizer", recorded):
        backend = load_backend(directory / "tokenizer" / "tokenizer.json")
    return Teacher(config, params, backend)


def parse_teacher(content: dict, name) -> TeacherConfig:
    """The architecture as `convert_teacher` wrote it. Raises ValueError for anything else."""
    values = {}
    for field in dataclasses.fields(TeacherConfig):
        if field.name not in content:
            continue
        value = content[field.name]
        if isinstance(field.default, int) and value is not None:
            value = whole_number(content, field.name, None, name, most=MAX_DEPTH if field.name == "depth" else 2**30)
        elif isinstance(field.default, tuple) and isinstance(value, list) and all(type(item) is int for item in value):
            value = tuple(value)
        elif not isinstance(value, type(field.default)):
            raise ValueError(f"{name}: {field.name} is {shown(value)}, expected a {type(field.default).__name__}")
        values[field.name] = value
    unknown = sorted(content.keys() - values.keys())
    if unknown:
        raise ValueError(f"{name} describes an unknown teacher: it has {', '.join(unknown[:3])[:100]}")
    try:
        return TeacherConfig(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name}: {error}") from None


def tokenize(tokenizer, texts, length=None) -> tuple[np.ndarray, np.ndarray]:
    """Texts as `encode_texts` reads them: (ids int32 [B, L], is_token bool [B, L]), padded at the end.

    L is that of the longest text, or `length`: longer texts are then cut. Nothing is added around a text.
    """
    pad = tokenizer.token_to_id(PAD_TOKEN) or 0
    encoded = [encoding.ids[:length] for encoding in tokenizer.encode_batch(list(texts))]
    longest = max(map(len, encoded), default=0) if length is None else length
    ids = np.full((len(encoded), longest), pad, np.int32)
    is_token = np.arange(longest) < np.array([len(each) for each in encoded])[:, None]
    ids[is_token] = [token for each in encoded for token in each]
    return ids, is_token
