import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unialign_jax.models import presets
from unialign_jax.models.mmdit import (
    AlignmentHeads,
    MMDiT,
    MMDiTConfig,
    block_modulations,
    in_pairs,
    patchify,
    position_table,
    unpatchify,
    without_modulations,
)
from unialign_jax.parallel.mesh import make_mesh

SMALL = MMDiTConfig(
    depth=3,
    num_heads=2,
    head_width=16,
    latent_channels=4,
    text_width=24,
    vocab_size=40,
    tap_depth=2,
    max_patches=12,
    base_patches=4,
    remat="none",
    dtype="float32",
)


def count(module, *inputs):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@functools.cache
def random_params(config, seed=0, scale=0.2):
    """Parameters without the zeros of the initialisation, so that every path carries signal."""
    shapes = jax.eval_shape(lambda: MMDiT(config).init(jax.random.key(0), *inputs(config)[:3]))["params"]
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * generator.normal(size=leaf.shape), jnp.float32), shapes)


def run(config, params, *args):
    return jax.jit(lambda p, *a: MMDiT(config).apply({"params": p}, *a))(params, *args)


def inputs(config, batch=2, height=8, width=6, tokens=5, num_conditions=3):
    keys = jax.random.split(jax.random.key(1), 4)
    latents = jax.random.normal(keys[0], (batch, height, width, config.latent_channels))
    text = jax.random.normal(keys[1], (batch, tokens, config.text_width))
    sigma = jax.random.uniform(keys[2], (batch,))
    conditions = jax.random.normal(keys[3], (batch, num_conditions, height, width, config.latent_channels))
    return latents, text, sigma, conditions


def test_full_size_has_the_reference_parameter_counts():
    latents, text, sigma = jnp.zeros((1, 4, 4, 16)), jnp.zeros((1, 3, 4096)), jnp.zeros((1,))
    # DualDiffusion's 2,102,856,100 less its unused null-image embedding [1, 8, 1536].
    assert count(MMDiT(presets.MMDIT["unialign_2b"]), latents, text, sigma) == 2_102_856_100 - 8 * 1536
    taps = jnp.zeros((1, 4, 1536)), jnp.zeros((1, 3, 1536))
    assert count(AlignmentHeads(presets.ALIGNMENT_HEADS["unialign_2b"]), *taps) == 20_982_784


def test_one_forward_of_pairs_is_two_forwards():
    """Outputs, and the gradient of a function of them all."""
    noisy, text, sigma, _ = inputs(SMALL)
    clean, other, zeros = noisy[::-1], text[::-1], 0 * sigma
    apply = lambda params, *args, **options: MMDiT(SMALL).apply({"params": params}, *args, **options)  # noqa: E731

    def apart(params):
        text_pass = apply(params, clean, other, zeros)
        ours = {name: getattr(text_pass, name) for name in ("text_logits", "text_features", "text_tap")}
        return apply(params, noisy, text, sigma)._replace(**ours)

    def paired(params):
        return apply(params, in_pairs(noisy, clean), in_pairs(text, other), in_pairs(sigma, zeros), paired=True)

    def with_gradient(passes):
        def total(params):
            outputs = passes(params)
            return sum(jnp.sum(jnp.sin(x)) for x in outputs), outputs

        return jax.jit(jax.grad(total, has_aux=True))(random_params(SMALL))

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(a).max()))  # noqa: E731
    jax.tree.map(close, with_gradient(apart), with_gradient(paired))


def test_full_size_output_shapes():
    config = presets.MMDIT["unialign_2b"]
    # 512 px: 64 x 64 latents, three conditions as in the reference's composition task.
    args = (jnp.zeros((2, 64, 64, 16)), jnp.zeros((2, 256, 4096)), jnp.zeros((2,)), jnp.zeros((2, 3, 64, 64, 16)))
    out = jax.eval_shape(lambda: MMDiT(config).init_with_output(jax.random.key(0), *args))[0]
    assert out.velocity.shape == (2, 64, 64, 16) and out.velocity.dtype == jnp.float32
    assert out.text_logits.shape == (2, 256, 32100) and out.text_logits.dtype == jnp.float32
    assert out.image_features.shape == out.image_tap.shape == (2, 1024, 1536)
    assert out.text_features.shape == out.text_tap.shape == (2, 256, 1536)


def test_position_table_is_the_middle_of_sd3s_grid():
    # Reference: coordinate i / 3 of the 192 grid; 512 px takes rows and columns 80 to 111; columns come first.
    table = position_table(32, 32, 1536, 192, 64).reshape(32, 32, 1536)
    omega = 10000.0 ** (-np.arange(384) / 384)
    for row, column in ((0, 0), (3, 31), (31, 7)):
        x, y = (80 + column) / 3 * omega, (80 + row) / 3 * omega
        expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)])
        np.testing.assert_allclose(table[row, column], expected, atol=1e-6)


