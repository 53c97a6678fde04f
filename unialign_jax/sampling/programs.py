"""The pure functions that inference and the samples of training compile: networks, encoders and samplers put together.

Each takes a module and its parameters first, then arrays; seeds, guidance and noise levels are arrays too, so that
other values of them compile nothing. A sample's random numbers depend on its own seed alone, never on its batch.
Under `jax.set_mesh(mesh)` samples are split over the mesh where it divides them. Arrays of the wrong rank or shape
raise AssertionError with both shapes.

Shape letters: B batch, H W image height and width, h w latent height and width, C latent channels, K conditions,
L text tokens, D width of the text embeddings, E evaluations of the network.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from unialign_jax.models.autoencoder import Moments, denormalize
from unialign_jax.models.autoencoder import sample_latents as latents_of
from unialign_jax.models.mmdit import block_modulations, first_of_pairs, in_pairs, second_of_pairs, without_modulations
from unialign_jax.parallel.activations import BATCH_AXES, axes_that_divide
from unialign_jax.sampling import image as image_sampler
from unialign_jax.sampling.text import SINGLE_STEPS, sample_text

# How the unconditional prediction enters: not at all; through the text at every noise level, or only where
# `Guidance.active` says so; through the text and the condition images, each with a scale of its own.
GUIDANCE_MODES = ("none", "text", "interval", "text_and_image")


class Guidance(NamedTuple):
    """What steers an image; the modes that do not use a field ignore it."""

    scale: jax.Array  # [B] float32, of the text; 1 is the conditional model alone
    image_scale: jax.Array  # [B] float32, of the condition images
    rescale: jax.Array  # [B] float32 in [0, 1], how far the result gets the conditional prediction's contrast back
    active: jax.Array  # [E] bool, the evaluations that are guided in the mode "interval"


def encode_prompts(text_encoder, params, ids):
    """Token ids int32 [B, L] -> T5 embeddings [B, L, D]."""
    return text_encoder.apply({"params": params}, ids)


def encode_images(autoencoder, params, images):
    """uint8 [B, H, W, 3] -> normalised latents float32 [B, h, w, C]: the mean of the posterior, nothing drawn."""
    chex.assert_shape(images, (None, None, None, 3))
    chex.assert_type(images, jnp.uint8)

    def encode(params, image):
        pixels = image[None].astype(jnp.float32) / 127.5 - 1
        moments = autoencoder.apply({"params": params}, pixels, method="encode")
        return latents_of(Moments(*moments), None, autoencoder.config)[0]

    return one_by_one(encode, params, images)


def decode_images(autoencoder, params, latents):
    """Normalised latents [B, h, w, C] -> uint8 [B, H, W, 3]."""
    chex.assert_shape(latents, (None, None, None, autoencoder.config.latent_channels))

    def decode(params, latent):
        raw = denormalize(latent[None], autoencoder.config)
        pixels = autoencoder.apply({"params": params}, raw, method="decode")[0]
        return jnp.clip((pixels + 1) * 127.5 + 0.5, 0, 255).astype(jnp.uint8)

    return one_by_one(decode, params, latents)


def one_by_one(function, params, samples):
    """`function(params, sample)` of each sample [B, ...] in turn; under a mesh each device does its own.

    One image fills a device, and so memory does not grow with the batch. XLA's partitioner cannot split a loop over
    samples: every device would do all of them.
    """

    def local(params, samples):
        return jax.lax.map(functools.partial(function, params), samples)

    axes = axes_that_divide(BATCH_AXES, jax.sharding.get_abstract_mesh(), samples.shape[0])
    if not axes:
        return local(params, samples)
    rows = jax.P(axes)
    return jax.shard_map(local, in_specs=(jax.P(), rows), out_specs=rows, check_vma=False)(params, samples)


def initial_noise(seeds, shape):
    """Standard normal float32 [B, *shape], each sample's from its own seed (uint32 [B])."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32))(seeds)


