"""Named sizes: the published models, and `tiny` ones that train on a laptop."""

from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.mmdit import AlignmentHeadsConfig, MMDiTConfig
from unialign_jax.models.text_encoder import TextEncoderConfig

MMDIT = {
    "unialign_2b": MMDiTConfig(),
    # On the latents of the tiny autoencoder: 64 pixels are 4 x 4 patches; images have at most 512 pixels a side.
    "tiny": MMDiTConfig(
        depth=4,
        num_heads=4,
        head_width=32,
        latent_channels=8,
        text_width=128,
        vocab_size=512,
        tap_depth=2,
        max_patches=32,
        base_patches=32,
        text_positions=32,
        remat="none",
        dtype="float32",
    ),
}

ALIGNMENT_HEADS = {
    "unialign_2b": AlignmentHeadsConfig(),
    "tiny": AlignmentHeadsConfig(hidden_width=128, teacher_width=64),
}

TEXT_ENCODER = {
    "t5_xxl": TextEncoderConfig(),
    "tiny": TextEncoderConfig(
        vocab_size=512, width=128, mlp_width=256, num_heads=4, head_width=32, depth=2, dtype="float32"
    ),
}

AUTOENCODER = {
    "sd3": AutoencoderConfig(),
    # Trained on the shapes world by launch/pretrain_encoders.py; its latents are white.
    "tiny": AutoencoderConfig(
        latent_channels=8,
        scale=1.0,
        shift=0.0,
        block_widths=(8, 16, 32, 64),
        blocks_per_level=0,
        norm_groups=2,
        dtype="float32",
    ),
    # Not a learned codec: it rearranges pixels into latents, for tests and trials without pretrained weights.
    "pixels": AutoencoderConfig(
        kind="space_to_depth", latent_channels=48, downsample_factor=4, scale=2.0, shift=0.0, dtype="float32"
    ),
}
