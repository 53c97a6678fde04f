"""The pretraining of the miniature's frozen parts: its losses against closed forms, and what the package holds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unialign_jax import bundle
from unialign_jax.data.shapes.scene import Scene, Thing
from unialign_jax.data.tokenizer import load_tokenizer
from unialign_jax.evaluation.reconstructions import reconstructions_exact
from unialign_jax.models import presets
from unialign_jax.models.autoencoder import AutoencoderConfig, make_autoencoder
from unialign_jax.training import encoders

SMALL_IMAGES = AutoencoderConfig(
    latent_channels=2,
    downsample_factor=2,
    scale=1.0,
    shift=0.0,
    block_widths=(4, 4),
    blocks_per_level=0,
    norm_groups=2,
    dtype="float32",
)
SMALL_TEXTS = dataclasses.replace(
    presets.TEXT_ENCODER["tiny"], width=16, mlp_width=16, num_heads=2, head_width=8, depth=1
)


@functools.cache
def autoencoder():
    """(the small autoencoder, its parameters, its `apply`), compiled as a whole: one operation at a time is slow."""
    module = make_autoencoder(SMALL_IMAGES)
    params = jax.jit(module.init)(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))["params"]
    return module, params, jax.jit(module.apply, static_argnames="method")


def test_the_rate_warms_up_stays_and_falls():
    rate = encoders.cooling(2.0, 100, 10)
    np.testing.assert_allclose([rate(s) for s in (0, 5, 10, 49, 75, 100)], [0, 1, 2, 2, 1, 0], atol=1e-6)


def test_the_foreground_is_what_differs_from_the_corner_and_a_pixel_around():
    pixels = np.zeros((1, 8, 8, 3), np.float32)
    pixels[0, 4, 4] = 0.5
    wanted = np.zeros((8, 8))
    wanted[3:6, 3:6] = 1
    np.testing.assert_array_equal(encoders.foreground(jnp.asarray(pixels))[0, ..., 0], wanted)


def test_what_is_at_each_latent():
    scene = Scene("gray", (Thing("star", "pink", "large", 0), Thing("circle", "blue", "small", 8)))
    found = encoders.things_at(scene, "photo", 8)
    assert found[1, 1].tolist() == [4, 2, 8] and found[6, 6].tolist() == [1, 1, 3]  # middles at 0.19 and 0.81
    assert found[4, 4].tolist() == [0, 0, 0]
    # Of the middles at 0.06, 0.19 and 0.31 those within 0.178 of the star's, (0.21, 0.21).
    assert (found[..., 0] == 4)[:3, :3].astype(int).tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 1]]
    assert (found[..., 0] == 4).sum() == 6
    assert (encoders.things_at(scene, "depth", 8)[..., 2] == encoders.NOT_ASKED).all()
    assert (encoders.things_at(scene, "depth", 8)[..., :2] == found[..., :2]).all()
    assert (encoders.things_at(None, "photo", 8) == encoders.NOT_ASKED).all()


def test_what_is_not_asked_does_not_count():
    logits = jnp.log(jnp.asarray([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]]))
    found = encoders.cross_entropy(logits, jnp.asarray([1, encoders.NOT_ASKED, 0]))
    np.testing.assert_allclose(found, -(np.log(0.75) + np.log(0.1)) / 2, rtol=1e-6)


def test_what_a_reader_answers_at_each_token():
    text = "a large pink star at the top right and a small blue cross at the left on a white background"
    tokens = text.split()
    found = encoders.answers(text, tokens, 24)
    star, cross = [8, 4, 2, 3, 3], [3, 6, 1, 4, 3]  # pink, star, large, top right; blue, cross, small, left; white
    nothing = [0, 0, 0, 0, 3]
    assert found[tokens.index("a")].tolist() == found[tokens.index("background")].tolist() == nothing
    assert all(found[place].tolist() == star for place in range(tokens.index("large"), tokens.index("small")))
    assert all(found[place].tolist() == cross for place in range(tokens.index("small"), tokens.index("on")))
    alike = encoders.answers("two small red circles on a gray background", "two small red circles on a gray".split(), 8)
    assert alike[1].tolist() == [1, 1, 1, 0, 2]
    assert (encoders.answers("move the red star to the top", [], 8) == encoders.NOT_ASKED).all()


@pytest.mark.slow
def test_what_the_loss_of_reading_counts():
    """A reader that is sure of all, and right but for one word in ten, seen or hidden, and one answer."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 12, (4, 20)))
    wanted = np.zeros((4, 20, len(encoders.QUESTIONS)), np.int32)
    wanted[0] = encoders.NOT_ASKED

    class Sure:
        encoder = type("", (), {"config": SMALL_TEXTS})

        def apply(self, _, seen, noise):
            self.hidden = np.asarray(seen != ids)
            assert noise.shape == (4, 20, SMALL_TEXTS.width)
            words = np.asarray(ids).copy()
            words[:, ::10] = (words[:, ::10] + 1) % 12
            replies = [50 * jax.nn.one_hot(jnp.zeros((4, 20), int), 5) for _ in encoders.QUESTIONS]
            replies[1] = replies[1].at[:, 0].set(50 * jax.nn.one_hot(1, 5))
            return 50 * jax.nn.one_hot(words, 16), replies

    reader = Sure()
    total, (hidden, visible, answered) = encoders.reading_loss(
        reader, {}, ids, jnp.asarray(wanted), jax.random.key(3), mask_id=15, num_words=12
    )
    assert reader.hidden.any() and not reader.hidden.all()
    wrong = np.zeros((4, 20), bool)
    wrong[:, ::10] = True
    # Where a hidden word was replaced by itself it cannot be told; the seed has no such word.
    np.testing.assert_allclose(hidden, 50 * wrong[reader.hidden].mean(), rtol=1e-5)
    np.testing.assert_allclose(visible, 50 * wrong[~reader.hidden].mean(), rtol=1e-5)
    np.testing.assert_allclose(answered, 50 * 3 / 60, rtol=1e-5)  # in the three texts that are asked
    np.testing.assert_allclose(total, hidden + encoders.VISIBLE_WEIGHT * visible + answered, rtol=1e-6)


