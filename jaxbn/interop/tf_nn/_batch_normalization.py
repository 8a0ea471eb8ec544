"""`batch_normalization`."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _axes, _dtypes
from jaxbn._normalize import normalize
from jaxbn.interop.tf_nn import _arguments


def batch_normalization(
    x: ArrayLike,
    mean: ArrayLike,
    variance: ArrayLike,
    offset: ArrayLike | None,
    scale: ArrayLike | None,
    variance_epsilon: ArrayLike,
    name: str | None = None,
) -> jax.Array:
    """Normalizes `x`, like `tf.nn.batch_normalization`.

        y = scale · (x − mean) / √(variance + variance_epsilon) + offset

    Args:
      x: Floating or complex array.
      mean: Array that broadcasts with `x`, in either direction, by NumPy's rule, like
        the other arrays.
      variance: Real array that broadcasts likewise.
      offset: Array that broadcasts likewise, or None for 0.
      scale: Array that broadcasts likewise, or None for 1. Note the order: offset comes
        first.
      variance_epsilon: A number or a scalar array; gradients stop at it.
      name: The `jax.named_scope` of the operations, by default "batchnorm".

    Returns:
      Array with the dtype of `x`, and the shape of all arrays broadcast together.

    Raises:
      TypeError: An argument is not floating or complex, or is complex and `x` is real.
      ValueError: The shapes do not broadcast together, or `variance_epsilon` is not a
        real, non-negative scalar.

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
    with _arguments.scope(name, "batchnorm"):
        x = _dtypes.inexact_array("x", x)
        vectors = {
            "mean": _checked("mean", mean, x),
            "variance": _arguments.real_array("variance", variance),
        }
        if offset is not None:
            vectors["offset"] = _checked("offset", offset, x)
        if scale is not None:
            vectors["scale"] = _checked("scale", scale, x)

        x = jnp.broadcast_to(
            x, _arguments.common_shape(_arguments.KEEPDIMS, x=x, **vectors)
        )
        # The feature axes are the axes along which any of them varies.
        varying = _arguments.common_shape(_arguments.KEEPDIMS, **vectors)
        varying = (1,) * (x.ndim - len(varying)) + varying
        reduced = tuple(axis for axis, n in enumerate(varying) if n == 1)
        vectors = {
            name: _arguments.feature_vector(name, vector, x, reduced)
            for name, vector in vectors.items()
        }
        hint = "To weigh features differently, add it to `variance` yourself"
        return normalize(
            x,
            vectors["mean"],
            vectors["variance"],
            vectors.get("scale"),
            vectors.get("offset"),
            feature_axes=_axes.others(reduced, x.ndim),
            epsilon=_arguments.scalar("variance_epsilon", variance_epsilon, hint),
        )


def _checked(name: str, vector: ArrayLike, x: jax.Array) -> jax.Array:
    array = _dtypes.inexact_array(name, vector)
    _dtypes.require_no_imaginary_loss(name, array, "x", x.dtype)
    return array
