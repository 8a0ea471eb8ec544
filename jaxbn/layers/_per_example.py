"""Values per example: moments, and integer ids."""

from math import prod

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _axes, _dtypes
from jaxbn._moments import Moments, moments


def example_moments(
    x: jax.Array,
    feature_axes: tuple[int, ...],
    *,
    weights: ArrayLike | None = None,
    shift: jax.Array | None = None,
    implementation: str | None = None,
) -> Moments:
    """The moments of each example, stacked along a first axis, as is `shift`."""
    batch = _axes.batch_axis(feature_axes, x)
    axes = tuple(sorted((batch, *feature_axes)))
    place = axes.index(batch)
    if shift is not None:
        shift = jnp.moveaxis(shift, 0, place)
    m = moments(
        x,
        feature_axes=axes,
        weights=weights,
        shift=shift,
        implementation=implementation,
    )
    mean, var = (jnp.moveaxis(v, place, 0) for v in (m.mean, m.var))
    if m.count.ndim == 0:
        return Moments(mean, var, jnp.broadcast_to(m.count, mean.shape[:1]))
    return Moments(mean, var, jnp.moveaxis(m.count, place, 0))


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
