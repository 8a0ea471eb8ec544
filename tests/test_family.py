"""Every layer against its formula: values, derivatives, state, dtypes, layouts."""

from functools import partial

import family
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import assert_close, numbers, tolerance, wide
from family import CASES, EXAMPLES, FEATURES

import jaxbn

slow = partial(pytest.param, marks=pytest.mark.slow)
every = pytest.mark.parametrize("name", CASES)
MASK = np.array([1, 1, 0, 1, 1, 1, 1, 0]).reshape(-1, 1, 1) * np.array([1.0, 2.0, 1.0])
FLOATS = MASK.reshape(EXAMPLES, 3, 1)


def batch(dtype="float64", **how):
    return numbers((EXAMPLES, 3, FEATURES), dtype, **how)


def train(layer, params, state, x, w, given):
    """A step of a layer; one program, because op by op is slow."""
    step = jax.jit(
        lambda p, s, x, w, g: layer.apply(p, s, x, training=True, weights=w, **g)
    )
    return step(params, state, x, w, given)


def run(name, x, w=None, dtype=jnp.float64, **options):
    """y and the state of a layer in training, and what its oracle says of both."""
    case = CASES[name]
    layer, params, state = family.started(case, dtype, **options)
    given = family.inputs(case, dtype)
    y, new = train(layer, params, state, x, w, given)
    wide_params = {k: wide(v) for k, v in params.items()}
    wide_state = [wide(v) for v in state[:2]]
    expected, m, _ = case.oracle(wide(x), wide_params, wide_state, w, None)
    return y, new, expected, moved(name, wide_state, m)


def moved(name, state, m):
    """Mean and variance after a step of momentum 0.9."""
    mean, var = (np.array(v) for v in state)
    if name == "domain":
        for k, own in m.items():
            mean[k] = 0.9 * mean[k] + 0.1 * own.mean.ravel()
            var[k] = 0.9 * var[k] + 0.1 * own.var.ravel()
        return mean, var
    new_mean, new_var = m.mean.ravel(), m.var.ravel()
    keep = 0.9 / 1.9 if name == "streaming" else 0.9
    between = keep * (1 - keep) * (new_mean - mean) ** 2 if name == "streaming" else 0
    return (
        keep * mean + (1 - keep) * new_mean,
        keep * var + (1 - keep) * new_var + between,
    )


@every
@pytest.mark.parametrize("weighted", [slow(False), True])
def test_is_its_formula(name, weighted, x64):
    y, new, expected, (mean, var) = run(name, batch(), FLOATS if weighted else None)
    tol = 2e-6 if name == "streaming" else 1e-10  # `debiased` is a float32
    assert_close(y, expected, tol, tol)
    assert_close(new[0], mean, tol, tol)
    assert_close(new[1], var, tol, tol)
    present = np.unique(family.IDS)
    expected_steps = [2 if k in present else 1 for k in range(3)]
    np.testing.assert_array_equal(new.step, expected_steps if name == "domain" else 2)


@every
def test_hard_numbers_in_float32(name):
    """A mean of 1e4 standard deviations, without a running mean near it."""
    x = batch("float32", mean=1e3, std=0.1)
    options = {} if name == "streaming" else {"use_fast_variance": False}
    if name.startswith("ghost") or name == "domain":
        x = numbers((EXAMPLES, 40, FEATURES), "float32", mean=1e3, std=0.1)
    y, _, expected, _ = run(name, x, dtype=jnp.float32, **options)
    assert_close(y, expected, 1e-3, 3e-3)


@every
@pytest.mark.parametrize("dtype", [slow("float16"), "bfloat16", "complex64"])
def test_dtypes(name, dtype):
    case = CASES[name]
    if dtype == "complex64":
        if case.reverse_only:
            pytest.skip("real dtypes only")
        layer = case.make(stats_dtype=jnp.complex64)
        _, state = layer.init(FEATURES)
        x = batch(dtype)
        given = family.inputs(case, jnp.float32)
        params, _ = layer.init(FEATURES)
        y, new = train(layer, params, state, x, None, given)
        assert y.dtype == x.dtype
        assert [v.dtype for v in new] == [v.dtype for v in state]
        assert np.isfinite(y).all()
        return
    x = batch(dtype)
    y, new, expected, (mean, var) = run(name, x, dtype=jnp.float32)
    assert y.dtype == x.dtype
    assert_close(wide(y), expected, 4 * tolerance(dtype), 4 * tolerance(dtype))
    assert (new[0].dtype, new[1].dtype) == (jnp.float32, jnp.float32)
    assert_close(new[0], mean, 1e-5, 1e-5)
    assert_close(new[1], var, 1e-5, 1e-5)


