"""Names that older versions of JAX have elsewhere, for the tests."""

import jax

if not hasattr(jax, "set_mesh"):  # before 0.7.1
    jax.set_mesh = jax.sharding.use_mesh
if not hasattr(jax, "enable_x64"):  # before 0.8
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64