def test_patches_are_read_in_rows_and_put_back():
    image = jnp.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    patches = patchify(image, 2)
    assert patches.shape == (1, 6, 8)
    np.testing.assert_array_equal(patches[0, 1], image[0, 0:2, 2:4].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 4, 6, 2), image)


@pytest.mark.slow
def test_taps_are_what_leaves_block_tap_depth():
    params, args = random_params(SMALL), inputs(SMALL)
    whole = run(SMALL, params, *args)
    # The same network cut off after the tapped block ends in the tap: its text features are the tap's norm.
    cut = dataclasses.replace(SMALL, depth=2)
    first = params | {"blocks": jax.tree.map(lambda x: x[:2], params["blocks"])}
    out = run(cut, first, *args)
    tap = np.asarray(whole.text_tap, np.float64)
    normed = (tap - tap.mean(-1, keepdims=True)) / np.sqrt(tap.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out.text_features, normed, atol=2e-4)
    np.testing.assert_allclose(out.image_tap, whole.image_tap, atol=1e-5)
    assert whole.image_tap.shape == (2, 12, 32)


@pytest.mark.slow
def test_conditions_matter_and_their_order_does_not():
    # The reference gives every condition the same positions and no index: a set, not a list.
    params, (latents, text, sigma, conditions) = random_params(SMALL), inputs(SMALL)
    out = run(SMALL, params, latents, text, sigma, conditions)
    turned = run(SMALL, params, latents, text, sigma, conditions[:, ::-1])
    np.testing.assert_allclose(out.velocity, turned.velocity, atol=1e-4)
    without = run(SMALL, params, latents, text, sigma)
    assert jnp.max(jnp.abs(out.velocity - without.velocity)) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.0)])
def test_modulations_made_ahead_change_nothing(dtype, tolerance):
    config = dataclasses.replace(SMALL, dtype=dtype)
    params = random_params(SMALL)
    latents, text, _, conditions = inputs(config)
    sigmas = jnp.array([1.0, 0.6, 0.0])
    table = jax.jit(block_modulations, static_argnums=0)(config, params, sigmas)
    lean = without_modulations(params)

    @jax.jit
    def at(row):
        return MMDiT(config).apply({"params": lean}, latents, text, None, conditions, modulations=row)

    for i, sigma in enumerate(sigmas):
        plain = run(config, params, latents, text, jnp.full((2,), sigma), conditions)
        ahead = at(jax.tree.map(operator.itemgetter(i), table))
        for name, found, expected in zip(plain._fields, ahead, plain, strict=True):
            scale = float(jnp.max(jnp.abs(expected)))
            np.testing.assert_allclose(found, expected, atol=tolerance * scale, rtol=0, err_msg=name)
    assert "time_embed" not in lean and "modulation" not in lean["blocks"]["joint"]["image"]
    with pytest.raises(ValueError, match="one row"):
        at(table)


@pytest.mark.slow
def test_untrained_network_predicts_zero_velocity_and_passes_its_input_through():
    latents, text, sigma, _ = inputs(SMALL)
    params = jax.jit(MMDiT(SMALL).init)(jax.random.key(0), latents, text, sigma)["params"]
    out = run(SMALL, params, latents, text, sigma)
    np.testing.assert_array_equal(out.velocity, 0)
    embedded = text @ params["text_embed"]["kernel"] + params["text_embed"]["bias"]
    np.testing.assert_allclose(out.text_tap, embedded, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["block", "dots", "offload"])
