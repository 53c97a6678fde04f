"""What the compiled programs of inference refuse, how many of them stay compiled, and how their seconds are told.

That they are right is tested by the pipeline and the samples.
"""

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import jax
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


def live(name):
    """How many programs of this name are compiled and in memory, by XLA's own list."""
    gc.collect()
    alive = jax.devices()[0].client.live_executables()
    return sum(program.hlo_modules()[0].name == f"jit_{name}" for program in alive)


def test_the_shapes_that_were_called_last_stay_compiled_and_others_leave_the_memory():
    traced = []

    def doubled_and_shifted(params, rows, *, shift):
        traced.append((len(rows), shift))
        return 2 * rows + params + shift

    program = programs.Program(doubled_and_shifted, "double", static="shift", kept=2)

    def call(rows, shift=0, value=1.0):
        made = program(jnp.float32(3), np.full((rows, 2), value, np.float32), shift=shift)
        np.testing.assert_array_equal(made, np.full((rows, 2), 2 * value + 3 + shift))

    for rows in (1, 2, 1, 3, 1):  # 2 was called longest ago when 3 comes
        call(rows)
        call(rows, value=rows)
    assert traced == [(1, 0), (2, 0), (3, 0)]
    assert live("doubled_and_shifted") == program._cache_size() == 2
    call(1, shift=5)  # a shape of its own, in the place of 3
    call(1)
    call(2)
    assert traced == [(1, 0), (2, 0), (3, 0), (1, 5), (2, 0)]
    assert live("doubled_and_shifted") == 2
    program = None
    assert live("doubled_and_shifted") == 0


def test_programs_are_forgotten_while_other_threads_call_them():
    program = programs.Program(lambda params, rows: params * rows, "multiply", kept=1)

    def call(number):
        rows = np.arange(1 + number % 3, dtype=np.float32)
        return np.asarray(program(jnp.float32(2), rows)), 2 * rows

    with ThreadPoolExecutor(4) as threads:
        for found, expected in threads.map(call, range(60)):
            np.testing.assert_array_equal(found, expected)


def test_a_model_keeps_as_many_shapes_of_its_programs_as_it_is_told():
    config = TextEncoderConfig(vocab_size=8, width=4, mlp_width=4, num_heads=1, head_width=4, depth=1, dtype="float32")
    encoder = TextEncoder(config)
    params = encoder.init(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]
    before = live("encode_prompts")
    made = programs.Programs.of(None, encoder, None, mask_id=0, eos_id=1, kept=2)
    for rows in (1, 2, 3, 4, 1):
        ids = np.arange(3 * rows, dtype=np.int32).reshape(rows, 3) % 8
        expected = encoder.apply({"params": params}, ids)
        np.testing.assert_allclose(made.encode_prompts(params, ids), expected, rtol=1e-5, atol=1e-6)
    assert live("encode_prompts") == before + 2


def test_seconds_by_part():
    program, stepped = (
        programs.Program(lambda params, x: params * x, part, is_in_loop=part == "steps", kept=4)
        for part in ("whole", "steps")
    )
    x = jnp.ones(3)
    program(2.0, x)
    began = time.perf_counter()
    with programs.seconds_by_part() as watch:
        seconds = watch.seconds
        assert seconds == {} and not watch.has_compiled
        with ThreadPoolExecutor(1) as thread:  # what other threads do is theirs
            thread.submit(stepped, 2.0, x).result()
        assert seconds == {}
        program(2.0, x)
        first = dict(seconds)
        assert not watch.has_compiled
        program(2.0, jnp.ones(5))
        assert watch.has_compiled
        for _ in range(3):
            x = stepped(2.0, x)
        time.sleep(0.05)
        assert list(seconds) == ["whole"]  # the loop may go on
        program(2.0, x)
        assert seconds["whole"] > first["whole"] > 0 and seconds["steps"] >= 0.05
        looped = seconds["steps"]
        stepped(2.0, x)
    assert seconds["steps"] > looped
    whole = dict(seconds)
    assert sum(whole.values()) <= time.perf_counter() - began
    program(2.0, x)
    assert seconds == whole
