"""Feature axes, reduced axes, and how vectors and weights broadcast against `x`."""

import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxbn import _dtypes

Axes = int | Sequence[int]


def canonical(axes: Axes, ndim: int, name: str = "feature_axes") -> tuple[int, ...]:
    """Returns `axes` as distinct, non-negative integers in ascending order."""
    given = integers(axes, name)
    for axis in given:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"`{name}` has {axis}, which is out of range for an array of rank "
                f"{ndim}. Give axes from {-ndim} to {ndim - 1}."
            )
    found = tuple(sorted(axis % ndim for axis in given))
    if len(set(found)) < len(found):
        raise ValueError(
            f"`{name}` names an axis twice: got {given} for an array of rank {ndim}. "
            "Name each axis once."
        )
    return found


def shape(features: int | Sequence[int], name: str = "features") -> tuple[int, ...]:
    """Returns `features` as the shape of a feature vector."""
    found = integers(features, name)
    if any(n < 0 for n in found):
        raise ValueError(f"`{name}` must not be negative, got {features!r}.")
    return found


def others(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """The axes of an array of rank `ndim` that are not in `axes`."""
    return tuple(axis for axis in range(ndim) if axis not in axes)


def lengths(x: jax.Array, axes: Sequence[int]) -> tuple[int, ...]:
    """The lengths of `x` along `axes`."""
    return tuple(x.shape[axis] for axis in axes)


def batch_axis(feature_axes: Sequence[int], x: jax.Array) -> int:
    """The batch axis: the first axis that is not a feature axis."""
    reduced = others(feature_axes, x.ndim)
    if not reduced:
        raise ValueError(
            f"`x` of shape {x.shape} has no axis of examples: `feature_axes`, "
            f"{tuple(feature_axes)}, are all of its axes. Leave one of them out."
        )
    return reduced[0]


def expand(vector: jax.Array, feature_axes: Sequence[int], ndim: int) -> jax.Array:
    """Reshapes a vector over the feature axes to broadcast against rank `ndim`.

    Axes of `vector` before the feature axes match the first reduced axes of `x`.
    """
    leading = others(feature_axes, ndim)[: vector.ndim - len(feature_axes)]
    axes = (*leading, *feature_axes)
    return jnp.expand_dims(vector.transpose(np.argsort(axes)), others(axes, ndim))


def is_per_example(vector: jax.Array | None, feature_axes: Sequence[int]) -> bool:
    """Whether `vector` has axes before the feature axes."""
    return vector is not None and vector.ndim > len(feature_axes)


def require_features(
    name: str,
    vector: jax.Array,
    x: jax.Array,
    feature_axes: Sequence[int],
    *,
    per_example: bool = False,
) -> None:
    """Raises unless `vector` has the shape of the feature axes of `x`.

    With `per_example`, leading axes may match the first reduced axes of `x`.
    """
    expected = features = lengths(x, feature_axes)
    leading = others(feature_axes, x.ndim)[: vector.ndim - len(feature_axes)]
    if per_example and is_per_example(vector, feature_axes):
        expected = lengths(x, (*leading, *feature_axes))
    if vector.shape != expected:
        hint = ""
        if per_example and leading:
            hint = f", or {expected} for a vector per index of the axes {leading}"
        raise ValueError(
            f"`{name}` has shape {vector.shape}, expected {features}: the lengths of "
            f"the feature axes {tuple(feature_axes)} of `x` (shape {x.shape}){hint}. "
            f"Reshape `{name}`, or name other `feature_axes`."
        )


def aligned(name: str, array: jax.Array, x: jax.Array, hint: str) -> jax.Array:
    """Reshapes `array` to the rank of `x`; raises unless it broadcasts against `x`."""
    shape = (1,) * (x.ndim - array.ndim) + array.shape
    if len(shape) > x.ndim or any(
        a not in (1, n) for a, n in zip(shape, x.shape, strict=True)
    ):
        raise ValueError(
            f"`{name}` has shape {array.shape}, which does not broadcast against `x` "
            f"of shape {x.shape}. Shapes are aligned at their last axes, as in NumPy: "
            f"{hint}."
        )
    return array.reshape(shape)


def weights_like(
    weights: ArrayLike, x: jax.Array, dtype, name: str = "weights"
) -> jax.Array:
    """Weights with the rank of `x`, boolean or cast to `dtype`, without gradient."""
    weights = lax.stop_gradient(_dtypes.array(name, weights))
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(
            f"`{name}` must be boolean or real, got dtype {weights.dtype}. "
            f"Pass the magnitude, or `{name} != 0`."
        )
    index = ", ".join([":", *["None"] * (x.ndim - 1)])
    hint = f"one weight per example, of shape (N,), is `{name}[{index}]`"
    weights = aligned(name, weights, x, hint)
    return weights if weights.dtype == jnp.bool_ else weights.astype(dtype)


def integers(values: int | Sequence[int], name: str) -> tuple[int, ...]:
    """Returns one or several integers as a tuple."""
    try:
        return tuple(map(operator.index, np.atleast_1d(np.asarray(values, object))))
    except TypeError:
        raise TypeError(
            f"`{name}` must be an integer or a tuple of integers, got {values!r}."
        ) from None