def loss_of(case, layer, state, w, given):
    def loss(x, params):
        y, new = train(layer, params, state, x, w, given)
        return jnp.sum(jnp.sin(y)), new

    return loss


@every
@pytest.mark.parametrize("form", ["vjp", "jvp"])
def test_derivatives(name, form, x64):
    """Along a direction, against differences of the formula."""
    case = CASES[name]
    if not case.form and form == "vjp" and not case.reverse_only:
        pytest.skip("has every mode at once")
    if case.reverse_only and form == "jvp":
        pytest.skip("reverse mode only")
    options = {"derivatives": form} if case.form else {}
    layer, params, state = family.started(case, **options)
    x, given = batch(), family.inputs(case)
    loss = loss_of(case, layer, state, FLOATS, given)
    direction = jax.tree.map(lambda a: numbers(a.shape, a.dtype, 7), (x, params))

    old = [wide(v) for v in state[:2]]
    _, _, frozen = case.oracle(wide(x), jax.tree.map(wide, params), old, FLOATS, None)

    def value(t):
        x_, p = jax.tree.map(lambda a, b: wide(a) + t * wide(b), (x, params), direction)
        return np.sum(np.sin(case.oracle(x_, p, old, FLOATS, frozen)[0]))

    h = 1e-5
    expected = (value(h) - value(-h)) / (2 * h)
    grads, _ = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, params)
    products = jax.tree.map(lambda a, b: jnp.sum(a * b), grads, direction)
    assert_close(sum(jax.tree.leaves(products)), expected, 1e-6)
    if form == "jvp":
        only = lambda *args: loss(*args)[0]
        _, forward = jax.jit(lambda *a: jax.jvp(only, *a))((x, params), direction)
        assert_close(forward, expected, 1e-6)


@every
def test_second_derivatives(name, x64):
    """Reverse over reverse, against differences of the gradient.

    Not of renorm: what differences see of its gradient passes through r and d.
    """
    if name.startswith("renorm"):
        pytest.skip("r and d are constant to the gradient")
    case = CASES[name]
    layer, params, state = family.started(case)
    x, given = batch(), family.inputs(case)
    loss = loss_of(case, layer, state, None, given)
    direction = numbers(x.shape, "float64", 7)
    gradient = jax.jit(lambda x: jax.grad(loss, has_aux=True)(x, params)[0])
    got = jax.jit(jax.grad(lambda x: jnp.sum(gradient(x) * direction)))(x)
    h = 1e-5
    along = lambda t: np.asarray(gradient(x + t * direction))
    expected = (along(h) - along(-h)) / (2 * h)  # the Hessian is symmetric
    assert_close(got, expected, 1e-5, 1e-6)


@every
def test_nan_under_the_mask_reaches_nothing(name):
    case = CASES[name]
    layer, params, state = family.started(case, jnp.float32)
    given = family.inputs(case, jnp.float32)
    w = np.ones((EXAMPLES, 3, 1), bool)
    w[2], w[5, 0] = False, False
    x = batch("float32")
    hidden = jnp.where(w, x, jnp.array([jnp.nan, jnp.inf, -jnp.inf]))

    def loss(x, params):
        y, new = train(layer, params, state, x, w, given)
        return jnp.sum(jnp.sin(jnp.where(w, y, 0))), new

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    got = gradient(hidden, params)
    expected = gradient(jnp.where(w, x, 5), params)
    jax.tree.map(partial(assert_close, rtol=1e-4, atol=1e-5), got, expected)


@every
def test_a_batch_that_is_all_masked_changes_nothing(name):
    case = CASES[name]
    layer, params, state = family.started(case, jnp.float32)
    x, w = batch("float32"), np.zeros((EXAMPLES, 1, 1), bool)
    given = family.inputs(case, jnp.float32)
    with jax.debug_nans(True):
        y, new = train(layer, params, state, x, w, given)
    assert np.isfinite(y).all()
    jax.tree.map(np.testing.assert_array_equal, new, state)


