"""How parameters move: AdamW with a schedule and clipping, what stays frozen, and the average of the weights."""

import re

import jax
import jax.numpy as jnp
import optax


def make_schedule(learning_rate, warmup_steps, *, cooldown_start=0, cooldown_steps=0):
    """step -> learning rate: linear warm-up, constant, and with `cooldown_steps` a linear fall to 0.

    The first update (step 0) already moves, by learning_rate / warmup_steps, and step warmup_steps - 1 is the
    first at full rate; the reference's first update has rate 0 and all others lag ours by one step. The fall begins
    after step cooldown_start - 1, and step cooldown_start + cooldown_steps - 1 is the last above 0.
    """

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        factor = jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
        if cooldown_steps:
            left = (cooldown_start + cooldown_steps - step) / cooldown_steps
            factor *= jnp.clip(left, 0.0, 1.0)
        return learning_rate * factor

    return schedule


def make_optimizer(
    *,
    learning_rate,
    warmup_steps,
    weight_decay,
    clip_norm,
    b1,
    b2,
    eps,
    decay_1d=True,
    freeze=(),
    cooldown_start=0,
    cooldown_steps=0,
):
    """AdamW as torch defines it, behind a clip of the gradients' global norm.

    Args:
      weight_decay: decoupled; scaled by the learning rate.
      clip_norm: largest global norm of the gradients that are not frozen.
      decay_1d: True decays every parameter, as the reference does; False spares biases and norm scales. Those
        are told by their names "bias" and "scale" too, for the stacked blocks store them with two axes.
      freeze: regular expressions, searched in each parameter's path ("transformer/blocks/joint/image/qkv/kernel").
        A parameter found by one gets no update, no decay, no share in the norm and no optimizer memory.
      cooldown_start, cooldown_steps: see `make_schedule`.
    Returns:
      (optax.GradientTransformation, schedule: step -> learning rate).
    Raises:
      ValueError: from `init`, when a pattern of freeze finds no parameter.
    """
    schedule = make_schedule(learning_rate, warmup_steps, cooldown_start=cooldown_start, cooldown_steps=cooldown_steps)
    tx = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            schedule,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=None if decay_1d else _has_matrices,
        ),
    )
    if freeze:
        tx = optax.partition({"train": tx, "freeze": optax.set_to_zero()}, lambda p: freeze_labels(p, freeze))
    return tx, schedule


def freeze_labels(params, freeze):
    """A tree like params of "freeze", where a pattern is found in the parameter's path, and "train" elsewhere."""
    paths = [_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in freeze:
        if not any(re.search(pattern, path) for path in paths):
            raise ValueError(
                f"optimizer.freeze has {pattern!r}, which finds none of the {len(paths)} parameters; "
                f"the first is {paths[0]!r}"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "freeze" if any(re.search(p, _path(path)) for p in freeze) else "train", params
    )


def ema_update(ema, params, decay, step, start=0):
    """The exponential moving average of the weights after an update: decay * ema + (1 - decay) * params, float32.

    Args:
      decay: a number in [0, 1), or traced.
      step: the number of the update, an int or traced; while it is below start the average is a copy of params.
    """
    # 1 - decay, taken before float32 rounds a decay close to 1, and applied to the difference for the same reason.
    fraction = jnp.where(jnp.asarray(step) < start, 1.0, 1 - decay)

    def move(average, new):
        average = average.astype(jnp.float32)
        return average + fraction * (new.astype(jnp.float32) - average)

    return jax.tree.map(move, ema, params)


def _path(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _has_matrices(params):
    """True where weight decay applies when vectors are spared."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x.ndim > 1 and _path(path).split("/")[-1] not in ("bias", "scale"), params
    )
