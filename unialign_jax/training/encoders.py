"""Pretrains the frozen networks of the `:tiny` stages on the shapes world: an autoencoder and a T5 encoder.

They are small networks of the classes of SD3's VAE and T5-XXL, trained from fixed seeds.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from unialign_jax.data.shapes.scene import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES, Scene
from unialign_jax.data.shapes.tasks import shapes_example
from unialign_jax.data.shapes.words import parse_caption
from unialign_jax.data.tokenizer import NUM_SENTINELS, Tokenizer
from unialign_jax.models.autoencoder import AutoencoderConfig, Moments, from_pixels, make_autoencoder
from unialign_jax.models.text_encoder import TextEncoder, TextEncoderConfig

AUTOENCODER_SEED, TEXT_ENCODER_SEED = 20261124, 20261125  # no data set of a run uses these
KL_WEIGHT = 2e-4
FOREGROUND_WEIGHT = 4.0
VIEW_WEIGHT = 0.1
LATENT_NOISE = 0.8  # added to latents before the viewer reads them, in standard deviations of each channel
DECODER_NOISE = 0.6  # largest noise added to latents before the decoder reads them, in the same unit
OFFSET_WEIGHT = 0.01  # of the channels' squared means, in standard deviations
NOT_ASKED = -1  # a class that no loss counts
MARGIN = 0.03  # by which a thing reaches beyond its radius, in picture widths


def world_images(seed: int, first: int, count: int, image_size: int) -> np.ndarray:
    """Pictures of all kinds, uint8 [count, S, S, 3]: scenes, perception maps and single subjects."""
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


def things_at(scene: Scene | None, view: str, side: int) -> np.ndarray:
    """The shape, size and colour at the middle of each square of a grid, int32 [side, side, 3].

    Class 0 is nothing, then the classes in their order. All are NOT_ASKED without a scene, and colours on a map.
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


def prefetched(make: Callable, count: int) -> Iterator:
    """make(0), make(1), ..., computed two ahead in a thread."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(make, number) for number in range(min(2, count))]
        for number in range(count):
            result = waiting.pop(0).result()
            if number + 2 < count:
                waiting.append(pool.submit(make, number + 2))
            yield result


def cooling(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear warm-up, constant, and a cosine to 0 over the last half."""
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, steps - steps // 2),
        ],
        [warmup, steps // 2],
    )


def foreground(pixels: jax.Array) -> jax.Array:
    """[B, H, W, 3] -> [B, H, W, 1]: 1 where a pixel or its neighbour differs from the background, the first pixel."""
    differs = jnp.abs(pixels - pixels[:, :1, :1]).max(-1, keepdims=True) > 0.05
    return nn.max_pool(differs.astype(jnp.float32), (3, 3), padding="SAME")


class Viewer(nn.Module):
    """Classifies each latent by itself, through noise: [B, h, w, C] -> logits of shape, size and colour."""

    @nn.compact
    def __call__(self, latents, noise):
        mean = jax.lax.stop_gradient(jnp.mean(latents, axis=(0, 1, 2)))
        deviation = jax.lax.stop_gradient(jnp.std(latents, axis=(0, 1, 2)))
        noisy = (latents - mean) / (deviation + 1e-6) + LATENT_NOISE * noise
        return [nn.Dense(1 + len(names), name=f"class_{i}")(noisy) for i, names in enumerate((SHAPES, SIZES, COLORS))]


def autoencoder_loss(
    module: nn.Module, params: dict, pixels: jax.Array, things: jax.Array, key: jax.Array, *, phase: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, its parts by name) of one phase of the autoencoder's training.

    All phases have the mean absolute error of the reconstruction, weighted up in the foreground.
    "pictures" adds a small KL divergence.
    "things" adds it too, and a `Viewer` classifies each latent through noise (`things_at`). The decoder also reads
    latents through noise, so that small errors of a diffusion model do not change a shape. The channels' means are
    held near 0.
    "decoder" trains the decoder alone, through the same noise.
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


