"""Pretrains the frozen parts of the shapes world's miniature: its autoencoder and its T5 encoder.

The real model stands on SD3's VAE and on T5-XXL, which others trained. The miniature stands on small ones of the same
classes, trained here from fixed seeds on the shapes world alone.
"""

import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from unialign_jax.data.shapes.scene import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES
from unialign_jax.data.shapes.tasks import shapes_example
from unialign_jax.data.shapes.words import parse_caption
from unialign_jax.data.tokenizer import NUM_SENTINELS
from unialign_jax.models.autoencoder import AutoencoderConfig, Moments, from_pixels, make_autoencoder
from unialign_jax.models.text_encoder import TextEncoder

AUTOENCODER_SEED, TEXT_ENCODER_SEED = 20261124, 20261125  # worlds that no data set of a run uses
KL_WEIGHT = 2e-4
FOREGROUND_WEIGHT = 4.0
VIEW_WEIGHT = 0.1
LATENT_NOISE = 0.8  # through which a latent is asked what is there, in deviations of each channel
DECODER_NOISE = 0.6  # the most through which the decoder reads latents
OFFSET_WEIGHT = 0.01  # of the channels' squared means, in deviations
NOT_ASKED = -1


def world_images(seed: int, first: int, count: int, image_size: int) -> np.ndarray:
    """Pictures of every kind that the autoencoder meets, uint8 [count, S, S, 3]: scenes, maps and lone subjects."""
    return world_pictures(seed, first, count, image_size, 1)[0]


def world_pictures(seed: int, first: int, count: int, image_size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(`world_images`, `things_at` of each on a grid of `side` x `side`)."""
    images, things = [], []
    for number in range(first, first + count):
        kind = ("text_to_image", "perception", "text_to_image", "edit", "perception", "personalization")[number % 6]
        example = shapes_example(kind, seed, number, image_size=image_size)
        lone = kind == "personalization"
        images.append(example.conditions[0] if lone else example.image)
        things.append(things_at(None if lone else example.scene, example.view, side))
    return np.stack(images), np.stack(things)


MARGIN = 0.03  # in picture widths, by which a thing reaches beyond its radius


def things_at(scene, view: str, side: int) -> np.ndarray:
    """Which shape, size and colour there is at the middle of each square of a grid, int32 [side, side, 3].

    0 is none, then the classes in their order; NOT_ASKED without a scene, and of the colours of a map.
    """
    result = np.full((side, side, 3), NOT_ASKED if scene is None else 0, np.int32)
    middles = (np.arange(side) + 0.5) / side
    for thing in scene.far_to_near() if scene is not None else ():
        x, y = thing.center
        inside = np.hypot(middles - x, (middles - y)[:, None]) <= thing.radius + MARGIN
        result[inside] = (
            1 + SHAPES.index(thing.shape),
            1 + SIZES.index(thing.size),
            1 + COLORS.index(thing.color),
        )
    if view != "photo":
        result[..., 2] = NOT_ASKED
    return result


def prefetched(make, count: int) -> Iterator:
    """make(0), make(1), ... made two ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, number) for number in range(min(2, count))]
        for number in range(count):
            result = waiting.pop(0).result()
            if number + 2 < count:
                waiting.append(pool.submit(make, number + 2))
            yield result


def cooling(peak: float, steps: int, warmup: int):
    """Linear warm-up, constant, and over the last half a cosine to 0."""
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, steps - steps // 2),
        ],
        [warmup, steps // 2],
    )


def foreground(pixels):
    """1 where pixels [B, H, W, 3] are not the background (the first pixel), widened by one pixel: [B, H, W, 1]."""
    differs = jnp.abs(pixels - pixels[:, :1, :1]).max(-1, keepdims=True) > 0.05
    return nn.max_pool(differs.astype(jnp.float32), (3, 3), padding="SAME")


class Viewer(nn.Module):
    """What is at each latent, read off it alone through noise: [B, h, w, C] -> logits of shape, size and colour."""

    @nn.compact
    def __call__(self, latents, noise):
        mean = jax.lax.stop_gradient(jnp.mean(latents, axis=(0, 1, 2)))
        deviation = jax.lax.stop_gradient(jnp.std(latents, axis=(0, 1, 2)))
        noisy = (latents - mean) / (deviation + 1e-6) + LATENT_NOISE * noise
        return [nn.Dense(1 + len(names), name=f"class_{i}")(noisy) for i, names in enumerate((SHAPES, SIZES, COLORS))]