@every
def test_state_keeps_its_structure_everywhere(name):
    """In scan (whose carry is typed), vmap over models, remat, and jit."""
    case = CASES[name]
    layer, params, state = family.started(case, jnp.float32)
    x, given = batch("float32"), family.inputs(case, jnp.float32)

    def apply(state, x):
        return train(layer, params, state, x, None, given)

    def step(state, x):
        y, state = jax.checkpoint(apply)(state, x)
        return state, y

    last, ys = jax.jit(lambda s: jax.lax.scan(step, s, jnp.stack([x, 2 * x])))(state)
    y, once = apply(state, x)
    y, twice = apply(once, 2 * x)
    close = partial(assert_close, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (last, ys[1]), (twice, y))
    models = jax.tree.map(lambda *a: jnp.stack(a), state, once)
    new, y_models = jax.jit(jax.vmap(apply))(models, jnp.stack([x, 2 * x]))[::-1]
    jax.tree.map(lambda a, b: close(a[1], b), (new, y_models), (twice, y))


@every
def test_inference_is_normalizing_by_the_state(name):
    case = CASES[name]
    layer, params, state = family.started(case, jnp.float32)
    x, given = batch("float32"), family.inputs(case, jnp.float32)
    y, kept = layer.apply(params, state, x, training=False, **given)
    assert kept is state
    one = {k: v[3:4] for k, v in given.items()}
    alone, _ = layer.apply(params, state, x[3:4], training=False, **one)
    assert_close(alone, y[3:4], 1e-5, 1e-5)  # examples do not see each other
    if name in ("standard", "streaming") or name.startswith("ghost"):
        expected = jaxbn.normalize(x, state.mean, state.var, **params)
        np.testing.assert_array_equal(y, expected)


@every
@pytest.mark.parametrize("feature_axes", [slow(1), slow(0), (1, 3)])
def test_feature_axes(name, feature_axes):
    """The same numbers with the features elsewhere."""
    case = CASES[name]
    last = numbers((EXAMPLES, 2, 5, 6), "float32")
    layer = case.make(feature_axes=-1)
    params, state = layer.init(6)
    given = family.inputs(case, jnp.float32)
    y, new = train(layer, params, state, last, None, given)
    if feature_axes == (1, 3):
        features, move = (
            (2, 3),
            lambda a: (
                a.reshape(8, 2, 5, 2, 3).transpose(0, 3, 1, 4, 2).reshape(8, 2, 2, 3, 5)
            ),
        )
        axes = (1, 3)
    else:
        features, axes = 6, feature_axes
        move = lambda a: jnp.moveaxis(a, -1, feature_axes)
    other = case.make(feature_axes=axes)
    params, state = other.init(features)
    y_other, new_other = train(other, params, state, move(last), None, given)
    assert_close(y_other, move(y), 1e-4, 1e-5)
    for a, b in zip(new_other[:2], new[:2], strict=True):
        assert_close(a.reshape(b.shape), b, 1e-4, 1e-5)


@every
@pytest.mark.parametrize("affine", [slow("scale"), slow("bias"), "none"])
def test_scale_and_bias_can_be_left_out(name, affine):
    case = CASES[name]
    options = {"use_scale": affine == "scale", "use_bias": affine == "bias"}
    layer, full = case.make(**options), case.make()
    params, state = layer.init(FEATURES)
    assert {k.removesuffix("_kernel") for k in params} == {affine} - {"none"}
    x, given = batch("float32"), family.inputs(case, jnp.float32)

    def outputs(layer, params):
        def loss(x):
            y, _ = layer.apply(params, state, x, training=True, **given)
            return jnp.sum(jnp.sin(y)), y

        y, _ = layer.apply(params, state, x, training=False, **given)
        return y, jax.grad(loss, has_aux=True)(x)

    got, expected = jax.jit(
        lambda: (outputs(layer, params), outputs(full, full.init(FEATURES)[0]))
    )()
    jax.tree.map(partial(assert_close, rtol=1e-4, atol=2e-5), got, expected)


def test_the_oracle_of_groups_is_the_standard_one_for_one_group():
    x = wide(batch("float32"))
    y, _ = oracle.groups(x, np.zeros(EXAMPLES))
    m = oracle.moments(x, (0, 1))
    np.testing.assert_array_equal(y, oracle.normalize(x, m.mean, m.var))
