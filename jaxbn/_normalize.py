"""`normalize`: the output for given statistics."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _devices, _dtypes, _sums

# The name of the compiled function of `normalize`, used to find it in programs.
NAME = "jaxbn_normalize"
OPTIONAL = ("scale", "bias")


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

    With running statistics, this is batch norm at inference. The mean is subtracted
    first, in float32 or wider, because `x·a + b` would lose digits if |mean| is far
    above the standard deviation. Differentiable in every mode, to every order.

    Args:
      x: Floating or complex array.
      mean: Array with the shape of the feature axes, in ascending order. This and the
        other vectors may have further axes before the feature axes, which match the
        first reduced axes of `x`: one vector per example.
      var: Variance, real, shaped like `mean`.
      scale: Factor γ, shaped like `mean`; by default 1.
      bias: Offset β, shaped like `mean`; by default 0.
      feature_axes: The axes of `x` that the vectors run along. By default the last.
      epsilon: Added to the variance. A number or a scalar array; gradients stop at it.
      dtype: The output's dtype, by default the dtype of `x`. May be complex for real
        `x`, and must be if one of the vectors is complex.

    Returns:
      Array with the shape of `x`.

    Raises:
      TypeError: An argument is not floating or complex, `var` is complex, or `x` or
        another vector is complex and the output is not.
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
    options = {"feature_axes": feature_axes, "epsilon": epsilon, "dtype": dtype}
    return normalize_given(x, mean, var, scale, bias, weights=None, **options)


def normalize_given(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    feature_axes: _axes.Axes,
    epsilon: ArrayLike,
    weights: ArrayLike | None,
    dtype: DTypeLike | None,
) -> jax.Array:
    """`normalize`, where NaN with weight 0 does not reach any gradient."""
    x = _dtypes.inexact_array("x", x)
    axes = _axes.canonical(feature_axes, x.ndim)
    dtype = _dtypes.output(x.dtype, dtype)
    mean = checked_vector("mean", mean, x, axes, dtype)
    var = checked_vector("var", var, x, axes, dtype)
    _dtypes.require_no_imaginary_loss("var", var, "a variance", jnp.float32)
    scale = optional_vector("scale", scale, x, axes, dtype)
    bias = optional_vector("bias", bias, x, axes, dtype)
    if weights is not None:
        weights = _axes.weights_like(weights, x, _dtypes.accumulation(x.dtype))
    vectors = mean, var, scale, bias, checked_epsilon(epsilon)
    return normalize_masked(x, *vectors, weights, feature_axes=axes, dtype=dtype)


def normalize_masked(
    x: jax.Array,
    *vectors_and_weights: jax.Array | None,
    by: Callable[..., jax.Array] | None = None,
    **options: Any,
) -> jax.Array:
    """Applies `by`, but returns x itself where it is masked and not finite.

    `by` is `normalized`, or a function of the same operands; the weights come last.
    """
    by = by or normalized
    *vectors, weights = vectors_and_weights
    if weights is None:
        return by(x, *vectors, **options)
    # Masked NaN bypasses the arithmetic, whose derivative would be 0 · NaN.
    masked = _sums.masked_nonfinite(x, weights)
    y = by(jnp.where(masked, 0, x), *vectors, **options)
    return _devices.where(masked, x.astype(y.dtype), y)


def normalized(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    epsilon: jax.Array,
    *,
    feature_axes: tuple[int, ...],
    dtype,
) -> jax.Array:
    """`normalize` for checked operands."""
    apply = _named_apply(feature_axes, dtype, scale is not None, bias is not None)
    return apply(x, mean, var, scale, bias, epsilon)


def checked_vector(
    name: str, vector: ArrayLike, x: jax.Array, feature_axes: tuple[int, ...], dtype
) -> jax.Array:
    """Checks a feature vector for `x`, or one per example; returns it as an array."""
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


def checked_epsilon(epsilon: ArrayLike) -> Any:
    """Epsilon as a scalar array without gradient."""
    values = _dtypes.known(epsilon)
    if values is not None and not jnp.issubdtype(values.dtype, jnp.number):
        raise TypeError(f"`epsilon` must be a number, got {epsilon!r}.")
    # In NumPy where it is known: outside `jax.jit`, JAX's functions take longer.
    array = jnp.asarray(epsilon) if values is None else values
    if array.ndim or jnp.iscomplexobj(array):
        raise ValueError(
            f"`epsilon` must be a real scalar, got shape {array.shape}, dtype "
            f"{array.dtype}. To weigh features differently, add it to `var` yourself."
        )
    if values is not None and not values >= 0:
        raise ValueError(f"`epsilon` must not be negative, got {epsilon}.")
    return lax.stop_gradient(array) if values is None else array


def factors(
    var: jax.Array, epsilon: jax.Array, scale: jax.Array | None, *like: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """inv = 1/√(var + epsilon) and k = scale·inv, at least as wide as `like`."""
    inv = _rsqrt(var + epsilon.astype(var.dtype))
    return inv, inv if scale is None else inv * _dtypes.widen(scale, *like)


@jax.custom_jvp
def _rsqrt(x: jax.Array) -> jax.Array:
    return lax.rsqrt(x)


@_rsqrt.defjvp
@_dtypes.mixing
def _rsqrt_jvp(primals, tangents):
    # Factor by factor: inv³ overflows where x is 1e-30, and would then be infinity
    # times 0 for a constant feature.
    inv = _rsqrt(*primals)
    return inv, -0.5 * tangents[0] * inv * inv * inv


def normalized_in_two_steps(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array,
    epsilon: jax.Array,
    *,
    feature_axes: tuple[int, ...],
    dtype,
) -> jax.Array:
    """`normalized` in two operations per element instead of three.

        y = (x − m)·k      k = scale / √(var + epsilon)      m = mean − bias / k

    The rounding error of m is about as large as that in the mean or the bias, so y is
    as exact up to a factor of 2. Where k is negligible next to the bias, y is the bias.
    """
    vectors = (mean, var, scale, bias)
    mean, var, bias = (_dtypes.widen(v, x, *vectors) for v in (mean, var, bias))
    _, k = factors(var, epsilon, scale, x, *vectors)
    bias = _devices.shard_like(bias, k)
    tiny = jnp.finfo(bias.dtype).tiny
    least = jnp.where(bias == 0, 0, jnp.maximum(jnp.abs(bias) * 1e-30, tiny))
    k = jnp.where(jnp.abs(k) < least, least, k)
    m = mean - jnp.where(bias == 0, 0, bias / jnp.where(k == 0, 1, k))
    m, k = (_axes.expand(v, feature_axes, x.ndim) for v in (m, k))
    return ((_dtypes.widen(x, *vectors) - m) * k).astype(dtype)


@functools.cache
def _named_apply(feature_axes: tuple[int, ...], dtype, has_scale: bool, has_bias: bool):
    """The formula as a compiled function, named after its operands."""

    def apply(x, mean, var, scale, bias, epsilon):
        vectors = (mean, var, scale, bias)

        def wide(vector):
            return _axes.expand(
                _dtypes.widen(vector, x, *vectors), feature_axes, x.ndim
            )

        _, k = factors(wide(var), epsilon, None if scale is None else wide(scale))
        y = (_dtypes.widen(x, *vectors) - wide(mean)) * k
        if bias is not None:
            y = y + wide(bias)
        return y.astype(dtype)

    optional = [
        n for n, has in zip(OPTIONAL, (has_scale, has_bias), strict=True) if has
    ]
    apply.__name__ = "_".join([NAME, "axis", *map(str, feature_axes), *optional])
    # Its derivative keeps x, not x − mean.
    return jax.jit(jax.checkpoint(apply, prevent_cse=False))


def operands_of(name: str) -> list[str] | None:
    """The operands of the compiled function `name`; None for any other function."""
    if not name.startswith(NAME):
        return None
    words = name.split("_")
    optional = [operand for operand in OPTIONAL if operand in words]
    return ["x", "mean", "var", *optional, "epsilon"]
