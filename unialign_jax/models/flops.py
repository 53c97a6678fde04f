"""The floating-point operations of one sample, in closed form, and a device's peak.

These are the model's FLOPs, the numerator of MFU, the same on every machine: matmuls, convolutions and attention. A
multiply-add counts 2; norms, activations and recomputation count 0. (XLA's own cost analysis counts the body of a scan
once, recomputation and elementwise operations, and nothing inside a Pallas or cuDNN kernel.)

All functions return the FLOPs of ONE sample.
"""

import math

from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.mmdit import AlignmentHeadsConfig, MMDiTConfig
from unialign_jax.models.text_encoder import TextEncoderConfig
from unialign_jax.parallel.hardware import find_chip

TIME_FEATURES = 256  # inputs of the MM-DiT's time embedding


def peak_flops(device_kind: str) -> float | None:
    """The bf16 peak in FLOP/s of a `jax.Device.device_kind`; None when unknown, as for a CPU."""
    chip = find_chip(device_kind)
    return chip and chip.peak


def linear(tokens: float, width_in: int, width_out: float) -> float:
    return 2.0 * tokens * width_in * width_out


def attention(tokens: float, width: int) -> float:
    """Scores and weighted sum of full attention; `width` is that of all heads together."""
    return 2 * linear(tokens, width, tokens)


def mmdit_forward(
    config: MMDiTConfig,
    *,
    latent_size: tuple[int, int],
    text_length: int,
    num_conditions: int = 0,
    velocity_head: bool = True,
    text_head: bool = False,
) -> float:
    """One forward pass of the MM-DiT. The image pass uses the velocity head, the text pass the text head.

    Args:
      latent_size: (height, width) of the latents, before patching.
      num_conditions: K condition images of the same size, whose tokens join the image sequence.
    """
    width, mlp_width = config.width, config.mlp_ratio * config.width
    patch_width = config.patch_size**2 * config.latent_channels
    target_tokens = latent_size[0] * latent_size[1] / config.patch_size**2
    image_tokens = (1 + num_conditions) * target_tokens
    tokens = image_tokens + text_length

    per_token = 4 * linear(1, width, width) + 2 * linear(1, width, mlp_width)  # q, k, v, out; MLP in and out
    modulation = 2 * linear(1, width, 6 * width)  # once per sample and stream
    blocks = config.depth * (tokens * per_token + attention(tokens, width) + modulation)

    embeddings = (
        linear(image_tokens, patch_width, width)
        + linear(text_length, config.text_width, width)
        + linear(1, TIME_FEATURES, width)
        + linear(1, width, width)
    )
    heads = 0.0
    if velocity_head:
        heads += linear(target_tokens, width, patch_width) + linear(1, width, 2 * width)
    if text_head:
        heads += linear(text_length, width, config.vocab_size)
    return blocks + embeddings + heads


def text_encoder_forward(config: TextEncoderConfig, *, text_length: int) -> float:
    """One pass of the T5 encoder: attention of its own width, and the gated MLP's three matrices."""
    attention_width = config.num_heads * config.head_width
    per_token = 4 * linear(1, config.width, attention_width) + 3 * linear(1, config.width, config.mlp_width)
    return config.depth * (text_length * per_token + attention(text_length, attention_width))


def autoencoder_encode(config: AutoencoderConfig, *, image_size: float) -> float:
    """Encoding one square image with SD3's KL autoencoder; nothing for the space-to-depth stand-in."""
    if config.kind == "space_to_depth":
        return 0.0
    side, width = image_size, config.block_widths[0]
    total = conv(side, 3, width)
    for level, width_out in enumerate(config.block_widths):
        for _ in range(config.blocks_per_level):
            total += resnet(side, width, width_out)
            width = width_out
        if level < len(config.block_widths) - 1:
            side /= 2
            total += conv(side, width, width_out)  # strided
            width = width_out
    return total + autoencoder_middle(side, width, width_out) + conv(side, width_out, 2 * config.latent_channels)


