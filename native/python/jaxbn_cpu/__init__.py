"""CPU kernels for jaxbn: the two reductions of batch norm, behind XLA's FFI.

They are for jaxbn, which calls them where they are installed; but they are functions of
JAX like any other, for programs that run on a CPU. They have no derivative here.
"""

import ctypes
import pathlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from jax.typing import ArrayLike

__version__ = "0.1.0"
DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))

_library = ctypes.CDLL(str(pathlib.Path(__file__).with_name("_kernels.so")))
for _name in ("jaxbn_moments", "jaxbn_cotangents"):
    _handler = jax.ffi.pycapsule(getattr(_library, _name))
    jax.ffi.register_ffi_target(_name, _handler, platform="cpu")


def moments(
    x: "ArrayLike", weights: "ArrayLike | None" = None
) -> tuple[jax.Array, jax.Array]:
    """Mean of each channel, and the sum of squares about it.

        n = Σw      mean = Σwx / n      squares = Σw(x − mean)²

    Summed in blocks that are pooled in float64 (Chan), so that the squares are exact
    for any ratio of mean to standard deviation; and the same to the bit in every run
    with as many threads. Where the weight is 0, `x` may be anything.

    Args:
      x: Array of float32 or bfloat16, of shape (outer, channels, inner): reduced are
        the first axis and the last. Channels last have an inner axis of length 1.
      weights: float32 of shape (outer, inner), not negative; by default 1.

    Returns:
      `(mean, squares)`, float32 of shape (channels,); 0 where there is no weight.

    Raises:
      TypeError: A dtype is another.
      ValueError: A shape does not fit.

    Example:
      >>> import jaxbn_cpu, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])[:, :, None]
      >>> mean, squares = jaxbn_cpu.moments(x)
      >>> print(mean, squares)
      [ 2. 20.] [  2. 200.]

    References:
      Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).
    """
    x = _checked(x, "x")
    return _call("jaxbn_moments", x.shape, x, _checked_weights(weights, x))


def cotangents(
    dy: "ArrayLike",
    x: "ArrayLike",
    mean: "ArrayLike",
    weights: "ArrayLike | None" = None,
) -> tuple[jax.Array, jax.Array]:
    """The two sums of batch norm's backward pass.

        first = Σdy      second = Σdy·(x − mean)

    Args:
      dy: Array of float32 or bfloat16, of the shape of `x`.
      x: As for `moments`.
      mean: float32 of shape (channels,).
      weights: As for `moments`. They do not weigh here: where they are 0 and `x` is not
        finite, `x` counts as the mean.

    Returns:
      `(first, second)`, float32 of shape (channels,).

    Raises:
      TypeError: A dtype is another.
      ValueError: A shape does not fit.

    Example:
      >>> import jaxbn_cpu, jax.numpy as jnp
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])[:, :, None]
      >>> print(*jaxbn_cpu.cotangents(jnp.ones_like(x), x, jnp.array([1.0, 10.0])))
      [2. 2.] [ 2. 20.]

    References:
      Ioffe and Szegedy, "Batch Normalization" (2015), section 3.
    """
    x, dy = _checked(x, "x"), _checked(dy, "dy", x)
    vectors = _checked_vectors(x, mean=mean)
    weights = _checked_weights(weights, x)
    return _call("jaxbn_cotangents", x.shape, dy, x, weights, *vectors)


def _call(name: str, shape: tuple[int, ...], *operands: jax.Array):
    """The two vectors that a kernel makes of arrays of this shape, and of vectors."""
    _, channels, inner = shape
    out = jax.ShapeDtypeStruct((channels,), jnp.float32)
    call = jax.ffi.ffi_call(name, (out, out), vmap_method="sequential")
    # Of one axis: with an axis of length 1 there are two layouts, which XLA may see as
    # different, and copy the array.
    flat = [array.reshape(-1) for array in operands]
    return tuple(call(*flat, channels=np.int64(channels), inner=np.int64(inner)))


def _checked(array, name: str, like: jax.Array | None = None) -> jax.Array:
    array = jnp.asarray(array)
    if array.dtype not in DTYPES:
        raise TypeError(f"`{name}` must be float32 or bfloat16, got {array.dtype}.")
    if array.ndim != 3:
        raise ValueError(
            f"`{name}` must have shape (outer, channels, inner), got {array.shape}."
        )
    if like is not None and array.shape != like.shape:
        raise ValueError(f"`{name}` has shape {array.shape}, expected {like.shape}.")
    return array


def _checked_vectors(x: jax.Array, **vectors) -> list[jax.Array]:
    arrays = {name: jnp.asarray(vector) for name, vector in vectors.items()}
    for name, array in arrays.items():
        if array.shape != x.shape[1:2] or array.dtype != jnp.float32:
            raise ValueError(
                f"`{name}` is {array.dtype} of shape {array.shape}, expected float32 "
                f"of shape {x.shape[1:2]}: a number for each channel of `x`."
            )
    return list(arrays.values())


def _checked_weights(weights, x: jax.Array) -> jax.Array:
    if weights is None:
        return jnp.zeros((0, 0), jnp.float32)
    weights = jnp.asarray(weights)
    if weights.dtype != jnp.float32:
        raise TypeError(f"`weights` must be float32, got {weights.dtype}.")
    if weights.shape != x.shape[::2]:
        raise ValueError(
            f"`weights` has shape {weights.shape}, expected {x.shape[::2]}: the outer "
            "and the inner axis of `x`."
        )
    return weights
