"""On a GPU: values and derivatives are those of the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
SHAPES = [(4096, 64), (16, 12, 12, 48), (64, 28, 28, 1024)]


def data(shape, dtype, mean):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32) + np.float32(mean)
    return jnp.asarray(x, dtype), rng.standard_normal(shape, np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "mean"), [("float32", 0), ("float32", 1e4), ("bfloat16", 3)]
)
@pytest.mark.parametrize("shift", [None, "sample"])
def test_moments(shape, dtype, mean, shift):
    x, _ = data(shape, dtype, mean)
    m = jax.jit(functools.partial(jaxbn.moments, shift=shift))(x)
    expected = oracle.moments(np.asarray(x, np.float64), tuple(range(len(shape) - 1)))
    np.testing.assert_allclose(m.mean, expected.mean.ravel(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(m.var, expected.var.ravel(), rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("form", ["vjp", "jvp"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_a_cpu(shape, form, masked):
    x, ct = data(shape, "float32", 100)
    scale, bias = jnp.linspace(0.5, 2, shape[-1]), jnp.linspace(-1, 1, shape[-1])
    weights = None
    if masked:
        weights = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) % 3 > 0
        x = jnp.where(weights, x, jnp.nan)

    def loss(x, scale, bias):
        y, m = jaxbn.batch_norm(
            x, scale, bias, shift="sample", weights=weights, derivatives=form
        )
        y = y if weights is None else jnp.where(weights, y, 0)
        return jnp.sum(jax.nn.relu(y) * ct) + jnp.sum(m.var)

    gradients = jax.grad(loss, (0, 1, 2))
    found = jax.jit(gradients)(x, scale, bias)
    cpu = jax.devices("cpu")[0]
    expected = jax.jit(gradients)(*jax.device_put((x, scale, bias), cpu))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
