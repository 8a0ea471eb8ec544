"""Mean and variance of a batch: `moments`, and `merge_moments` to pool them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _axes, _compat, _devices, _dtypes, _kernels, _sums
from jaxbn._batch import Batch, checked_batch
from jaxbn._shift import (
    Sampled,
    SampledWhereFree,
    Shift,
    checked_shift,
    shift_named,
    shift_of,
)


@_compat.exportable("jaxbn.Moments")
class Moments(NamedTuple):
    """Mean, variance and total weight of a batch, or of a part of one.

    Attributes:
      mean: Array with the shape of the feature axes; complex for complex data.
      var: Biased variance E[|x − mean|²], real and never negative, of the same shape.
      count: The total weight n, summed over the devices of `axis_name`: a scalar, or an
        array with the shape of the feature axes if each feature has its own weights
        (`weights` has full length along any of them).

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> jaxbn.moments(jnp.array([[1.0, 10.0], [3.0, 10.0]]))._asdict()
      {'mean': Array([ 2., 10.], dtype=float32), 'var': Array([1., 0.], dtype=float32), 'count': Array(2., dtype=float32)}
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array


@_dtypes.mixing
def moments(
    x: ArrayLike,
    *,
    feature_axes: _axes.Axes = -1,
    weights: ArrayLike | None = None,
    shift: ArrayLike | str | None = None,
    axis_name: _devices.AxisName | None = None,
    axis_index_groups: _devices.Groups | None = None,
    implementation: str | None = None,
) -> Moments:
    """Computes the mean and biased variance of `x` over all axes but the feature axes.

        n = Σw      mean = Σwx / n      var = Σw|x − mean|² / n

    All sums run over the reduced axes and over the devices of `axis_name`. The result
    describes the whole batch, however it is split.

    Args:
      x: Floating or complex array of any rank. Sums are accumulated in float32, or in
        float64 for 64-bit input.
      feature_axes: The axes to keep, an integer or a tuple. By default the last.
      weights: Boolean mask or non-negative numbers (frequencies) that broadcast against
        `x` by NumPy's rule; by default all 1. Where the weight is 0, `x` may be
        anything, including NaN and infinity. Gradients stop at the weights.
      shift: Chooses the algorithm. None reads `x` twice and is exact for any ratio of
        mean to standard deviation. An array with the shape of the feature axes, such as
        a running mean, reads `x` once. The nearer it is to the mean, the more exact the
        variance: its relative error grows as 1 + ((shift − mean) / std)². The array
        must be the same on all devices of `axis_name` (of each group, if there are
        groups). Its entries that are not finite count as 0, and gradients stop at it.
        "sample" computes the shift from the batch: the mean of `x` if it has at most
        2²⁰ elements, otherwise the median of the means of three samples of up to 16
        positions each. A large `x` is then read once. The variance is inexact only if
        whole samples are outliers, or if the mask leaves none of their positions.
      axis_name: Name or names of mapped axes (`jax.shard_map`, `jax.pmap`, `jax.vmap`)
        to sum over. This takes one all-reduce if `shift` is an array, and two if it is
        None or "sample", or with the CPU kernels.
      axis_index_groups: Groups of indices that partition the only axis in `axis_name`.
        Each group has its own moments.
      implementation: How the sums are computed. "xla" uses XLA. "native" requires the
        kernels of jaxbn-cpu, which read `x` once and are exact for any shift. None uses
        these kernels if they are installed, support the dtypes and axes, and the
        program is lowered for a CPU.

    Returns:
      `Moments(mean, var, count)` in the accumulation dtype; `mean` and `var` have the
      shape of the feature axes, in ascending order. Where the total weight is 0, `var`
      is 0 and `mean` is the shift, or 0. The sums over devices are named
      "jaxbn_moments" for `jax.checkpoint` policies.

    Raises:
      TypeError: `x` is not floating or complex, `weights` are complex, or `shift` is
        complex and `x` is real.
      ValueError: An axis is out of range or named twice, `shift` does not have the
        shape of the feature axes, `weights` do not broadcast, the groups do not
        partition the axis, or `implementation` is unknown or not available.
      NameError: `axis_name` is not bound.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0], [jnp.nan, jnp.inf]])
      >>> m = jaxbn.moments(x, weights=jnp.array([[True], [True], [False]]))
      >>> print(m.mean, m.var, m.count)
      [2. 4.] [1. 4.] 2.0

    References:
      Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983):
      the shifted sums, and the corrected two-pass algorithm, which shifts by the mean
      of a first pass.
    """
    over = axis_name, axis_index_groups
    batch = checked_batch(x, feature_axes, weights, *over, implementation)
    return moments_about(shift_named(shift), batch)


