"""The MM-DiT's layouts: diffusers' SD3, Stability's single file, and UniAlignment's (and DualDiffusion's) release.

SD3 lacks some of our parameters. They are filled so that the image velocity is SD3's own for T5's embeddings and a
pooled vector of zeros. The last block's text half passes its input on (its gates are zero). The embedding of the zero
pooled vector is added to the time embedding's bias. The text head is drawn from small random numbers.
"""

import math
import re
from collections.abc import Callable, Collection

import numpy as np
from flax.traverse_util import flatten_dict

from unialign_jax.conversion.rules import (
    DENSE,
    DENSE_FROM_HEADS,
    SWAPPED_DENSE,
    SWAPPED_VECTOR,
    VECTOR,
    Constant,
    Dropped,
    Fill,
    Rule,
    Shapes,
    Table,
    Transform,
    affine,
    count_layers,
    layer_numbers,
    patch_conv,
    shape_of,
)
from unialign_jax.conversion.settings import section, whole_number
from unialign_jax.files import shown
from unialign_jax.models.mmdit import AlignmentHeadsConfig, MMDiTConfig, position_table

SEED = 20250928  # of the text head, and of new alignment heads
POOLED_WIDTH = 2048  # of the pooled CLIP vector in SD3
NULL_IMAGE_TOKENS = 8  # UniAlignment's unused stand-in for an image
MAX_GRID = 4096  # patches on a side of the positional table
HEADS_SETTINGS = "unialign_jax_heads"  # in an exported config.json: settings of heads that differ from RELEASED_HEADS
RELEASED_HEADS = {"final_silu": True, "pool": True}
HEADS_PREFIX = "siglip_adapter_"  # of the alignment heads in the released file
BLOCK = re.compile(r"(?:transformer|joint)_blocks\.(\d{1,6})\.")
DEFAULT_VOCAB_SIZE = MMDiTConfig().vocab_size

