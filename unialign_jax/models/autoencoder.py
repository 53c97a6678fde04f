"""Images to latents and back: SD3's AutoencoderKL, and a stand-in without parameters for tiny runs.

Source: the autoencoder of Stable Diffusion 3 (arXiv 2403.03206): 8x downsampling, 16 channels, no quantisation
convolutions. The raw latents z are normalised as (z - shift) * scale before the MM-DiT sees them.

Shape letters: B batch, H W image height and width, h w latent height and width, C latent channels.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unialign_jax.models.attention import attention
from unialign_jax.parallel.activations import ROW_AXES


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture and latent statistics; the defaults are SD3's.

    `kind` is "kl" or "space_to_depth"; the latter has latent_channels = 3 * downsample_factor^2 and ignores the widths.
    `blocks_per_level` is the encoder's; the decoder has one more. With 0 blocks the encoder's strided convolutions
    change the width. `dtype` is that of the convolutions; group norms are float32.
    """

    kind: str = "kl"
    latent_channels: int = 16
    downsample_factor: int = 8
    scale: float = 1.5305
    shift: float = 0.0609
    block_widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    norm_groups: int = 32
    dtype: str = "bfloat16"


class Moments(NamedTuple):
    """The encoder's Gaussian over raw latents, both float32 [B, h, w, C]."""

    mean: jax.Array
    log_variance: jax.Array


def make_autoencoder(config: AutoencoderConfig) -> "SpaceToDepth | AutoencoderKL":
    """The Linen module of `config.kind`. Both have the methods

      encode(images [B, H, W, 3] in [-1, 1]) -> Moments of the raw latents [B, h, w, C]
      decode(latents [B, h, w, C], raw) -> images [B, H, W, 3] float32, near [-1, 1] but not clipped

    called as `module.apply({"params": params}, images, method="encode")`. `module.init(key, images)` makes the
    parameters of both methods; those of "space_to_depth" are {}.

    Raises ValueError for an unknown kind and contradicting numbers; so do the methods for sizes that do not fit.
    """
    factor, channels = config.downsample_factor, config.latent_channels
    if config.kind == "space_to_depth":
        if channels != 3 * factor**2:
            raise ValueError(
                f"latent_channels is {channels}, expected 3 * downsample_factor^2 = {3 * factor**2} for space_to_depth"
            )
        return SpaceToDepth(config)
    if config.kind == "kl":
        if factor != 2 ** (len(config.block_widths) - 1):
            raise ValueError(
                f"downsample_factor is {factor}, but {len(config.block_widths)} block_widths give "
                f"{2 ** (len(config.block_widths) - 1)}"
            )
        return AutoencoderKL(config)
    raise ValueError(f"unknown autoencoder kind {config.kind!r}, expected 'kl' or 'space_to_depth'")


def normalize(latents: jax.Array, config: AutoencoderConfig) -> jax.Array:
    """Raw latents z -> the MM-DiT's normalised ones, (z - shift) * scale, float32."""
    return (latents.astype(jnp.float32) - config.shift) * config.scale


def denormalize(latents: jax.Array, config: AutoencoderConfig) -> jax.Array:
    """The inverse of `normalize`."""
    return latents.astype(jnp.float32) / config.scale + config.shift


def from_pixels(images: jax.Array) -> jax.Array:
    """Pixels 0 to 255 of any shape and type -> float32 in [-1, 1], which `encode` takes."""
    return jnp.float32(images) / 127.5 - 1


def to_pixels(images: jax.Array) -> jax.Array:
    """Floats near [-1, 1], which `decode` gives -> uint8, clipped and rounded to the nearest."""
    return jnp.clip((images + 1) * 127.5 + 0.5, 0, 255).astype(jnp.uint8)


def sample_latents(moments: Moments, key: jax.Array | None, config: AutoencoderConfig) -> jax.Array:
    """Normalised latents float32 [B, h, w, C]: a draw from the posterior, or its mean when `key` is None."""
    latents = moments.mean
    if key is not None:
        deviation = jnp.exp(0.5 * moments.log_variance)
        latents = latents + deviation * jax.random.normal(key, latents.shape, jnp.float32)
    return normalize(latents, config)


def check_images(images: jax.Array, config: AutoencoderConfig) -> None:
    factor = config.downsample_factor
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] % factor or images.shape[2] % factor:
        raise ValueError(
            f"images have shape {images.shape}, expected [batch, height, width, 3] with multiples of {factor}"
        )


def check_latents(latents: jax.Array, config: AutoencoderConfig) -> None:
    if latents.ndim != 4 or latents.shape[3] != config.latent_channels:
        raise ValueError(
            f"latents have shape {latents.shape}, expected [batch, height, width, {config.latent_channels}]"
        )


