"""The parameters that a network reads in float32, whatever dtype it computes in."""

import re

import jax.numpy as jnp

# These are small, and rounding them would change results. A network rounds all others to its dtype before use, so that
# storing them in that dtype changes no number.
FLOAT32 = re.compile(r"(^|/)(time_embed|image_head_modulation|heads)/|relative_bias$|norm")


def storage_dtype(path: str, dtype) -> jnp.dtype:
    """The dtype to store the parameter at `path` in, for a network that computes in `dtype`."""
    return jnp.dtype(jnp.float32 if FLOAT32.search(path) else dtype)