def autoencoder_loss(module, params, pixels, things, key, *, phase: str):
    """The mean absolute error of what comes back, more where there is something; and what the phase adds.

    "pictures": the latents with their own variance, and a little KL divergence.
    "things": each latent is asked what is there (`things_at`, `Viewer`), through noise, and the decoder reads latents
      through noise too. A shape then lies in a direction of its own, and small errors of a diffusion model do not
      change it. The channels' means are held near 0.
    "decoder": the decoder alone, through the same noise.

    Returns (loss, {name: its parts}).
    """
    apply = functools.partial(module.apply, {"params": params["autoencoder"]})
    moments = Moments(*apply(pixels, method="encode"))
    key, view_key, level_key, robust_key = (key, *[None] * 3) if phase == "pictures" else jax.random.split(key, 4)
    mean, variance = moments.mean, jnp.exp(moments.log_variance)
    latents = mean + jnp.sqrt(variance) * jax.random.normal(key, mean.shape)
    if phase != "pictures":
        deviation = jax.lax.stop_gradient(jnp.std(mean, axis=(0, 1, 2)))
        level = DECODER_NOISE * jax.random.uniform(level_key, (len(mean), 1, 1, 1))
        latents += level * deviation * jax.random.normal(robust_key, mean.shape)
    if phase == "decoder":
        latents = jax.lax.stop_gradient(latents)
    error = jnp.abs(apply(latents, method="decode") - pixels)
    divergence = 0.5 * jnp.mean(jnp.square(mean) + variance - 1 - moments.log_variance)
    loss = jnp.mean((1 + FOREGROUND_WEIGHT * foreground(pixels)) * error)
    parts = {"error": jnp.mean(error)}
    if phase != "decoder":
        loss += KL_WEIGHT * divergence
        parts["kl"] = divergence
    if phase == "things":
        views = Viewer().apply({"params": params["viewer"]}, mean, jax.random.normal(view_key, mean.shape))
        parts["view"] = sum(cross_entropy(logits, things[..., i]) for i, logits in enumerate(views))
        loss += VIEW_WEIGHT * parts["view"]
        loss += OFFSET_WEIGHT * jnp.mean(jnp.square(jnp.mean(mean, axis=(0, 1, 2)) / deviation))
    return loss, parts


def cross_entropy(logits, classes):
    """The mean over where it is asked for."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(classes, 0))
    asked = classes != NOT_ASKED
    return jnp.sum(losses * asked) / jnp.maximum(jnp.sum(asked), 1)


def train_autoencoder(
    config: AutoencoderConfig, *, steps: int, view_steps: int, decoder_steps: int, batch: int, image_size: int, log
):
    """(config with the latents' own scale and shift, float32 params): an autoencoder of the shapes world.

    Args:
      steps: in which it learns to give pictures back.
      view_steps: in which its latents then learn to tell what is there; made white before and after (`whitened`).
      decoder_steps: in which its decoder learns on alone.
      log: called with (step, {name: value}, parameters averaged).
    """
    module, key = make_autoencoder(config), jax.random.key(AUTOENCODER_SEED)
    side = image_size // config.downsample_factor
    make = lambda n: world_pictures(AUTOENCODER_SEED, n * batch, batch, image_size, side)  # noqa: E731
    images = world_images(AUTOENCODER_SEED, 0, 480, image_size)
    params = {"autoencoder": module.init(key, jnp.zeros((1, image_size, image_size, 3)))["params"]}
    latents = jnp.zeros((1, 1, 1, config.latent_channels))
    viewer = Viewer().init(jax.random.fold_in(key, 1), latents, latents)["params"]
    done = 0
    for phase, count, rate in (
        ("pictures", steps, 2.5e-3),
        ("things", view_steps, 2e-3),
        ("decoder", decoder_steps, 2e-3),
    ):
        if phase == "things":
            params = params | {"viewer": viewer}
        shifted = functools.partial(_log_after, done, log)
        params = optimize_autoencoder(module, params, count, rate, make, key, shifted, phase)
        if phase != "decoder":
            params = {"autoencoder": whitened(config, params["autoencoder"], images)}
        done += count
    return with_statistics(config, params["autoencoder"], images), params["autoencoder"]


def _log_after(done, log, step, *values):
    log(done + step, *values)


def optimize_autoencoder(module, params, steps, learning_rate, make, key, log, phase):
    """The running average of the parameters after `steps` steps on `make(0)`, `make(1)`, ...: (images, things)."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(cooling(learning_rate, steps, 100), b2=0.99))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, images, things, key):
        params, average, opt_state = state
        pixels = from_pixels(images)
        loss = functools.partial(autoencoder_loss, module, phase=phase)
        (_, parts), gradients = jax.value_and_grad(loss, has_aux=True)(params, pixels, things, key)
        updates, opt_state = tx.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: a + 0.005 * (p - a), average, params)
        return (params, average, opt_state), parts

    state = (params, jax.tree.map(jnp.copy, params), tx.init(params))
    for step, (images, things) in enumerate(prefetched(make, steps)):
        state, parts = update(state, images, things, jax.random.fold_in(key, step))
        if step % 50 == 49 or step == steps - 1:
            log(step + 1, {name: float(value) for name, value in parts.items()}, state[1]["autoencoder"])
    return state[1]