@_dtypes.mixing
def merge_moments(
    moments_: Moments,
    axis: _axes.Axes = 0,
    *,
    shift: ArrayLike | None = None,
    axis_name: _devices.AxisName | None = None,
) -> Moments:
    """Pools the moments of several parts into the moments of all their data.

        n = Σnₖ      mean = Σnₖ·meanₖ / n
        var = Σnₖ·varₖ / n + Σnₖ|meanₖ − mean|² / n

    The result equals `moments` of the concatenated batches, in any order and for any
    counts. Empty parts (count 0) have no effect.

    Args:
      moments_: `Moments` with additional axes, as `jax.lax.scan` and `jax.vmap` stack
        them. If the count of each part is a scalar, the stacked count has only these
        axes. If these axes come first, the count may also have the first of the feature
        axes without the others, as for stacked layers or for `domain`.
      axis: The stacked axes, as axes of `moments_.mean`.
      shift: None, or a vector near the pooled mean, as for `moments`. With a vector,
        pooling over `axis_name` takes one all-reduce; otherwise two.
      axis_name: Name or names of mapped axes to pool over as well, as for `moments`.

    Returns:
      `Moments` without the stacked axes.

    Raises:
      TypeError: `moments_` is not `Moments`, or its variance is complex.
      ValueError: An axis is out of range, or `moments_.count` has neither the shape of
        the stacked axes nor the shape of `moments_.mean`.
      NameError: `axis_name` is not bound.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> x = jnp.arange(12.0).reshape(3, 4, 1)  # three parts of four examples
      >>> merged = jaxbn.merge_moments(jax.vmap(jaxbn.moments)(x))
      >>> print(merged.mean, merged.var, merged.count)
      [5.5] [11.916667] 12.0

    References:
      Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).
    """
    if not isinstance(moments_, Moments):
        raise TypeError(f"`moments_` must be `Moments`, got {type(moments_).__name__}.")
    mean = _dtypes.inexact_array("moments_.mean", moments_.mean)
    var = _dtypes.inexact_array("moments_.var", moments_.var)
    count = _dtypes.array("moments_.count", moments_.count)
    _dtypes.require_no_imaginary_loss("moments_.var", var, "a variance", jnp.float32)
    if var.shape != mean.shape:
        raise ValueError(
            f"`moments_.var` has shape {var.shape}, expected that of `moments_.mean`, "
            f"{mean.shape}."
        )
    stacked = _axes.canonical(axis, mean.ndim, "axis")
    features = _axes.others(stacked, mean.ndim)
    if count.shape == _axes.lengths(mean, stacked):
        weights = jnp.expand_dims(count, features)
    elif count.shape == mean.shape:
        weights = count
    elif _leads(count, mean, stacked):
        weights = jnp.expand_dims(count, tuple(range(count.ndim, mean.ndim)))
    else:
        raise ValueError(
            f"`moments_.count` has shape {count.shape}, expected that of the stacked "
            f"axes, {_axes.lengths(mean, stacked)}, or of `moments_.mean`, "
            f"{mean.shape}. Name every stacked axis in `axis`, got {axis}."
        )
    weights = _axes.weights_like(weights, mean, _dtypes.accumulation(mean.dtype))

    def central_sums(mean, center, weights, features):
        sums = _sums.central_sums(mean, center, weights, features)
        return *sums, _sums.weighted_sum(var, weights, features)

    parts = Batch(mean, features, weights, axis_name)
    whole = pooled(parts, checked_shift(shift, parts), central_sums)
    if count.ndim == len(stacked):
        return whole._replace(count=whole.count.reshape(()))
    counts = jnp.broadcast_to(whole.count, whole.mean.shape)
    same = tuple(range(count.ndim - len(stacked), counts.ndim))
    return whole._replace(count=jnp.max(counts, same, initial=0))