@pytest.mark.slow
def test_whitened_latents_are_uncorrelated_and_the_pictures_stay():
    _, params, apply = autoencoder()
    params = jax.tree.map(lambda leaf: leaf, params)
    images = encoders.world_images(7, 0, 12, 16)
    mean = apply({"params": params}, jnp.float32(images) / 127.5 - 1, method="encode")[0].mean((0, 1, 2))
    # Pictures stay exactly where the mean is 0: the decoder's first convolution pads with zeros.
    params["encoder"]["conv_out"]["bias"] -= jnp.pad(mean, (0, 2))
    white = encoders.whitened(SMALL_IMAGES, params, images)
    pixels = jnp.float32(images) / 127.5 - 1
    latents, log_variance = apply({"params": white}, pixels, method="encode")
    latents = np.asarray(latents).reshape(-1, 2)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(latents.T), np.eye(2), atol=1e-3)
    before, variance = apply({"params": params}, pixels, method="encode")
    matrix = np.linalg.lstsq(before.reshape(-1, 2) - before.mean((0, 1, 2)), latents, rcond=None)[0]
    wanted = np.exp(variance).mean((0, 1, 2)) @ matrix**2
    np.testing.assert_allclose(np.exp(log_variance).mean((0, 1, 2)), wanted, rtol=1e-3)
    pictures = [np.asarray(apply({"params": p}, pixels)) for p in (params, white)]
    np.testing.assert_allclose(*pictures, atol=1e-3)


@pytest.fixture(scope="module")
def small_autoencoder():
    """(module, parameters with a viewer, pictures as float32, what is at each latent)."""
    module, params, _ = autoencoder()
    images, things = encoders.world_pictures(7, 0, 6, 16, 8)
    latents = jnp.zeros((1, 1, 1, 2))
    params = {
        "autoencoder": params,
        "viewer": encoders.Viewer().init(jax.random.key(2), latents, latents)["params"],
    }
    return module, params, jnp.float32(images) / 127.5 - 1, things


@pytest.mark.slow
def test_the_decoder_learns_on_alone_and_through_noise(small_autoencoder, monkeypatch):
    module, params, pixels, things = small_autoencoder

    def loss(params):
        return encoders.autoencoder_loss(module, params, pixels, things, jax.random.key(3), phase="decoder")[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))({"autoencoder": params["autoencoder"]})
    norm = {name: optax.global_norm(gradients["autoencoder"][name]) for name in ("encoder", "decoder")}
    assert norm["encoder"] == 0 < norm["decoder"]
    monkeypatch.setattr(encoders, "DECODER_NOISE", 0.0)
    assert abs(jax.jit(lambda params: loss(params))(params) - value) > 1e-4  # another function: traced anew


