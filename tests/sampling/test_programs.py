"""What the compiled programs of inference refuse; that they are right is tested by the pipeline and the samples."""

import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.models import presets
from unialign_jax.models.autoencoder import make_autoencoder
from unialign_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from unialign_jax.sampling import image as image_sampler
from unialign_jax.sampling import programs
from unialign_jax.sampling.solvers import SolverTable

AUTOENCODER = make_autoencoder(presets.AUTOENCODER["pixels"])
LATENTS, TEXT, TABLE = jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 5, 8)), SolverTable(*np.zeros((5, 3), np.float32))
GUIDANCE = programs.Guidance(jnp.ones(2), jnp.ones(2), np.ones(3, bool))


def advance(prompt=TEXT, negative=TEXT, guidance=GUIDANCE):
    state = image_sampler.start(LATENTS)
    return programs.advance_images(None, {}, state, TABLE, prompt, negative, guidance)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: programs.encode_images(AUTOENCODER, {}, jnp.zeros((8, 8, 3), jnp.uint8)), r"\(8, 8, 3\)"),
        (lambda: programs.encode_images(AUTOENCODER, {}, jnp.zeros((1, 8, 8, 3))), "float32.*uint8"),
        (lambda: programs.decode_images(AUTOENCODER, {}, LATENTS), r"\(2, 4, 4, 3\).*48"),
        (lambda: advance(negative=TEXT[:1]), r"\(2, 5, 8\).*\(1, 5, 8\)|\(1, 5, 8\).*\(2, 5, 8\)"),
        (lambda: advance(guidance=GUIDANCE._replace(scale=jnp.ones((2, 1)))), r"\(2, 1\).*\(2\)"),
        (lambda: advance(guidance=GUIDANCE._replace(active=np.ones(4, bool))), r"\(4,\).*\(3\)"),
        (lambda: image_sampler.text_guidance(LATENTS, LATENTS[:1], 7.0), r"\(1, 4, 4, 3\)"),
        (lambda: image_sampler.text_guidance(LATENTS, LATENTS, jnp.ones((2, 1))), r"\(2, 1\).*\(2\)"),
        (lambda: image_sampler.text_guidance(LATENTS, LATENTS, jnp.ones(3)), r"\(3,\).*\(2\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_their_shapes(call, found):
    with pytest.raises(AssertionError, match=found):
        call()


def test_parameters_of_another_network_are_refused_in_one_line():
    config = TextEncoderConfig(vocab_size=8, width=4, mlp_width=4, num_heads=1, head_width=4, depth=1, dtype="float32")
    made = programs.Programs.of(None, TextEncoder(config), None, mask_id=0, eos_id=1)
    for params, named in (
        ({"token_embedding": jnp.zeros((8, 6))}, "token_embedding"),
        ({"layers": {}}, "token_embedding"),
    ):
        with pytest.raises(ValueError, match="the parameters do not fit the configuration: .*" + named) as error:
            made.encode_prompts(params, jnp.zeros((1, 3), jnp.int32))
        assert "\n" not in str(error.value)


def test_guidance_holds_only_what_takes_part():
    assert programs.make_guidance(2, TABLE, scale=1.0) is None
    text = programs.make_guidance(2, TABLE, scale=7.0)
    assert text.active is None and text.image_scale is None and text.scale.shape == (2,)
    some = programs.make_guidance(2, TABLE._replace(sigma=np.array([1, 0.5, 0.1])), scale=7.0, interval=(0.2, 0.9))
    assert some.active.tolist() == [False, True, False] and some.image_scale is None
    assert programs.make_guidance(2, TABLE, scale=1.0, image_scale=1.5).image_scale.tolist() == [1.5, 1.5]
    with pytest.raises(ValueError, match="guidance_interval goes with text guidance only"):
        programs.make_guidance(2, TABLE, scale=7.0, interval=(0.2, 0.9), image_scale=1.5)