def _leads(count: jax.Array, mean: jax.Array, stacked: tuple[int, ...]) -> bool:
    """Whether the stacked axes come first, and the count the mean's first axes."""
    first = stacked == tuple(range(len(stacked))) and count.ndim >= len(stacked)
    return first and count.shape == mean.shape[: count.ndim]


def moments_about(shift: Shift, batch: Batch) -> Moments:
    """`moments` of a checked batch."""
    if not (shift is None or isinstance(shift, (Sampled, SampledWhereFree))):
        shift = _dtypes.inexact_array("shift", shift)
    how = batch._replace(x=None, weights=None)
    return _moments_about(how, batch.x, batch.weights, shift)


# Traced once for each kind of arguments, and one program when called without `jit`.
@functools.partial(jax.jit, static_argnums=0)
def _moments_about(how: Batch, x: jax.Array, weights, shift) -> Moments:
    batch = how._replace(x=x, weights=weights)
    shift, kernels = shift_of(shift, batch), batch.kernels
    if kernels and batch.axis_name is not None and shift is not None:
        kernels = _kernels.unless_for_accelerators(kernels)
    if not kernels:
        return pooled(batch, shift, _sums.central_sums)
    known = _kernels.first_pass(batch.x, shift, batch.weights, kernels)

    def central_sums(x, center, weights, _):
        return _kernels.central_sums(x, center, known, weights, kernels)

    return pooled(batch, shift, central_sums, known.mean)


def pooled(
    batch: Batch,
    shift: jax.Array | None,
    central_sums: Callable[..., tuple[jax.Array, ...]],
    known_mean: jax.Array | None = None,
) -> Moments:
    """The moments of values, or of parts whose means are `batch.x`.

    `central_sums(x, center, weights, feature_axes)` returns Σwδ, Σw|δ|² and, for parts,
    the sum of their variances. This device's mean, if known, is a better center than
    the shift. The center is a constant, because neither moments nor their derivatives
    depend on it.
    """
    _devices.require_bound(batch.axis_name, batch.axis_index_groups)
    if shift is not None and batch.axis_index_groups is None:  # Groups may differ.
        _devices.require_same_on_all("shift", shift, batch.axis_name)
    data = batch.weights, batch.feature_axes
    if shift is not None and known_mean is None:
        *sums, count = batch.all_sum(*central_sums(batch.x, shift, *data), batch.count)
        return _from_sums(shift, count, *sums)
    center, count = _mean(batch, known_mean)
    if shift is not None:
        center = _devices.where(count > 0, center, shift)
    sums = batch.all_sum(*central_sums(batch.x, center, *data))
    return _from_sums(center, count, *sums)


def _mean(batch: Batch, here: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """First pass: the mean, as a constant, and the count. `here` is the local mean."""
    count = batch.count
    if here is not None and batch.axis_name is None:
        mean, count = batch.all_sum(here, count)
        return mean, count
    total = batch.total if here is None else count * here
    total, count = batch.all_sum(total, count)
    return _sums.over(total, count), count


def _from_sums(
    center: jax.Array,
    count: jax.Array,
    first: jax.Array,
    second: jax.Array,
    within: jax.Array | None = None,
) -> Moments:
    """The moments from sums about a center."""
    offset = _sums.over(first, count)
    # Where Σ|δ|² overflows, var is infinite, not inf − inf.
    excess = jnp.where(jnp.isfinite(second), _sums.squared(offset), 0)
    var = _sums.over(second, count) - excess
    # Not maximum(var, 0), whose derivative is halved where var is 0.
    var = jnp.where(var < 0, 0, var)
    if within is not None:
        var = var + _sums.over(within, count)
    return Moments(center + offset, var, count)


def finite_only(m: Moments) -> Moments:
    """The same moments, with count 0 where the mean or the variance is not finite."""
    finite = jnp.isfinite(m.mean) & jnp.isfinite(m.var)
    count = whole_count(m)
    return m._replace(count=_devices.where(finite, count, jnp.zeros_like(count)))


def whole_count(m: Moments) -> jax.Array:
    """The count with the shape and sharding of the mean."""
    mean, count = jnp.asarray(m.mean), jnp.asarray(m.count)
    count = jnp.expand_dims(count, tuple(range(count.ndim, mean.ndim)))
    return _devices.shard_like(jnp.broadcast_to(count, mean.shape), mean)
