"""Arrays that would broadcast into a wrong loss are refused with their shapes."""

import jax.numpy as jnp
import pytest

from unialign_jax.losses.cross_modal import cross_modal_loss
from unialign_jax.losses.flow_matching import flow_matching_loss
from unialign_jax.losses.intrinsic_modal import intrinsic_modal_loss
from unialign_jax.losses.masked_text import masked_text_loss
from unialign_jax.models.mmdit import AlignmentHeads, AlignmentHeadsConfig

LATENTS, LOGITS, IDS, MASK = (jnp.zeros(shape) for shape in ((4, 2, 2, 3), (4, 5, 7), (4, 5), (4, 5)))
IDS, MASK = IDS.astype(jnp.int32), MASK.astype(bool)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: flow_matching_loss(LATENTS, LATENTS, jnp.ones((4, 1)), form="x0"), r"\(4, 1\).*\(4\)"),
        (lambda: flow_matching_loss(LATENTS, LATENTS, jnp.ones(())), r"\(\).*\(4\)"),
        (lambda: masked_text_loss(LOGITS, IDS, MASK, MASK, jnp.ones((4, 1)), mask_id=6), r"\(4, 1\).*\(4\)"),
        (lambda: masked_text_loss(LOGITS[0], IDS, MASK, MASK, jnp.ones(4), mask_id=6), r"rank 2 .* expected 3"),
        (lambda: cross_modal_loss(jnp.ones((4, 8)), jnp.ones((4, 8))), r"rank 2 .* expected 3"),
        (lambda: intrinsic_modal_loss(jnp.ones(8), jnp.ones(8)), r"rank 1 .*rank"),
        (
            lambda: AlignmentHeads(AlignmentHeadsConfig(8, 8)).apply({}, jnp.ones((4, 2, 8)), jnp.ones((3, 2, 8))),
            r"\[4, 8\], \[3, 8\]",
        ),
    ],
)
def test_shapes_that_would_broadcast_are_refused(call, found):
    with pytest.raises(AssertionError, match=found):
        call()
