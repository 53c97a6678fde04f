"""The text sampler: ancestral sampling of masked diffusion, batched and with static shapes."""

import jax
import jax.numpy as jnp

from unialign_jax.diffusion import masking


def sample_text(logits_fn, ids_BL, is_target_BL, keys_B, *, num_steps, mask_id):
    """Fills the target positions, starting from all of them masked, over t = 1, 1 - 1/N, ..., 0.

    The step-by-step sampler reveals a masked token between t and s with probability (t - s) / t, draws it
    from the model's prediction and never masks it again. Here each token's time is drawn up front instead
    (uniform and independent, which is the same distribution), so that steps at which nothing happens in the
    whole batch cost no forward pass: at most min(num_steps, targets in the batch) of them are run. (The
    reference ends at t = 1e-5 and takes the most likely token for the one in 1e5 left; ours ends at 0.)

    A sample's outcome depends on its own key and row, not on its neighbours, as long as logits_fn keeps rows
    apart. Call it under jax.jit.

    Args:
      logits_fn: ids [B, L] -> logits [B, L, V], any float type; unrevealed positions of ids hold mask_id.
      ids_BL: int32; where is_target is False, tokens that stay (a question's); elsewhere ignored.
      is_target_BL: bool, the positions to fill.
      keys_B: [B] typed PRNG keys, one a sample.
      num_steps: N, a Python int.
      mask_id: the mask's token id; it is never drawn.
    Returns:
      int32 [B, L], the completed ids.
    Raises:
      ValueError: num_steps below 1, or shapes that do not fit.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a sampler needs at least 1 step")
    if ids_BL.shape != is_target_BL.shape or keys_B.shape != ids_BL.shape[:1]:
        raise ValueError(
            f"ids, is_target and keys have shapes {ids_BL.shape}, {is_target_BL.shape}, {keys_B.shape}; "
            "expected [B, L], [B, L] and [B]"
        )
    length = ids_BL.shape[1]
    time_keys, token_keys = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
    times_BL = jax.vmap(lambda key: masking.unmask_times(key, (length,)))(time_keys)
    # Step k covers the times in (1 - (k + 1)/N, 1 - k/N].
    step_BL = jnp.minimum(jnp.floor((1 - times_BL) * num_steps).astype(jnp.int32), num_steps - 1)

    def unfinished(state):
        _, is_hidden = state
        return jnp.any(is_hidden)

    def reveal(state):
        ids, is_hidden = state
        step = jnp.min(jnp.where(is_hidden, step_BL, num_steps))
        logits = logits_fn(ids).astype(jnp.float32)
        logits = jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(token_keys, step)
        drawn = jax.vmap(jax.random.categorical)(step_keys, logits).astype(ids.dtype)
        revealed = is_hidden & (step_BL == step)
        return jnp.where(revealed, drawn, ids), is_hidden & ~revealed

    start = jnp.where(is_target_BL, jnp.asarray(mask_id, ids_BL.dtype), ids_BL)
    ids, _ = jax.lax.while_loop(unfinished, reveal, (start, jnp.asarray(is_target_BL)))
    return ids
