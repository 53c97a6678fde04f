"""Which parameters a network reads in float32, whatever dtype it computes in."""

import re

import jax.numpy as jnp

# Small, and rounding them would change results; all others a network rounds to its dtype before it uses them, so that
# keeping them in that dtype changes no number.
FLOAT32 = re.compile(r"(^|/)(time_embed|image_head_modulation|heads)/|relative_bias$|norm")


def storage_dtype(path: str, dtype):
    """The dtype that the parameter at `path` may be kept in for a network that computes in `dtype`."""
    return jnp.dtype(jnp.float32 if FLOAT32.search(path) else dtype)
