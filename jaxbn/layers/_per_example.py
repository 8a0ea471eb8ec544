"""Values per example: moments, and integer ids."""

from math import prod

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _axes, _devices, _dtypes, _sums
from jaxbn._batch import Batch, checked_batch
from jaxbn._moments import Moments, moments_about


def example_moments(
    x: jax.Array,
    feature_axes: tuple[int, ...],
    *,
    weights: ArrayLike | None = None,
    shift: jax.Array | None = None,
    implementation: str | None = None,
) -> Moments:
    """The moments of each example, stacked along a first axis.

    `shift` is a feature vector near their means.
    """
    axis = _axes.batch_axis(feature_axes, x)
    axes = tuple(sorted((axis, *feature_axes)))
    place = axes.index(axis)
    batch = checked_batch(x, axes, weights, None, None, implementation)
    demanded = batch.kernels and batch.kernels.demanded
    if has_one_position(x, feature_axes) and not demanded:
        m = _of_one_position(batch)
    else:
        if shift is not None:
            shift = _devices.repeat_along(shift, place, x, axis)
        m = moments_about(shift, batch)
    mean, var = (jnp.moveaxis(v, place, 0) for v in (m.mean, m.var))
    if m.count.ndim == 0:
        return Moments(mean, var, jnp.broadcast_to(m.count, mean.shape[:1]))
    return Moments(mean, var, jnp.moveaxis(m.count, place, 0))


def _of_one_position(batch: Batch) -> Moments:
    """Moments of one value each: the values, and variances of 0."""
    rest = _axes.others(batch.feature_axes, batch.x.ndim)
    values = _sums.select(_dtypes.widen(batch.x), batch.weights, 0)
    mean = jnp.squeeze(values, rest)
    return Moments(mean, jnp.zeros_like(mean.real), batch.count)


def has_one_position(x: jax.Array, feature_axes: tuple[int, ...]) -> bool:
    """Whether an example has just one value for each feature, known when tracing."""
    batch = _axes.batch_axis(feature_axes, x)
    rest = _axes.others((batch, *feature_axes), x.ndim)
    return all(isinstance(n, int) and n == 1 for n in _axes.lengths(x, rest))


def positions(x: jax.Array, feature_axes: tuple[int, ...]) -> jax.Array:
    """The number of positions per feature in one example of `x`."""
    batch = _axes.batch_axis(feature_axes, x)
    rest = _axes.others((batch, *feature_axes), x.ndim)
    return jnp.asarray(prod(_axes.lengths(x, rest)), _dtypes.accumulation(x.dtype))


def example_ids(
    name: str, ids: ArrayLike | None, x: jax.Array, feature_axes: tuple[int, ...]
) -> jax.Array:
    """Checks `ids`: an integer for each example, or a scalar for all of them."""
    examples = x.shape[_axes.batch_axis(feature_axes, x)]
    if ids is None:
        raise TypeError(f"`{name}` is needed: an integer for each example.")
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"`{name}` must be integers, got dtype {ids.dtype}. Cast them first, for "
            f"example `{name}.astype(jnp.int32)`."
        )
    if ids.shape not in ((), (examples,)):
        raise ValueError(
            f"`{name}` has shape {ids.shape}, expected ({examples},): one for each "
            f"example of `x` (shape {x.shape}), or () for one that all have."
        )
    return ids