def whitened(config: AutoencoderConfig, params, images: np.ndarray):
    """The same autoencoder, whose latents have mean 0 and covariance I over `images`, so that noise hides all alike.

    With W = covariance^(-1/2) the latents become (latents - mean) W, by the encoder's last convolution; the decoder's
    first takes it back. Pictures stay but for their border: that convolution pads with zeros, which now stand for the
    mean. The log variances are shifted to what they are on average. A direction without variance stays as it is.
    """
    encode = jax.jit(make_autoencoder(config).apply, static_argnames="method")
    moments = [
        Moments(*encode({"params": params}, from_pixels(images[i : i + 32]), method="encode"))
        for i in range(0, len(images), 32)
    ]
    channels = config.latent_channels
    latents = np.concatenate([m.mean for m in moments]).reshape(-1, channels).astype(np.float64)
    variance = np.exp(np.concatenate([m.log_variance for m in moments])).mean(axis=(0, 1, 2))
    mean, values, vectors = latents.mean(0), *np.linalg.eigh(np.cov(latents.T))
    matrix = (vectors / np.where(values > 1e-8, np.sqrt(np.maximum(values, 1e-8)), 1)) @ vectors.T
    last, first = params["encoder"]["conv_out"], params["decoder"]["conv_in"]
    kernel, bias = np.asarray(last["kernel"], np.float64), np.asarray(last["bias"], np.float64)
    offset = np.log(variance @ np.square(matrix)) - np.log(variance)
    last = {
        "kernel": np.concatenate([kernel[..., :channels] @ matrix, kernel[..., channels:]], -1),
        "bias": np.concatenate([(bias[:channels] - mean) @ matrix, bias[channels:] + offset]),
    }
    kernel = np.asarray(first["kernel"], np.float64)
    first = {
        "kernel": np.einsum("ij,hwjo->hwio", np.linalg.inv(matrix), kernel),
        "bias": first["bias"] + np.einsum("j,hwjo->o", mean, kernel),
    }
    last, first = jax.tree.map(jnp.float32, (last, first))
    encoder, decoder = params["encoder"] | {"conv_out": last}, params["decoder"] | {"conv_in": first}
    return params | {"encoder": encoder, "decoder": decoder}


def with_statistics(config: AutoencoderConfig, params, images: np.ndarray) -> AutoencoderConfig:
    """The configuration with the scale and shift that bring the latents of `images` to mean 0 and deviation 1.

    The scale is rounded to four digits, the shift to four places.
    """
    module = make_autoencoder(config)
    encode = jax.jit(lambda x: Moments(*module.apply({"params": params}, from_pixels(x), method="encode")).mean)
    latents = np.concatenate([encode(images[i : i + 32]) for i in range(0, len(images), 32)])
    return dataclasses.replace(config, scale=float(f"{1 / latents.std():.4g}"), shift=round(float(latents.mean()), 4))


# --- the text encoder -------------------------------------------------------------------------------------------------

MASK_SHARES = (0.0, 0.6)  # of the tokens of a text that are hidden, drawn uniformly
CORRUPTED = 0.1  # of the hidden tokens, those that become another token instead of the mask
VISIBLE_WEIGHT = 0.5  # of the tokens that are not hidden
EMBEDDING_NOISE = 0.8  # added to embeddings where they are read, in parts of their size
# What a reader asks of each token of a caption: of which colour, shape, size and at which place its thing is (0: it has
# none, or it is not said), and what the background is. The answers, in the order of the classes from 1 on.
QUESTIONS = (COLORS, SHAPES, SIZES, POSITIONS, BACKGROUNDS)


def world_texts(seed: int, first: int, count: int) -> list[str]:
    """Texts as the model reads them, of all streams: captions, instructions, questions with their answers."""
    texts = []
    for number in range(first, first + count):
        kind = ("text_to_image", "edit", "text_to_image", "perception", "personalization", "vqa")[number % 6]
        example = shapes_example(kind, seed, number, image_size=8)  # the words do not depend on the size
        if kind == "vqa":
            texts.append(f"Q: {example.question} A: {example.answer}")
        else:
            texts.append(example.instruction if example.instruction and number % 4 else example.caption)
    return texts


