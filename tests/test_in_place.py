"""`layers.in_place` against the plain form: gradients, small scales, saturation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers, wide

from jaxbn import layers

ACTIVATIONS = {
    "leaky_relu": lambda y: jax.nn.leaky_relu(y, 0.01),
    "elu": jax.nn.elu,
    "identity": lambda y: y,
}


def plain(activation):
    """Batch norm with scale |γ| + ε, then the activation."""
    layer = layers.standard()

    def apply(params, state, x, *, training):
        scale = jnp.where(params["scale"] < 0, -1, 1) * params["scale"] + 1e-5
        y, state = layer.apply({**params, "scale": scale}, state, x, training=training)
        return ACTIVATIONS[activation](y), state

    return apply


def network(apply, depth=3):
    """Dense, norm, dense, norm, …: a loss of its parameters and the input."""

    def loss(params, x):
        _, state = layers.standard().init(x.shape[-1])
        for kernel, norm in params:
            x, _ = apply(norm, state, x @ kernel, training=True)
        return jnp.mean(jnp.sin(x))

    return jax.jit(jax.grad(loss, (0, 1)))


def parameters(seed, smallest, width=8, depth=3):
    rng = np.random.default_rng(seed)

    def scale():
        size = rng.uniform(smallest, 1.5, width)
        return jnp.asarray(size * rng.choice([-1, 1], width), jnp.float32)

    kernel = lambda: jnp.asarray(rng.normal(size=(width, width)) / width**0.5)
    bias = lambda: jnp.asarray(rng.normal(size=width), jnp.float32)
    return [
        (kernel().astype(jnp.float32), {"scale": scale(), "bias": bias()})
        for _ in range(depth)
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_plain_form(activation):
    """Over random networks with |γ| of at least 0.1."""
    ours = network(layers.in_place(activation=activation).apply)
    theirs = network(plain(activation))
    for seed in range(4):
        params, x = parameters(seed, 0.1), numbers((32, 8), "float32", seed, 0.0, 1.0)
        got, expected = ours(params, x), theirs(params, x)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert_close(a, b, 0, 1e-4 * np.abs(b).max() + 1e-7)


@pytest.mark.parametrize(
    ("scale", "dtype", "worst"),
    [
        (0.1, "float32", 1e-5),
        (0.01, "float32", 1e-4),
        (0.1, "bfloat16", 3e-2),
        (0.01, "bfloat16", 1.0),
    ],
)
def test_small_scales_cost_the_gradient_of_scale_its_digits(scale, dtype, worst):
    layer = layers.in_place()
    _, state = layer.init(64)
    x = numbers((256, 64), dtype, 0, 0.0, 1.0)
    params = {"scale": jnp.full(64, scale), "bias": jnp.ones(64)}
    ct = numbers((256, 64), "float32", 1, 0.0, 1.0)

    def dscale(apply, x):
        loss = lambda p: jnp.sum(apply(p, state, x, training=True)[0] * ct)
        return jax.grad(loss)(params)["scale"]

    expected = dscale(plain("leaky_relu"), x.astype(jnp.float32))
    error = np.abs(dscale(layer.apply, x) - expected).max() / np.abs(expected).max()
    assert error < worst


def test_scale_can_leave_0():
    layer = layers.in_place()
    _, state = layer.init(3)
    params = {"scale": jnp.zeros(3), "bias": jnp.zeros(3)}
    x = numbers((16, 3), "float32")
    loss = lambda p: jnp.sum(layer.apply(p, state, x, training=True)[0] ** 2)
    assert (jax.grad(loss)(params)["scale"] != 0).all()


@pytest.mark.parametrize(
    ("dtype", "lowest"), [("float32", -16.5), ("bfloat16", -3), ("float16", -5)]
)
def test_saturated_elu(dtype, lowest):
    """Where e^y is rounded away x̂ is lost: the gradient there is that at `lowest`.

    Elsewhere, and of scale and bias, it is right: what is lost has the derivative 0.
    """
    layer = layers.in_place(activation="elu")
    _, state = layer.init(3)
    params = {"scale": jnp.full(3, 20.0), "bias": jnp.full(3, -10.0)}
    x = numbers((64, 3), dtype, 0, 0.0, 1.0)

    def grads(apply, x):
        def loss(p, x):
            z, _ = apply(p, state, x, training=True)
            return jnp.sum(jnp.sin(z.astype(jnp.float32) / 4))

        return jax.grad(loss, (0, 1))(params, x)

    got = jax.tree.map(wide, grads(layer.apply, x))
    exact = x.astype(jnp.float32)
    expected = jax.tree.map(wide, grads(plain("elu"), exact))
    y, _ = layers.standard().apply(params, state, exact, training=True)
    assert (y < lowest).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    slack = 1e-3 if dtype == "float32" else 0.1
    for name in params:
        assert_close(got[0][name], expected[0][name], slack)
    known = np.asarray(y > lowest)
    dx, truth = got[1][known], expected[1][known]
    assert_close(dx, truth, 0, slack * np.abs(truth).max())


def test_keeps_only_its_output():
    layer = layers.in_place()
    params, state = layer.init(4)
    x = jax.ShapeDtypeStruct((6, 5, 4), jnp.bfloat16)

    def f(params, x):
        return layer.apply(params, state, x, training=True)[0]

    leaves = jax.tree.leaves(
        jax.eval_shape(lambda p, x: jax.vjp(f, p, x)[1], params, x)
    )
    large = [leaf for leaf in leaves if leaf.shape == x.shape]
    assert [leaf.dtype for leaf in large] == [jnp.bfloat16]


def test_has_no_forward_mode():
    layer = layers.in_place()
    params, state = layer.init(3)
    x = jnp.ones((4, 3))
    f = lambda x: layer.apply(params, state, x, training=True)[0]
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(f, (x,), (x,))
