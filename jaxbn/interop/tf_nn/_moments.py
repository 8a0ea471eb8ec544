"""`moments` and `weighted_moments`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _axes, _dtypes
from jaxbn._moments import Moments
from jaxbn._moments import moments as _moments
from jaxbn.interop.tf_nn import _arguments


def moments(
    x: ArrayLike,
    axes: int | Sequence[int],
    shift: ArrayLike | None = None,
    keepdims: bool = False,
    name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the mean and variance of `x` over `axes`, like `tf.nn.moments`.

        mean = E[x]      variance = E[|x − mean|²]

    Args:
      x: Floating or complex array.
      axes: The axes to *reduce* (jaxbn's own functions name the axes to keep).
      shift: Array near the mean, such as a running mean, that broadcasts against `x`
        with length 1 along `axes`. `x` is then read once instead of twice; the nearer
        the shift, the more exact the variance (see `jaxbn.moments`). TensorFlow has
        this argument but ignores it. Gradients stop at the shift.
      keepdims: Whether to keep the reduced axes with length 1.
      name: The `jax.named_scope` of the operations, by default "moments".

    Returns:
      `(mean, variance)` in the dtype of `x`, accumulated in float32 or wider; the
      variance of complex `x` is real.

    Raises:
      TypeError: `x` or `shift` is not floating or complex, or only `shift` is complex.
      ValueError: An axis is out of range or named twice, or `shift` does not broadcast
        against `x` or varies along `axes`.

    Example:
      >>> from jaxbn.interop import tf_nn
      >>> import jax.numpy as jnp
      >>> mean, variance = tf_nn.moments(jnp.array([[1.0, 2.0], [3.0, 6.0]]), [0])
      >>> print(mean, variance)
      [2. 4.] [1. 4.]

    References:
      https://www.tensorflow.org/api_docs/python/tf/nn/moments
    """
    with _arguments.scope(name, "moments"):
        x = _dtypes.inexact_array("x", x)
        reduced = _axes.canonical(axes, x.ndim, "axes")
        if shift is not None:
            shift = _dtypes.inexact_array("shift", shift)
            shift = _arguments.feature_vector("shift", shift, x, reduced)
        m = _moments(x, feature_axes=_axes.others(reduced, x.ndim), shift=shift)
        return _like(m, x, reduced, keepdims)


def weighted_moments(
    x: ArrayLike,
    axes: int | Sequence[int],
    frequency_weights: ArrayLike,
    keepdims: bool = False,
    name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the weighted mean and variance of `x`, like `tf.nn.weighted_moments`.

        mean = Σwx / Σw      variance = Σw|x − mean|² / Σw

    Args:
      x: Floating or complex array.
      axes: The axes to reduce, of `x` and the weights broadcast together.
      frequency_weights: Boolean mask or non-negative numbers. They broadcast against
        `x`, and `x` against them. Where the weight is 0, `x` may be anything; in
        TensorFlow, NaN there makes the moments NaN. Gradients stop at the weights,
        unlike in TensorFlow.
      keepdims: Whether to keep the reduced axes with length 1.
      name: The `jax.named_scope` of the operations, by default "weighted_moments".

    Returns:
      `(mean, variance)` in the dtype of `x`; the variance of complex `x` is real. Both
      are 0 where all weights are 0.

    Raises:
      TypeError: `x` is not floating or complex, or `frequency_weights` are complex.
      ValueError: An axis is out of range or named twice, or the shapes do not broadcast
        together.

    Example:
      >>> from jaxbn.interop import tf_nn
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0], [jnp.nan, 9.0]])
      >>> weights = jnp.array([[1.0], [3.0], [0.0]])
      >>> mean, variance = tf_nn.weighted_moments(x, [0], weights)
      >>> print(mean, variance)
      [2.5 5. ] [0.75 3.  ]

    References:
      https://www.tensorflow.org/api_docs/python/tf/nn/weighted_moments
    """
    with _arguments.scope(name, "weighted_moments"):
        x = _dtypes.inexact_array("x", x)
        weights = jnp.asarray(frequency_weights)
        hint = "for one weight per example add axes, as in `frequency_weights[:, None]`"
        shape = _arguments.common_shape(hint, x=x, frequency_weights=weights)
        x = jnp.broadcast_to(x, shape)
        # Here, because `_moments` would report another name.
        dtype = _dtypes.accumulation(x.dtype)
        weights = _axes.weights_like(weights, x, dtype, "frequency_weights")
        reduced = _axes.canonical(axes, x.ndim, "axes")
        m = _moments(x, feature_axes=_axes.others(reduced, x.ndim), weights=weights)
        return _like(m, x, reduced, keepdims)


def _like(
    m: Moments, x: jax.Array, reduced: tuple[int, ...], keepdims: bool
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance in the dtype of `x`."""
    mean = m.mean.astype(x.dtype)
    variance = m.var.astype(jnp.finfo(x.dtype).dtype)
    return (
        _arguments.with_dims(mean, reduced, keepdims),
        _arguments.with_dims(variance, reduced, keepdims),
    )
