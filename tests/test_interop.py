"""`interop.tf_nn`: TensorFlow's meaning, from its documented formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import assert_close, numbers, tolerance, wide

from jaxbn.interop import tf_nn


@pytest.mark.parametrize("axes", [0, [0], (0, 1, 2), [-1], [1, 3], [0, 1, 2, 3], []])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_moments(axes, keepdims, dtype):
    x = numbers((4, 3, 2, 5), dtype)
    mean, variance = jax.jit(lambda x: tf_nn.moments(x, axes, keepdims))(x)
    reduced = tuple(np.atleast_1d(np.array(axes, int)) % 4)
    truth = oracle.moments(wide(x), reduced)
    assert mean.dtype == x.dtype
    assert variance.dtype == x.real.dtype
    for got, expected in ((mean, truth.mean), (variance, truth.var)):
        expected = expected if keepdims else np.squeeze(expected, reduced)
        assert got.shape == expected.shape
        tol = 10 * tolerance(dtype)
        assert_close(wide(got), expected, tol, tol)


SHAPES = [
    ((5,), (5,), (5,), (5,)),
    ((), (), (), ()),
    ((1, 1, 1, 5), (5,), None, (1, 5)),
    ((4, 1, 1, 5), (4, 1, 1, 5), (5,), None),
    ((3, 1, 5), (3, 1, 1), (1,), (2, 1)),
    ((4, 3, 2, 5), (1, 3, 1, 1), (4, 1, 1, 1), (5,)),
]


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_batch_normalization_broadcasts_as_numpy_does(shapes):
    x = numbers((4, 3, 2, 5), "float32")
    mean, variance, offset, scale = (
        None if s is None else numbers(s, "float32", i) for i, s in enumerate(shapes)
    )
    variance = jnp.abs(variance) + 0.1
    y = tf_nn.batch_normalization(x, mean, variance, offset, scale, 0.001)
    expected = (wide(x) - wide(mean)) / np.sqrt(wide(variance) + 0.001)
    expected = expected * (1 if scale is None else wide(scale))
    expected = expected + (0 if offset is None else wide(offset))
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert_close(y, expected, 1e-5, 1e-5)


def test_length_one_axes():
    x = numbers((4, 1), "float32")
    mean, variance = tf_nn.moments(x, [0])
    y = tf_nn.batch_normalization(x, mean, variance, None, None, 0.0)
    assert_close(y.var(0), 1, 1e-5)


def test_the_fully_connected_snippet():
    """Moments over axis 0 of w·u + b, equal to the formula in two steps."""
    u, w, b = numbers((60, 8), "float32"), numbers((8, 5), "float32", 1), jnp.ones(5)
    scale, offset, epsilon = jnp.full(5, 1.5), jnp.full(5, -0.5), 0.001

    def one_step(u):
        z = u @ w + b[None]
        mean, variance = tf_nn.moments(z, [0])
        return tf_nn.batch_normalization(z, mean, variance, offset, scale, epsilon)

    def two_steps(u):
        z = u @ w + b[None]
        mean, variance = z.mean(0)[None], z.var(0)[None]
        zhat = (z - mean) / jnp.sqrt(variance + epsilon)
        return scale[None] * zhat + offset[None]

    assert_close(one_step(u), two_steps(u), 1e-5, 1e-5)
    loss = lambda f: lambda u: jnp.sum(f(u) ** 3)
    assert_close(jax.grad(loss(one_step))(u), jax.grad(loss(two_steps))(u), 1e-3, 1e-3)
