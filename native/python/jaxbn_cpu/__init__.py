"""CPU kernels for jaxbn: the sums and the backward pass of batch norm.

jaxbn calls these kernels if this package is installed. They can also be called like any
other JAX function, in programs that run on a CPU (they are calls of the XLA FFI). They
have no derivatives.
"""

import ctypes
import operator
import pathlib
from math import prod
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jax.typing import ArrayLike

__version__ = "0.1.0"
# The interface that jaxbn expects; it ignores a package with another number.
INTERFACE = 1
DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))

_library = ctypes.CDLL(str(pathlib.Path(__file__).with_name("_kernels.so")))
for _name in ("jaxbn_moments", "jaxbn_cotangents", "jaxbn_input_cotangent"):
    _handler = jax.ffi.pycapsule(getattr(_library, _name))
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")


def moments(
    x: "ArrayLike",
    weights: "ArrayLike | None" = None,
    *,
    feature_axes: int | tuple[int, ...] = -1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes each feature's mean, its rounding error, and its squared deviations.

        n = Σw      mean + rest = Σwx / n      squares = Σw(x − mean)²

    The sums are taken in blocks, which are pooled in float64 (Chan), so `squares` is
    exact for any ratio of mean to standard deviation. Results are the same, bit for
    bit, in every run with the same number of threads. Where the weight is 0, `x` may be
    anything.

    Args:
      x: Array of float32 or bfloat16.
      weights: Non-negative float32 array with the shape of `x`, but length 1 along the
        feature axes; by default 1.
      feature_axes: The axes that are not reduced, one or several adjacent ones in
        ascending order. By default the last.

    Returns:
      `(mean, rest, squares)`, float32 with the shape of the feature axes, and 0 if
      there is no weight. `mean + rest` is more exact than `mean`, as needed to pool
      means that are far from 0.

    Raises:
      TypeError: `x` is neither float32 nor bfloat16, `weights` are not float32, or the
        feature axes are not integers.
      ValueError: A shape does not fit, or the feature axes are not adjacent.

    Example:
      >>> import jaxbn_cpu, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> mean, rest, squares = jaxbn_cpu.moments(x)
      >>> print(mean, rest, squares)
      [ 2. 20.] [0. 0.] [  2. 200.]

    References:
      Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).
    """
    x = _checked(x, "x")
    axes = _checked_axes(feature_axes, x)
    return _call("jaxbn_moments", axes, x, _checked_weights(weights, axes, x), number=3)


def cotangents(
    dy: "ArrayLike",
    x: "ArrayLike",
    mean: "ArrayLike",
    weights: "ArrayLike | None" = None,
    *,
    feature_axes: int | tuple[int, ...] = -1,
) -> tuple[jax.Array, jax.Array]:
    """Computes the two sums of the backward pass of batch norm.

        first = Σdy      second = Σdy·(x − mean)

    Args:
      dy: The cotangent of the output, float32 or bfloat16, with the shape of `x`.
      x: As for `moments`.
      mean: float32 with the shape of the feature axes.
      weights: As for `moments`, but the sums are not weighted. If a weight is 0 and `x`
        is not finite there, the mean replaces `x`.
      feature_axes: As for `moments`.

    Returns:
      `(first, second)`, float32 with the shape of the feature axes.

    Raises:
      TypeError: `dy` or `x` is neither float32 nor bfloat16, `weights` are not float32,
        or the feature axes are not integers.
      ValueError: `mean` is not float32, a shape does not fit, or the feature axes are
        not adjacent.

    Example:
      >>> import jaxbn_cpu, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> print(*jaxbn_cpu.cotangents(jnp.ones_like(x), x, jnp.array([1.0, 10.0])))
      [2. 2.] [ 2. 20.]

    References:
      Ioffe and Szegedy, "Batch Normalization" (2015), section 3.
    """
    x, dy = _checked(x, "x"), _checked_dy(dy, x)
    axes = _checked_axes(feature_axes, x)
    mean = _checked_vector(mean, "mean", axes, x)
    weights = _checked_weights(weights, axes, x)
    return _call("jaxbn_cotangents", axes, dy, x, weights, mean)


def input_cotangent(
    dy: "ArrayLike",
    x: "ArrayLike",
    mean: "ArrayLike",
    k: "ArrayLike",
    c1: "ArrayLike",
    c0: "ArrayLike",
    weights: "ArrayLike | None" = None,
    *,
    feature_axes: int | tuple[int, ...] = -1,
) -> jax.Array:
    """Computes the cotangent of `x` in the backward pass of batch norm.

        dx = k·dy + w·(c1·(x − mean) + c0)

    Args:
      dy: The cotangent of the output, float32 or bfloat16, with the shape of `x`.
      x: As for `moments`.
      mean: float32 with the shape of the feature axes.
      k: Shaped like `mean`: scale / √(var + epsilon).
      c1: Shaped like `mean`: −k·Σ(dy·(x − mean)) / ((var + epsilon)·n).
      c0: Shaped like `mean`: −k·Σdy / n.
      weights: As for `moments`.
      feature_axes: As for `moments`.

    Returns:
      `dx`, with the shape and dtype of `x`, rounded once.

    Raises:
      TypeError: `dy` or `x` is neither float32 nor bfloat16, `weights` are not float32,
        or the feature axes are not integers.
      ValueError: `mean`, `k`, `c1` or `c0` is not float32, a shape does not fit, or the
        feature axes are not adjacent.

    Example:
      >>> import jaxbn_cpu, jax.numpy as jnp
      >>> x, one = jnp.array([[1.0, 10.0], [3.0, 30.0]]), jnp.ones(2)
      >>> jaxbn_cpu.input_cotangent(x, x, mean=one, k=one, c1=2 * one, c0=-one)
      Array([[ 0., 27.],
             [ 6., 87.]], dtype=float32)

    References:
      Ioffe and Szegedy, "Batch Normalization" (2015), section 3.
    """
    x, dy = _checked(x, "x"), _checked_dy(dy, x)
    axes = _checked_axes(feature_axes, x)
    given = {"mean": mean, "k": k, "c1": c1, "c0": c0}
    vectors = [_checked_vector(v, name, axes, x) for name, v in given.items()]
    operands = dy, x, _checked_weights(weights, axes, x), *vectors
    return _call("jaxbn_input_cotangent", axes, *operands, like=x)


def _call(
    name: str,
    axes: tuple[int, ...],
    x: jax.Array,
    *rest: jax.Array,
    number: int = 2,
    like: jax.Array | None = None,
):
    """Calls a kernel: returns feature vectors, or an array like `like`.

    Arrays keep their shape. If they were reshaped for the call, bfloat16 might be
    copied, and the loop that computes `x` would run over another shape.
    """
    first = axes[0] if axes else x.ndim
    features, inner = x.shape[first : first + len(axes)], x.shape[first + len(axes) :]
    out = (jax.ShapeDtypeStruct(features, jnp.float32),) * number
    if like is not None:
        out = jax.ShapeDtypeStruct(like.shape, like.dtype)
    call = jax.ffi.ffi_call(name, out, vmap_method="sequential")
    sizes = {"channels": features, "inner": inner}
    made = call(x, *rest, **{k: np.int64(prod(v)) for k, v in sizes.items()})
    return tuple(made) if like is None else made


def _as_array(array, name: str) -> jax.Array:
    try:
        return jnp.asarray(array)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array, got {array!r}.") from error


def _checked(array, name: str) -> jax.Array:
    array = _as_array(array, name)
    if array.dtype not in DTYPES:
        raise TypeError(f"`{name}` must be float32 or bfloat16, got {array.dtype}.")
    return array


def _checked_dy(dy, x: jax.Array) -> jax.Array:
    dy = _checked(dy, "dy")
    if dy.shape != x.shape:
        raise ValueError(f"`dy` has shape {dy.shape}, expected {x.shape}, that of `x`.")
    return dy


def _checked_vector(
    vector, name: str, axes: tuple[int, ...], x: jax.Array
) -> jax.Array:
    vector, features = _as_array(vector, name), tuple(x.shape[axis] for axis in axes)
    if vector.shape != features or vector.dtype != jnp.float32:
        raise ValueError(
            f"`{name}` is {vector.dtype} of shape {vector.shape}, expected float32 of "
            f"shape {features}: a number for each feature of `x`."
        )
    return vector


def _checked_axes(feature_axes: int | tuple[int, ...], x: jax.Array) -> tuple:
    given = np.atleast_1d(np.asarray(feature_axes, object))
    try:
        axes = [operator.index(axis) for axis in given]
    except TypeError:
        raise TypeError(
            f"`feature_axes` must be integers, got {feature_axes!r}."
        ) from None
    axes = tuple(axis + x.ndim if axis < 0 else axis for axis in axes)
    first = axes[0] if axes else 0
    adjacent = tuple(range(first, first + len(axes)))
    if axes != adjacent or not 0 <= first <= x.ndim - len(axes):
        raise ValueError(
            f"`feature_axes` is {feature_axes}, expected axes of `x`, which has "
            f"{x.ndim}, next to each other and in ascending order."
        )
    return axes


def _checked_weights(weights, axes: tuple[int, ...], x: jax.Array) -> jax.Array:
    if weights is None:
        return jnp.zeros(0, jnp.float32)
    weights = _as_array(weights, "weights")
    if weights.dtype != jnp.float32:
        raise TypeError(f"`weights` must be float32, got {weights.dtype}.")
    expected = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    if weights.shape != expected:
        raise ValueError(
            f"`weights` has shape {weights.shape}, expected {expected}: that of `x`, "
            "with the feature axes of length 1."
        )
    return weights
