"""How parameters move: AdamW with a schedule and clipping, frozen parameters, and the average of the weights."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from unialign_jax.parallel.sharding import path_string

Optimizer = optax.GradientTransformation


def make_schedule(
    learning_rate: float, warmup_steps: int, *, cooldown_start: int = 0, cooldown_steps: int = 0
) -> optax.Schedule:
    """step -> learning rate: linear warm-up, constant, and with `cooldown_steps` a linear fall to 0.

    Step s < warmup_steps has the rate learning_rate * (s + 1) / warmup_steps, so that the first update already moves
    the weights; in the reference the first rate is 0, and all others come one step later than here. Step
    cooldown_start is the last at full rate, and from step cooldown_start + cooldown_steps on the rate is 0.
    """
    # Not optax.linear_schedule: its first rates lose digits, and its last is not exactly 0.

    def schedule(step):
        factor = jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
        if cooldown_steps:
            factor *= jnp.clip((cooldown_start + cooldown_steps - step) / cooldown_steps, 0.0, 1.0)
        return learning_rate * factor

    return schedule


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    weight_decay: float,
    clip_norm: float,
    b1: float,
    b2: float,
    eps: float,
    decay_1d: bool,
    mu_dtype: str = "float32",
    freeze: Sequence[str] = (),
    cooldown_start: int = 0,
    cooldown_steps: int = 0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW as torch defines it, behind a clip of the gradients' global norm, and its schedule.

    Raises ValueError from `init` when a pattern of `freeze` finds no parameter.

    Args:
      weight_decay: decoupled; scaled by the learning rate.
      clip_norm: largest global norm of the gradients that are not frozen.
      decay_1d: whether biases and norm scales decay too. They are told by their names, for the stacked blocks store
        them with two axes.
      mu_dtype: of the gradients' average (the first moment) as it is kept; it is computed in float32.
      freeze: regular expressions, searched in each parameter's path ("transformer/blocks/joint/image/qkv/kernel"). A
        match gets no update, no decay, no share in the norm and no optimizer memory.
    """
    schedule = make_schedule(learning_rate, warmup_steps, cooldown_start=cooldown_start, cooldown_steps=cooldown_steps)
    mask = None if decay_1d else _has_matrices
    tx = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask, mu_dtype=mu_dtype),
    )
    if freeze:
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, lambda p: freeze_labels(p, freeze))
    return tx, schedule


def freeze_labels(params: dict, freeze: Sequence[str]) -> dict:
    """A tree like `params` of "freeze", where a pattern is found in the parameter's path, and "train" elsewhere."""
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in freeze:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"optimizer.freeze has {pattern!r}, which finds none of the {len(paths)} parameters; "
                f"the first is {paths[0]!r}"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "freeze" if any(re.search(p, path_string(path)) for p in freeze) else "train", params
    )


def ema_update(ema: dict, params: dict, decay: float | jax.Array) -> dict:
    """The exponential moving average of the weights after an update: decay * ema + (1 - decay) * params, float32."""

    def move(average, new):
        # `optax.incremental_update` computes the sum of two products, whose factors in float32 do not add up to 1.
        average = average.astype(jnp.float32)
        return average + (1 - decay) * (new.astype(jnp.float32) - average)

    return jax.tree.map(move, ema, params)


def _has_matrices(params: dict) -> dict:
    """True where weight decay applies when vectors are spared."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim > 1 and path_string(path).split("/")[-1] not in ("bias", "scale"), params
    )
