"""The image sampler: a solver's table run along the velocity field, and the arithmetic of guidance.

Arrays that do not fit each other raise AssertionError with their shapes.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from unialign_jax.diffusion import flow


class SamplerState(NamedTuple):
    """A sampler between two evaluations of the network; all float32 [B, H, W, C]."""

    latents: jax.Array  # where the network is evaluated next; after the last row, the sample
    clean: jax.Array  # the clean prediction of the last evaluation, 0 before any
    previous: jax.Array  # the one before it


def start(noise: jax.Array) -> SamplerState:
    """The state before the first evaluation; noise [B, H, W, C] is standard normal (sigma 1)."""
    noise = jnp.asarray(noise, jnp.float32)
    return SamplerState(noise, jnp.zeros_like(noise), jnp.zeros_like(noise))


def advance(velocity_fn: Callable, state: SamplerState, rows: tuple) -> SamplerState:
    """The state after the evaluations of `rows`: one scan, whatever the solver.

    The rows may be cut into pieces, one call each. Under jax.jit with rows and parameters traced, other noise levels,
    and another solver with as many evaluations, compile nothing new.

    Args:
      velocity_fn: (latents float32 [B, H, W, C], sigma float32 scalar, a row of the inputs) -> velocity [B, H, W, C],
        already guided, of any float type.
      rows: (SolverTable, inputs), pytrees with a leading axis of evaluations: a `solvers.solver_table` over
        `diffusion.flow.sampling_sigmas`, and whatever else changes from one evaluation to the next, or None.
    """

    chex.assert_equal_shape(state)

    def evaluate(state, row):
        table, inputs = row
        velocity = velocity_fn(state.latents, table.sigma, inputs).astype(jnp.float32)
        chex.assert_equal_shape([velocity, state.latents])
        latents = (
            table.latents * state.latents
            + table.velocity * velocity
            + table.clean * state.clean
            + table.previous * state.previous
        )
        return SamplerState(latents, flow.predict_clean(state.latents, velocity, table.sigma), state.clean), None

    table, inputs = rows
    state, _ = jax.lax.scan(evaluate, state, (jax.tree.map(jnp.asarray, table), inputs))
    return state


def text_guidance(
    unconditional: jax.Array, conditional: jax.Array, scale: ArrayLike, rescale: ArrayLike = 0.0
) -> jax.Array:
    """Classifier-free guidance of velocities, float32: unconditional + scale * (conditional - unconditional).

    A scale of 1 is the conditional model alone, to be used at noise levels without guidance (arXiv 2404.07724).

    Args:
      unconditional, conditional: velocities [B, ...].
      scale: a scalar, or [B].
      rescale: a scalar or [B] in [0, 1]; see `rescale_guidance`.
    """
    chex.assert_equal_shape([unconditional, conditional])
    unconditional, conditional = unconditional.astype(jnp.float32), conditional.astype(jnp.float32)
    guided = unconditional + _per_sample(scale, conditional) * (conditional - unconditional)
    return rescale_guidance(guided, conditional, rescale)


def two_scale_guidance(
    neither: jax.Array,
    image_only: jax.Array,
    both: jax.Array,
    image_scale: ArrayLike,
    text_scale: ArrayLike,
    rescale: ArrayLike = 0.0,
) -> jax.Array:
    """Guidance with a scale for the condition images and one for the text, float32:

        neither + image_scale * (image_only - neither) + text_scale * (both - image_only)

    (InstructPix2Pix, arXiv 2211.09800, eq. 3). An image_scale of 1 is `text_guidance` from image_only to both.

    Args:
      neither, image_only, both: velocities [B, ...] without conditions, with the images, with images and text.
      image_scale, text_scale, rescale: scalars, or [B]; rescale as in `rescale_guidance`, towards `both`.
    """
    chex.assert_equal_shape([neither, image_only, both])
    neither, image_only, both = (velocity.astype(jnp.float32) for velocity in (neither, image_only, both))
    guided = neither + _per_sample(image_scale, both) * (image_only - neither)
    guided = guided + _per_sample(text_scale, both) * (both - image_only)
    return rescale_guidance(guided, both, rescale)


def rescale_guidance(guided: jax.Array, conditional: jax.Array, rescale: ArrayLike) -> jax.Array:
    """Takes back the contrast that guidance adds (Lin et al., arXiv 2305.08891, eq. 15 and 16).

        guided * (rescale * std(conditional) / std(guided) + 1 - rescale)

    The paper uses 0.7. The deviations are over all elements of a sample's velocity, as in diffusers.
    """
    chex.assert_equal_shape([guided, conditional])
    axes = tuple(range(1, guided.ndim))
    wanted, found = (jnp.std(velocity, axis=axes, keepdims=True) for velocity in (conditional, guided))
    factor = jnp.where(found > 0, wanted / jnp.where(found > 0, found, 1), 1)  # a constant field stays
    rescale = _per_sample(rescale, guided)
    return guided * (rescale * factor + (1 - rescale))


def _per_sample(value: ArrayLike, array: jax.Array) -> jax.Array:
    """A scalar or [B] as float32, with trailing axes of size 1 so that it multiplies array [B, ...]."""
    value = jnp.asarray(value, jnp.float32)
    if value.ndim == 0:
        return value
    chex.assert_shape(value, array.shape[:1])
    return value.reshape(value.shape + (1,) * (array.ndim - 1))
