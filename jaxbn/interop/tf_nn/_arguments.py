"""TensorFlow's arguments: names of operations, and arrays that broadcast."""

from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _axes, _dtypes

KEEPDIMS = "pass what `moments` returns over the same axes, with `keepdims=True`"


def scope(name: str | None, default: str) -> AbstractContextManager:
    """The named scope for tracing an operation."""
    if not isinstance(name, str | None):
        raise TypeError(f"`name` must be a string or None, got {name!r}.")
    return jax.named_scope(default if name is None else name)


def real_array(name: str, value: ArrayLike) -> jax.Array:
    """Converts `value` to an array; raises unless it is floating."""
    array = _dtypes.inexact_array(name, value)
    if jnp.iscomplexobj(array):
        raise TypeError(
            f"`{name}` must be floating, got dtype {array.dtype}. Pass its real part, "
            "or its magnitude."
        )
    return array


def scalar(name: str, value: ArrayLike, hint: str) -> ArrayLike:
    """Returns `value`; raises unless it is a real number or a real scalar array."""
    array = jnp.asarray(value)
    if array.ndim or array.dtype == jnp.bool_ or jnp.iscomplexobj(array):
        raise ValueError(
            f"`{name}` must be a real scalar, got shape {array.shape}, dtype "
            f"{array.dtype}. {hint}."
        )
    if isinstance(value, (int, float)) and value < 0:
        raise ValueError(f"`{name}` must not be negative, got {value}.")
    return value


def common_shape(hint: str, **arrays: jax.Array) -> tuple[int, ...]:
    """The shape that all arrays broadcast to together."""
    (against, first), *rest = arrays.items()
    shape = first.shape
    for name, array in rest:
        try:
            shape = jnp.broadcast_shapes(shape, array.shape)
        except ValueError:
            by_now = "" if shape == first.shape else f", by now broadcast to {shape}"
            raise ValueError(
                f"`{name}` has shape {array.shape}, which does not broadcast against "
                f"`{against}` of shape {first.shape}{by_now}. Shapes are aligned at "
                f"their last axes, as in NumPy: {hint}."
            ) from None
    return shape


def feature_vector(
    name: str, array: jax.Array, x: jax.Array, reduced: tuple[int, ...]
) -> jax.Array:
    """Turns an array that broadcasts against `x` into a vector over the kept axes."""
    features = _axes.others(reduced, x.ndim)
    aligned = _axes.aligned(name, array, x, KEEPDIMS)
    if any(aligned.shape[axis] != 1 for axis in reduced):
        raise ValueError(
            f"`{name}` has shape {array.shape}, which varies along the axes {reduced} "
            f"of `x` (shape {x.shape}) that are reduced. Give it length 1 there: "
            f"{KEEPDIMS}."
        )
    return jnp.broadcast_to(jnp.squeeze(aligned, reduced), _axes.lengths(x, features))


def with_dims(vector: jax.Array, reduced: tuple[int, ...], keepdims: bool) -> jax.Array:
    """A feature vector, with the reduced axes if `keepdims`."""
    return jnp.expand_dims(vector, reduced) if keepdims else vector
