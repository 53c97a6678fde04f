"""The VAE's layouts: diffusers' AutoencoderKL, and the older names in Stability's single files."""

import dataclasses
from collections.abc import Collection

from unialign_jax.conversion.rules import CONV, DENSE, POINTWISE, VECTOR, Rule, Shapes, Table, affine, shape_of
from unialign_jax.conversion.settings import number, whole_number
from unialign_jax.models.autoencoder import AutoencoderConfig

MAX_LEVELS = 8  # each halves the image
ATTENTION = {  # ours: (diffusers', the older)
    "query": ("to_q", "q"),
    "key": ("to_k", "k"),
    "value": ("to_v", "v"),
    "out": ("to_out.0", "proj_out"),
}


def autoencoder_table(layout: str, config: AutoencoderConfig) -> Table:
    """The AutoencoderKL's table in the layout "diffusers" or "ldm"."""
    levels = len(config.block_widths)
    rules = []
    for half, direction, sampler, blocks in (
        ("encoder", "down", "downsample", config.blocks_per_level),
        ("decoder", "up", "upsample", config.blocks_per_level + 1),
    ):
        widths = [config.block_widths[0], *config.block_widths]
        if direction == "up":
            widths = [config.block_widths[-1], *reversed(config.block_widths)]
        conv_out = "norm_out" if layout == "ldm" else "conv_norm_out"
        middle = f"{half}.mid" if layout == "ldm" else f"{half}.mid_block"
        rules += affine(f"{half}.conv_in", f"{half}/conv_in", CONV)
        rules += norm(f"{half}.{conv_out}", f"{half}/norm_out")
        rules += affine(f"{half}.conv_out", f"{half}/conv_out", CONV)
        for i in range(2):
            source = f"{middle}.block_{i + 1}" if layout == "ldm" else f"{middle}.resnets.{i}"
            rules += residual_block(layout, source, f"{half}/middle_block_{i}", widens=False)
        rules += attention(layout, middle, f"{half}/middle_attention")
        for level in range(levels):
            if layout == "ldm":  # counts the decoder's levels from the finest
                number = level if direction == "down" else levels - 1 - level
                source, block, resample = f"{half}.{direction}.{number}", "block", f"{sampler}.conv"
            else:
                source, block, resample = f"{half}.{direction}_blocks.{level}", "resnets", f"{sampler}rs.0.conv"
            for i in range(blocks):
                widens = i == 0 and widths[level] != widths[level + 1]
                target = f"{half}/{direction}_{level}_block_{i}"
                rules += residual_block(layout, f"{source}.{block}.{i}", target, widens)
            if level < levels - 1:
                rules += affine(f"{source}.{resample}", f"{half}/{direction}_{level}_{sampler}", CONV)
    return Table(f"vae-{layout}", rules)


def norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}/scale", VECTOR), Rule(f"{source}.bias", f"{target}/bias", VECTOR)]


def residual_block(layout: str, source: str, target: str, widens: bool) -> list[Rule]:
    rules = []
    for i in range(2):
        rules += norm(f"{source}.norm{i + 1}", f"{target}/norm_{i}")
        rules += affine(f"{source}.conv{i + 1}", f"{target}/conv_{i}", CONV)
    if widens:
        shortcut = "nin_shortcut" if layout == "ldm" else "conv_shortcut"
        rules += affine(f"{source}.{shortcut}", f"{target}/shortcut", CONV)
    return rules


def attention(layout: str, middle: str, target: str) -> list[Rule]:
    source = f"{middle}.attn_1" if layout == "ldm" else f"{middle}.attentions.0"
    rules = norm(f"{source}.norm" if layout == "ldm" else f"{source}.group_norm", f"{target}/norm")
    for ours, (diffusers, older) in ATTENTION.items():
        name, transform = (older, POINTWISE) if layout == "ldm" else (diffusers, DENSE)
        rules += affine(f"{source}.{name}", f"{target}/{ours}", transform)
    return rules


def detect_layout(keys: Collection[str]) -> str | None:
    """ "diffusers" or "ldm", by the VAE's keys; None when it is neither."""
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in keys:
        return "diffusers"
    if "encoder.down.0.block.0.conv1.weight" in keys:
        return "ldm"
    return None


def infer_config(layout: str, shapes: Shapes, settings: dict, name: str) -> AutoencoderConfig:
    """The architecture from the tensors' shapes, and latent statistics and norm groups from config.json or else SD3's.

    Raises ValueError for another VAE than SD3's; `name` is for messages.
    """
    if any(key.startswith(("quant_conv.", "post_quant_conv.")) for key in shapes):
        raise ValueError(f"{name} has quantisation convolutions, so it is not SD3's VAE but an older one")
    block = "encoder.down.{}.block.{}" if layout == "ldm" else "encoder.down_blocks.{}.resnets.{}"
    pattern = f"{block}.conv1.weight"
    widths, blocks = [], 0
    while (key := pattern.format(len(widths), 0)) in shapes:
        widths.append(shape_of(shapes, key, 4, name)[0])
    while pattern.format(0, blocks) in shapes:
        blocks += 1
    channels = shape_of(shapes, "decoder.conv_in.weight", 4, name)[1]
    if len(widths) > MAX_LEVELS:
        raise ValueError(f"{name} has {len(widths)} levels, expected at most {MAX_LEVELS}")
    default = AutoencoderConfig()
    if not settings and (channels, tuple(widths)) != (default.latent_channels, default.block_widths):
        raise ValueError(
            f"{name} has {channels} latent channels and widths {widths}, so it is not SD3's VAE "
            f"({default.latent_channels} and {list(default.block_widths)}), and no config.json gives its scale"
        )
    norm_groups = whole_number(settings, "norm_num_groups", default.norm_groups, name)
    if any(width % norm_groups for width in widths):
        raise ValueError(f"{name}: norm_num_groups is {norm_groups}, which does not divide the widths {widths}")
    scale = number(settings, "scaling_factor", default.scale, name)
    if scale <= 0:
        raise ValueError(f"{name}: scaling_factor is {scale}, expected a positive number")
    return dataclasses.replace(
        default,
        latent_channels=channels,
        downsample_factor=2 ** (len(widths) - 1),
        scale=scale,
        shift=number(settings, "shift_factor", default.shift, name),
        block_widths=tuple(widths),
        blocks_per_level=blocks,
        norm_groups=norm_groups,
    )
