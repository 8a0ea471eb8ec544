"""`batch_norm`: values and first derivatives against the float64 oracle."""

from functools import partial

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
    WEIGHTS,
    assert_close,
    numbers,
    reduced_axes,
    tolerance,
    weights,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn

FORMS = ("vjp", "jvp")
AFFINE = ("none", "scale", "bias", "both")
TABLE = list(
    AllPairs([REAL + COMPLEX, list(LAYOUTS), WEIGHTS, AFFINE, FORMS, (False, True)])
)


def check_against_oracle(
    x, axes, w, scale, bias, shift, form, tol, epsilon=1e-3, summed_tol=None
):
    """Output and every cotangent, of which there must be no NaN."""
    reduced = reduced_axes(x.shape, axes)
    laid = lambda v: 1.0 if v is None else np.expand_dims(wide(v), reduced)

    def f(x, scale, bias):
        return jaxbn.batch_norm(
            x,
            scale,
            bias,
            feature_axes=axes,
            weights=w,
            shift=shift,
            derivatives=form,
            epsilon=epsilon,
        )

    @jax.jit  # One compilation instead of one for each operation.
    def values_and_cotangents(dy, *operands):
        y, vjp, m = jax.vjp(f, *operands, has_aux=True)
        return y, m, vjp(dy)

    dy = numbers(x.shape, x.dtype, seed=9, mean=0.5)
    y, m, cotangents = values_and_cotangents(dy, x, scale, bias)

    truth = oracle.moments(wide(x), reduced, w)
    mean = np.where(truth.count == 0, laid(m.mean), truth.mean)
    y_truth = oracle.normalize(
        wide(x),
        mean,
        truth.var,
        laid(scale),
        0 if bias is None else laid(bias),
        epsilon,
    )
    assert y.dtype == x.dtype
    size = np.abs(y_truth).max(initial=1)
    assert_close(wide(y), y_truth, tol, tol * size)
    if np.all(truth.count > 0):
        expected = oracle.vjp(wide(x), wide(dy), reduced, laid(scale), w, epsilon)
        names = ("x", "scale", "bias")
        operands = (x, scale, bias)
        for name, o, ct, t in zip(names, operands, cotangents, expected, strict=True):
            if o is None:
                assert ct is None
                continue
            assert ct.dtype == o.dtype
            t = t if jnp.iscomplexobj(o) else t.real
            ct_tol = tol
            if name != "x":
                t, ct_tol = np.squeeze(t, reduced), summed_tol or tol
            size = ct_tol * np.abs(t).max(initial=1)
            assert_close(wide(ct), t, ct_tol, size, err_msg=name)
    for ct in jax.tree.leaves(cotangents):
        assert np.all(np.isfinite(wide(ct)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("dtype", "layout", "kind", "affine", "form", "near"), TABLE)
def test_equals_the_oracle(dtype, layout, kind, affine, form, near):
    shape, axes = LAYOUTS[layout]
    reduced = reduced_axes(shape, axes)
    features = [n for i, n in enumerate(shape) if i not in reduced]
    x = numbers(shape, dtype)
    param = jnp.float64 if x.dtype in (jnp.float64, jnp.complex128) else jnp.float32
    scale = numbers(features, param, 5) if affine in ("scale", "both") else None
    bias = numbers(features, param, 6) if affine in ("bias", "both") else None
    w = weights(kind, shape, reduced)
    shift = np.squeeze(oracle.moments(wide(x), reduced, w).mean + 0.5, reduced)
    tol = 20 * tolerance(dtype)
    check_against_oracle(x, axes, w, scale, bias, shift if near else None, form, tol)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mean", [1.0, 1e2, 1e4])
def test_gradients_at_large_means(form, mean):
    x = numbers((512, 4), "float32", mean=mean, std=1.0)
    scale, bias = numbers(4, "float32", 5), numbers(4, "float32", 6)
    # The mean itself is rounded to float32: y is off by half of that, and dscale by as
    # much times Σdy, of which there are hundreds here.
    tol = max(1e-5, 1e-7 * mean)
    check_against_oracle(
        x, (-1,), None, scale, bias, None, form, tol, summed_tol=10 * tol
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale_dtype", ["complex64", "float32"])
@pytest.mark.parametrize("bias_dtype", ["complex64", "float32"])
def test_complex_parameters(form, scale_dtype, bias_dtype):
    x = numbers((9, 3), "complex64")
    scale, bias = numbers(3, scale_dtype, 5), numbers(3, bias_dtype, 6)
    check_against_oracle(x, (-1,), None, scale, bias, None, form, 2e-5)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    data=st.data(),
    form=st.sampled_from(FORMS),
)
def test_any_shape_axes_and_mask(shape, data, form):
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1)).map(sorted).map(tuple))
    mask_shape = [data.draw(st.sampled_from([1, n])) for n in shape]
    seed = data.draw(st.integers(0, 99))
    w = np.random.default_rng(seed).uniform(size=mask_shape) < 0.7
    features = [shape[a] for a in axes]
    x = numbers(shape, "float32", seed)
    scale, bias = numbers(features, "float32", 5), numbers(features, "float32", 6)
    check_against_oracle(x, axes, w, scale, bias, None, form, 2e-4, epsilon=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_is_moments_then_normalize(form):
    x = numbers((8, 5, 3), "float32")
    scale, bias, w = (
        numbers(3, "float32", 5),
        numbers(3, "float32", 6),
        numbers((8, 1, 1), "float32", 7) ** 2,
    )
    y, m = jaxbn.batch_norm(x, scale, bias, weights=w, derivatives=form)
    for a, b in zip(m, jaxbn.moments(x, weights=w), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(y, jaxbn.normalize(x, m.mean, m.var, scale, bias))


@pytest.mark.parametrize("masked", [False, True])
def test_scale_and_bias_per_example(masked):
    x = numbers((6, 5, 3), "float32")
    scale, bias = numbers((6, 3), "float32", 5), numbers(3, "float32", 6)
    w = jnp.arange(6).reshape(6, 1, 1) % 3 > 0 if masked else None

    def loss(bn):
        return lambda *a: jnp.sum(jnp.sin(bn(*a)))

    def plain(x, scale, bias):
        xhat = jaxbn.batch_norm(x, weights=w)[0]
        return xhat * scale[:, None] + bias[None, None]

    def per_example(x, scale, bias):
        return jaxbn.batch_norm(x, scale, bias, weights=w)[0]

    args = (x, scale, bias)
    got = jax.grad(loss(per_example), (0, 1, 2))(*args)
    for a, b in zip(got, jax.grad(loss(plain), (0, 1, 2))(*args), strict=True):
        assert_close(a, b, 1e-5, 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shift", [False, True])
def test_not_finite_under_the_mask(form, per_example, bad, shift):
    x = numbers((6, 2, 3), "float32")
    keep = jnp.array([1, 1, 0, 1, 0, 1], bool)[:, None, None]
    dirty = jnp.where(keep, x, bad)
    scale = numbers((6, 3) if per_example else 3, "float32", 5)
    bias = numbers(3, "float32", 6)

    def loss(x, scale, bias):
        s = jnp.ones(3) if shift else None
        y, m = jaxbn.batch_norm(x, scale, bias, weights=keep, shift=s, derivatives=form)
        y = jnp.where(keep, y, 0)
        return jnp.sum(jnp.sin(y)) + jnp.sum(m.mean * m.var)

    clean = jax.grad(loss, (0, 1, 2))(x, scale, bias)
    for a, b in zip(jax.grad(loss, (0, 1, 2))(dirty, scale, bias), clean, strict=True):
        assert_close(a, b, 1e-5, 1e-6)
    # The output says what is there, instead of hiding it.
    y = jaxbn.batch_norm(dirty, scale, bias, weights=keep, derivatives=form)[0]
    assert not np.any(np.isfinite(y[2]))
    assert np.all(np.isfinite(y[0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (4, 1), (4, 0)])
def test_nothing_to_learn_from(form, shape):
    x = numbers(shape, "float32")
    scale = jnp.ones(shape[-1])
    cases = [None, jnp.zeros(shape, bool), jnp.zeros((*shape[:-1], 1))]
    with jax.debug_nans(True):  # Operation by operation: not even between them.
        for w in cases:
            f = partial(jaxbn.batch_norm, weights=w, derivatives=form)
            out, vjp = jax.vjp(f, x, scale, scale)
            cotangents = vjp(jax.tree.map(jnp.ones_like, out))
            for leaf in jax.tree.leaves((out, cotangents)):
                assert np.all(np.isfinite(leaf))
            m = out[1]
            stats = jaxbn.init_stats(shape[-1])
            new = jaxbn.update(stats, m)
            if w is not None or 0 in shape[:-1]:
                assert jax.tree.all(jax.tree.map(np.array_equal, new, stats))


@pytest.mark.parametrize("form", FORMS)
def test_constant_feature(form):
    x = jnp.full((8, 2), 3.0)
    y, m = jaxbn.batch_norm(x, derivatives=form)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal(m.var, 0)
    g = jax.grad(lambda x: jaxbn.batch_norm(x, derivatives=form)[0][0, 0])(x)
    expected = (np.eye(8)[0] - 1 / 8) / np.sqrt(1e-5)
    assert_close(g[:, 0], expected, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_output_dtype(form):
    x = numbers((8, 3), "bfloat16")
    f = lambda x: jaxbn.batch_norm(x, dtype=jnp.float32, derivatives=form)[0]
    y, vjp = jax.vjp(f, x)
    assert y.dtype == jnp.float32
    assert vjp(y)[0].dtype == jnp.bfloat16
    assert_close(y.mean(0), 0, atol=1e-6)
