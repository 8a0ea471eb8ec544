"""As far as float32 and its counts reach, and not a finite wrong number beyond."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import assert_close, numbers

import jaxbn
from jaxbn import _sums
from jaxbn.layers._per_example import positions

pytestmark = pytest.mark.optimized

LAYOUTS = {
    "scalar": ((1000,), ()),
    "column": ((1000, 1), (1,)),
    "two": ((1000, 2), (1,)),
}
IMPLEMENTATIONS = ("xla", None)


def truth(x, axes, w=None):
    reduced = tuple(i for i in range(x.ndim) if i not in axes)
    m = oracle.moments(x, reduced, w)
    return jaxbn.Moments(*(np.squeeze(v, reduced) for v in m[:2]), m.count.max())


def both(f):
    """With and without jit: a compiler sees constants, and moves them."""
    return f, jax.jit(f)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1e14, 1e16, 1e17])
@pytest.mark.parametrize("near", [True, False])
def test_large_values(layout, size, near):
    shape, axes = LAYOUTS[layout]
    x = numbers(shape, "float32", mean=size, std=size)
    shift = None if near else jnp.zeros([shape[a] for a in axes])
    expected = truth(x, axes)
    for implementation in IMPLEMENTATIONS:
        options = {"shift": shift, "implementation": implementation}
        for f in both(partial(jaxbn.moments, feature_axes=axes, **options)):
            m = f(x)
            assert_close(m.mean, expected.mean, 1e-5)
            assert_close(m.var, expected.var, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight", [1e25, 1e30, 1e-25, 1e-30])
def test_weights_of_any_size(layout, weight):
    """Constants of the program, as a closure's are."""
    shape, axes = LAYOUTS[layout]
    x = numbers(shape, "float32")
    expected = truth(x, axes)
    ones = np.ones(len(shape), int)
    for w in (np.full(ones, weight, np.float32), np.full(shape, weight, np.float32)):
        for shift in (None, jnp.ones([shape[a] for a in axes])):

            def f(x, w=w, shift=shift):
                options = {"feature_axes": axes, "weights": w, "shift": shift}
                y, m = jaxbn.batch_norm(x, **options)
                return m, y

            def loss(x, f=f):
                m, y = f(x)
                return jnp.sum(jnp.sin(y)) + jnp.sum(m.var)

            plain = jax.grad(
                lambda x: (
                    jnp.sum(jnp.sin(jaxbn.batch_norm(x, feature_axes=axes)[0]))
                    + jnp.sum(jaxbn.moments(x, feature_axes=axes).var)
                )
            )(x)
            for run in both(f):
                assert_close(run(x)[0].mean, expected.mean, 1e-5)
                assert_close(run(x)[0].var, expected.var, 1e-5)
            assert_close(jax.jit(jax.grad(loss))(x), plain, 1e-3, 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [2.4e37, 1e20, 3e38])
@pytest.mark.parametrize("shift", [None, 0.0, 1e37])
def test_beyond_the_range_nothing_is_finite_and_wrong(implementation, value, shift):
    x = np.full((1000, 2), value, np.float32) * np.array([1, -1], np.float32)
    x[::2, 1] *= -1  # Constant, and of alternating sign.
    shift = None if shift is None else jnp.full(2, shift)
    expected = truth(x, (1,))
    for f in both(partial(jaxbn.moments, shift=shift, implementation=implementation)):
        m = f(x)
        for got, right, size in (
            (m.mean, expected.mean, value),
            (m.var, expected.var, value**2),
        ):
            got = np.asarray(got, np.float64)
            near = np.abs(got - right) <= 1e-5 * np.abs(right) + 1e-6 * size
            assert np.all(near | ~np.isfinite(got)), (got, right)


@pytest.mark.parametrize("form", ["vjp", "jvp"])
@pytest.mark.parametrize("per_example", [True, False])
def test_a_constant_channel_and_a_tiny_epsilon(form, per_example):
    x, scale = jnp.ones((4, 3)), jnp.ones((4, 3) if per_example else 3)

    def loss(x, scale):
        y, _ = jaxbn.batch_norm(x, scale, scale, epsilon=1e-30, derivatives=form)
        return jnp.sum(jnp.sin(y))

    for gradient in both(jax.grad(loss, (0, 1))):
        assert all(np.all(np.isfinite(g)) for g in gradient(x, scale))
    normalized = lambda x, m, v: jnp.sum(jaxbn.normalize(x, m, v, epsilon=1e-30) ** 2)
    for g in jax.grad(normalized, (0, 1, 2))(x, jnp.ones(3), jnp.zeros(3)):
        assert_close(g, np.zeros(g.shape))


