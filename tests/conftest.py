"""Every test sees eight virtual CPU devices; programs that name no mesh use the first."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