class SpaceToDepth(nn.Module):
    """A stand-in for tiny runs, not a learned codec: each square of pixels becomes the channels of one latent.

    It is lossless. Pixels in [-1, 1] deviate by about a half, so that scale 2 and shift 0 give about unit variance.
    """

    config: AutoencoderConfig

    def encode(self, images: jax.Array):
        check_images(images, self.config)
        batch, height, width, _ = images.shape
        f = self.config.downsample_factor
        x = images.astype(jnp.float32).reshape(batch, height // f, f, width // f, f, 3)
        mean = jnp.swapaxes(x, 2, 3).reshape(batch, height // f, width // f, f * f * 3)
        return Moments(mean, jnp.full_like(mean, -30.0))

    def decode(self, latents: jax.Array):
        check_latents(latents, self.config)
        batch, height, width, _ = latents.shape
        f = self.config.downsample_factor
        x = latents.astype(jnp.float32).reshape(batch, height, width, f, f, 3)
        return jnp.swapaxes(x, 2, 3).reshape(batch, height * f, width * f, 3)

    def __call__(self, images):
        return self.decode(self.encode(images).mean)


class AutoencoderKL(nn.Module):
    """SD3's autoencoder; see `make_autoencoder`."""

    config: AutoencoderConfig

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(self, images: jax.Array):
        check_images(images, self.config)
        mean, log_variance = jnp.split(self.encoder(images).astype(jnp.float32), 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, latents: jax.Array):
        check_latents(latents, self.config)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images):
        return self.decode(self.encode(images).mean)


class Encoder(nn.Module):
    """Images -> mean and log variance of the latents, concatenated along the channels."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = conv(c, c.block_widths[0], "conv_in")(x)
        for level, width in enumerate(c.block_widths):
            for block in range(c.blocks_per_level):
                x = ResidualBlock(c, width, name=f"down_{level}_block_{block}")(x)
            if level < len(c.block_widths) - 1:
                # Stable Diffusion pads only on the right and at the bottom.
                x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
                x = conv(c, width, f"down_{level}_downsample", strides=2, padding="VALID")(x)
        x = middle(c, x)
        x = nn.silu(norm(c, "norm_out")(x))
        return conv(c, 2 * c.latent_channels, "conv_out")(x)


class Decoder(nn.Module):
    """Raw latents -> images. Level 0 is the coarsest."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = conv(c, c.block_widths[-1], "conv_in")(x)
        x = middle(c, x)
        for level, width in enumerate(reversed(c.block_widths)):
            for block in range(c.blocks_per_level + 1):
                x = ResidualBlock(c, width, name=f"up_{level}_block_{block}")(x)
            if level < len(c.block_widths) - 1:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = conv(c, width, f"up_{level}_upsample")(x)
        x = nn.silu(norm(c, "norm_out")(x))
        return conv(c, 3, "conv_out")(x)


def middle(config: AutoencoderConfig, x: jax.Array) -> jax.Array:
    """The blocks at the coarsest resolution, of encoder and decoder alike. To be called in a compact method."""
    width = config.block_widths[-1]
    x = ResidualBlock(config, width, name="middle_block_0")(x)
    x = SpatialAttention(config, name="middle_attention")(x)
    return ResidualBlock(config, width, name="middle_block_1")(x)


class ResidualBlock(nn.Module):
    """Two normed convolutions with a residual connection, a 1x1 convolution where the width changes."""

    config: AutoencoderConfig
    width: int

    @nn.compact
    def __call__(self, x):
        c = self.config
        hidden = conv(c, self.width, "conv_0")(nn.silu(norm(c, "norm_0")(x)))
        hidden = conv(c, self.width, "conv_1")(nn.silu(norm(c, "norm_1")(hidden)))
        if x.shape[-1] != self.width:
            x = conv(c, self.width, "shortcut", kernel=1)(x)
        return x + hidden


class SpatialAttention(nn.Module):
    """Attention over all positions, with one head as wide as the features."""

    config: AutoencoderConfig

    @nn.compact
    def __call__(self, x):
        batch, height, width, features = x.shape

        def dense(name):
            return nn.Dense(features, dtype=self.config.dtype, name=name)

        hidden = norm(self.config, "norm")(x).reshape(batch, height * width, features)
        query, key, value = (dense(name)(hidden)[:, :, None, :] for name in ("query", "key", "value"))
        attended = attention(query, key, value, batch_axes=ROW_AXES)[:, :, 0, :]
        return x + dense("out")(attended).reshape(x.shape)


def conv(
    config: AutoencoderConfig, features: int, name: str, kernel: int = 3, strides: int = 1, padding: Any = "SAME"
) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), strides, padding, dtype=config.dtype, name=name)


def norm(config: AutoencoderConfig, name: str) -> nn.GroupNorm:
    """Group norm with a float32 result, which the following convolution casts."""
    return nn.GroupNorm(config.norm_groups, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, name=name)
