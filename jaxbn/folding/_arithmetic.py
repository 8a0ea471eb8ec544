"""The arithmetic of folding, on arrays that are already wide."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._normalize import factors


def affine(
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A normalization as `a·x + c`: a = scale/√(var + ε), c = bias − mean·a."""
    _, factor = factors(var, epsilon, scale)
    offset = -mean * factor
    return factor, offset if bias is None else offset + bias


def lay(vector: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """Expands `vector` to rank `ndim`, with its axes at `axes`, in any order."""
    others = tuple(axis for axis in range(ndim) if axis not in axes)
    return jnp.expand_dims(vector.transpose(np.argsort(axes)), others)


def after(kernel: jax.Array, factor: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The kernel of `factor · (W·x)`, whose outputs run along `axes` of the kernel."""
    return kernel * lay(factor, axes, kernel.ndim)


def before(
    kernel: jax.Array,
    factor: jax.Array,
    offset: jax.Array,
    axes: Sequence[int],
    summed: Sequence[int],
) -> tuple[jax.Array, jax.Array]:
    """The kernel of `W·(factor·x + offset)`, and the sum that offset adds to outputs.

    `factor` and `offset` run along `axes` of the kernel; the layer sums over `summed`,
    which the second result lacks. It is a plain sum, because matrix products round to
    bfloat16 on TPUs.
    """
    added = jnp.sum(kernel * lay(offset, axes, kernel.ndim), tuple(summed))
    return kernel * lay(factor, axes, kernel.ndim), added


def per_group(vector: jax.Array, inputs: int, outputs: int) -> jax.Array:
    """Turns a vector over all input channels into one over a kernel's (input, output).

    A kernel with several groups has `inputs` channels per group, and the outputs of
    each group next to each other.
    """
    groups = vector.size // inputs
    return jnp.repeat(vector.reshape(groups, inputs).T, outputs // groups, axis=1)
