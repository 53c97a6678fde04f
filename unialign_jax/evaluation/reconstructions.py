"""How many scenes survive the autoencoder."""

import jax
import numpy as np

from unialign_jax.data.shapes.detector import detect
from unialign_jax.data.shapes.words import is_true
from unialign_jax.evaluation import shapes_run
from unialign_jax.evaluation.shapes import claim_of
from unialign_jax.models.autoencoder import AutoencoderConfig, from_pixels, make_autoencoder, to_pixels


def reconstructions_exact(config: AutoencoderConfig, params: dict, scenes: int, *, image_size: int) -> float:
    """The share of held-out scenes that the detector still reads right from their reconstruction."""
    module = make_autoencoder(config)
    examples = shapes_run.held_out("text_to_image", scenes, image_size)

    @jax.jit
    def reconstruct(images):
        return to_pixels(module.apply({"params": params}, from_pixels(images)))

    images = np.concatenate(
        [reconstruct(np.stack([e.image for e in examples[i : i + 32]])) for i in range(0, scenes, 32)]
    )
    # A claim names cells: shifts within a cell do not count.
    same = [is_true(claim_of(e.scene), detect(image).scene) for image, e in zip(images, examples, strict=True)]
    return float(np.mean(same))
