"""The text sampler: masked diffusion from all tokens masked to none, batched and with static shapes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from unialign_jax.diffusion import masking
from unialign_jax.sampling import DECODINGS

SINGLE_STEPS = 4  # of "top_k" for a model without text positions


class TextSample(NamedTuple):
    ids: jax.Array  # int32 [B, L], the completed ids; of a sampler that was stopped, the mask's id in hidden targets
    evaluations: jax.Array  # int32, how often the network ran on the batch


def sample_text(
    logits_fn: Callable[[jax.Array], jax.Array],
    ids_BL: jax.Array,
    is_target_BL: jax.Array,
    keys_B: jax.Array,
    *,
    num_steps: ArrayLike,
    mask_id: int,
    eos_id: int | None = None,
    single_steps: ArrayLike = 0,
    decoding: str = "ancestral",
    temperature: ArrayLike = 1.0,
    threshold: ArrayLike = 0.9,
    entropy_bound: ArrayLike = 0.1,
    evaluations: ArrayLike = 0,
    most: ArrayLike | None = None,
) -> TextSample:
    """Fills the target positions, starting from all of them masked.

    Each step runs the network on the batch, draws a token for every masked position, and reveals some of them:

    - "ancestral", the reference's process (MDLM) over t = 1, 1 - 1/N, ..., 0: a masked token is revealed between t and
      s with probability (t - s) / t. Here each token's time is drawn up front, uniform and independent, which is the
      same distribution. So steps that reveal nothing in the whole batch cost no forward pass: at most min(num_steps,
      targets in the batch) are run. (The reference ends at t = 1e-5 and takes the likeliest token for the one in 1e5
      left; ours ends at 0.)
    - "top_k" (LLaDA's low-confidence remasking, arXiv 2502.09992): the ceil(masked / steps left) surest positions of a
      sample, so that num_steps steps are enough.
    - "confidence": every position whose likeliest token has probability `threshold` or more, and at least the surest.
      num_steps does not matter.
    - "entropy" (EB-sampler, arXiv 2505.24857): positions in the order of their entropy, as long as the sum of the
      entropies revealed, less the largest, is at most `entropy_bound` (nats); at least one. This bounds the loss from
      drawing them independently. num_steps does not matter.

    Probability and entropy are the model's own, before temperature: the choice of positions does not depend on the
    tokens drawn. (LLaDA takes the probability of the drawn token, which is the same at temperature 0.)

    Two rules protect texts in all decodings but "ancestral", which stays the reference's:

    - With `eos_id`, end-of-text comes last. Sentences of all lengths agree on end-of-text after their end and differ in
      their words, so the surest position would often end the text too early. A position whose likeliest token is
      end-of-text waits while another hidden position of its sample predicts a word; top_k spreads the words over its
      steps. When only ends are left, the rightmost come first: an end there says least about the length.
    - In the first `single_steps` steps top_k reveals one token. A model without text positions predicts the same word
      at every masked position until it sees a first one.

    A text may be filled in parts: a call with `most` stops after so many evaluations. The next one goes on from the ids
    and evaluations of its TextSample, with all else the same. The tokens are those of a single call.

    A sample's outcome depends on its own key and row, not on its neighbours, if logits_fn keeps rows apart. Call it
    under jax.jit: everything but decoding and mask_id may be traced.

    Args:
      logits_fn: ids [B, L] -> logits [B, L, V], any float type; unrevealed positions of ids hold mask_id.
      ids_BL: int32; where is_target is False, tokens that stay (a question's); elsewhere ignored.
      is_target_BL: bool, the positions to fill.
      keys_B: [B] typed PRNG keys, one a sample.
      num_steps: N, an int32 scalar of at least 1.
      mask_id: the mask's token id, the tokenizer's last; neither it nor what a larger vocabulary has beyond is drawn.
      eos_id: the id of end-of-text, which then comes last; None treats it as any token.
      single_steps: an int32 scalar; it takes at most half of num_steps.
      temperature: of the draw, a scalar or [B]; 1 draws from the model, 0 takes the likeliest token.
      threshold: of "confidence", a scalar or [B]; above 1 it reveals one token a step.
      entropy_bound: of "entropy", a scalar or [B]; 0 or less reveals one token a step, or those that are certain.
      evaluations: an int32 scalar, those that the text has had in earlier calls; 0 masks all targets first.
      most: an int32 scalar, after how many evaluations of this call it stops; None is when all is revealed.

    Raises ValueError for an unknown decoding, num_steps below 1 (where it is not traced), and shapes that do not fit.
    """
    if decoding not in DECODINGS:
        raise ValueError(f"decoding is {decoding!r}; expected one of {', '.join(DECODINGS)}")
    if isinstance(num_steps, int) and num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a sampler needs at least 1 step")
    if ids_BL.shape != is_target_BL.shape or keys_B.shape != ids_BL.shape[:1]:
        raise ValueError(
            f"ids, is_target and keys have shapes {ids_BL.shape}, {is_target_BL.shape}, {keys_B.shape}; "
            "expected [B, L], [B, L] and [B]"
        )
    batch, length = ids_BL.shape
    num_steps = jnp.asarray(num_steps, jnp.int32)
    temperature, threshold, entropy_bound = (
        jnp.broadcast_to(jnp.asarray(value, jnp.float32), (batch,))[:, None]
        for value in (temperature, threshold, entropy_bound)
    )
    time_keys, token_keys = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
    times_BL = jax.vmap(lambda key: masking.unmask_times(key, (length,)))(time_keys)
    # Ancestral step k covers the times in (1 - (k + 1)/N, 1 - k/N].
    step_BL = jnp.minimum(jnp.floor((1 - times_BL) * num_steps).astype(jnp.int32), num_steps - 1)

    def choose(logits, is_hidden, step):
        """bool [B, L], the hidden positions to reveal now."""
        if decoding == "ancestral":
            return is_hidden & (step_BL == step)
        probabilities = jax.nn.softmax(logits)
        if decoding == "entropy":
            doubt = jnp.sum(jax.scipy.special.entr(probabilities), axis=-1)
        else:
            doubt = -jnp.max(probabilities, axis=-1)
        is_end = jnp.zeros_like(is_hidden) if eos_id is None else jnp.argmax(logits, axis=-1) == eos_id
        waits = is_end & jnp.any(is_hidden & ~is_end, axis=-1, keepdims=True)
        is_ready = is_hidden & ~waits
        # Ready positions first: words from the surest on, ends from the right; rank is a position's place in it.
        order = jnp.lexsort((jnp.where(is_end, -jnp.arange(length), doubt), waits, ~is_hidden), axis=-1)
        rank = jnp.argsort(order, axis=-1)
        ready = jnp.sum(is_ready, axis=-1, keepdims=True)
        if decoding == "confidence":
            count = jnp.sum(is_ready & (-doubt >= threshold), axis=-1, keepdims=True)
        elif decoding == "entropy":
            ordered = jnp.take_along_axis(doubt, order, axis=-1)
            within = jnp.cumsum(ordered, axis=-1) - jax.lax.cummax(ordered, axis=1) <= entropy_bound
            count = jnp.sum(within & (jnp.arange(length) < ready), axis=-1, keepdims=True)
        else:
            left = jnp.maximum(num_steps - step, 1)
            count = jnp.where(left == 1, jnp.sum(is_hidden, axis=-1, keepdims=True), -(-ready // left))
            count = jnp.where(step < jnp.minimum(single_steps, num_steps // 2), 1, count)
        return is_hidden & (rank < jnp.maximum(count, 1))

    def unfinished(state):
        _, is_hidden, done = state
        return jnp.any(is_hidden) & (True if last is None else done < last)

    def reveal(state):
        ids, is_hidden, evaluations = state
        # A sample that is not finished has been through every evaluation, so that the count is its own step as well.
        step = jnp.min(jnp.where(is_hidden, step_BL, num_steps)) if decoding == "ancestral" else evaluations
        logits = logits_fn(ids).astype(jnp.float32)
        logits = jnp.where(jnp.arange(logits.shape[-1]) >= mask_id, -jnp.inf, logits)
        step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(token_keys, step)
        # The largest of logits + temperature * Gumbel noise is a draw from softmax(logits / temperature).
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(step_keys)
        drawn = jnp.argmax(logits + temperature[..., None] * noise, axis=-1).astype(ids.dtype)
        revealed = choose(logits, is_hidden, step)
        return jnp.where(revealed, drawn, ids), is_hidden & ~revealed, evaluations + 1

    evaluations = jnp.asarray(evaluations, jnp.int32)
    last = None if most is None else evaluations + jnp.asarray(most, jnp.int32)
    masked = jnp.where(is_target_BL & (evaluations == 0), jnp.asarray(mask_id, ids_BL.dtype), ids_BL)
    state = masked, is_target_BL & (masked == mask_id), evaluations
    ids, _, evaluations = jax.lax.while_loop(unfinished, reveal, state)
    return TextSample(ids, evaluations)
