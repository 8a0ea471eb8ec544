"""Under JAX's transformations and its strict modes."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers

import jaxbn
from jaxbn import _compat
from jaxbn import _operation as operation

FORMS = ("vjp", "jvp")


def step(form, x, scale, bias, stats, w):
    """Everything that a training step uses."""

    def loss(x, scale, bias):
        y, m = jaxbn.batch_norm(
            x, scale, bias, weights=w, shift=stats.mean, derivatives=form
        )
        return jnp.sum(y**3), m

    grads, m = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    new = jaxbn.update(stats, m, momentum=jaxbn.debiased(0.9), unbiased=True)
    y = jaxbn.normalize(x, new.mean, new.var, scale, bias)
    merged = jaxbn.merge_moments(jax.tree.map(lambda a: jnp.stack([a, a]), m))
    return grads, new, y, merged


def arguments(seed=0):
    x = numbers((6, 5, 3), "float32", seed)
    vector = jnp.ones(3)
    return x, vector, vector, jaxbn.init_stats(3), jnp.ones((6, 1, 1), bool)


@pytest.mark.parametrize("form", FORMS)
def test_does_not_compile_twice(form):
    traced = 0

    @jax.jit
    def f(*args):
        nonlocal traced
        traced += 1
        return step(form, *args)

    with jax.log_compiles(False):
        _, new, *_ = f(*arguments())
        x, scale, bias, _, w = arguments(1)
        f(x, scale, bias, new, w)
    assert traced == 1
    assert f._cache_size() == 1


def test_equal_layers_share_one_program():
    @jax.jit
    def f(x, params, state):
        return apply(params, state, x, training=True)

    calls = []
    for _ in range(2):
        layer = jaxbn.layers.standard(momentum=jaxbn.debiased(0.9))
        params, state = layer.init(3)
        apply = layer.apply
        calls.append(f(arguments()[0], params, state))
    assert f._cache_size() == 1


def test_leaks_no_tracers():
    x, scale, bias, _, w = arguments()

    def gradient(x, scale, bias):  # The rest does not depend on the form.
        options = {"weights": w, "derivatives": "jvp"}
        f = lambda *a: jnp.sum(jaxbn.batch_norm(*a, **options)[0] ** 3)
        return jax.grad(f, (0, 1, 2))(x, scale, bias)

    with jax.checking_leaks():
        jax.jit(lambda *a: step("vjp", *a))(*arguments())
        jax.jit(gradient)(x, scale, bias)


@pytest.mark.parametrize("form", FORMS)
def test_strict_dtype_promotion(form):
    with jax.numpy_dtype_promotion("strict"):
        for dtype in ("float32", "bfloat16"):
            x, *rest = arguments()
            jax.eval_shape(lambda *a: step(form, *a), x.astype(dtype), *rest)


@pytest.mark.parametrize("form", FORMS)
def test_jit_equals_eager(form):
    jax.tree.map(
        lambda a, b: assert_close(a, b, 1e-5, 1e-5),
        step(form, *arguments()),
        jax.jit(lambda *args: step(form, *args))(*arguments()),
    )


@pytest.mark.parametrize("form", FORMS)
def test_vmap_equals_a_loop(form):
    many = [arguments(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *many)
    mapped = jax.jit(jax.vmap(lambda *a: step(form, *a)))(*stacked)
    alone = jax.jit(lambda *a: step(form, *a))
    for i, args in enumerate(many):
        one = alone(*args)
        for a, b in zip(jax.tree.leaves(mapped), jax.tree.leaves(one), strict=True):
            assert_close(a[i], b, 1e-5, 1e-5)


def test_shapes_without_values():
    out = jax.eval_shape(lambda *a: step("vjp", *a), *arguments())
    assert out[0][0].shape == (6, 5, 3)


def test_numpy_input():
    x = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    y, m = jaxbn.batch_norm(x, np.ones(3, np.float32))
    assert_close(y, jaxbn.normalize(x, m.mean, m.var), 1e-6)


def test_donated_state():
    f = jax.jit(lambda s, x: jaxbn.update(s, jaxbn.moments(x)), donate_argnums=0)
    stats = jaxbn.init_stats(3)
    for _ in range(2):
        stats = f(stats, arguments()[0])
    assert stats.step == 2


def test_what_is_traced_lives_as_long_as_jax_keeps_its_programs():
    def step(x):
        return jax.grad(lambda x: jaxbn.batch_norm(x)[0].sum())(x)

    def own():
        """Forms of arrays that no other test has."""
        avals = [aval for _, _, avals, _ in operation._forms for aval in avals]
        return sum(aval.shape[-1:] == (11,) for aval in avals)

    for rows in (2, 3):
        step(jnp.ones((rows, 11)))
        jax.jit(step)(jnp.ones((rows, 11)))
        assert own() > 0
        jax.clear_caches()
        gc.collect()
        assert own() == 0


def test_without_jit_nothing_is_traced_again():
    step = jax.grad(lambda x: jaxbn.batch_norm(x)[0].sum())
    step(jnp.ones((7, 3)))
    before = dict(operation._forms)
    step(jnp.ones((7, 3)))
    assert all(operation._forms[key] is form for key, form in before.items())
    assert len(operation._forms) == len(before)


def equations(jaxpr):
    """Yields the equations of a program and of the programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _compat.jaxprs_in(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("implementation", ["xla", None])
def test_the_forms_of_an_operation_can_be_weakly_referenced(implementation):
    # JAX 0.8.0 keeps traces by weak references to the functions among the parameters.
    def f(x):
        y, _ = jaxbn.batch_norm(x, shift="sample", implementation=implementation)
        return jnp.sum(y**3)

    program = jax.make_jaxpr(jax.grad(f))(numbers((64, 128), "float32"))
    forms = [
        value
        for equation in equations(program.jaxpr)
        if equation.primitive is operation._operation
        for value in equation.params.values()
        if callable(value)
    ]
    assert forms
    for form in forms:
        assert weakref.ref(form)() is form
