"""`sufficient_statistics`, and `normalize_moments` to turn them into moments."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _axes, _dtypes, _sums
from jaxbn.interop.tf_nn import _arguments


def sufficient_statistics(
    x: ArrayLike,
    axes: int | Sequence[int],
    shift: ArrayLike | None = None,
    keepdims: bool = False,
    name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Computes the count and sums of `x`, like `tf.nn.sufficient_statistics`.

        counts = n      m_ss = Σ(x − shift)      v_ss = Σ|x − shift|²

    Sums of several parts can be added, if they have the same shift. Without a shift
    near the mean, the variance from `normalize_moments` loses all its digits if
    mean/std is large. `moments` and `jaxbn.merge_moments` do not lose them, so prefer
    these.

    Args:
      x: Floating or complex array.
      axes: The axes to reduce.
      shift: Array near the mean that broadcasts against `x` with length 1 along `axes`,
        or None for 0.
      keepdims: Whether to keep the reduced axes with length 1.
      name: The `jax.named_scope` of the operations, by default "sufficient_statistics".

    Returns:
      `(counts, m_ss, v_ss, shift)` in float32, or float64 for 64-bit `x`; TensorFlow
      stays in the dtype of `x`, where squares of float16 soon overflow. `counts` is a
      scalar, `v_ss` is real, and `shift` is None if none was given. Without `keepdims`,
      `shift` lacks the reduced axes, like the sums, so it can be added to the mean;
      TensorFlow's shift keeps them.

    Raises:
      TypeError: `x` or `shift` is not floating or complex, or only `shift` is complex.
      ValueError: An axis is out of range or named twice, or `shift` does not broadcast
        against `x` or varies along `axes`.

    Example:
      >>> from jaxbn.interop import tf_nn
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> print(*tf_nn.sufficient_statistics(x, [0], shift=jnp.array([2.0, 3.0])))
      2.0 [0. 2.] [ 2. 10.] [2. 3.]

    References:
      https://www.tensorflow.org/api_docs/python/tf/nn/sufficient_statistics
    """
    with _arguments.scope(name, "sufficient_statistics"):
        x = _dtypes.inexact_array("x", x)
        reduced = _axes.canonical(axes, x.ndim, "axes")
        features = _axes.others(reduced, x.ndim)
        given = (
            jnp.zeros((), x.dtype) if shift is None else _checked_shift(shift, "x", x)
        )
        given = given.astype(_dtypes.widen(x).dtype)
        center = _arguments.feature_vector("shift", given, x, reduced)
        counts = _sums.total_weight(x, None, features)
        first, second = _sums.central_sums(x, center, None, features)
        if shift is not None:
            shift = given if keepdims else _without(given, reduced, x.ndim)
        return (
            counts,
            _arguments.with_dims(first, reduced, keepdims),
            _arguments.with_dims(second, reduced, keepdims),
            shift,
        )


def normalize_moments(
    counts: ArrayLike,
    mean_ss: ArrayLike,
    variance_ss: ArrayLike,
    shift: ArrayLike | None,
    name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Converts sufficient statistics to moments, like `tf.nn.normalize_moments`.

        mean = mean_ss / counts + shift
        variance = max(0, variance_ss / counts − |mean_ss / counts|²)

    Args:
      counts: Number of elements, a scalar or an array. All arguments broadcast.
      mean_ss: Sum of x − shift, floating or complex.
      variance_ss: Sum of |x − shift|², real.
      shift: The shift that was subtracted, or None for 0.
      name: The `jax.named_scope` of the operations, by default "normalize".

    Returns:
      `(mean, variance)` in the dtypes of `mean_ss` and `variance_ss`. The variance is
      never negative (in TensorFlow, rounding can make it so). Where `counts` is 0, the
      mean is the shift, and the variance is 0.

    Raises:
      TypeError: An argument has the wrong kind of numbers; `counts` may be integers.
      ValueError: The shapes do not broadcast together.

    Example:
      >>> from jaxbn.interop import tf_nn
      >>> import jax.numpy as jnp
      >>> parts = jnp.array([[1.0, 3.0], [5.0, 7.0]])
      >>> shift = jnp.array(4.0)  # the same for all parts
      >>> sums = [tf_nn.sufficient_statistics(x, [0], shift)[:3] for x in parts]
      >>> print(*tf_nn.normalize_moments(*map(sum, zip(*sums)), shift))
      4.0 5.0

    References:
      https://www.tensorflow.org/api_docs/python/tf/nn/normalize_moments
    """
    with _arguments.scope(name, "normalize"):
        mean_ss = _dtypes.inexact_array("mean_ss", mean_ss)
        variance_ss = _arguments.real_array("variance_ss", variance_ss)
        counts = jnp.asarray(counts)
        _dtypes.require_no_imaginary_loss("counts", counts, "a count", jnp.float32)
        shift = jnp.zeros((), mean_ss.dtype) if shift is None else shift
        shift = _checked_shift(shift, "mean_ss", mean_ss)
        _arguments.common_shape(
            "pass what `sufficient_statistics` returns",
            mean_ss=mean_ss,
            variance_ss=variance_ss,
            counts=counts,
            shift=shift,
        )

        offset = _over(_dtypes.widen(mean_ss, variance_ss), counts)
        square = _over(_dtypes.widen(variance_ss, mean_ss), counts)
        square, excess = jnp.broadcast_arrays(square, _sums.squared(offset))
        # Not maximum(…, 0), whose derivative is halved where the variance is 0.
        variance = jnp.where(square < excess, 0, square - excess)
        mean = jnp.add(*jnp.broadcast_arrays(offset, shift))
        return mean.astype(mean_ss.dtype), variance.astype(variance_ss.dtype)


def _checked_shift(shift: ArrayLike, into: str, array: jax.Array) -> jax.Array:
    shift = _dtypes.inexact_array("shift", shift)
    _dtypes.require_no_imaginary_loss("shift", shift, into, array.dtype)
    return shift


def _over(total: jax.Array, counts: jax.Array) -> jax.Array:
    total, counts = jnp.broadcast_arrays(total, counts.astype(total.real.dtype))
    return _sums.over(total, counts)


def _without(shift: jax.Array, reduced: tuple[int, ...], ndim: int) -> jax.Array:
    """A shift that broadcasts against `x`, without its reduced axes."""
    missing = ndim - shift.ndim
    return jnp.squeeze(shift, tuple(a - missing for a in reduced if a >= missing))