def autoencoder_decode(config: AutoencoderConfig, *, image_size: int) -> float:
    """Decoding one square image with SD3's KL autoencoder; nothing for the space-to-depth stand-in."""
    if config.kind == "space_to_depth":
        return 0.0
    side, width = image_size // config.downsample_factor, config.block_widths[-1]
    total = conv(side, config.latent_channels, width) + autoencoder_middle(side, width, width)
    for level, width_out in enumerate(reversed(config.block_widths)):
        if level > 0:
            side *= 2
            total += conv(side, width, width)  # after the pixels are repeated
        total += resnet(side, width, width_out) + config.blocks_per_level * resnet(side, width_out, width_out)
        width = width_out
    return total + conv(side, width, 3)


def autoencoder_middle(side: int, width_in: int, width: int) -> float:
    """Two residual blocks around an attention over all positions, at the coarsest level."""
    blocks = resnet(side, width_in, width) + resnet(side, width, width)
    return blocks + 4 * linear(side**2, width, width) + attention(side**2, width)


def resnet(side: int, width_in: int, width_out: int) -> float:
    shortcut = conv(side, width_in, width_out, kernel=1) if width_in != width_out else 0.0
    return conv(side, width_in, width_out) + conv(side, width_out, width_out) + shortcut


def conv(side: int, width_in: int, width_out: int, kernel: int = 3) -> float:
    return linear(side**2, kernel**2 * width_in, width_out)


def alignment_heads_forward(
    config: AlignmentHeadsConfig, *, width: int, image_tokens: float = 1, text_tokens: int = 1
) -> float:
    """Both projections onto the teacher's features. Pooling heads, the default, project one token per stream."""
    per_token = linear(1, width, config.hidden_width) + linear(1, config.hidden_width, config.teacher_width)
    return (image_tokens + text_tokens) * per_token


def training_sample_flops(
    mmdit: MMDiTConfig,
    text_encoder: TextEncoderConfig,
    autoencoder: AutoencoderConfig,
    heads: AlignmentHeadsConfig | None = None,
    *,
    image_size: int | tuple[int, int],
    text_length: int,
    num_conditions: int = 0,
    image_pass: bool = True,
    text_pass: bool = True,
    cached_latents: bool = False,
    teacher_cells: int = 1,
) -> float:
    """One training sample of a stream.

    The backward pass counts twice the forward pass of the trained networks, and nothing for the frozen encoders:
    3 x (image pass + text pass + heads) + T5 over the prompt and over the masked text + the VAE's encoder over the
    target, once for both passes, and over each condition.

    Args:
      heads: AlignmentHeadsConfig, or None when the intrinsic loss is off.
      image_size: (height, width) of the images in pixels, or the side of square ones.
      num_conditions: condition images of the stream's image pass.
      image_pass, text_pass: whether the stream runs it (vqa runs only the text pass).
      teacher_cells: the means of image tokens that pooling heads project.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = height // autoencoder.downsample_factor, width // autoencoder.downsample_factor
    images = 0 if cached_latents else int(image_pass or text_pass) + num_conditions * image_pass
    forward, encoders = 0.0, images * autoencoder_encode(autoencoder, image_size=math.sqrt(height * width))
    if image_pass:
        forward += mmdit_forward(mmdit, latent_size=size, text_length=text_length, num_conditions=num_conditions)
        encoders += text_encoder_forward(text_encoder, text_length=text_length)
    if text_pass:
        forward += mmdit_forward(mmdit, latent_size=size, text_length=text_length, velocity_head=False, text_head=True)
        encoders += text_encoder_forward(text_encoder, text_length=text_length)
    if heads is not None:
        tokens = (teacher_cells, 1) if heads.pool else (size[0] * size[1] / mmdit.patch_size**2, text_length)
        forward += alignment_heads_forward(heads, width=mmdit.width, image_tokens=tokens[0], text_tokens=tokens[1])
    return 3 * forward + encoders
