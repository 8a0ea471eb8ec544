"""Derivatives of every order and mode, against autodiff of the textbook formula."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, half_slow, numbers
from jax.test_util import check_grads

import jaxbn

pytestmark = pytest.mark.usefixtures("x64")
FORMS = ("vjp", "jvp")


def textbook(x, scale, bias, w=None):
    """Nothing but primitives that JAX differentiates by itself."""
    w = jnp.ones_like(x) if w is None else jnp.broadcast_to(w, x.shape).astype(x.dtype)
    n = w.sum(0)
    mean = (w * x).sum(0) / n
    var = (w * (x - mean[None]) ** 2).sum(0) / n
    y = (x - mean[None]) / jnp.sqrt(var + 1e-5)[None] * scale[None] + bias[None]
    return y, jaxbn.Moments(mean, var, n)


def arguments(shape=(5, 2)):
    return (
        numbers(shape, "float64"),
        numbers(shape[-1], "float64", 5),
        numbers(shape[-1], "float64", 6),
    )


WEIGHTS = {
    "none": None,
    "mask": np.array([1, 1, 0, 1, 1], bool)[:, None],
    "floats": np.array([0.5, 2.0, 0.0, 1.5, 1.0])[:, None],
}
SHIFTS = {"two_passes": None, "shift": np.array([0.7, 1.9])}


def ours(form, w, shift):
    return lambda x, s, b: jaxbn.batch_norm(
        x, s, b, weights=w, shift=shift, derivatives=form
    )


def scalar(bn, uses_moments):
    """A loss with derivatives of all orders."""

    def loss(x, scale, bias):
        y, m = bn(x, scale, bias)
        value = jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size).reshape(y.shape)))
        if uses_moments:
            value += jnp.sum(jnp.sin(m.mean) * m.var**2)
        return value

    return loss


@pytest.mark.parametrize(
    ("w", "shift", "form"),
    half_slow(
        (*kind, form)
        for form in FORMS
        for kind in [("none", "shift"), ("mask", "shift"), ("floats", "two_passes")]
    ),
)
def test_check_grads(form, w, shift):
    modes = ("rev",) if form == "vjp" else ("fwd", "rev")
    f = jax.jit(scalar(ours(form, WEIGHTS[w], SHIFTS[shift]), uses_moments=True))
    check_grads(f, arguments(), order=2, modes=modes, rtol=1e-5, atol=1e-5)


def nest(modes, f, directions):
    """Differentiates `f` once per mode, each time along the next direction."""
    for mode, v in zip(modes, directions, strict=True):
        if mode == "fwd":
            f = lambda *a, f=f, v=v: jax.jvp(f, a, v)[1]
        else:
            f = lambda *a, f=f, v=v: sum(
                jnp.vdot(t, g)
                for t, g in zip(v, jax.grad(f, tuple(range(len(a))))(*a), strict=True)
            )
    return f


def nestings(form):
    every = itertools.chain.from_iterable(
        itertools.product(("fwd", "rev"), repeat=order) for order in (1, 2, 3)
    )
    # A custom_vjp has reverse mode first, then anything over it.
    return [m for m in every if form == "jvp" or m[0] == "rev"]


# The third order takes seconds to compile: one kind of weights, and the moments in
# every other loss; reverse mode throughout with the quick tests, the others with all.
CASES = [
    pytest.param(
        form,
        modes,
        w,
        shift,
        uses,
        id="-".join([form, *modes, w, shift]),
        marks=[pytest.mark.slow] * (len(modes) == 3 and "fwd" in modes),
    )
    for form in FORMS
    for k, modes in enumerate(nestings(form))
    for w, shift, uses in (
        [("floats", "two_passes", bool(k % 2))]
        if len(modes) == 3
        else [("none", "shift", False), ("mask", "two_passes", True)]
    )
]


@pytest.mark.parametrize(("form", "modes", "w", "shift", "uses_moments"), CASES)
def test_every_nesting(form, modes, w, shift, uses_moments):
    args = arguments()
    directions = [
        tuple(numbers(a.shape, "float64", 20 + i + 3 * k) for i, a in enumerate(args))
        for k in range(len(modes))
    ]
    bn = ours(form, WEIGHTS[w], SHIFTS[shift])
    plain = lambda x, s, b: textbook(x, s, b, WEIGHTS[w])
    got = jax.jit(nest(modes, scalar(bn, uses_moments), directions))(*args)
    truth = jax.jit(nest(modes, scalar(plain, uses_moments), directions))(*args)
    assert_close(got, truth, 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_under_jit_vmap_and_remat(form):
    args = arguments()
    loss = scalar(ours(form, None, None), uses_moments=True)
    truth = jax.jit(jax.hessian(scalar(textbook, uses_moments=True)))(*args)
    assert_close(jax.hessian(jax.jit(loss))(*args), truth, 1e-9, 1e-9)
    remat = jax.jit(jax.hessian(jax.checkpoint(loss)))(*args)
    assert_close(remat, truth, 1e-9, 1e-9)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), args)
    mapped = jax.jit(jax.vmap(jax.hessian(loss)))(*stacked)
    assert_close(mapped[1], truth, 1e-9, 1e-9)


def test_forward_mode_of_the_vjp_form_is_refused():
    f = lambda x: jaxbn.batch_norm(x)[0]
    x = arguments()[0]
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (x,), (x,))


def test_moments_and_normalize_have_every_mode():
    x, scale, bias = arguments()
    w = WEIGHTS["floats"]

    @jax.jit
    def f(x, scale, bias):
        m = jaxbn.moments(x, weights=w)
        y = jaxbn.normalize(x, m.mean, m.var, scale, bias)
        return jnp.sum(jnp.sin(y)) + jnp.sum(m.mean * m.var)

    check_grads(f, (x, scale, bias), order=2, rtol=1e-5, atol=1e-5)


def test_hessian_of_the_variance_where_it_is_zero():
    # maximum(var, 0) would halve it.
    h = jax.hessian(jax.jit(lambda x: jaxbn.moments(x[:, None]).var[0]))(jnp.ones(4))
    assert_close(h, 2 / 4 * (np.eye(4) - 1 / 4), atol=1e-12)


def test_weights_and_shift_are_data():
    x, scale, bias = arguments()

    def f(w, shift, epsilon):
        y, m = jaxbn.batch_norm(x, scale, bias, weights=w, shift=shift, epsilon=epsilon)
        z = jaxbn.normalize(x, m.mean, m.var, epsilon=epsilon)
        return jnp.sum(y**3) + jnp.sum(m.var) + jnp.sum(z**3)

    for g in jax.grad(f, (0, 1, 2))(jnp.ones((5, 1)), jnp.ones(2), 1e-5):
        np.testing.assert_array_equal(g, 0)


def test_moments_returned_beside_y_count_in_full():
    # Backpropagation through the moments adds to that through y, and is not lost.
    x, scale, bias = arguments()
    g = jax.grad(lambda x: jaxbn.batch_norm(x, scale, bias)[1].var.sum())(x)
    assert_close(g, 2 / 5 * (x - x.mean(0)[None]), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_complex_output_of_real_input(form):
    x = arguments()[0]
    scale, bias = numbers(2, "complex128", 5), numbers(2, "complex128", 6)

    def loss(bn):
        return lambda *a: jnp.sum(jnp.abs(jnp.sin(0.2 * bn(*a)[0])) ** 2)

    bn = lambda *a: jaxbn.batch_norm(
        *a, weights=WEIGHTS["floats"], dtype=complex, derivatives=form
    )
    losses = [loss(bn), loss(lambda *a: textbook(*a, WEIGHTS["floats"]))]
    for derivative in (jax.grad, jax.hessian):
        got, truth = (jax.jit(derivative(f))(x, scale, bias) for f in losses)
        assert_close(got, truth, 1e-9, 1e-12)
    got, truth = (jax.jit(jax.grad(f, (1, 2)))(x, scale, bias) for f in losses)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-12), got, truth)
