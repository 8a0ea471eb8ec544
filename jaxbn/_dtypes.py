"""Dtypes of inputs, sums and outputs."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

Args = ParamSpec("Args")
Result = TypeVar("Result")


def accumulation(*dtypes: DTypeLike) -> Any:
    """The real dtype for sums of `dtypes`: float64 if one has 64 bits, else float32."""
    wide = any(jnp.finfo(dtype).dtype.itemsize == 8 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(array: jax.Array, *like: jax.Array | None) -> jax.Array:
    """Casts to the accumulation dtype of `array` and `like`; complex stays complex."""
    real = accumulation(*(a.dtype for a in (array, *like) if a is not None))
    if not jnp.iscomplexobj(array):
        return array.astype(real)
    return array.astype(jnp.complex128 if real == jnp.float64 else jnp.complex64)


def mixing(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Lets a function promote dtypes by JAX's rules, even if users have forbidden it.

    Users forbid it with `jax_numpy_dtype_promotion="strict"`. Here dtypes are mixed on
    purpose: statistics are wider than `x`, and variances are real for complex `x`.
    """

    @functools.wraps(function)
    def mixed(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return mixed


def complex_like(dtype: DTypeLike) -> Any:
    """The complex dtype with the precision of `dtype`, at least complex64."""
    real = jnp.finfo(dtype).dtype
    return jnp.dtype(jnp.complex128 if real.itemsize == 8 else jnp.complex64)


def checked(name: str, dtype: DTypeLike) -> np.dtype:
    """Returns `dtype` as a NumPy dtype; raises unless it is floating or complex."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"`{name}` must be a dtype, got {dtype!r}.") from None
    if not jnp.issubdtype(found, jnp.inexact):
        raise TypeError(
            f"`{name}` must be floating or complex, got {found}. Use jnp.float32."
        )
    return found


def number(name: str, value: ArrayLike) -> float:
    """Returns `value` as a Python float; raises unless it is one real number."""
    found = numbers(name, value)
    if found is None:
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if found.ndim:
        raise TypeError(f"`{name}` must be one number, got shape {found.shape}.")
    return float(found)


def numbers(name: str, value: ArrayLike) -> np.ndarray | None:
    """The real numbers in `value`; raises for others. None if they are not known."""
    found, kinds = known(value), (jnp.integer, jnp.floating)
    if found is not None and not any(jnp.issubdtype(found.dtype, k) for k in kinds):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    return found


def array(name: str, value: ArrayLike) -> jax.Array:
    """Converts `value` to an array."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, (tuple, list)) and any(np.ndim(v) for v in value):
        raise TypeError(
            f"`{name}` must be one array, got a {type(value).__name__} of "
            f"{len(value)}. Stack them first if they are one: `jnp.stack({name})`."
        )
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}` must be an array, got {value!r}.") from error


def inexact_array(name: str, value: ArrayLike) -> jax.Array:
    """Converts `value` to an array; raises unless it is floating or complex."""
    found = array(name, value)
    if not jnp.issubdtype(found.dtype, jnp.inexact):
        raise TypeError(
            f"`{name}` must be floating or complex, got dtype {found.dtype}. "
            f"Cast it first, for example `{name}.astype(jnp.float32)`."
        )
    return found


def known(value: ArrayLike) -> np.ndarray | None:
    """The concrete numbers in `value`; None if traced or partly on other machines."""
    if isinstance(value, Tracer):
        return None
    if (as_jax := getattr(value, "__jax_array__", None)) is not None:
        return known(as_jax())
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    numbers = np.asarray(value)
    if jnp.issubdtype(numbers.dtype, jnp.floating):
        return numbers.astype(np.float64)  # NumPy warns about NaN in narrow dtypes.
    return numbers


def require_no_imaginary_loss(name: str, array: jax.Array, into: str, dtype) -> None:
    """Raises if the array `name` is complex and its destination `into` is real."""
    if jnp.iscomplexobj(array) and not _is_complex(dtype):
        raise TypeError(
            f"`{name}` is complex ({array.dtype}) where `{into}` is real "
            f"({jnp.dtype(dtype)}): its imaginary part would be lost. "
            f"Make `{into}` complex too, or pass a real `{name}`."
        )


def output(x_dtype: DTypeLike, dtype: DTypeLike | None) -> Any:
    """The output's dtype: `dtype`, by default the dtype of `x`."""
    if dtype is None:
        return jnp.dtype(x_dtype)
    dtype = checked("dtype", dtype)
    if _is_complex(x_dtype) and not _is_complex(dtype):
        raise TypeError(
            f"`dtype` must be complex, as `x` is ({jnp.dtype(x_dtype)}), got {dtype}. "
            "Leave it out to get the dtype of `x`."
        )
    return jax.dtypes.canonicalize_dtype(dtype)


def randomly_rounded(new: jax.Array, nearest: jax.Array, step: jax.Array) -> jax.Array:
    """Rounds `new` up or down at random, more often to the nearer number: no bias."""
    rest = new - nearest.astype(new.dtype)
    other = jnp.nextafter(nearest, jnp.where(rest > 0, jnp.inf, -jnp.inf))
    other = other.astype(nearest.dtype)
    apart = jnp.abs(other.astype(new.dtype) - nearest.astype(new.dtype))
    draw = _uniform(new, step)
    return jnp.where(draw * apart < jnp.abs(rest), other, nearest)


def _uniform(value: jax.Array, step: jax.Array) -> jax.Array:
    """Pseudo-random numbers from 0 to 1: a hash of `value` and `step`."""
    bits = lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
    bits = bits ^ (step.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # Murmur3.
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _is_complex(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)