def struct(shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


LARGE = (2**20, 2**13, 2)
COUNTED = {
    "one number": (LARGE, struct((1, 1, 1))),
    "one boolean": (LARGE, struct((1, 1, 1), bool)),
    "a mask": (LARGE, struct((2**20, 2**13, 1), bool)),
    "a mask of features": (LARGE, struct(LARGE, bool)),
    "a long axis": ((2**33, 2), struct((2**33, 1), bool)),
    "nothing": (LARGE, None),
}
LAYERS = {
    "standard": jaxbn.layers.standard(),
    "example_weight": jaxbn.layers.standard(example_weight=0.1),
    "pseudo_samples": jaxbn.layers.standard(pseudo_samples=3.0),
    "ghost": jaxbn.layers.ghost(group_size=2),
    "renorm": jaxbn.layers.renorm(),
    "streaming": jaxbn.layers.streaming(),
    "in_place": jaxbn.layers.in_place(),
}


@pytest.mark.parametrize("name", COUNTED)
def test_arrays_of_more_than_int32_counts(name):
    shape, w = COUNTED[name]
    x = struct(shape)
    m = jax.eval_shape(lambda x, w: jaxbn.moments(x, weights=w), x, w)
    assert m.count.dtype == jnp.float32
    for layer in LAYERS.values():
        params, state = layer.init(2)
        for training in (True, False):
            if layer == LAYERS["example_weight"] and "features" in name:
                continue

            def f(x, w, layer=layer, params=params, state=state, training=training):
                return layer.forward(params, state, x, training=training, weights=w)

            assert jax.eval_shape(f, x, w)[0].shape == shape


@pytest.mark.parametrize("limit", [5, 30, 10**6])
@pytest.mark.parametrize("reduced", [(0, 1), (0,), (1,), ()])
def test_booleans_are_counted_in_parts(monkeypatch, limit, reduced):
    monkeypatch.setattr(_sums, "INT32_MAX", limit)
    features = tuple(i for i in range(3) if i not in reduced)
    w = np.random.default_rng(0).random((6, 20, 3)) < 0.6
    count = _sums.total_weight(jnp.ones(w.shape), jnp.asarray(w), features)
    np.testing.assert_array_equal(count, w.sum(reduced))


def test_an_example_of_many_positions():
    x = struct((4, 2**33, 2))
    assert jax.eval_shape(lambda x: positions(x, (2,)), x).dtype == jnp.float32
    np.testing.assert_array_equal(positions(jnp.ones((4, 5, 6, 2)), (3,)), 30)


def test_the_count_has_the_shape_of_the_features_if_weights_have():
    x = jnp.ones((4, 1))
    for w, shape in (((4, 1), (1,)), ((1, 1), (1,)), ((1,), (1,)), ((), (1,))):
        assert jaxbn.moments(x, weights=np.ones(w)).count.shape == shape
    x = jnp.ones((4, 2))
    for w, shape in (((4, 1), ()), ((4, 2), (2,)), ((2,), (2,)), ((1,), ()), ((), ())):
        assert jaxbn.moments(x, weights=np.ones(w)).count.shape == shape
    assert jaxbn.moments(x, weights=np.ones((4, 1)), feature_axes=()).count.shape == ()


SCALARS = [np.float32, np.float64, jnp.float32, jnp.bfloat16, np.array]


@pytest.mark.parametrize("kind", SCALARS)
def test_numbers_of_numpy_and_jax_are_checked_as_pythons(kind):
    x, stats = jnp.ones((4, 3)), jaxbn.init_stats(3)
    m = jaxbn.moments(x)
    for value in (2.0, -0.1, np.nan):
        with pytest.raises(ValueError, match="`momentum` is the weight of the old"):
            jaxbn.update(stats, m, momentum=kind(value))
        with pytest.raises(ValueError, match="`momentum` is the weight of the old"):
            jaxbn.layers.standard(momentum=kind(value))
    for value in (-1.0, np.nan):
        for f in (
            lambda e: jaxbn.batch_norm(x, epsilon=e),
            lambda e: jaxbn.normalize(x, x[0], x[0], epsilon=e),
            lambda e: jaxbn.layers.renorm(epsilon=e),
            lambda e: jaxbn.layers.in_place(epsilon=e),
        ):
            with pytest.raises(ValueError, match="`epsilon` must not be negative"):
                f(kind(value))
    jaxbn.update(stats, m, momentum=kind(0.5))
    jaxbn.batch_norm(x, epsilon=kind(0.5))
    jax.jit(lambda e: jaxbn.batch_norm(x, epsilon=e))(-1.0)  # Not known in a trace.