def cross_entropy(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """The mean over the places whose class is not NOT_ASKED."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(classes, 0))
    asked = classes != NOT_ASKED
    return jnp.sum(losses * asked) / jnp.maximum(jnp.sum(asked), 1)


def train_autoencoder(
    config: AutoencoderConfig,
    *,
    steps: int,
    view_steps: int,
    decoder_steps: int,
    batch: int,
    image_size: int,
    log: Callable,
) -> tuple[AutoencoderConfig, dict]:
    """Trains an autoencoder of the shapes world: (config with the latents' scale and shift, float32 params).

    Args:
      steps: of the phase "pictures"; the latents are whitened after it (`whitened`).
      view_steps: of the phase "things"; the latents are whitened again after it.
      decoder_steps: of the phase "decoder".
      log: called with (step, {name: value}, averaged parameters).
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
        shifted = lambda step, *values, done=done: log(done + step, *values)  # noqa: E731
        params = optimize_autoencoder(module, params, count, rate, make, key, shifted, phase)
        if phase != "decoder":
            params = {"autoencoder": whitened(config, params["autoencoder"], images)}
        done += count
    return with_statistics(config, params["autoencoder"], images), params["autoencoder"]


def optimize_autoencoder(
    module: nn.Module,
    params: dict,
    steps: int,
    learning_rate: float,
    make: Callable,
    key: jax.Array,
    log: Callable,
    phase: str,
) -> dict:
    """The running average of the parameters after `steps` steps; batch n is make(n), images and things."""
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


def moments_of(config: AutoencoderConfig, params: dict, images: np.ndarray) -> Moments:
    """The moments of many images, on the host; 32 are encoded at a time."""
    encode = jax.jit(make_autoencoder(config).apply, static_argnames="method")
    parts = [
        encode({"params": params}, from_pixels(images[i : i + 32]), method="encode") for i in range(0, len(images), 32)
    ]
    return Moments(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def whitened(config: AutoencoderConfig, params: dict, images: np.ndarray) -> dict:
    """The same autoencoder with latents of mean 0 and covariance I over `images`: noise hides all directions alike.

    The encoder's last convolution maps latents to (latents - mean) W, with W = covariance^(-1/2), and the decoder's
    first convolution inverts it. Pictures change at their border only: that convolution pads with zeros, which are now
    the mean. Log variances are shifted by their average change. A direction without variance stays as it is.
    """
    means, log_variances = moments_of(config, params, images)
    channels = config.latent_channels
    latents, variance = means.reshape(-1, channels).astype(np.float64), np.exp(log_variances).mean(axis=(0, 1, 2))
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


def with_statistics(config: AutoencoderConfig, params: dict, images: np.ndarray) -> AutoencoderConfig:
    """The configuration with the scale and shift that normalise the latents of `images` to mean 0 and deviation 1.

    The scale is rounded to four digits, the shift to four decimal places.
    """
    latents = moments_of(config, params, images).mean
    return dataclasses.replace(config, scale=float(f"{1 / latents.std():.4g}"), shift=round(float(latents.mean()), 4))


# The text encoder

MASK_SHARES = (0.0, 0.6)  # range of the share of a text's tokens that is hidden, drawn uniformly
CORRUPTED = 0.1  # share of the hidden tokens that become another token instead of the mask
VISIBLE_WEIGHT = 0.5  # of the loss of visible tokens
EMBEDDING_NOISE = 0.8  # added to embeddings before the heads read them, relative to their size
# The questions at each token of a caption: colour, shape, size and place of its thing (class 0: no thing, or not said),
# and the background. Each tuple lists the classes from 1 on.
QUESTIONS = (COLORS, SHAPES, SIZES, POSITIONS, BACKGROUNDS)


def world_texts(seed: int, first: int, count: int) -> list[str]:
    """Texts of all streams as the model reads them: captions, instructions, questions with their answers."""
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
    """The right answers to QUESTIONS at each token, int32 [length, QUESTIONS]; NOT_ASKED unless the text is a caption.

    `tokens` are the words of the text, one token each. A thing's phrase begins with its size.
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
    """A T5 encoder with its training heads: ids [B, L] -> logits of words [B, L, V], and of QUESTIONS.

    The heads read the embeddings through noise, which drives different meanings apart.
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


def reading_loss(
    module: nn.Module, params: dict, ids: jax.Array, wanted: jax.Array, key: jax.Array, mask_id: int, num_words: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(loss, its parts: hidden words, visible words, answers) of a T5 encoder.

    Words are hidden in spans of one or two. Visible words are predicted too: an encoder of hidden words alone would
    keep only what helps to guess them, and in this world a colour does not. `wanted`, int [B, L, QUESTIONS], are the
    `answers` at every token of a caption: a supervised task, as in T5's own pretraining.
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


def train_text_encoder(
    config: TextEncoderConfig,
    tokenizer: Tokenizer,
    *,
    steps: int,
    batch: int,
    length: int,
    learning_rate: float,
    log: Callable,
) -> dict:
    """float32 params of a T5 encoder for the shapes world's texts, trained by `reading_loss`."""
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
