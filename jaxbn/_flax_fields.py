"""What the linen and the nnx module share: from Flax's fields to a layer."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import layers
from jaxbn._running_stats import RunningStats


def standard(module: Any, **fixed: Any) -> layers.Layer:
    """`layers.standard` as the fields of a module say, but for `fixed`."""
    options = {
        "feature_axes": module.axis,
        "momentum": module.momentum,
        "epsilon": module.epsilon,
        "use_scale": module.use_scale,
        "use_bias": module.use_bias,
        "use_fast_variance": module.use_fast_variance,
        "unbiased": module.unbiased,
        "axis_name": module.axis_name,
        "axis_index_groups": module.axis_index_groups,
        "derivatives": module.derivatives,
    }
    return layers.standard(**(options | fixed))


def affine(scale: jax.Array | None, bias: jax.Array | None) -> dict[str, jax.Array]:
    """The layer's parameters: those that the module has."""
    given = {"scale": scale, "bias": bias}
    return {name: value for name, value in given.items() if value is not None}


def stats(mean: jax.Array, var: jax.Array, step: jax.Array | None) -> RunningStats:
    """The layer's state. Only a momentum that is a function needs the step kept."""
    return RunningStats(mean, var, jnp.zeros((), jnp.int32) if step is None else step)


def as_inexact(x: Any) -> jax.Array:
    """`x` as an array; integers as float32, as Flax takes them."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)
