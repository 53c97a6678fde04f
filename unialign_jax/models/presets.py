"""Named sizes: the published models, and `tiny` ones that train on a laptop."""

from unialign_jax.models.autoencoder import AutoencoderConfig
from unialign_jax.models.mmdit import AlignmentHeadsConfig, MMDiTConfig
from unialign_jax.models.text_encoder import TextEncoderConfig

MMDIT = {
    "unialign_2b": MMDiTConfig(),
    "tiny": MMDiTConfig(
        depth=4,
        num_heads=4,
        head_width=32,
        latent_channels=48,
        text_width=128,
        vocab_size=512,
        tap_depth=2,
        max_patches=96,
        base_patches=32,
        remat="none",
        dtype="float32",
    ),
}

ALIGNMENT_HEADS = {
    "unialign_2b": AlignmentHeadsConfig(),
    "tiny": AlignmentHeadsConfig(hidden_width=128, teacher_width=64),
}
