"""Under `jax_numpy_dtype_promotion="strict"` all is as it is without."""

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allpairspy import AllPairs
from data import numbers
from flax import nnx

import jaxbn

DTYPES = ("bfloat16", "float32", "float64", "complex64")
WEIGHTS = {
    "none": None,
    "mask": np.arange(8).reshape(8, 1, 1) % 3 > 0,
    "features": np.ones((8, 2, 3), np.float32),
}
OWN = [("bfloat16", "mask"), ("float32", "none"), ("float64", "features")]
OTHERS = {
    "example_weight": lambda **o: jaxbn.layers.standard(example_weight=0.1, **o),
    "pseudo_samples": lambda **o: jaxbn.layers.standard(pseudo_samples=3, **o),
    "update_per_group": lambda **o: jaxbn.layers.ghost(
        num_groups=2, update_per_group=True, **o
    ),
}
CASES = family.CASES | {name: family.Case(make, None) for name, make in OTHERS.items()}


def types(f, *args):
    found = jax.eval_shape(f, *args)
    return jax.tree.map(lambda a: (a.shape, a.dtype.name), found)


def assert_the_same(f, *args):
    expected = types(f, *args)
    with jax.numpy_dtype_promotion("strict"):
        assert types(f, *args) == expected


def total(tree):
    """A loss of complex numbers, too."""
    return sum(jnp.sum(jnp.abs(a).astype(jnp.float32)) for a in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["vjp", "jvp"])
@pytest.mark.parametrize(("own", "w"), OWN)
def test_verbs(x64, dtype, form, own, w):
    x, shift, scale = numbers((8, 2, 3), dtype), jnp.zeros(3), jnp.ones(3, own)
    is_complex, w = dtype.startswith("complex"), WEIGHTS[w]

    def verbs(x, scale):
        options = {"weights": w, "derivatives": form, "shift": shift.astype("float32")}
        y, m = jaxbn.batch_norm(x, scale, scale, **options)
        stats = jaxbn.init_stats(3, dtype="complex64" if is_complex else "bfloat16")
        stats = jaxbn.update(stats, m, unbiased=True)
        z = jaxbn.normalize(x, stats.mean, stats.var, scale, scale)
        stacked = jax.tree.map(lambda a: jnp.stack([a, a]), m)
        return y, m, z, jaxbn.merge_moments(stacked), stats

    def gradient(*args):
        return jax.grad(lambda *a: total(verbs(*a)[:2]), (0, 1))(*args)

    assert_the_same(verbs, x, scale)
    assert_the_same(gradient, x, scale)
    if own == dtype:
        assert_the_same(jax.grad(lambda *a: total(gradient(*a))), x, scale)


@pytest.mark.parametrize(("name", "dtype", "own"), list(AllPairs([CASES, DTYPES, OWN])))
def test_layers(x64, name, dtype, own):
    own, w = own
    case, x, w = CASES[name], numbers((8, 2, 3), dtype), WEIGHTS[w]
    is_complex = dtype.startswith("complex")
    if is_complex and case.reverse_only:
        pytest.skip("in_place works on real numbers")
    stats = "complex64" if is_complex else own
    layer = case.make(momentum=0.9, stats_dtype=stats, param_dtype=own)
    params, state = layer.init(3)
    given = {"weights": w, **family.inputs(case, jnp.float32)}

    def train(params, x):
        y, new = layer.apply(params, state, x, training=True, **given)
        return total(y), new

    def infer(params, x):
        return layer.apply(params, state, x, training=False, **given)

    assert_the_same(jax.grad(train, (0, 1), has_aux=True), params, x)
    assert_the_same(infer, params, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_modules_and_population(x64, dtype, param_dtype):
    x = numbers((8, 3), dtype)
    with jax.numpy_dtype_promotion("strict"):
        layer = jaxbn.linen.BatchNorm(False, param_dtype=param_dtype, accumulate=True)
        variables = layer.init(jax.random.key(0), x)
        layer.apply(variables, x, mutable=["batch_stats", "batch_moments"])
        if dtype.startswith("complex"):
            param_dtype = dtype
        model = jaxbn.nnx.BatchNorm(3, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        model(x)
        model.eval()
        assert np.all(np.isfinite(model(x)))
        measure = jaxbn.nnx.moments_fn(model)
        stats = jaxbn.population.recalibrate(measure, [x, x + 1])
        jaxbn.population.recalibrate(measure, [x, x], estimator="average")
        jaxbn.population.drift(stats, measure(x))
        options = {"pseudo_samples": 3, "samples": 8}
        stats = jaxbn.population.adapt(stats, measure(x), **options)
        jaxbn.nnx.load_stats(model, stats)