@pytest.mark.slow
def test_the_loss_that_asks_what_is_there_is_the_sum_of_its_parts(small_autoencoder, monkeypatch):
    """Without noise in the decoder's latents the picture's part is that of the means and the variances' own draw."""
    module, params, pixels, things = small_autoencoder
    key, apply = jax.random.key(3), autoencoder()[-1]
    monkeypatch.setattr(encoders, "DECODER_NOISE", 0.0)
    ask = functools.partial(encoders.autoencoder_loss, module, phase="things")
    loss, parts = jax.jit(ask)(params, pixels, things, key)
    mean, log_variance = apply({"params": params["autoencoder"]}, pixels, method="encode")
    draws, view_key, *_ = jax.random.split(key, 4)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(draws, mean.shape)
    made = apply({"params": params["autoencoder"]}, latents, method="decode")
    error = np.abs(np.asarray(made - pixels))
    weights = 1 + encoders.FOREGROUND_WEIGHT * np.asarray(encoders.foreground(pixels))
    mean, variance = np.float64(mean), np.exp(np.float64(log_variance))
    kl = 0.5 * (mean**2 + variance - 1 - np.log(variance)).mean()
    z = (mean - mean.mean((0, 1, 2))) / mean.std((0, 1, 2))
    z += encoders.LATENT_NOISE * np.asarray(jax.random.normal(view_key, mean.shape))
    view = 0
    for i in range(3):
        head = params["viewer"][f"class_{i}"]
        logits = z @ np.float64(head["kernel"]) + np.float64(head["bias"])
        log_shares = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        asked = things[..., i] != encoders.NOT_ASKED
        view -= np.take_along_axis(log_shares, np.maximum(things[..., i, None], 0), -1)[..., 0][asked].mean()
    offset = ((mean.mean((0, 1, 2)) / mean.std((0, 1, 2))) ** 2).mean()
    wanted = (weights * error).mean() + encoders.KL_WEIGHT * kl + encoders.VIEW_WEIGHT * view
    np.testing.assert_allclose(loss, wanted + encoders.OFFSET_WEIGHT * offset, rtol=1e-4)
    np.testing.assert_allclose([parts["error"], parts["kl"], parts["view"]], [error.mean(), kl, view], rtol=1e-3)


@pytest.mark.slow
def test_scale_and_shift_bring_latents_to_mean_0_and_deviation_1():
    _, params, apply = autoencoder()
    images = encoders.world_images(7, 0, 12, 16)
    config = encoders.with_statistics(SMALL_IMAGES, params, images)
    moments = apply({"params": params}, jnp.float32(images) / 127.5 - 1, method="encode")
    latents = (np.asarray(moments[0]) - config.shift) * config.scale
    assert abs(latents.mean()) < 1e-3 and abs(latents.std() - 1) < 1e-3


@pytest.mark.slow
def test_both_learn_and_the_same_seed_gives_the_same_numbers():
    seen = []
    log = lambda step, values, params: seen.append((step, values))  # noqa: E731
    settings = {"steps": 30, "batch": 4, "log": log}
    images = [
        encoders.train_autoencoder(SMALL_IMAGES, image_size=16, view_steps=5, decoder_steps=3, **settings)[1]
        for _ in range(2)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, images), strict=True))
    texts = encoders.train_text_encoder(SMALL_TEXTS, load_tokenizer(), length=16, learning_rate=1e-2, **settings)
    assert texts.keys() == bundle.abstract_params(bundle.BundleConfig(text_encoder=SMALL_TEXTS))["text_encoder"].keys()
    first, second, (step, words) = seen[:3], seen[3:6], seen[6]
    assert first == second and [step for step, _ in first] == [30, 35, 38]
    assert [set(values) for _, values in first] == [{"error", "kl"}, {"error", "kl", "view"}, {"error"}]
    assert step == 30
    assert words["visible"] < 0.9 * np.log(512)  # better than a guess


def test_texts_are_those_that_the_model_reads():
    texts = encoders.world_texts(1, 0, 60)
    assert len(texts) == 60 and all(texts)
    assert any(text.startswith("Q: ") for text in texts) and any("background" in text for text in texts)


@pytest.mark.slow
def test_the_packaged_encoders_are_those_of_the_preset():
    """Training reads scale and shift from the preset, sampling from the bundle: they are one and measured."""
    config, params = bundle.load(bundle.locate("demo"), components=("autoencoder",), dtype="float32")
    assert config.autoencoder == presets.AUTOENCODER["tiny"]
    assert config.text_encoder == presets.TEXT_ENCODER["tiny"]
    plain = dataclasses.replace(config.autoencoder, scale=1.0, shift=0.0)
    images = encoders.world_images(encoders.AUTOENCODER_SEED, 0, 480, 64)
    measured = encoders.with_statistics(plain, params["autoencoder"], images)
    assert measured.scale == pytest.approx(config.autoencoder.scale, rel=1e-2)
    assert measured.shift == pytest.approx(config.autoencoder.shift, abs=1e-2)
    assert reconstructions_exact(config.autoencoder, params["autoencoder"], 32, image_size=64) >= 0.8


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "option", ["--autoencoder-steps=1", "--view-steps=1", "--decoder-steps=1", "--text-encoder-steps=0", "--scenes=0"]
)
def test_bad_options(command_refuses, tmp_path, option):
    command_refuses("pretrain_encoders", [f"--output={tmp_path}/encoders", option], option.split("=")[0])


@pytest.mark.bad_input
def test_a_folder_of_something_else_is_kept(command_refuses, tmp_path):
    (tmp_path / "notes.txt").write_text("precious")
    command_refuses("pretrain_encoders", [f"--output={tmp_path}", "--overwrite"], str(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "precious"
