"""Arrays to test on: shapes, weights and dtypes that are easy to get wrong."""

import jax.numpy as jnp
import numpy as np
import pytest

# Shape and feature axes: the usual ones, channels first, several, none, length 1.
LAYOUTS = {
    "dense": ((7, 3), (-1,)),
    "image": ((4, 3, 5, 2), (-1,)),
    "channels_first": ((4, 3, 2, 5), (1,)),
    "two_axes": ((3, 4, 2, 5), (1, 3)),
    "two_axes_unordered": ((3, 4, 2), (2, 0)),
    "one_channel": ((9, 1), (-1,)),
    "one_per_channel": ((1, 4), (-1,)),
    "all_reduced": ((5, 3), ()),
    "none_reduced": ((2, 3), (0, 1)),
    "vector": ((6,), (0,)),
    "prime": ((13, 11, 17), (-1,)),
}
REAL = ("float16", "bfloat16", "float32", "float64")
COMPLEX = ("complex64", "complex128")
WEIGHTS = ("none", "mask", "examples", "floats", "frequencies", "features", "nothing")


def numbers(shape, dtype, seed=0, mean=1.0, std=2.0):
    rng = np.random.default_rng(seed)
    x = mean + std * rng.normal(size=shape)
    dtype = jnp.dtype(dtype)
    if dtype.kind == "c":
        x = x + 1j * (0.5 * mean + std * rng.normal(size=shape))
    return jnp.asarray(x.astype(dtype))  # NumPy casts without a program.


def weights(kind, shape, reduced, seed=1):
    """Weights of a kind, or None, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    if kind == "none":
        return None
    if kind == "mask":
        return rng.uniform(size=shape) < 0.6
    if kind == "nothing":
        return np.zeros(shape, bool)
    if kind == "features":
        return rng.integers(0, 3, size=shape).astype(np.float32)
    kept = [n if i in reduced[:1] else 1 for i, n in enumerate(shape)]
    if kind == "examples":
        return rng.uniform(size=kept) < 0.6
    if kind == "floats":
        return rng.uniform(0, 2, size=kept).astype(np.float32)
    assert kind == "frequencies"
    return rng.integers(0, 4, size=kept)


def reduced_axes(shape, feature_axes):
    kept = {axis % len(shape) for axis in feature_axes}
    return tuple(i for i in range(len(shape)) if i not in kept)


def squeeze(keepdims, reduced):
    """An oracle's result without the reduced axes."""
    return np.squeeze(keepdims, reduced)


def tolerance(dtype):
    """Relative tolerance of a value of O(1) that was computed or stored in `dtype`."""
    name = jnp.dtype(dtype).name
    return {
        "float16": 2e-3,
        "bfloat16": 1.6e-2,
        "float32": 2e-6,
        "complex64": 4e-6,
        "float64": 1e-13,
        "complex128": 2e-13,
    }[name]


def half_slow(cases):
    """Cases for `parametrize`, as lists; every second one only where there is time."""
    slow = pytest.mark.slow
    return [pytest.param(*case, marks=[slow] * (i % 2)) for i, case in enumerate(cases)]


def wide(array):
    """To float64 or complex128."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def assert_close(actual, desired, rtol=1e-7, atol=0.0, err_msg=""):
    """NumPy's `assert_allclose`, to which NaN is close to nothing, not even to NaN."""
    np.testing.assert_allclose(
        actual, desired, rtol, atol, equal_nan=False, err_msg=err_msg
    )
