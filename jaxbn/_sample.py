"""A shift from the batch itself: the median of the means of three small samples.

A sample is a few positions, spread over every reduced axis. Its mean is near the
batch's, also in sorted data and with borders of one value; and one outlier takes at
most one of three means away, which the median leaves out. Of a small batch, one sample
has all positions: to read it again costs less than to pick some.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _axes, _devices, _sums

SAMPLES, POSITIONS = 3, 16
SMALL = 2**20  # Elements.


def sample_sums(
    x: jax.Array, weights: jax.Array | None, feature_axes: tuple[int, ...]
) -> tuple[list[jax.Array], list[Any]]:
    """The sum of each sample, and its size: a number, or an array."""
    reduced = _axes.others(feature_axes, x.ndim)
    elements = math.prod(x.shape)
    few = isinstance(elements, int) and elements <= SMALL
    counts = {} if few else _spread_over(x, reduced)
    sums, sizes = [], []
    for i in range(1 if few else SAMPLES):
        part, own = _sample(x, counts, i), None
        size: Any = math.prod(_axes.lengths(part, reduced))
        if weights is not None:
            own = _sample(weights, counts, i)
            own = own if own.dtype == jnp.bool_ else own != 0
        if few or own is not None:
            size = _sums.total_weight(part, own, feature_axes)
        sums.append(_sums.weighted_sum(part, own, feature_axes))
        sizes.append(size)
    return sums, sizes


def median_of_means(
    sums: list[jax.Array], sizes: list[Any], fallback: jax.Array | None
) -> jax.Array:
    """The median of the samples' means, or `fallback` (by default 0) if all are empty.

    An empty sample has the mean of the others.
    """
    total: Any = sum(sizes)
    if not isinstance(total, jax.Array):  # Known: all of one size.
        if isinstance(total, int) and total == 0:
            return jnp.zeros_like(sums[0]) if fallback is None else fallback
        return _median_of(
            [of_one / size for of_one, size in zip(sums, sizes, strict=True)]
        )
    mean = _sums.over(sum(sums[1:], sums[0]), total)
    if fallback is not None:
        mean = _devices.where(total > 0, mean, fallback.astype(mean.dtype))
    if len(sums) == 1:
        return mean
    return _median_of(
        [
            _devices.where(size > 0, _sums.over(of_one, size), mean)
            for of_one, size in zip(sums, sizes, strict=True)
        ]
    )


def _median_of(means: list[jax.Array]) -> jax.Array:
    means = [jnp.where(jnp.isfinite(mean), mean, 0) for mean in means]
    if jnp.iscomplexobj(means[0]):
        parts = [m.real for m in means], [m.imag for m in means]
        return lax.complex(*(_median(*part) for part in parts))
    return _median(*means)


def _median(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    return lax.max(lax.min(a, b), lax.min(lax.max(a, b), c))


def _spread_over(x: jax.Array, reduced: tuple[int, ...]) -> dict[int, int]:
    """How many positions to take of each reduced axis: about POSITIONS in all."""
    known = [axis for axis in reduced if isinstance(x.shape[axis], int)]
    counts = dict.fromkeys(set(reduced) - set(known), 1)  # Of a symbolic length.
    left = POSITIONS
    for i, axis in enumerate(sorted(known, key=lambda axis: x.shape[axis])):
        wanted = int(left ** (1 / (len(known) - i)) + 1e-6)
        count = _fitting(max(wanted, 1), x.shape[axis])
        left /= max(count, 1)
        # On an explicit mesh, every device has as many of them.
        parts = _devices.parts_along(x, axis)
        counts[axis] = math.ceil(count / parts) * parts
    return counts


def _fitting(wanted: int, length: int) -> int:
    """So many positions, or fewer.

    A power of two that divides the length is likely to divide it as devices do, whose
    samples are then their own.
    """
    if length % 4 or length == 0:
        return min(wanted, length)
    return 2 ** min(wanted.bit_length() - 1, (length & -length).bit_length() - 1)


def _sample(array: jax.Array, counts: dict[int, int], index: int) -> jax.Array:
    """Positions in the middle of one of SAMPLES parts of equal stretches of an axis."""
    if not counts:
        return array
    start, stop, step = [0] * array.ndim, list(array.shape), [1] * array.ndim
    for axis, count in counts.items():
        length = array.shape[axis]
        if count == 0 or (isinstance(length, int) and length == 1):  # Or is broadcast.
            continue
        every = length // count
        start[axis] = (2 * index + 1) * every // (2 * SAMPLES)
        stop[axis] = start[axis] + (count - 1) * every + 1
        step[axis] = every if count > 1 else 1
    return lax.slice(array, start, stop, step)
