"""`normalize`: from given statistics to the output."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _devices, _dtypes

NAME = "jaxbn_normalize"


@_dtypes.mixing
def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: _axes.Axes = -1,
    epsilon: ArrayLike = 1e-5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes `x` by given statistics.

        y = (x − mean) · (scale / √(var + epsilon)) + bias

    With running statistics this is batch norm's inference. The mean is subtracted
    first, in float32 or wider: `x·a + b` loses 40 times the precision where mean/std is
    large. Differentiable in every mode, to every order.

    Args:
      x: Floating or complex array.
      mean: Array with the shape of the feature axes, in ascending order. This and the
        following vectors may have further axes before those of the features, which
        belong to the first reduced axes of `x`: one vector per example.
      var: Variance, real, shaped as `mean`.
      scale: Factor γ, shaped as `mean`; by default 1.
      bias: Summand β, shaped as `mean`; by default 0.
      feature_axes: The axes of `x` that the vectors run along. By default the last.
      epsilon: Added to the variance. A number or a scalar array, and data: gradients
        stop there.
      dtype: The output's dtype, by default that of `x`. May be complex for real `x`,
        and must be where one of the vectors is complex.

    Returns:
      Array with the shape of `x`.

    Raises:
      TypeError: An argument is not floating or complex, `var` is complex, or another
        vector or `x` is while the output is not.
      ValueError: An axis is out of range or named twice, or a vector does not have the
        shape of the feature axes.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> mean, var = jnp.array([2.0, 20.0]), jnp.array([1.0, 100.0])
      >>> print(jaxbn.normalize(x, mean, var, epsilon=0.0))
      [[-1. -1.]
       [ 1.  1.]]

    References:
      Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 2.
    """
    x = _dtypes.inexact_array("x", x)
    feature_axes = _axes.canonical(feature_axes, x.ndim)
    dtype = _dtypes.output(x.dtype, dtype)
    mean = checked_vector("mean", mean, x, feature_axes, dtype)
    var = checked_vector("var", var, x, feature_axes, dtype)
    _dtypes.require_no_imaginary_loss("var", var, "a variance", jnp.float32)
    scale = optional_vector("scale", scale, x, feature_axes, dtype)
    bias = optional_vector("bias", bias, x, feature_axes, dtype)
    apply = _named_apply(feature_axes, dtype, scale is not None, bias is not None)
    return apply(x, mean, var, scale, bias, checked_epsilon(epsilon))


def checked_vector(
    name: str, vector: ArrayLike, x: jax.Array, feature_axes: tuple[int, ...], dtype
) -> jax.Array:
    """A feature vector for `x`, or one per example, as an array."""
    array = _dtypes.inexact_array(name, vector)
    _dtypes.require_no_imaginary_loss(name, array, "dtype", dtype)
    _axes.require_features(name, array, x, feature_axes, per_example=True)
    return array


def optional_vector(
    name: str,
    vector: ArrayLike | None,
    x: jax.Array,
    feature_axes: tuple[int, ...],
    dtype,
) -> jax.Array | None:
    """Like `checked_vector`, but None stays None."""
    if vector is None:
        return None
    return checked_vector(name, vector, x, feature_axes, dtype)


def checked_epsilon(epsilon: ArrayLike) -> jax.Array:
    """Epsilon as a scalar array without gradient."""
    values = _dtypes.known(epsilon)
    if values is not None and not jnp.issubdtype(values.dtype, jnp.number):
        raise TypeError(f"`epsilon` must be a number, got {epsilon!r}.")
    array = jnp.asarray(epsilon)
    if array.ndim or jnp.iscomplexobj(array):
        raise ValueError(
            f"`epsilon` must be a real scalar, got shape {array.shape}, dtype "
            f"{array.dtype}. To weigh features differently, add it to `var` yourself."
        )
    if values is not None and not values >= 0:
        raise ValueError(f"`epsilon` must not be negative, got {epsilon}.")
    return lax.stop_gradient(array)


def inverse_deviation(var: jax.Array, epsilon: jax.Array) -> jax.Array:
    """1 / √(var + epsilon)."""
    return _rsqrt(var + epsilon.astype(var.dtype))


@jax.custom_jvp
def _rsqrt(x: jax.Array) -> jax.Array:
    return lax.rsqrt(x)


@_rsqrt.defjvp
@_dtypes.mixing
def _rsqrt_jvp(primals, tangents):
    # One factor after the other: their product overflows where x is 1e-30, and is then
    # infinity times 0 for a feature that is constant.
    inv = _rsqrt(*primals)
    return inv, -0.5 * tangents[0] * inv * inv * inv


def normalize_shifted(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array,
    *,
    feature_axes: tuple[int, ...],
    epsilon: jax.Array,
    dtype,
) -> jax.Array:
    """`normalize` in two operations an element instead of three.

        y = (x − m)·k      k = scale / √(var + epsilon)      m = mean − bias / k

    What rounds m is of the size of what rounds the mean or the bias: y is as exact, to
    a factor of 2. Where k is next to nothing beside the bias, y is the bias.
    """
    vectors = (mean, var, scale, bias)
    mean, var, bias = (_dtypes.widen(v, x, *vectors) for v in (mean, var, bias))
    k = inverse_deviation(var, epsilon)
    if scale is not None:
        k = k * _dtypes.widen(scale, x, *vectors)
    bias = _devices.shard_like(bias, k)
    tiny = jnp.finfo(bias.dtype).tiny
    least = jnp.where(bias == 0, 0, jnp.maximum(jnp.abs(bias) * 1e-30, tiny))
    k = jnp.where(jnp.abs(k) < least, least, k)
    m = mean - jnp.where(bias == 0, 0, bias / jnp.where(k == 0, 1, k))
    m, k = (_axes.expand(v, feature_axes, x.ndim) for v in (m, k))
    return ((_dtypes.widen(x, *vectors) - m) * k).astype(dtype)


@functools.cache
def _named_apply(feature_axes: tuple[int, ...], dtype, has_scale: bool, has_bias: bool):
    """The formula as a jit of its own, whose name programs can be searched for.

    The name tells the feature axes, and which of the optional operands there are.
    """

    def apply(x, mean, var, scale, bias, epsilon):
        vectors = (mean, var, scale, bias)

        def wide(vector):
            return _axes.expand(
                _dtypes.widen(vector, x, *vectors), feature_axes, x.ndim
            )

        factor = inverse_deviation(wide(var), epsilon)
        if scale is not None:
            factor = factor * wide(scale)
        y = (_dtypes.widen(x, *vectors) - wide(mean)) * factor
        if bias is not None:
            y = y + wide(bias)
        return y.astype(dtype)

    optional = ["scale"] * has_scale + ["bias"] * has_bias
    apply.__name__ = "_".join([NAME, "axis", *map(str, feature_axes), *optional])
    # What its derivative keeps is x, not x − mean.
    return jax.jit(jax.checkpoint(apply, prevent_cse=False))
