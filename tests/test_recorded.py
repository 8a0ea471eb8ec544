"""Records of moments where they are easily lost: dtypes, switches, transforms."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from spread import mesh_of

import jaxbn
from jaxbn.population import recalibrate

BOTH = ["batch_stats", "batch_moments"]
KEY = jax.random.key(0)
X = numbers((8, 2), "float32", mean=3.0)
MEAN = np.mean(X, 0)


def steps(net, variables, batches):
    for x in batches:
        variables = {**variables, **net.apply(variables, x, mutable=BOTH)[1]}
    return variables


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_window_that_was_restored_narrow_is_widened(dtype):
    """In bfloat16 the count would stop at 2048, and the mean with it."""
    net = jaxbn.linen.BatchNorm(False, momentum=0.5, accumulate=True)
    variables = net.init(KEY, X)
    variables = jax.tree.map(lambda a: a.astype(dtype), variables)
    batches = numbers((40, 64, 96, 2), "float32", mean=3.0).at[20:].add(2)

    def step(variables, x):
        return steps(net, variables, [x]), None

    once, _ = step(variables, batches[0])  # From here on dtypes stay.
    last, _ = jax.jit(partial(jax.lax.scan, step))(once, batches[1:])
    mean = np.mean(batches, (0, 1, 2))
    assert_close(last["batch_moments"]["mean"], mean, 1e-4)
    assert_close(last["batch_moments"]["count"], np.full(2, 40.0 * 64 * 96))
    # The statistics keep the dtype that they were restored in.
    stored = last["batch_stats"]["mean"]
    assert stored.dtype == dtype
    assert_close(stored.astype("float32"), mean / 2, jnp.finfo(dtype).eps)


def test_wide_data_have_a_wide_record(x64):
    """Statistics are float32, but their window is float64, as what it pools."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 1)) + 1e8)
    exact = {"momentum": 0.0, "use_fast_variance": False}
    net = jaxbn.linen.BatchNorm(False, accumulate=True, **exact)
    window = steps(net, net.init(KEY, x), [x[:32], x[32:]])
    assert_close(window["batch_stats"]["var"], np.var(x, 0), rtol=1e-6)
    module = jaxbn.nnx.BatchNorm(1, accumulate=True, rngs=nnx.Rngs(0), **exact)
    for batch in (x[:32], x[32:]):
        module(batch)
    assert_close(module.var[...], np.var(x, 0), rtol=1e-6)
    stats = recalibrate(jaxbn.nnx.moments_fn(module), [x[:32], x[32:]])
    assert_close(stats[""].var, np.var(x, 0), rtol=1e-6)


def test_accumulate_switched_on_later_is_an_error():
    module = jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    module.accumulate = True
    with pytest.raises(ValueError, match="`accumulate` became True after"):
        module(X)


def test_accumulate_switched_off_leaves_the_window_alone():
    module = jaxbn.nnx.BatchNorm(2, momentum=0.5, accumulate=True, rngs=nnx.Rngs(0))
    module(X)
    jaxbn.nnx.end_accumulation(module)
    module.accumulate = False
    for _ in range(3):
        module(X)
    assert_close(module.mean[...], MEAN * (1 - 0.5**4), rtol=1e-5)

    window = jaxbn.linen.BatchNorm(False, momentum=0.5, accumulate=True)
    single = window.clone(accumulate=False)
    variables = steps(window, window.init(KEY, X), [X])
    variables = steps(single, jaxbn.linen.end_accumulation(variables), [X, X])
    variables = steps(window, variables, [X, X])
    assert_close(variables["batch_stats"]["mean"], MEAN * (1 - 0.5**4), rtol=1e-5)


def test_mutable_true_is_as_in_flax():
    """Nothing is recorded that was not asked for by name."""
    net = nn.Sequential([jaxbn.linen.BatchNorm(False)])
    variables = net.init(KEY, X)

    def step(variables, x):
        return net.apply(variables, x, mutable=True)[1], None

    jax.lax.scan(step, variables, jnp.stack([X, X]))


def test_new_variables_may_be_donated():
    net = jaxbn.linen.BatchNorm(False, accumulate=True)
    step = jax.jit(lambda v, x: steps(net, v, [x]), donate_argnums=0)
    variables = step(net.init(KEY, X), X)
    stats = jaxbn.linen.running_stats(variables)
    step(jaxbn.linen.load_stats(variables, stats), X)
    assert np.isfinite(stats[""].mean).all()  # It was not given away.
    module = jaxbn.nnx.BatchNorm(2, accumulate=True, rngs=nnx.Rngs(0))
    nnx.jit(lambda module, x: module(x), donate_argnums=0)(module, X)


