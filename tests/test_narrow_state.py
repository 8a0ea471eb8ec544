"""Running statistics in half precision: they arrive, and keep their dtype."""

from functools import partial

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close
from flax import nnx

import jaxbn

NARROW = ("bfloat16", "float16")
MEAN, STD, STEPS = 4.9, 3.0, 1000
# One number of the dtype apart, and what the batches' own means differ by.
CLOSE = {"rtol": 0.02, "atol": 0.02}


def batches(same=True):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, family.EXAMPLES, 4, family.FEATURES))
    x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    x = MEAN + STD * x
    return jnp.asarray(np.broadcast_to(x[:1], x.shape) if same else x, jnp.float32)


def cast(tree, dtype):
    """As a model is cast whole: what is floating."""
    return jax.tree.map(
        lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.inexact) else a, tree
    )


def assert_arrived(mean, spread, dtype, truth=STD**2):
    """`spread` is a variance, or a deviation with its own `truth`."""
    assert mean.dtype == spread.dtype == dtype
    mean, spread = (np.asarray(a, np.float64) for a in (mean, spread))
    assert_close(mean, np.full(mean.shape, MEAN), **CLOSE)
    assert_close(spread, np.full(spread.shape, truth), **CLOSE)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["standard", "renorm", "classes", "streaming", "elu"])
@pytest.mark.parametrize("same", [True, False])
def test_layers_arrive(name, dtype, same):
    case = family.CASES[name]
    momentum = (lambda step: 0.99) if name == "streaming" else 0.99
    layer = case.make(momentum=momentum)
    params, state = layer.init(family.FEATURES)
    given = family.inputs(case, jnp.float32)

    def step(state, x):
        _, new = layer.apply(params, state, x, training=True, **given)
        return new, None

    last, _ = jax.lax.scan(step, cast(state, dtype), batches(same))
    assert_arrived(*last[:2], dtype, STD if name == "renorm" else STD**2)
    assert last.step == STEPS


@pytest.mark.parametrize("dtype", NARROW)
def test_linen_arrives(dtype):
    model = jaxbn.linen.BatchNorm(use_running_average=False)
    x = batches()
    variables = cast(model.init(jax.random.key(0), x[0]), dtype)

    def step(stats, x):
        given = {"params": variables["params"], "batch_stats": stats}
        _, new = model.apply(given, x, mutable=["batch_stats"])
        return new["batch_stats"], None

    stats, _ = jax.lax.scan(step, variables["batch_stats"], x)
    assert_arrived(stats["mean"], stats["var"], dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_nnx_arrives(dtype):
    model = jaxbn.nnx.BatchNorm(family.FEATURES, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    def step(state, x):
        model = nnx.merge(graph, state)
        model(x)
        return nnx.state(model), None

    state, _ = jax.lax.scan(step, cast(state, dtype), batches())
    assert_arrived(state["mean"][...], state["var"][...], dtype)


def test_momentum_of_one_keeps_narrow_statistics():
    stats = jaxbn.init_stats(3, dtype=jnp.bfloat16)
    new = jaxbn.update(stats, jaxbn.moments(jnp.ones((4, 3)) * 7), momentum=1.0)
    jax.tree.map(np.testing.assert_array_equal, new[:2], stats[:2])


def test_what_has_no_weight_keeps_narrow_statistics():
    stats = jaxbn.init_stats(3, dtype=jnp.bfloat16)
    m = jaxbn.moments(jnp.full((4, 3), 1e-3), weights=np.array([1.0, 0.0, 1.0]))
    new = jaxbn.update(stats, m)
    np.testing.assert_array_equal(new.mean[1], stats.mean[1])
    assert np.all(new.mean[::2] > 0)


@pytest.mark.parametrize("counted", [True, False])
def test_statistics_stay_next_to_the_batch(counted):
    stats = jaxbn.init_stats(1, dtype=jnp.bfloat16)
    stats = stats._replace(mean=jnp.full(1, 4.90625, jnp.bfloat16))
    m = jaxbn.Moments(jnp.full(1, 4.9), jnp.ones(1), jnp.ones(()))
    step = jax.jit(partial(jaxbn.update, moments=m))
    for _ in range(50):
        stats = step(stats)
        assert abs(float(stats.mean[0]) - 4.9) < 0.04  # Its neighbours, and no other.
        stats = stats if counted else stats._replace(step=jnp.int32(0))
    assert stats.mean.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("momentum", [0.99, 0.999, jaxbn.cumulative()], ids=str)
def test_rounding_has_no_bias_where_steps_are_counted(dtype, momentum):
    """Of moments that are skewed, as variances of few numbers are."""
    x = jnp.asarray(np.exp(np.random.default_rng(0).normal(size=(3000, 4, 64))))

    def last(dtype):
        layer = jaxbn.layers.standard(stats_dtype=dtype, momentum=momentum)
        params, state = layer.init(64)

        def step(state, x):
            return layer.apply(params, state, x, training=True)[1], None

        return jax.lax.scan(step, state, x.astype(jnp.float32))[0]

    wide, narrow = last("float32"), last(dtype)
    for a, b in zip(wide[:2], narrow[:2], strict=True):
        assert_close(b.astype(jnp.float32).mean(), a.mean(), rtol=0.01)


def test_where_no_steps_are_counted_the_median_is_reached():
    """Which for variances of 16 values is 3 % less, as docs/numerics.md says."""
    x = np.random.default_rng(0).normal(5, 3, size=(4000, 16, 64))
    model = jaxbn.nnx.BatchNorm(64, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)

    def step(state, x):
        model = nnx.merge(graph, state)
        model(x)
        return nnx.state(model), None

    last = jax.jit(
        lambda state: jax.lax.scan(step, state, jnp.asarray(x, "float32"))[0]
    )
    wide, narrow = (last(s)["var"][...] for s in (state, cast(state, jnp.bfloat16)))
    assert 0.02 < 1 - float(narrow.astype(jnp.float32).mean() / wide.mean()) < 0.04


def test_rounding_is_the_same_everywhere():
    stats = jaxbn.init_stats(3, dtype=jnp.bfloat16)
    m = jaxbn.moments(jnp.arange(12.0).reshape(4, 3))
    step = lambda _: jax.lax.fori_loop(0, 9, lambda i, s: jaxbn.update(s, m), stats)
    found = jax.pmap(step)(jnp.arange(8))
    jaxbn.assert_replicated(found, stacked=True)
    close = lambda a, b: np.testing.assert_array_equal(a[0], b)
    jax.tree.map(close, found, jax.jit(step)(0))


def test_a_count_in_half_precision_is_refused():
    stats = jax.tree.map(lambda a: a.astype(jnp.bfloat16), jaxbn.init_stats(3))
    with pytest.raises(TypeError, match=r"`stats.step` is bfloat16.*an integer"):
        jaxbn.update(stats, jaxbn.moments(jnp.ones((4, 3))))