def advance_images(transformer, params, state, table, prompt, negative, guidance, conditions=None, *, mode):
    """Some evaluations of the image sampler: a state of `sampling.image` -> the state after the rows of `table`.

    The adaLN modulations of all rows are made first, and the loop does not read the weights that made them.

    Args:
      table: SolverTable rows, float32 [E, ...].
      prompt, negative: text embeddings [B, L, D].
      conditions: latents [B, K, h, w, C] or None; the unconditional half sees them too, except that
        "text_and_image" also asks for a prediction without them.
      mode: one of GUIDANCE_MODES.
    Raises:
      ValueError: an unknown mode.
    """
    if mode not in GUIDANCE_MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(GUIDANCE_MODES)}")
    evaluations, batch = len(table.sigma), len(state.latents)
    chex.assert_equal_shape([prompt, negative])
    chex.assert_shape([guidance.scale, guidance.image_scale, guidance.rescale], (batch,))
    chex.assert_shape([*table, guidance.active], (evaluations,))
    rows = block_modulations(transformer.config, params, jnp.asarray(table.sigma, jnp.float32))
    lean = without_modulations(params)

    def network(latents, text, conditions, modulations):
        apply = transformer.apply
        return apply({"params": lean}, latents, text, None, conditions, modulations=modulations).velocity

    def both(latents, modulations):
        """The predictions under the negative and under the given prompt, in one forward of twice the batch.

        The two rows of a sample are neighbours, so that a batch that is split over devices stays so.
        """
        twice = None if conditions is None else in_pairs(conditions, conditions)
        velocities = network(in_pairs(latents, latents), in_pairs(negative, prompt), twice, modulations)
        return first_of_pairs(velocities), second_of_pairs(velocities)

    def velocity(latents, sigma, row):
        modulations, active = row
        conditional = lambda: network(latents, prompt, conditions, modulations)  # noqa: E731
        guided = lambda: image_sampler.text_guidance(  # noqa: E731
            *both(latents, modulations), guidance.scale, guidance.rescale
        )
        if mode == "none":
            return conditional()
        if mode == "text":
            return guided()
        if mode == "interval":
            return jax.lax.cond(active, guided, conditional)
        neither = network(latents, negative, None, modulations)
        image_only, full = both(latents, modulations)
        return image_sampler.two_scale_guidance(
            neither, image_only, full, guidance.image_scale, guidance.scale, guidance.rescale
        )

    return image_sampler.advance(velocity, state, (table, (rows, guidance.active)))


def sample_images(
    transformer, params, seeds, table, prompt, negative, guidance, conditions=None, *, mode, latent_shape
):
    """Latents [B, h, w, C] from noise, all evaluations in one scan; the arguments are those of `advance_images`.

    Args:
      seeds: uint32 [B].
      latent_shape: (h, w, C).
    """
    chex.assert_shape(seeds, (len(prompt),))
    state = image_sampler.start(initial_noise(seeds, latent_shape))
    state = advance_images(transformer, params, state, table, prompt, negative, guidance, conditions, mode=mode)
    return image_sampler.latents(state)


def describe(
    transformer,
    text_encoder,
    params,
    latents,
    ids,
    is_target,
    seeds,
    num_steps,
    temperature,
    threshold,
    entropy_bound,
    *,
    mask_id,
    eos_id,
    decoding,
):
    """The text of an image: T5 and the network fill the masked positions of ids (see `sampling.text.sample_text`).

    Args:
      params: {"transformer": ..., "text_encoder": ...}.
      latents: [B, h, w, C] of the images, clean.
      ids, is_target: [B, L]; what is no target stays, such as a question.
      seeds: uint32 [B].
    Returns: TextSample.
    """
    chex.assert_rank(latents, 4)
    chex.assert_equal_shape([ids, is_target])
    chex.assert_equal_shape_prefix([latents, ids, seeds], 1)
    # The image is clean: one noise level, 0, and so one row of modulations for all steps.
    table = block_modulations(transformer.config, params["transformer"], jnp.zeros((1,)))
    row = jax.tree.map(lambda x: x[0], table)
    lean = without_modulations(params["transformer"])

    def logits(ids):
        text = encode_prompts(text_encoder, params["text_encoder"], ids)
        return transformer.apply({"params": lean}, latents, text, None, modulations=row).text_logits

    return sample_text(
        logits,
        ids,
        is_target,
        jax.vmap(jax.random.key)(seeds),
        num_steps=num_steps,
        mask_id=mask_id,
        eos_id=eos_id,
        single_steps=0 if transformer.config.text_positions else SINGLE_STEPS,
        decoding=decoding,
        temperature=temperature,
        threshold=threshold,
        entropy_bound=entropy_bound,
    )
