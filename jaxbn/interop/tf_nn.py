"""`tf.nn.moments` and `tf.nn.batch_normalization`, on jaxbn's verbs.

Same arguments and meaning as in TensorFlow, so that code ports line by line. Two
differences, both to the better: derivatives of every order are right (TensorFlow stops
the gradient of the mean inside the variance, which makes Hessians wrong), and the mean
is subtracted before scaling, which keeps precision where mean/std is large.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _axes, _dtypes
from jaxbn._moments import moments as _moments
from jaxbn._normalize import normalize as _normalize


def moments(
    x: ArrayLike, axes: int | Sequence[int], keepdims: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of `x` over `axes`, as `tf.nn.moments`.

        mean = E[x]      variance = E[|x − mean|²]

    Args:
      x: Floating or complex array.
      axes: The axes to *reduce* (jaxbn's verbs name those they keep).
      keepdims: Keep the reduced axes with length 1.

    Returns:
      `(mean, variance)` in the dtype of `x`, accumulated in float32 or wider; the
      variance of complex `x` is real.

    Raises:
      TypeError: `x` is not floating or complex.
      ValueError: An axis is out of range or named twice.

    Example:
      >>> from jaxbn.interop import tf_nn
      >>> import jax.numpy as jnp
      >>> mean, variance = tf_nn.moments(jnp.array([[1.0, 2.0], [3.0, 6.0]]), [0])
      >>> print(mean, variance)
      [2. 4.] [1. 4.]

    References:
      https://www.tensorflow.org/api_docs/python/tf/nn/moments
    """
    x = _dtypes.inexact_array("x", x)
    reduced = _axes.canonical(axes, x.ndim, "axes")
    m = _moments(x, feature_axes=_axes.others(reduced, x.ndim))
    mean = m.mean.astype(x.dtype)
    variance = m.var.astype(jnp.finfo(x.dtype).dtype)
    if keepdims:
        return jnp.expand_dims(mean, reduced), jnp.expand_dims(variance, reduced)
    return mean, variance


def batch_normalization(
    x: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    offset: ArrayLike | None,
    scale: ArrayLike | None,
    variance_epsilon: ArrayLike,
) -> jax.Array:
    """Normalizes `x`, as `tf.nn.batch_normalization`.

        y = scale · (x − mean) / √(variance + variance_epsilon) + offset

    Args:
      x: Floating or complex array.
      mean: Array that broadcasts against `x` by NumPy's rule, as the others do.
      variance: Likewise; real.
      offset: Likewise, or None for 0.
      scale: Likewise, or None for 1. Mind the order: offset comes first.
      variance_epsilon: A number or a scalar array.

    Returns:
      Array with the shape and dtype of `x`.

    Raises:
      TypeError: An argument is not floating or complex.
      ValueError: An argument does not broadcast against `x`.

    Example:
      >>> from jaxbn.interop import tf_nn
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> mean, variance = tf_nn.moments(x, [0])
      >>> print(tf_nn.batch_normalization(x, mean, variance, None, None, 0.0))
      [[-1. -1.]
       [ 1.  1.]]

    References:
      https://www.tensorflow.org/api_docs/python/tf/nn/batch_normalization
    """
    x = _dtypes.inexact_array("x", x)
    mean, variance = _aligned("mean", mean, x), _aligned("variance", variance, x)
    scale = None if scale is None else _aligned("scale", scale, x)
    offset = None if offset is None else _aligned("offset", offset, x)
    # The axes along which any of them varies are the feature axes.
    given = [v for v in (mean, variance, scale, offset) if v is not None]
    axes = tuple(a for a in range(x.ndim) if any(v.shape[a] != 1 for v in given))
    shape, ones = _axes.lengths(x, axes), _axes.others(axes, x.ndim)

    def features(v: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.squeeze(v, ones), shape)

    return _normalize(
        x,
        features(mean),
        features(variance),
        None if scale is None else features(scale),
        None if offset is None else features(offset),
        feature_axes=axes,
        epsilon=variance_epsilon,
    )


def _aligned(name: str, value: ArrayLike, x: jax.Array) -> jax.Array:
    hint = "pass what `moments` returns over the same axes, with `keepdims=True`"
    return _axes.aligned(name, _dtypes.inexact_array(name, value), x, hint)
