"""Which dtypes come in, which one sums are accumulated in, and which one goes out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike


def accumulation(*dtypes: DTypeLike) -> Any:
    """The real dtype of sums over values of `dtypes`: float64 if one has 64 bits."""
    wide = any(jnp.finfo(dtype).dtype.itemsize == 8 for dtype in dtypes)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def widen(array: jax.Array, *like: jax.Array | None) -> jax.Array:
    """`array` in the accumulation dtype of itself and `like`; complex stays complex."""
    real = accumulation(*(a.dtype for a in (array, *like) if a is not None))
    if not jnp.iscomplexobj(array):
        return array.astype(real)
    return array.astype(jnp.complex128 if real == jnp.float64 else jnp.complex64)


def inexact_array(name: str, value: ArrayLike) -> jax.Array:
    """`value` as an array, refused unless it is floating or complex."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be a floating or complex array, got {value!r}."
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(
            f"`{name}` must be floating or complex, got dtype {array.dtype}. "
            f"Cast it first, for example `{name}.astype(jnp.float32)`."
        )
    return array


def known(value: ArrayLike) -> np.ndarray | None:
    """The numbers of `value`; None where they are traced, or on other machines."""
    if isinstance(value, Tracer):
        return None
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return None
    return np.asarray(value)


def require_no_imaginary_loss(name: str, array: jax.Array, into: str, dtype) -> None:
    """Refuses a complex `name` where what takes it up, `into`, is real."""
    if jnp.iscomplexobj(array) and not _is_complex(dtype):
        raise TypeError(
            f"`{name}` is complex ({array.dtype}) where `{into}` is real "
            f"({jnp.dtype(dtype)}): its imaginary part would be lost. "
            f"Make `{into}` complex too, or pass a real `{name}`."
        )


def output(x_dtype: DTypeLike, dtype: DTypeLike | None) -> Any:
    """The output's dtype: `dtype`, by default that of `x`."""
    if dtype is None:
        return jnp.dtype(x_dtype)
    if not jnp.issubdtype(dtype, jnp.inexact) or (
        _is_complex(x_dtype) and not _is_complex(dtype)
    ):
        kind = "complex" if _is_complex(x_dtype) else "floating"
        raise TypeError(
            f"`dtype` must be {kind}, as `x` is ({jnp.dtype(x_dtype)}), got "
            f"{jnp.dtype(dtype)}. Leave it out to get the dtype of `x`."
        )
    return jax.dtypes.canonicalize_dtype(dtype)


def _is_complex(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.complexfloating)