def test_remat_changes_no_gradient(remat):
    params, args = random_params(SMALL), inputs(SMALL)

    def gradient(config):
        loss = lambda p: jnp.sum(MMDiT(config).apply({"params": p}, *args).velocity ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain, rematted = gradient(SMALL), gradient(dataclasses.replace(SMALL, remat=remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(rematted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))


def test_the_gradient_of_every_weight_is_reduce_scattered():
    """Those that the table splits: five in each stream of a block, the two embeddings and the two heads."""
    params, args = random_params(SMALL), inputs(SMALL, batch=8)[:3]
    loss = lambda p: sum(jnp.sum(x**2) for x in MMDiT(SMALL).apply({"params": p}, *args))  # noqa: E731
    with jax.set_mesh(make_mesh(fsdp=8)):
        text = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert text.count("stablehlo.reduce_scatter") == 2 * 5 + 4


@pytest.mark.slow
def test_passes_of_two_shapes_reduce_gradients_once():
    params, (latents, text, sigma, conditions) = random_params(SMALL), inputs(SMALL, batch=8)

    def permutes(*passes):
        apply = lambda p: MMDiT(SMALL).apply({"params": p}, *passes, method="several")  # noqa: E731
        loss = lambda p: sum(jnp.sum(x**2) for x in jax.tree.leaves(apply(p)))  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(params).as_text().count("stablehlo.collective_permute")

    with jax.set_mesh(make_mesh(data=4, encoder=2, fsdp=1)):
        alone = permutes((latents, text, sigma))
        assert alone and permutes((latents, text, sigma, conditions), (latents, text, sigma)) == alone


@pytest.mark.slow
def test_bfloat16_stays_near_float32():
    params, args = random_params(SMALL, scale=0.1), inputs(SMALL)
    exact = run(SMALL, params, *args)
    rounded = run(dataclasses.replace(SMALL, dtype="bfloat16"), params, *args)
    for name in ("velocity", "text_logits"):
        a, b = getattr(exact, name), getattr(rounded, name)
        assert b.dtype == jnp.float32
        assert float(jnp.abs(a - b).max() / jnp.abs(a).max()) < 0.03, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": (2, 7, 6, 4)}, "latents are 7 high, expected a multiple of 2 from 2 to 24"),
        ({"latents": (2, 8, 26, 4)}, "latents are 26 wide"),
        ({"latents": (2, 8, 6, 5)}, "latents have 5 channels, the network expects 4"),
        ({"latents": (8, 6, 4)}, r"latents have shape \(8, 6, 4\)"),
        ({"text": (2, 5, 23)}, r"text_embeddings have shape \(2, 5, 23\), expected \[2, tokens, 24\]"),
        ({"text": (3, 5, 24)}, "text_embeddings have shape"),
        ({"sigma": (1,)}, r"sigma has shape \(1,\), expected \[2\]"),
        ({"conditions": (2, 8, 6, 4)}, "conditions have shape"),
        ({"conditions": (2, 1, 8, 5, 4)}, "conditions are 5 wide"),
    ],
)
def test_wrong_sizes_are_refused_with_the_numbers(change, message):
    shapes = {"latents": (2, 8, 6, 4), "text": (2, 5, 24), "sigma": (2,), "conditions": (2, 1, 8, 6, 4)} | change
    args = [jnp.zeros(shape) for shape in shapes.values()]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: MMDiT(SMALL).init(jax.random.key(0), *args))


PLAIN = dataclasses.replace(SMALL, depth=1, tap_depth=1)
POSITIONED = dataclasses.replace(PLAIN, text_positions=5)


@pytest.mark.slow
def test_a_table_of_zeros_is_bit_for_bit_no_table():
    plain = run(PLAIN, random_params(PLAIN), *inputs(PLAIN))
    zeros = run(POSITIONED, random_params(PLAIN) | {"text_positions": jnp.zeros((5, PLAIN.width))}, *inputs(PLAIN))
    jax.tree.map(np.testing.assert_array_equal, zeros, plain)


@pytest.mark.slow
def test_every_token_gets_the_row_of_its_place():
    """Beside a table: its first row in the bias of `text_embed`, for one token; and tokens that change places."""
    rows = np.random.default_rng(2).normal(size=(5, PLAIN.width)).astype(np.float32)
    params, (latents, text, sigma, _) = random_params(PLAIN), inputs(PLAIN)
    positioned = jax.jit(lambda table, *a: MMDiT(POSITIONED).apply({"params": params | {"text_positions": table}}, *a))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)

    embed = params["text_embed"] | {"bias": params["text_embed"]["bias"] + rows[0]}
    expected = run(PLAIN, params | {"text_embed": embed}, latents, text[:, :1], sigma)
    jax.tree.map(close, positioned(rows, latents, text[:, :1], sigma), expected)

    order = np.array([3, 0, 4, 2, 1])
    first, moved = positioned(rows, latents, text, sigma), positioned(rows[order], latents, text[:, order], sigma)
    close(moved.text_logits, first.text_logits[:, order])
    close(moved.velocity, first.velocity)
    other = positioned(rows, latents, text[:, order], sigma)
    assert np.abs(other.text_logits - first.text_logits[:, order]).max() > 0.1


@pytest.mark.bad_input
def test_a_text_longer_than_its_positions_is_refused():
    with pytest.raises(ValueError, match="text_embeddings have 6 tokens, the model has positions for 5"):
        jax.eval_shape(lambda: MMDiT(POSITIONED).init(jax.random.key(0), *inputs(POSITIONED, tokens=6)[:3]))


def test_wrong_configurations_are_refused():
    for change, message in ({"tap_depth": 4}, "tap_depth is 4"), ({"remat": "all"}, "remat is 'all'"):
        config = dataclasses.replace(SMALL, **change)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda c=config: MMDiT(c).init(jax.random.key(0), *inputs(c)))