def answers(text: str, tokens: list[str], length: int) -> np.ndarray:
    """The classes that a reader is to answer at each token, int32 [length, QUESTIONS]; NOT_ASKED for other texts.

    Args: `tokens` are the words of the text, one token each. A thing's phrase begins with its size.
    """
    claim = parse_caption(text)
    if claim is None or claim.view != "photo":
        return np.full((length, len(QUESTIONS)), NOT_ASKED, np.int32)
    result = np.zeros((length, len(QUESTIONS)), np.int32)
    result[:, -1] = 1 + BACKGROUNDS.index(claim.background)
    end = len(tokens) - tokens[::-1].index("on") - 1
    starts = [place for place in range(end) if tokens[place] in SIZES]
    for start, stop, named in zip(starts, [*starts[1:], end], claim.things, strict=False):
        cell = 0 if named.cell is None else 1 + named.cell
        words = (1 + COLORS.index(named.color), 1 + SHAPES.index(named.shape), 1 + SIZES.index(named.size), cell)
        result[start:stop, :-1] = words
    return result


class Reader(nn.Module):
    """A T5 encoder and the heads that it is trained with: ids [B, L] -> logits of words [B, L, V], and of QUESTIONS.

    The embeddings are read through noise, so that what differs in meaning comes to lie far apart.
    """

    encoder: nn.Module

    @nn.compact
    def __call__(self, ids, noise):
        x = self.encoder(ids)
        size = jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))
        x = x + EMBEDDING_NOISE * size * noise
        hidden = nn.LayerNorm(name="head_norm")(nn.gelu(nn.Dense(x.shape[-1], name="head_hidden")(x)))
        words = nn.Dense(self.encoder.config.vocab_size, name="head_out")(hidden)
        return words, [nn.Dense(1 + len(names), name=f"question_{i}")(x) for i, names in enumerate(QUESTIONS)]


def reading_loss(module, params, ids, wanted, key, mask_id: int, num_words: int):
    """What a T5 encoder is trained by: (loss, its parts: hidden words, visible words, answers).

    Masked words, spans of one or two hidden together, and the visible ones too: hidden words alone would leave of a
    visible word what tells of hidden ones, and of a colour in this world nothing does. And a supervised task, as T5's
    own pretraining mixed in: at every token of a caption, what its thing is (`answers`, int [B, L, QUESTIONS]).
    """
    share_key, start_key, kind_key, word_key, noise_key = jax.random.split(key, 5)
    share = jax.random.uniform(share_key, (ids.shape[0], 1), minval=MASK_SHARES[0], maxval=MASK_SHARES[1])
    starts = jax.random.uniform(start_key, ids.shape) < share / 2
    hidden = starts | jnp.pad(starts, ((0, 0), (1, 0)))[:, :-1]
    drawn = jax.random.uniform(kind_key, ids.shape)
    other = jax.random.randint(word_key, ids.shape, 0, num_words)
    seen = jnp.where(hidden, jnp.where(drawn < CORRUPTED, other, mask_id), ids)
    noise = jax.random.normal(noise_key, (*ids.shape, module.encoder.config.width))
    words, replies = module.apply({"params": params}, seen, noise)

    def mean(values, where):
        return jnp.sum(values * where) / jnp.maximum(jnp.sum(where), 1)

    losses = optax.softmax_cross_entropy_with_integer_labels(words, ids)
    asked = wanted[..., 0] != NOT_ASKED
    answered = sum(
        mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(wanted[..., i], 0)), asked)
        for i, logits in enumerate(replies)
    )
    parts = mean(losses, hidden), mean(losses, ~hidden), answered
    return parts[0] + VISIBLE_WEIGHT * parts[1] + parts[2], parts


def train_text_encoder(config, tokenizer, *, steps: int, batch: int, length: int, learning_rate: float, log):
    """float32 params of a T5 encoder of the shapes world's texts, trained by `reading_loss`."""
    module = Reader(TextEncoder(config))
    key = jax.random.key(TEXT_ENCODER_SEED)
    params = module.init(key, jnp.zeros((1, length), jnp.int32), jnp.zeros((1, length, config.width)))["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(cooling(learning_rate, steps, 200), b2=0.98))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, ids, wanted, key):
        params, opt_state = state
        loss = functools.partial(
            reading_loss, module, mask_id=tokenizer.mask_id, num_words=tokenizer.vocab_size - NUM_SENTINELS
        )
        (_, values), gradients = jax.value_and_grad(loss, has_aux=True)(params, ids, wanted, key)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), values

    def make(number):
        texts = world_texts(TEXT_ENCODER_SEED, number * batch, batch)
        ids = np.stack([tokenizer.encode(text, length) for text in texts])
        words = [[tokenizer.decode([token]).strip() for token in tokenizer.token_ids(text)] for text in texts]
        return ids, np.stack([answers(*pair, length) for pair in zip(texts, words, strict=True)])

    state = (params, tx.init(params))
    for step, (ids, wanted) in enumerate(prefetched(make, steps)):
        state, values = update(state, ids, wanted, jax.random.fold_in(key, step))
        if step % 50 == 49 or step == steps - 1:
            hidden, visible, answered = map(float, values)
            log(step + 1, {"hidden": hidden, "visible": visible, "answers": answered}, state[0]["encoder"])
    return state[0]["encoder"]
