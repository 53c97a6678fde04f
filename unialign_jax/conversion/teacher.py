"""From a Qwen2.5-VL checkpoint to the bundle of the teacher.

Only the vision tower and the table of input embeddings are read, and only the shards with these need to be there.
"""

from collections.abc import Collection
from pathlib import Path

from unialign_jax import bundle
from unialign_jax.conversion import sources
from unialign_jax.conversion.importing import DTYPES, Job, write
from unialign_jax.conversion.rules import DENSE_FROM_HEADS, SAME, Rule, Table, Transform, affine
from unialign_jax.conversion.settings import number, section, whole_number
from unialign_jax.conversion.sources import Part, check_tokenizer
from unialign_jax.data.tokenizer import load_backend
from unialign_jax.files import read_json, shown
from unialign_jax.models.teacher import PIXEL_MEAN, PIXEL_STD, ROTARY_BASE, TeacherConfig

COMPONENT = "teacher"

# {the writer of the file: (prefix of the tower, key of the table)}
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


def config_from_qwen(content: dict, preprocessor: dict, name: str | Path) -> TeacherConfig:
    """The architecture, from the contents of config.json and of preprocessor_config.json (or {}).

    Absent settings have Qwen's published values. Raises ValueError for another model, or settings that we do not have.
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


def patch_conv(config: TeacherConfig) -> Transform:
    """A convolution over frames and pixels [D, 3, t, p, p] as a dense layer over patches flattened as (3, t, p, p)."""
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


def find_layout(keys: Collection[str], name: str | Path) -> str:
    """The one of LAYOUTS that has these keys. Raises ValueError when none has."""
    for layout, (tower, embedding) in LAYOUTS.items():
        if f"{tower}patch_embed.proj.weight" in keys and embedding in keys:
            return layout
    example = ", ".join(sorted(keys)[:3])[:200]
    raise ValueError(
        f"{name} holds no Qwen2.5-VL: expected visual.patch_embed.proj.weight and model.embed_tokens.weight (or both "
        f"as transformers 5 names them), found {len(keys)} tensors: {example} ..."
    )


def is_needed(key: str) -> bool:
    """Whether a key of a Qwen2.5-VL checkpoint belongs to the vision tower or the table of input embeddings."""
    return any(key.startswith(tower) or key == embedding for tower, embedding in LAYOUTS.values())


def open_qwen(source: Path) -> Part:
    """The tower and the table in a folder of safetensors. Raises ValueError as `sources.read_tensors` does."""
    tensors = sources.read_tensors(source, is_needed)
    layout = find_layout(tensors, source)
    tensors = {key: info for key, info in tensors.items() if is_needed(key)}
    sources.check_floats(tensors, source)
    return Part(COMPONENT, layout, tensors, {}, str(source))


def preprocessor_settings(source: Path) -> dict:
    """The image processor's settings, from the file of transformers 4 or 5; {} when there is neither."""
    if (source / "preprocessor_config.json").is_file():
        return read_json(source / "preprocessor_config.json")
    if (source / "processor_config.json").is_file():
        path = source / "processor_config.json"
        return section(read_json(path), "image_processor", path)
    return {}


def convert_teacher(
    source: str | Path,
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> TeacherConfig:
    """Converts a Qwen2.5-VL folder (3B, 7B, 32B or 72B) to a bundle, and returns the teacher's architecture.

    One array is in memory at a time, as read and as written; the largest is the table (1.1 GB for 7B).

    Args:
      source: the downloaded folder: config.json, safetensors (one file, or an index with shards), tokenizer.json.
      tokenizer: the folder of tokenizer.json, when `source` has none.
      dtype: "float32", "float16" or "bfloat16" to store; the source's own (bfloat16) when None.

    Raises ValueError or OSError when the conversion is impossible or fails; `output` is then as it was before.
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
    load_backend(tokenizer)  # raises when it is no tokenizer, before it is copied
    part = open_qwen(source)
    abstract = bundle.abstract_params(bundle.BundleConfig(teacher=config))[COMPONENT]
    job = Job(COMPONENT, config, qwen_table(config, part.layout), part, abstract, DTYPES[dtype] if dtype else None)
    files = [source / "config.json", *part.files]
    write(output, [job], files, {"kind": COMPONENT}, tokenizer=tokenizer, overwrite=overwrite, progress=progress)
    return config
