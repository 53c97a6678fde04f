"""The parameters of a network: random ones from its configuration, and the dtype that each may be kept in."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from unialign_jax.models.autoencoder import AutoencoderConfig, make_autoencoder
from unialign_jax.models.mmdit import AlignmentHeads, AlignmentHeadsConfig, MMDiT, MMDiTConfig
from unialign_jax.models.teacher import TeacherConfig, init_teacher
from unialign_jax.models.text_encoder import TextEncoder, TextEncoderConfig

# These are small, and rounding them would change results. A network rounds all others to its dtype before it uses
# them, so keeping them in that dtype changes no number.
FLOAT32 = re.compile(r"(^|/)(time_embed|image_head_modulation|heads)/|relative_bias$|norm")


def init(
    config: MMDiTConfig | AlignmentHeadsConfig | TextEncoderConfig | AutoencoderConfig | TeacherConfig,
    key: jax.Array,
    *,
    tap_width: int | None = None,
) -> dict:
    """Random float32 parameters of the network that `config` describes; {} for a network without parameters.

    Args:
      tap_width: for alignment heads, the width of the transformer whose taps they read.
    """
    match config:
        case MMDiTConfig():
            latents = jnp.zeros((1, config.patch_size, config.patch_size, config.latent_channels))
            module, inputs = MMDiT(config), (latents, jnp.zeros((1, 1, config.text_width)), jnp.zeros((1,)))
        case AlignmentHeadsConfig():
            tap = jnp.zeros((1, 1, tap_width))
            module, inputs = AlignmentHeads(config), (tap, tap)
        case TextEncoderConfig():
            module, inputs = TextEncoder(config), (jnp.zeros((1, 1), jnp.int32),)
        case AutoencoderConfig():
            side = config.downsample_factor
            module, inputs = make_autoencoder(config), (jnp.zeros((1, side, side, 3)),)
        case TeacherConfig():
            return init_teacher(key, config)
    return module.init(key, *inputs).get("params", {})


def storage_dtype(path: str, dtype: Any) -> jnp.dtype:
    """The dtype that the parameter at `path` may be kept in for a network that computes in `dtype`."""
    return jnp.dtype(jnp.float32 if FLOAT32.search(path) else dtype)
