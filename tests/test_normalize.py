"""`normalize` against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from allpairspy import AllPairs
from data import (
    COMPLEX,
    LAYOUTS,
    REAL,
    assert_close,
    numbers,
    reduced_axes,
    tolerance,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
from jaxbn._normalize import normalized_in_two_steps

AFFINE = ("none", "scale", "bias", "both")
VECTORS = ("features", "one_leading", "two_leading")
OUT = (None, "float16", "bfloat16", "float32", "float64")
TABLE = list(AllPairs([REAL, list(LAYOUTS), AFFINE, VECTORS, OUT]))


def vector(shape, axes, reduced, leading, seed, positive=False):
    """A vector for the verb, and the same laid against x for the oracle."""
    first = reduced[:leading]
    rng = np.random.default_rng(seed)
    kept = [n if i in first or i not in reduced else 1 for i, n in enumerate(shape)]
    laid = rng.normal(size=kept)
    laid = np.abs(laid) + 0.5 if positive else laid
    features = tuple(i for i in range(len(shape)) if i not in reduced)
    ordered = np.transpose(laid, (*first, *features, *reduced[leading:]))
    squeezed = ordered.reshape([shape[i] for i in (*first, *features)])
    return jnp.asarray(squeezed, jnp.float32), wide(jnp.asarray(laid, jnp.float32))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "layout", "affine", "vectors", "out"), TABLE)
def test_equals_the_oracle(dtype, layout, affine, vectors, out):
    shape, axes = LAYOUTS[layout]
    reduced = reduced_axes(shape, axes)
    leading = min(len(reduced), {"features": 0, "one_leading": 1}.get(vectors, 2))
    x = numbers(shape, dtype)
    mean, mean_laid = vector(shape, axes, reduced, leading, 1)
    var, var_laid = vector(shape, axes, reduced, leading, 2, positive=True)
    scale, scale_laid = vector(shape, axes, reduced, leading, 3)
    bias, bias_laid = vector(shape, axes, reduced, 0, 4)

    y = jaxbn.normalize(
        x,
        mean,
        var,
        scale if affine in ("scale", "both") else None,
        bias if affine in ("bias", "both") else None,
        feature_axes=axes,
        dtype=out,
    )
    truth = oracle.normalize(
        wide(x),
        mean_laid,
        var_laid,
        scale_laid if affine in ("scale", "both") else 1.0,
        bias_laid if affine in ("bias", "both") else 0.0,
    )
    assert y.dtype == (out or dtype)
    # epsilon, a float, is rounded to the dtype of the vectors.
    tol = max(tolerance(y.dtype), tolerance(x.dtype) if dtype == "float64" else 2e-6)
    assert_close(wide(y), truth, 4 * max(tol, 1e-9), 4 * max(tol, 1e-9))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", COMPLEX)
def test_complex(dtype):
    x = numbers((6, 3), dtype)
    m = oracle.moments(wide(x), (0,))
    scale = np.array([1.0, -2.0, 0.5], np.float32)
    for factor in (scale, scale * (1 + 2j)):
        y = jaxbn.normalize(x, m.mean[0], m.var[0], factor, 1j * scale)
        assert y.dtype == dtype
        truth = oracle.normalize(wide(x), m.mean, m.var, factor, 1j * scale)
        assert_close(wide(y), truth, 1e-5, 1e-5)


def test_subtracts_before_it_scales():
    x = numbers((4096, 4), "float32", mean=1e4, std=0.05)
    m = oracle.moments(wide(x), (0,))
    y = jaxbn.normalize(x, m.mean[0], m.var[0], epsilon=0.0)
    error = np.abs(wide(y) - oracle.normalize(wide(x), *m[:2], epsilon=0.0)).max()
    inv = (1 / np.sqrt(m.var)).astype(np.float32)
    folded = np.asarray(x) * inv + (-m.mean * inv).astype(np.float32)
    folded_error = np.abs(folded - oracle.normalize(wide(x), *m[:2], epsilon=0.0)).max()
    # What is left is the rounding of the mean itself to float32.
    assert error < 1.2e-2
    assert error < folded_error


def test_the_program_shows_where_it_is():
    x = jnp.ones((2, 3, 4))
    program = jax.make_jaxpr(
        lambda x: jaxbn.normalize(x, x[0, :, 0], x[1, :, 0], feature_axes=1)
    )(x)
    names = [eqn.params.get("name") for eqn in program.eqns]
    assert "jaxbn_normalize_axis_1" in names


def test_epsilon_may_be_an_array():
    x, v = jnp.ones((2, 3)), jnp.ones(3)
    np.testing.assert_array_equal(
        jaxbn.normalize(x, v, v, epsilon=jnp.float32(0.5)),
        jaxbn.normalize(x, v, v, epsilon=0.5),
    )


NUMBERS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@settings(deadline=None, max_examples=300)
@given(
    NUMBERS,
    st.floats(-5, 5, width=32),
    st.floats(0, 1e6, width=32, allow_subnormal=False),
    st.sampled_from([0.0, 1.0, -2.5, 1e-3, 1e-20, 1e-38, -1e-36, 3e5]),
    st.sampled_from([0.0, 1.0, -7.0, 1e-8, 1e-20, 1e5]),
)
def test_two_operations_are_as_exact_as_three(mean, offset, var, scale, bias):
    """What GPUs compute in training."""
    x = np.float32(mean + offset * np.sqrt(var))
    vectors = [jnp.full(1, v, jnp.float32) for v in (mean, var, scale, bias)]
    options = {"feature_axes": (1,), "epsilon": jnp.float32(1e-5), "dtype": "float32"}
    y = normalized_in_two_steps(jnp.full((1, 1), x), *vectors, **options)
    mean, var, scale, bias = (float(v[0]) for v in vectors)
    truth = oracle.normalize(x, mean, var, scale, bias)
    factor = abs(scale) / np.sqrt(var + 1e-5)
    terms = (abs(x) + abs(mean)) * factor + abs(bias)
    # Numbers below the smallest normal one count as 0 on a CPU.
    assert abs(float(y[0, 0]) - truth) <= 2e-7 * terms + 1e-18


def test_two_operations_leave_what_is_0_at_0():
    x, zero = numbers((6, 2), "float32"), jnp.zeros(2)
    options = {"feature_axes": (1,), "epsilon": jnp.float32(1e-5), "dtype": "float32"}
    assert not normalized_in_two_steps(x, zero, zero, zero, zero, **options).any()
    bias = jnp.array([3.0, -1e-3])
    y = normalized_in_two_steps(x, zero, zero, zero, bias, **options)
    assert_close(y, np.broadcast_to(bias, y.shape), rtol=1e-6, atol=0)


def test_two_operations_where_the_variance_is_not_finite():
    x, zero = numbers((6, 2), "float32"), jnp.zeros(2)
    options = {"feature_axes": (1,), "epsilon": jnp.float32(1e-5), "dtype": "float32"}
    bias = jnp.array([3.0, 1e-19])
    y = normalized_in_two_steps(x, zero, zero + jnp.inf, zero + 1, bias, **options)
    assert_close(y, np.broadcast_to(bias, y.shape), rtol=1e-5, atol=1e-30)
