"""The sums over the reduced axes that batch norm needs, on one device.

    forward    n = Σw,  Σwδ,  Σw|δ|²    with δ = x − center
    backward   Σdy,  Σdy·δ              with δ = x − mean

and `input_cotangent`, which needs the backward sums.

Weights are in the form that `_axes.weights_like` returns. Where a weight is 0, `x` is
replaced before any arithmetic, so NaN and Inf there have no effect.

XLA's CPU compiler fuses an elementwise producer into a reduction only if nothing else
uses it; otherwise it stores the whole array. Hence `x + (-center)` in one sum and
`x - center` in the other: equal numbers, but two expressions.

XLA's GPU compiler fuses by an estimate of the time, to which each use of an element
adds. Two sums of the same elements are two uses, one complex sum is one (`both`).
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _axes, _devices, _dtypes
from jaxbn._operation import GPUS, Bound, Operation

FeatureAxes = tuple[int, ...]
INT32_MAX = 2**31 - 1


def total_weight(
    x: jax.Array, weights: jax.Array | None, feature_axes: FeatureAxes
) -> jax.Array:
    """Σw: a scalar, or a feature vector if each feature has its own weights."""
    dtype = _dtypes.accumulation(x.dtype)
    reduced = _axes.others(feature_axes, x.ndim)
    if weights is None:
        return _opaque(jnp.asarray(prod(_axes.lengths(x, reduced)), dtype))
    # Counted before broadcasting.
    repeated = [axis for axis in reduced if weights.shape[axis] != x.shape[axis]]
    times = jnp.asarray(prod(_axes.lengths(x, repeated)), dtype)
    total = _opaque(_counted(weights, reduced, dtype) * times)
    features, own = (_axes.lengths(a, feature_axes) for a in (x, weights))
    if own == features or any(n != 1 for n in own):
        return jnp.broadcast_to(total, features)
    return total.reshape(())


def _counted(weights: jax.Array, reduced: FeatureAxes, dtype) -> jax.Array:
    """Σw without broadcasting; booleans count as integers as long as int32 suffices.

    Counting one by one, float32 stops at 2**24 and int32 at 2**31.
    """
    if weights.dtype != jnp.bool_:
        return weights.sum(reduced)
    lengths = _axes.lengths(weights, reduced)
    if not _is_large(prod(lengths)):
        return weights.sum(reduced, dtype=jnp.int32).astype(dtype)
    longest = reduced[lengths.index(max(lengths))]
    rest = tuple(axis for axis in reduced if axis != longest)
    kind = dtype if _is_large(prod(_axes.lengths(weights, rest))) else jnp.int32
    count = weights.sum(rest, keepdims=True, dtype=kind)
    return count.sum(reduced, dtype=dtype)


def _is_large(size: Any) -> bool:
    """Whether `size` exceeds int32. A symbolic size counts as small."""
    return isinstance(size, int) and size > INT32_MAX


def _opaque(count: jax.Array) -> jax.Array:
    """Hides from XLA's compiler that `count` is constant.

    Otherwise it would rewrite (a/n)² as a·a/n², which overflows.
    """
    return lax.optimization_barrier(count)


def weighted_sum(
    x: jax.Array, weights: jax.Array | None, feature_axes: FeatureAxes
) -> jax.Array:
    """Σwx."""
    x = select(_dtypes.widen(x), weights, 0)
    return jnp.sum(times(x, weights), _axes.others(feature_axes, x.ndim))


def central_sums(
    x: jax.Array,
    center: jax.Array,
    weights: jax.Array | None,
    feature_axes: FeatureAxes,
) -> tuple[jax.Array, jax.Array]:
    """Σwδ and Σw|δ|² about `center`. Its derivative keeps x, not δ."""
    reduced = _axes.others(feature_axes, x.ndim)

    def sums(x, center):
        center = _axes.expand(center, feature_axes, x.ndim)
        x = select(_dtypes.widen(x), weights, center)
        first = times(x + (-center), weights)
        return both(first, times(squared(x - center), weights), reduced)

    return jax.checkpoint(sums, prevent_cse=False)(x, center)


def cotangent_sums(
    dy: jax.Array, delta: jax.Array, feature_axes: FeatureAxes
) -> tuple[jax.Array, jax.Array]:
    """Σdy and Σdy·δ."""
    return both(dy, dy * delta, _axes.others(feature_axes, dy.ndim))


def both(
    a: jax.Array, b: jax.Array, reduced: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Σa and Σb; on GPUs one sum, of a + ib."""
    if a.dtype != b.dtype or a.dtype not in (jnp.float32, jnp.float64):
        return _in_two(reduced, a, b)
    general, special = (Bound(form, (reduced,)) for form in (_in_two, _in_one))
    first, second = Operation(general, special, GPUS, mapped=True)(a, b)
    return first, second


def _in_two(reduced: tuple[int, ...], a, b) -> tuple[jax.Array, jax.Array]:
    return jnp.sum(a, reduced), jnp.sum(b, reduced)


def _in_one(reduced: tuple[int, ...], a, b) -> tuple[jax.Array, jax.Array]:
    total = jnp.sum(lax.complex(a, b), reduced)
    return total.real, total.imag


def input_cotangent(
    dy: jax.Array,
    delta: jax.Array,
    k: jax.Array,
    c1: jax.Array,
    c0: jax.Array,
    weights: jax.Array | None,
    feature_axes: FeatureAxes,
) -> jax.Array:
    """k·dy + w·(c1·δ* + c0): the direct term, and the term through the moments."""
    k, c1, c0 = (_axes.expand(v, feature_axes, dy.ndim) for v in (k, c1, c0))
    through_moments = delta.conj() * c1 + c0
    return dy * k + times(through_moments, weights)


def over(total: jax.Array, count: jax.Array) -> jax.Array:
    """A sum divided by a count; 0, or nearly 0, where the count is 0."""
    least = jnp.where(count > 0, count, jnp.finfo(count.dtype).max)
    return total / least


def select(x: jax.Array, weights: jax.Array | None, replacement) -> jax.Array:
    """x, or `replacement` where the weight is 0."""
    return x if weights is None else _devices.where(_present(weights), x, replacement)


def times(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    """wx, or 0 where the weight is 0, whatever x is there."""
    if weights is None:
        return x
    product = x if weights.dtype == jnp.bool_ else x * weights
    return select(product, weights, 0)


def masked_nonfinite(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Where x is not finite and its weight is 0."""
    return ~(_present(weights) | jnp.isfinite(x))


def finite(x: jax.Array, weights: jax.Array | None, replacement) -> jax.Array:
    """x, or `replacement` where it is masked and not finite."""
    if weights is None:
        return x
    return _devices.where(masked_nonfinite(x, weights), replacement, x)


def squared(x: jax.Array) -> jax.Array:
    """|x|²."""
    if jnp.iscomplexobj(x):
        return lax.square(x.real) + lax.square(x.imag)
    return lax.square(x)


def _present(weights: jax.Array) -> jax.Array:
    return weights if weights.dtype == jnp.bool_ else weights != 0