def test_keywords_that_are_equal_and_not_the_same():
    """1 and True, and a dict of them."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, mode, options=None):
            chosen = mode is True or (options and options["a"] is True)
            return jaxbn.linen.BatchNorm(False)(x if chosen else 10 * x)

    variables = Net().init(KEY, X, 1)
    for call, factor in [
        ({"mode": 1}, 10),
        ({"mode": True}, 1),
        ({"mode": 1, "options": {"a": 1, "b": jnp.ones(2)}}, 10),
        ({"mode": 1, "options": {"a": True, "b": np.ones(2)}}, 1),
    ]:
        m = jaxbn.linen.moments_fn(Net(), variables, **call)(X)["BatchNorm_0"]
        assert_close(m.mean, factor * MEAN, rtol=1e-5)


def test_a_gradient_passes_what_is_measured():
    """As for a loss on the moments of synthetic images."""
    net = jaxbn.linen.BatchNorm(False)
    variables = net.init(KEY, X)
    module = jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    for f in (jaxbn.linen.moments_fn(net, variables), jaxbn.nnx.moments_fn(module)):
        got = jax.grad(lambda s, f=f: f(X * s)[""].var.sum())(2.0)
        assert_close(got, 4 * np.var(X, 0).sum(), rtol=1e-4)


def test_nnx_measures_in_the_mode_it_was_asked_for():
    """Also where the model passes `use_running_average` itself."""

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.first = jaxbn.nnx.BatchNorm(2, rngs=rngs)
            self.second = jaxbn.nnx.GhostBatchNorm(2, num_groups=1, rngs=rngs)
            self.third = jaxbn.nnx.BatchNorm(2, rngs=rngs)

        def __call__(self, x):
            x = self.first(x, use_running_average=True)
            return self.third(self.second(x, use_running_average=False) + 1)

    found = jaxbn.nnx.moments_fn(Model())(X)
    assert_close(found["second"].mean, np.zeros(2), atol=1e-5)
    found = jaxbn.nnx.moments_fn(Model(), training=False)(X)
    assert_close(found["third"].mean, MEAN + 1, rtol=1e-4)


def test_rngs_as_a_keyword():
    class Model(nnx.Module):
        def __init__(self):
            self.norm = jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.dropout(self.norm(x), rngs=rngs)

    found = jaxbn.nnx.moments_fn(Model(), rngs=nnx.Rngs(1))(X)
    assert_close(found["norm"].mean, MEAN, rtol=1e-5)


def test_a_layer_in_one_branch():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, taken):
            norm = jaxbn.linen.BatchNorm(False)
            if self.is_initializing():
                return norm(x)
            run, leave = (lambda net, x: net(x)), (lambda net, x: x)
            return nn.cond(taken, run, leave, norm, x)

    variables = Net().init(KEY, X, True)
    f = jaxbn.linen.moments_fn(Net(), variables, taken=jnp.array(True))
    assert_close(f(X)["BatchNorm_0"].mean, MEAN, rtol=1e-5)
    f = jaxbn.linen.moments_fn(Net(), variables, taken=jnp.array(False))
    assert not f(X)["BatchNorm_0"].count.any()


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_scan_that_does_not_lift_the_record(accumulate):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jaxbn.linen.BatchNorm(False, accumulate=accumulate)(x), None

    axes = {"params": 0, "batch_stats": 0}
    scanned = nn.scan(Body, axes, split_rngs={"params": True}, length=2)()
    if accumulate:
        with pytest.raises(ValueError, match="lift it as `batch_stats`"):
            scanned.init(KEY, X, None)
        return
    variables = scanned.init(KEY, X, None)
    method = lambda net, x: net(x, None)
    with pytest.raises(ValueError, match="lift `batch_moments` as `batch_stats`"):
        jaxbn.linen.moments_fn(scanned, variables, method=method)(X)


def test_other_variables_in_batch_stats():
    """A mean of the model's own is no batch norm; one beside a variance may be."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("batch_stats", "mean", jnp.zeros, ())
            self.variable("batch_stats", "seen", jnp.zeros, ())
            return jaxbn.linen.BatchNorm(False)(x)

    variables = Net().init(KEY, X)
    stats = recalibrate(jaxbn.linen.moments_fn(Net(), variables), [X])
    assert set(stats) == {"BatchNorm_0"}
    loaded = jaxbn.linen.load_stats(variables, stats)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)


def test_features_that_are_sharded_on_an_explicit_mesh():
    mesh = mesh_of(2, 4, names=("data", "model"), kind=AxisType.Explicit)
    net = jaxbn.linen.BatchNorm(False, momentum=0.5, accumulate=True)
    x = numbers((2, 8, 4), "float32", mean=3.0)
    with jax.set_mesh(mesh):
        variables = net.init(KEY, x[0])
        variables = jax.device_put(variables, jax.NamedSharding(mesh, P("model")))
        batches = jax.device_put(x, jax.NamedSharding(mesh, P(None, "data", "model")))
        new = jax.jit(partial(steps, net))(variables, list(batches))
        assert_close(new["batch_stats"]["mean"], np.mean(x, (0, 1)) / 2, rtol=1e-5)
        measure = jaxbn.linen.moments_fn(net, variables)
        stats = recalibrate(measure, list(batches))
        adapted = jaxbn.population.adapt(
            jaxbn.linen.running_stats(variables), measure(batches[0])
        )
    assert_close(stats[""].mean, np.mean(x, (0, 1)), rtol=1e-5)
    assert_close(adapted[""].mean, np.mean(x[0], 0), rtol=1e-5)
