"""What the tests need to run with older versions of JAX and Flax."""

import sys
import types

import flax
import jax
import jaxlib
import pytest

assert jaxlib  # `jax` alone may be a folder.
JAX = jax.__version_info__
FLAX = tuple(int(n) for n in flax.__version__.split(".")[:3])

if not hasattr(jax, "set_mesh"):  # before 0.7.1
    jax.set_mesh = jax.sharding.use_mesh
if not hasattr(jax, "enable_x64"):  # before 0.8
    from jax.experimental import enable_x64

    jax.enable_x64 = enable_x64
if not hasattr(jax.lax, "pcast"):  # before 0.8
    jax.lax.pcast = lambda array, names, *, to: jax.lax.pvary(array, names)


class Missing:
    """Any class or function of `jaxbn.nnx`: a test that calls it is skipped."""

    def __init__(self, *args, **kwargs):
        pytest.skip("jaxbn.nnx needs Flax 0.12.0")


def any_name(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing


if FLAX < (0, 12):
    stand_in = types.ModuleType("jaxbn.nnx")
    stand_in.__getattr__ = any_name
    sys.modules["jaxbn.nnx"] = stand_in
