"""`moments` and `merge_moments` against the float64 oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import older
import oracle
import pytest
from allpairspy import AllPairs
from data import (
    COMPLEX,
    LAYOUTS,
    REAL,
    WEIGHTS,
    assert_close,
    numbers,
    reduced_axes,
    squeeze,
    tolerance,
    weights,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn

SHIFTS = ("none", "mean", "off", "not_finite")
TABLE = list(AllPairs([REAL + COMPLEX, list(LAYOUTS), WEIGHTS, SHIFTS]))


def shift_of(kind, mean, std):
    if kind == "none":
        return None
    if kind == "not_finite":
        return np.full(mean.shape, np.nan)
    return mean + (0.0 if kind == "mean" else 3.0) * std


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "layout", "kind", "shift"), TABLE)
def test_equals_the_oracle(dtype, layout, kind, shift):
    shape, axes = LAYOUTS[layout]
    reduced = reduced_axes(shape, axes)
    x, w = numbers(shape, dtype), weights(kind, shape, reduced)
    truth = oracle.moments(wide(x), reduced, w)
    mean, var = squeeze(truth.mean, reduced), squeeze(truth.var, reduced)
    given_shift = shift_of(shift, mean, np.sqrt(var))

    # Compiled as a whole, which takes a tenth of the time of each operation by itself.
    verb = jax.jit(partial(jaxbn.moments, feature_axes=axes))
    m = verb(x, weights=w, shift=given_shift)

    accumulator = "float64" if dtype in ("float64", "complex128") else "float32"
    assert m.var.dtype == m.count.dtype == accumulator
    assert jnp.iscomplexobj(m.mean) == jnp.iscomplexobj(x)
    some = np.asarray(squeeze(truth.count, reduced) > 0)
    tol = 30 * tolerance(accumulator)
    assert_close(wide(m.mean)[some], mean[some], tol, tol)
    assert_close(wide(m.var)[some], var[some], tol, tol)
    count = np.broadcast_to(m.count, some.shape)
    assert_close(count, squeeze(truth.count, reduced), 1e-6)
    # Where nothing counts: variance 0, and a mean that is finite.
    assert np.all(np.isfinite(m.mean))
    assert np.all(wide(m.var)[~some] == 0)


def test_count_is_a_scalar_unless_weights_vary_along_features():
    x = jnp.ones((4, 3))
    assert jaxbn.moments(x).count.shape == ()
    assert jaxbn.moments(x, weights=jnp.ones((4, 1))).count.shape == ()
    assert jaxbn.moments(x, weights=jnp.ones(3)).count.shape == (3,)
    np.testing.assert_array_equal(jaxbn.moments(x, weights=jnp.ones(3)).count, 4)


def test_mask_counts_past_the_integers_of_float32():
    x = jnp.zeros((2**24 + 6, 1), jnp.bfloat16)
    mask = jnp.ones((2**24 + 6, 1), bool)
    assert jaxbn.moments(x, weights=mask, shift=jnp.zeros(1)).count == 2**24 + 6


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("off", [None, 0.0, 1.0, -3.0, 10.0])
def test_variance_at_any_ratio_of_mean_to_std(x64, ratio, dtype, off):
    x = numbers((4096, 8), dtype, mean=ratio, std=1.0)
    truth = oracle.moments(wide(x), (0,))
    std = np.sqrt(truth.var[0])
    if np.any(std == 0):  # bfloat16 cannot tell 10000.3 from 10000.9.
        pytest.skip("the data are constant in this dtype")
    shift = None if off is None else truth.mean[0] + off * std
    m = jax.jit(jaxbn.moments)(x, shift=shift)
    # Σ|δ|² is 1 + off² times what is left of it, and is rounded to float32.
    bound = 1e-5 if off is None or abs(off) <= 3 else (1 + off**2) * 5e-7
    if older.JAX < (0, 10) and dtype in ("bfloat16", "float16"):
        bound *= 3  # XLA adds numbers in half precision up one by one there.
    assert_close(m.var, truth.var[0], bound)


def test_flax_default_is_where_this_matters():
    import flax.linen as nn

    x = numbers((4096, 8), "float32", mean=1e3, std=1.0)
    truth = oracle.moments(wide(x), (0,)).var[0]
    layer = nn.BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    flax = np.max(np.abs(new["batch_stats"]["var"] / truth - 1))
    ours = np.max(np.abs(jaxbn.moments(x).var / truth - 1))
    assert flax > 1e-3
    assert ours < 1e-6


def test_what_is_masked_may_be_anything():
    x = numbers((6, 3), "float32")
    dirty = x.at[1].set(jnp.nan).at[4].set(jnp.inf)
    keep = jnp.array([1, 0, 1, 1, 0, 1])[:, None]
    for w in (keep, keep.astype(bool), keep.astype(jnp.float32)):
        for shift in (None, jnp.ones(3)):
            clean = jaxbn.moments(x, weights=w, shift=shift)
            for a, b in zip(
                jaxbn.moments(dirty, weights=w, shift=shift), clean, strict=True
            ):
                np.testing.assert_array_equal(a, b)


def test_nan_that_counts_is_seen():
    m = jaxbn.moments(jnp.array([[1.0, 1.0], [jnp.nan, 2.0]]))
    np.testing.assert_array_equal(np.isnan(m.mean), [True, False])
    np.testing.assert_array_equal(np.isnan(m.var), [True, False])


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0), (0, 5, 3)])
@pytest.mark.parametrize("shift", [False, True])
def test_empty(shape, shift):
    x = jnp.zeros(shape)
    m = jaxbn.moments(x, shift=jnp.ones(shape[-1]) if shift else None)
    assert m.count == (4 if shape == (4, 0) else 0)
    np.testing.assert_array_equal(m.mean, np.full(shape[-1], float(shift)))
    np.testing.assert_array_equal(m.var, np.zeros(shape[-1]))


finite = st.floats(-1e3, 1e3, width=32)


@jax.jit
def merged_parts(x, keep):
    part = lambda x, w: jaxbn.moments(x, weights=w)
    return jaxbn.merge_moments(jax.vmap(part)(x, keep))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(finite, max_size=6), max_size=5))
def test_merging_parts_is_the_whole(parts):
    x, keep = np.zeros((5, 6, 1), np.float32), np.zeros((5, 6, 1), bool)
    for k, part in enumerate(parts):
        x[k, : len(part), 0], keep[k, : len(part)] = part, True

    merged = merged_parts(x, keep)
    whole = oracle.moments(x.reshape(-1, 1), (0,), keep.reshape(-1, 1))
    scale = 1e-6 * (np.abs(x).max() + 1)
    assert_close(merged.mean, whole.mean[0], 1e-6, scale)
    assert_close(merged.var, whole.var[0], 1e-5, scale**2)
    assert merged.count == whole.count[0, 0]


@pytest.mark.parametrize("vector_count", [False, True])
def test_merging_over_several_axes(vector_count):
    x = numbers((2, 3, 5, 4), "float32", mean=1e2, std=1.0)
    w = numbers((2, 3, 5, 4 if vector_count else 1), "float32", seed=3) ** 2
    part = lambda x, w: jaxbn.moments(x, weights=w)
    stacked = jax.jit(jax.vmap(jax.vmap(part)))(x, w)
    merged = jax.jit(partial(jaxbn.merge_moments, axis=(0, 1)))(stacked)
    whole = oracle.moments(wide(x).reshape(-1, 4), (0,), wide(w).reshape(30, -1))
    assert merged.count.shape == ((4,) if vector_count else ())
    assert_close(merged.mean, whole.mean[0], 1e-6)
    assert_close(merged.var, whole.var[0], 1e-5)
    assert_close(merged.count, np.squeeze(whole.count), 1e-6)


def test_merging_along_a_later_axis():
    x = numbers((3, 5, 4), "float32")
    stacked = jax.vmap(jaxbn.moments, out_axes=jaxbn.Moments(1, 1, 0))(x)
    merged = jaxbn.merge_moments(stacked, axis=1)
    whole = oracle.moments(wide(x).reshape(15, 4), (0,))
    assert_close(merged.mean, whole.mean[0], 1e-6)
    assert_close(merged.var, whole.var[0], 1e-6)


def test_merging_keeps_the_shape_of_a_single_feature():
    m = jaxbn.Moments(jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.ones((2, 1)))
    assert jaxbn.merge_moments(m).count.shape == (1,)


@pytest.mark.parametrize("shift", [None, np.zeros(4, np.float32)])
def test_a_variance_that_overflows_is_infinite(shift):
    m = jaxbn.moments(numbers((8, 4), "float32", mean=0.0) * 1e30, shift=shift)
    np.testing.assert_array_equal(m.var, np.inf)
    assert np.all(np.isfinite(m.mean))
