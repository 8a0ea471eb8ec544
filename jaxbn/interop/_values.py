"""Converts one value of a checkpoint to a NumPy array; errors name its key."""

import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def leaf(key: str, value: Any) -> np.ndarray:
    """An array of numbers as a NumPy array; floats have at least 32 bits."""
    try:
        array = np.asarray(_on_host(value))
    except Exception as error:
        # The other library's own error, for a meta tensor or a deleted array.
        raise TypeError(
            f"`{key}` must be an array with known values, got {type(value).__name__}: "
            f"{error}"
        ) from error
    numbers = jnp.issubdtype(array.dtype, jnp.number) or array.dtype == np.bool_
    if not numbers or array.dtype.kind == "m":  # NumPy treats times as integers.
        raise TypeError(
            f"`{key}` must be an array of numbers, got {reprlib.repr(value)} of dtype "
            f"{array.dtype}."
        )
    if np.ma.is_masked(value):
        raise ValueError(
            f"`{key}` is a masked array with entries that are masked. Say what they "
            "are, by `.filled(...)`."
        )
    return held(key, array, _dtype(array.dtype))


def held(key: str, array: np.ndarray, dtype: Any) -> np.ndarray:
    """Casts the array to another dtype; raises if a value is too large for it."""
    with np.errstate(over="ignore", invalid="ignore"):
        kept = array.astype(dtype, copy=False)
    require_finite(key, kept, array)
    return kept


def require_finite(key: str, kept: np.ndarray, before: np.ndarray) -> None:
    """Raises if a value was finite before its conversion, and no longer is."""
    lost = np.isfinite(before) & ~np.isfinite(kept)
    if np.any(lost):
        where = int(np.argmax(lost))
        raise ValueError(
            f"`{key}` has {before.flat[where]:.4g} at feature {where}, which becomes "
            f"{kept.flat[where]} in {kept.dtype}. The checkpoint is damaged; if not, "
            "pass float64 with JAX's 64 bits switched on, by "
            '`jax.config.update("jax_enable_x64", True)`.'
        )


def to_device(key: str, array: np.ndarray) -> jax.Array:
    """Converts to a JAX array, in float32 if 64 bits are switched off."""
    return jnp.asarray(held(key, array, jax.dtypes.canonicalize_dtype(array.dtype)))


def _on_host(value: Any) -> Any:
    if hasattr(value, "unbox"):  # Flax wraps values with metadata.
        value = value.unbox()
    if hasattr(value, "detach"):  # torch: NumPy takes no tensors with a gradient,
        value = value.detach().cpu()
        if value.is_floating_point() and value.element_size() < 4:
            value = value.float()  # and no bfloat16 or float8.
    return value


def _dtype(dtype: np.dtype) -> Any:
    """The dtype to keep: no narrow or long floats, no int4, native byte order."""
    if jnp.issubdtype(dtype, jnp.floating):
        return np.float32 if dtype.itemsize < 4 else _at_most_64(dtype, np.float64)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return _at_most_64(dtype, np.complex128)
    own = dtype.kind in "iub"  # Not int4 or other JAX-only dtypes.
    return dtype.newbyteorder("=") if own else np.int32


def _at_most_64(dtype: np.dtype, widest: Any) -> Any:
    return min(dtype.newbyteorder("="), np.dtype(widest), key=lambda d: d.itemsize)