# {stream: {part: key}} in each layout; {layer} is the number of the block.
DIFFUSERS_BLOCK = {
    stream: {
        "modulation": f"transformer_blocks.{{layer}}.{norm}.linear",
        "qkv": [f"transformer_blocks.{{layer}}.attn.{name}" for name in qkv],
        "out": f"transformer_blocks.{{layer}}.attn.{out}",
        "mlp_in": f"transformer_blocks.{{layer}}.{mlp}.net.0.proj",
        "mlp_out": f"transformer_blocks.{{layer}}.{mlp}.net.2",
    }
    for stream, norm, qkv, out, mlp in (
        ("image", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
        ("text", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
    )
}
STABILITY_BLOCK = {
    stream: {
        "modulation": f"joint_blocks.{{layer}}.{block}.adaLN_modulation.1",
        "qkv": f"joint_blocks.{{layer}}.{block}.attn.qkv",
        "out": f"joint_blocks.{{layer}}.{block}.attn.proj",
        "mlp_in": f"joint_blocks.{{layer}}.{block}.mlp.fc1",
        "mlp_out": f"joint_blocks.{{layer}}.{block}.mlp.fc2",
    }
    for stream, block in (("image", "x_block"), ("text", "context_block"))
}


def block_rules(names: dict, depth: int, pre_only_modulation: tuple[Transform, Transform] | None = None) -> list[Rule]:
    """The blocks' rules.

    Args:
      names: DIFFUSERS_BLOCK or STABILITY_BLOCK.
      pre_only_modulation: for SD3, whose last text half ends after keys and values and has a modulation of two parts,
        the transforms of its kernel and bias.
    """
    every, full = range(depth), range(depth - 1 if pre_only_modulation else depth)
    rules = []
    for stream, name in names.items():
        target = f"blocks/joint/{stream}"
        layers = full if stream == "text" else every
        rules += affine(name["modulation"], f"{target}/modulation", layers=layers)
        if isinstance(name["qkv"], str):
            rules += affine(name["qkv"], f"{target}/qkv", layers=every)
        else:
            for i, source in enumerate(name["qkv"]):
                rules += affine(source, f"{target}/qkv", layers=every, index=(slice(None), i))
        rules += affine(name["out"], f"{target}/out", DENSE_FROM_HEADS, layers=layers)
        rules += affine(name["mlp_in"], f"{target}/mlp_in", layers=layers)
        rules += affine(name["mlp_out"], f"{target}/mlp_out", layers=layers)
    if pre_only_modulation:
        kernel, bias = pre_only_modulation
        last = range(depth - 1, depth)
        shift_and_scale = (slice(None), slice(0, 2))
        source = names["text"]["modulation"]
        rules += affine(source, "blocks/joint/text/modulation", kernel, bias, layers=last, index=shift_and_scale)
    return rules


def end_rules(names: dict, config: MMDiTConfig, head_modulation: tuple[Transform, Transform]) -> list[Rule]:
    """The rules before and after the blocks. `head_modulation` transforms kernel and bias of the last modulation."""
    kernel, bias = head_modulation
    return [
        *affine(names["patch_embed"], "patch_embed", patch_conv(config.patch_size)),
        *affine(names["text_embed"], "text_embed"),
        *affine(names["time_hidden"], "time_embed/hidden"),
        *affine(names["image_head_modulation"], "image_head_modulation", kernel, bias),
        *affine(names["image_head"], "image_head"),
    ]


DIFFUSERS_ENDS = {
    "patch_embed": "pos_embed.proj",
    "text_embed": "context_embedder",
    "time_hidden": "time_text_embed.timestep_embedder.linear_1",
    "time_out": "time_text_embed.timestep_embedder.linear_2",
    "pooled_hidden": "time_text_embed.text_embedder.linear_1",
    "pooled_out": "time_text_embed.text_embedder.linear_2",
    "image_head_modulation": "norm_out.linear",
    "image_head": "proj_out",
    "positions": "pos_embed.pos_embed",
}
UNIALIGN_ENDS = DIFFUSERS_ENDS | {"image_head_modulation": "image_norm_out.linear", "image_head": "image_proj_out"}
STABILITY_ENDS = {
    "patch_embed": "x_embedder.proj",
    "text_embed": "context_embedder",
    "time_hidden": "t_embedder.mlp.0",
    "time_out": "t_embedder.mlp.2",
    "pooled_hidden": "y_embedder.mlp.0",
    "pooled_out": "y_embedder.mlp.2",
    "image_head_modulation": "final_layer.adaLN_modulation.1",
    "image_head": "final_layer.linear",
    "positions": "pos_embed",
}


def sd3_table(layout: str, config: MMDiTConfig) -> Table:
    """SD3's transformer in the layout "diffusers" or "stability"."""
    if layout == "diffusers":
        ends, blocks, two_parts = DIFFUSERS_ENDS, DIFFUSERS_BLOCK, (SWAPPED_DENSE, SWAPPED_VECTOR)
    else:
        ends, blocks, two_parts = STABILITY_ENDS, STABILITY_BLOCK, (DENSE, VECTOR)
    if config.depth < 2:
        raise ValueError(f"an SD3 transformer has at least 2 blocks, found {config.depth}")
    width = config.width
    time_out, pooled_hidden, pooled_out = ends["time_out"], ends["pooled_hidden"], ends["pooled_out"]
    rules = [
        *end_rules(ends, config, two_parts),
        Rule(f"{time_out}.weight", "time_embed/out/kernel", DENSE),
        *block_rules(blocks, config.depth, pre_only_modulation=two_parts),
    ]
    zero_weights = {
        f"{pooled_hidden}.weight": (width, POOLED_WIDTH),
        f"{pooled_hidden}.bias": (width,),
        f"{pooled_out}.weight": (width, width),
        f"{pooled_out}.bias": (width,),
    }
    return Table(
        layout=f"sd3-{layout}",
        rules=rules,
        fills=[
            fold_pooled(f"{time_out}.bias", pooled_hidden, pooled_out),
            *last_text_half(blocks["text"], config),
            *text_head(),
        ],
        dropped=[
            Dropped(f"{pooled_hidden}.weight", "reads the pooled CLIP vector, which is zero here"),
            position_buffer(ends["positions"], config),
        ],
        constants=[
            position_constant(ends["positions"], config),
            # The time embedding's bias includes the pooled embedding, so SD3's layers for it must add nothing.
            *(zero_constant(key, shape) for key, shape in zero_weights.items()),
        ],
        float32=frozenset({"time_embed/out/bias"}),
    )


def sd3_export_table(layout: str, config: MMDiTConfig) -> Table:
    """`sd3_table` with a rule for the time embedding's bias, which an import computes instead."""
    table = sd3_table(layout, config)
    ends = DIFFUSERS_ENDS if layout == "diffusers" else STABILITY_ENDS
    return table._replace(rules=[*table.rules, Rule(f"{ends['time_out']}.bias", "time_embed/out/bias", VECTOR)])


def unialign_table(config: MMDiTConfig) -> Table:
    """The released transformer, without the alignment heads in the same file: see `heads_table`."""
    ends = UNIALIGN_ENDS
    return Table(
        layout="unialign",
        rules=[
            *end_rules(ends, config, (SWAPPED_DENSE, SWAPPED_VECTOR)),
            *affine(ends["time_out"], "time_embed/out"),
            *affine("text_proj_out", "text_head"),
            *block_rules(DIFFUSERS_BLOCK, config.depth),
        ],
        dropped=[
            position_buffer(ends["positions"], config),
            Dropped("null_image_embd", "never used by the released code's training or sampling"),
        ],
        constants=[
            position_constant(ends["positions"], config),
            zero_constant("null_image_embd", (1, NULL_IMAGE_TOKENS, config.width)),
        ],
    )


def heads_table() -> Table:
    """The alignment heads in the released transformer's file."""
    rules = []
    for ours, theirs in (("image", "siglip_adapter_img"), ("text", "siglip_adapter_text")):
        rules += affine(f"{theirs}.fc.0", f"{ours}_hidden") + affine(f"{theirs}.fc.2", f"{ours}_out")
    return Table("unialign-heads", rules)


def fold_pooled(time_bias: str, pooled_hidden: str, pooled_out: str) -> Fill:
    """The time embedding's bias plus the embedding of a zero pooled vector, which SD3 adds to the time embedding."""
    keys = (time_bias, f"{pooled_hidden}.bias", f"{pooled_out}.weight", f"{pooled_out}.bias")

    def make(read, _shape):
        bias, hidden, weight, out = (read(key).astype(np.float64) for key in keys)
        return (bias + weight @ (hidden / (1 + np.exp(-hidden))) + out).astype(np.float32)

    return Fill("time_embed/out/bias", (), make, "the pooled embedding of a zero vector, added", keys)


def last_text_half(names: dict, config: MMDiTConfig) -> list[Fill]:
    """The last block's text half after keys and values, which SD3 lacks: gates of zero, weights of the block before."""
    last, gates_and_mlp = config.depth - 1, slice(2, 6)

    def zeros(_read, shape):
        return np.zeros(shape, np.float32)

    def copy(name, transform, kind):
        key = names[name].replace("{layer}", str(last - 1)) + f".{kind}"
        return lambda read, shape: transform.forward(read(key), shape).astype(np.float32)

    about = f"block {last - 1}'s (silent until the gates move)"
    target = "blocks/joint/text"
    fills = [
        Fill(f"{target}/modulation/kernel", (last, slice(None), gates_and_mlp), zeros, "zero: the text passes through"),
        Fill(f"{target}/modulation/bias", (last, gates_and_mlp), zeros, "zero: the text passes through"),
    ]
    for name, transform in (("out", DENSE_FROM_HEADS), ("mlp_in", DENSE), ("mlp_out", DENSE)):
        fills.append(Fill(f"{target}/{name}/kernel", (last,), copy(name, transform, "weight"), about))
        fills.append(Fill(f"{target}/{name}/bias", (last,), copy(name, VECTOR, "bias"), about))
    return fills


def text_head() -> list[Fill]:
    """The text head, which SD3 lacks."""

    def normal(_read, shape):
        return np.random.default_rng(SEED).standard_normal(shape, np.float32) * np.float32(0.02)

    return [
        Fill("text_head/kernel", (), normal, f"normal, deviation 0.02, seed {SEED}"),
        Fill("text_head/bias", (), lambda _read, shape: np.zeros(shape, np.float32), "zero"),
    ]


def new_heads_table(abstract: dict) -> Table:
    """New alignment heads (Xavier, biases zero), for a source without. `abstract` is the tree of their parameters."""
    fills = []
    for i, path in enumerate(flatten_dict(abstract, sep="/")):

        def make(_read, shape, i=i):
            if len(shape) == 1:
                return np.zeros(shape, np.float32)
            limit = math.sqrt(6 / sum(shape))
            return np.random.default_rng((SEED, i)).uniform(-limit, limit, shape).astype(np.float32)

        fills.append(Fill(path, (), make, f"Xavier uniform, seed {SEED}" if path.endswith("kernel") else "zero"))
    return Table("new-heads", [], fills)


def positions(config: MMDiTConfig) -> np.ndarray:
    """The positional table [1, max_patches^2, D] of the PyTorch layouts."""
    side = config.max_patches
    return position_table(side, side, config.width, side, config.base_patches)[None]


def position_constant(key: str, config: MMDiTConfig) -> Constant:
    return Constant(key, (1, config.max_patches**2, config.width), lambda: positions(config))


def zero_constant(key: str, shape: tuple[int, ...]) -> Constant:
    return Constant(key, shape, lambda: np.zeros(shape, np.float32))


def position_buffer(key: str, config: MMDiTConfig) -> Dropped:
    """The positional table, dropped if it equals the one that we compute, up to fp16 rounding."""

    def check(read):
        try:
            found = read(key)
        except KeyError:
            return
        expected = positions(config)
        if found.shape != expected.shape:
            raise ValueError(f"{key} has shape {found.shape}, expected {expected.shape}")
        error = max(float(np.abs(a.astype(np.float32) - b).max()) for a, b in zip(found[0], expected[0], strict=True))
        if not error < 5e-3:
            raise ValueError(
                f"{key} differs from SD3's positional table by {error:.3g}: the file has other positions "
                f"(a grid of {config.max_patches} with {config.base_patches} patches to the base was expected)"
            )

    return Dropped(key, "a buffer, computed from its formula", check)


def detect_layout(keys: Collection[str]) -> str | None:
    """ "diffusers", "stability" or "unialign", by the transformer's keys without a prefix; None for something else."""
    if "transformer_blocks.0.attn.add_q_proj.weight" in keys and "context_embedder.weight" in keys:
        return "unialign" if "image_proj_out.weight" in keys else "diffusers"
    if "joint_blocks.0.context_block.attn.qkv.weight" in keys:
        return "stability"
    return None


def refuse_sd35(shapes: Shapes, name: str) -> None:
    """Raises ValueError, with the differences, for a transformer of the SD3.5 family."""
    normed = any(".attn.norm_q." in key or ".attn.ln_q." in key for key in shapes)
    dual = sorted(layer_numbers(BLOCK, [key for key in shapes if ".attn2." in key]))
    if not (normed or dual):
        return
    width = (shapes.get("context_embedder.bias") or (0,))[0]
    depth = count_layers(BLOCK, shapes, name)
    family = {1536: "SD3.5-medium", 2432: "SD3.5-large"}.get(width, "of the SD3.5 family")
    differences = (["normed queries and keys (qk-norm)"] if normed else []) + (
        [f"a second image attention in blocks {dual[0]} to {dual[-1]} (dual attention)"] if dual else []
    )
    raise ValueError(
        f"{name} is {family}: {depth} blocks of width {width} with {' and '.join(differences)}, which SD3 and "
        "UniAlignment do not have. Use stable-diffusion-3-medium (24 blocks of width 1536)"
    )


def infer_config(
    layout: str,
    shapes: Shapes,
    read: Callable[[str], np.ndarray],
    settings: dict,
    name: str,
    vocab_size: int | None = None,
) -> MMDiTConfig:
    """The architecture from the tensors' shapes, and from config.json what shapes do not tell.

    Args:
      layout: "diffusers", "stability" or "unialign".
      settings: the source's config.json, or {}.
      vocab_size: for SD3, which has no text head.

    Raises ValueError for another architecture, and when shapes and config.json disagree.
    """
    refuse_sd35(shapes, name)
    ends = {"diffusers": DIFFUSERS_ENDS, "stability": STABILITY_ENDS, "unialign": UNIALIGN_ENDS}[layout]
    mlp_in = (STABILITY_BLOCK if layout == "stability" else DIFFUSERS_BLOCK)["image"]["mlp_in"].replace("{layer}", "0")
    width, channels, patch, _ = shape_of(shapes, f"{ends['patch_embed']}.weight", 4, name)
    _, text_width = shape_of(shapes, f"{ends['text_embed']}.weight", 2, name)
    mlp, _ = shape_of(shapes, f"{mlp_in}.weight", 2, name)
    if layout == "unialign":
        vocab_size, _ = shape_of(shapes, "text_proj_out.weight", 2, name)
    head_width = whole_number(settings, "attention_head_dim", 64, name)
    if width % head_width or head_width % 2:
        raise ValueError(f"{name} has width {width}, which heads of width {head_width} do not divide")
    if mlp % width:
        raise ValueError(f"{name} has an MLP of width {mlp}, expected a multiple of the model's width {width}")
    depth = count_layers(BLOCK, shapes, name)
    max_patches, base_patches = grid(ends["positions"], shapes, read, settings, patch, name)
    config = MMDiTConfig(
        depth=depth,
        num_heads=width // head_width,
        head_width=head_width,
        mlp_ratio=mlp // width,
        latent_channels=channels,
        patch_size=patch,
        text_width=text_width,
        vocab_size=vocab_size or DEFAULT_VOCAB_SIZE,
        tap_depth=min(MMDiTConfig().tap_depth, depth),
        max_patches=max_patches,
        base_patches=base_patches,
    )
    for key, found in (
        ("num_layers", depth),
        ("num_attention_heads", config.num_heads),
        ("in_channels", channels),
        ("patch_size", patch),
        ("joint_attention_dim", text_width),
    ):
        said = whole_number(settings, key, found, name)
        if said != found:
            raise ValueError(f"{name}: config.json says {key} {said}, the tensors say {found}")
    return config


def grid(
    key: str, shapes: Shapes, read: Callable[[str], np.ndarray], settings: dict, patch: int, name: str
) -> tuple[int, int]:
    """max_patches and base_patches, from config.json or else from the positional table at `key`."""
    default = MMDiTConfig()
    max_patches = whole_number(settings, "pos_embed_max_size", default.max_patches, name, most=MAX_GRID)
    if key in shapes:
        count = shape_of(shapes, key, 3, name)[1]
        max_patches = math.isqrt(count)
        if max_patches**2 != count or not 2 <= max_patches <= MAX_GRID:
            raise ValueError(f"{name}: {key} has {count} positions, expected a square of 2 to {MAX_GRID} on a side")
    sample_size = whole_number(settings, "sample_size", None, name)
    if sample_size is not None:
        if sample_size < patch:
            raise ValueError(f"{name}: sample_size is {sample_size}, expected at least one patch, {patch}")
        return max_patches, sample_size // patch
    if key not in shapes:
        return max_patches, max(1, max_patches * default.base_patches // default.max_patches)
    # The first value of the second position is sin(base_patches / max_patches).
    sine = float(read(key)[0, 1, 0])
    base_patches = round(max_patches * math.asin(sine)) if abs(sine) <= 1 else 0
    if base_patches < 1:
        raise ValueError(f"{name}: {key} is not SD3's positional table (its second position begins with {sine:.3g})")
    return max_patches, base_patches


def infer_heads_config(shapes: Shapes, settings: dict, name: str) -> AlignmentHeadsConfig:
    """The configuration of the released heads, or of exported ones, whose config.json tells where they differ."""
    hidden, _ = shape_of(shapes, "siglip_adapter_img.fc.0.weight", 2, name)
    teacher, _ = shape_of(shapes, "siglip_adapter_img.fc.2.weight", 2, name)
    own = section(settings, HEADS_SETTINGS, name)
    for key, value in own.items():
        if key not in ("final_silu", "pool") or not isinstance(value, bool):
            raise ValueError(f"{name}: {HEADS_SETTINGS} has {key[:40]} {shown(value)}, expected final_silu or pool")
    return AlignmentHeadsConfig(hidden_width=hidden, teacher_width=teacher, **RELEASED_HEADS | own)
