"""What modules record, and the statistics of whole models."""

from functools import partial
from itertools import product

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from data import assert_close, half_slow, numbers, squeeze
from flax import nnx
from flax.core import freeze
from jax.sharding import PartitionSpec as P
from spread import mesh_of
from test_family_flax import FAMILY, every

import jaxbn
from jaxbn.population import adapt, drift, recalibrate

X = numbers((8, 6, 6, 2), "float32", mean=3.0)
BATCHES = [X[:2], X[2:5], X[5:]]


def truth(x, weights=None):
    reduced = tuple(range(x.ndim - 1))
    return [squeeze(v, reduced) for v in oracle.moments(x, reduced, weights)]


def assert_moments(m, x, rtol=1e-6, weights=None):
    mean, var, count = truth(x, weights)
    assert_close(m.mean, mean, rtol=rtol)
    assert_close(m.var, var, rtol=3 * rtol)
    assert_close(m.count, count)


class Block(nn.Module):
    shared: bool = False

    @nn.compact
    def __call__(self, x, training):
        norm = partial(jaxbn.linen.BatchNorm, use_running_average=not training)
        first = norm(name="first")
        y = nn.relu(first(nn.Conv(x.shape[-1], (3, 3))(x)))
        y = (first if self.shared else norm(name="second"))(y)
        return x + y


class Net(nn.Module):
    shared: bool = False

    @nn.compact
    def __call__(self, x, training, extra=True):
        x = jaxbn.linen.BatchNorm(not training, name="input")(x)
        x = Block(self.shared, name="block")(x, training)
        if extra:
            x = jaxbn.linen.BatchNorm(not training, name="extra")(x)
        return x.mean((1, 2))


class NNXNet(nnx.Module):
    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        norm = partial(jaxbn.nnx.BatchNorm, rngs=rngs, **options)
        self.norms = nnx.List([norm(2), norm(3)])
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, extra=True):
        x = self.conv(self.norms[0](x))
        return self.norms[1](x) if extra else x


def values(model):
    """Parameters and statistics of an nnx model, by their names."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))


@pytest.fixture(scope="module")
def variables():
    return Net().init(jax.random.key(0), X, training=False)


# What modules record


def test_no_one_asked_and_nothing_is_recorded(variables):
    assert set(variables) == {"params", "batch_stats"}
    _, new = Net().apply(variables, X, training=True, mutable=["batch_stats"])
    assert set(new) == {"batch_stats"}
    y = Net().apply(variables, X, training=False)
    assert isinstance(y, jax.Array)


@pytest.mark.parametrize("training", [False, True])
def test_moments_are_recorded_wherever_they_are_mutable(variables, training):
    apply = partial(Net().apply, variables, X, training=training)
    y, new = apply(mutable=["batch_moments"])
    assert set(new) == {"batch_moments"}
    first = jaxbn.Moments(**new["batch_moments"]["input"])
    assert_moments(first, X)
    assert_close(y, apply(mutable=["batch_stats"])[0], rtol=1e-4, atol=1e-5)


def test_moments_and_a_step_at_once(variables):
    both = ["batch_stats", "batch_moments"]
    y, new = Net().apply(variables, X, training=True, mutable=both)
    plain, stats = Net().apply(variables, X, training=True, mutable=["batch_stats"])
    assert_close(y, plain, rtol=1e-6)
    jax.tree.map(assert_close, new["batch_stats"], stats["batch_stats"])
    assert_moments(jaxbn.Moments(**new["batch_moments"]["input"]), X)


def test_measured_moments_are_exact_far_from_the_running_mean():
    """A one-pass variance about a fresh running mean would be off by 100 %."""
    x = numbers((64, 3), "float32", mean=1e4, std=1.0)
    layer = jaxbn.linen.BatchNorm()
    variables = layer.init(jax.random.key(0), x, True)
    module = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    for training in (True, False):
        f = jaxbn.linen.moments_fn(layer, variables, use_running_average=not training)
        assert_moments(f(x)[""], x)
        assert_moments(jaxbn.nnx.moments_fn(module, training=training)(x)[""], x)


@every
@pytest.mark.parametrize(
    ("kind", "training"), half_slow(product(["linen", "nnx"], [True, False]))
)
def test_every_module_measures_its_input(kind, training, name):
    cls, _, own, given = FAMILY[name]
    x = numbers((8, 5, 3), "float32", mean=3.0)
    mask = np.arange(8).reshape(8, 1, 1) != 3
    call = {"mask": mask, **given}
    if kind == "linen":
        layer = getattr(jaxbn.linen, cls)(**own)
        variables = layer.init(jax.random.key(0), x, True, **given)
        running = {"use_running_average": not training}
        f = jaxbn.linen.moments_fn(layer, variables, **running, **call)
    else:
        layer = getattr(jaxbn.nnx, cls)(3, rngs=nnx.Rngs(0), **own)
        f = jaxbn.nnx.moments_fn(layer, training=training, **call)
    m = f(x)[""]
    assert m.count.shape == m.mean.shape
    if name == "domain":
        for k in (0, 2):
            own = given["domain_ids"] == k
            row = jax.tree.map(lambda v, k=k: v[k], m)
            assert_moments(row, x[own], weights=mask[own])
        assert not m.count[1].any()
    elif name == "renorm":  # What it divides by, squared.
        assert_moments(m._replace(var=m.var - 1e-5), x, weights=mask)
    else:
        assert_moments(m, x, weights=mask)


def test_layers_under_scan_and_vmap():
    """Stacked layers have stacked moments."""
    x = numbers((8, 3), "float32", mean=3.0)
    layer = partial(jaxbn.linen.BatchNorm, use_running_average=False)
    axes = {"params": 0, "batch_stats": 0, "batch_moments": 0}

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            class Body(nn.Module):
                @nn.compact
                def __call__(self, x, _):
                    return 2 * layer(name="norm")(x) + 5, None

            return nn.scan(
                Body, variable_axes=axes, split_rngs={"params": True}, length=3
            )(name="body")(x, None)[0]

    variables = Scanned().init(jax.random.key(0), x)
    m = jaxbn.linen.moments_fn(Scanned(), variables)(x)["body/norm"]
    assert m.mean.shape == m.count.shape == (3, 3)
    assert_close(m.mean[0], np.mean(x, 0), rtol=1e-6)
    assert_close(m.mean[1:], np.full((2, 3), 5.0), rtol=1e-5)

    stacked = nn.vmap(layer, variable_axes=axes, split_rngs={"params": True})()
    variables = stacked.init(jax.random.key(0), jnp.stack([x, x + 1]))
    stats = recalibrate(
        jaxbn.linen.moments_fn(stacked, variables), [jnp.stack([x, x + 1])]
    )
    loaded = jaxbn.linen.load_stats(variables, stats)
    assert_close(loaded["batch_stats"]["mean"][1], np.mean(x, 0) + 1, rtol=1e-6)


def test_stacked_layers_in_nnx():
    x = numbers((8, 3), "float32", mean=3.0)

    class Model(nnx.Module):
        def __init__(self):
            make = lambda _: jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.norms = nnx.vmap(make)(jnp.arange(2))

        def __call__(self, x):
            axes = nnx.StateAxes({nnx.Param: 0, nnx.BatchStat: 0})
            call = nnx.vmap(lambda norm, x: norm(x), in_axes=(axes, None))
            return call(self.norms, x)

    model = Model()
    stats = recalibrate(jaxbn.nnx.moments_fn(model), [x])
    jaxbn.nnx.load_stats(model, stats)
    assert_close(model.norms.mean[...], np.stack([np.mean(x, 0)] * 2), rtol=1e-6)


# Whole models


def test_recalibrate_linen(variables):
    """The first layer as one giant batch; later ones as the batches normalize them."""
    f = jaxbn.linen.moments_fn(Net(), variables, training=True)
    stats = recalibrate(f, BATCHES)
    assert set(stats) == {"input", "block/first", "block/second", "extra"}
    mean, var, _ = truth(X)
    assert_close(stats["input"].mean, mean, rtol=1e-6)
    assert_close(stats["input"].var, var, rtol=3e-6)

    seen = []

    def record(next_fun, args, kwargs, context):
        if context.module.name == "first" and context.method_name == "__call__":
            seen.append(args[0])
        return next_fun(*args, **kwargs)

    for batch in BATCHES:
        with nn.intercept_methods(record):
            Net().apply(variables, batch, training=True, mutable=["batch_stats"])
    mean, var, _ = truth(np.concatenate(seen))
    assert_close(stats["block/first"].mean, mean, rtol=1e-4, atol=1e-5)
    assert_close(stats["block/first"].var, var, rtol=1e-4)

    loaded = jaxbn.linen.load_stats(variables, stats)
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    again = jaxbn.linen.running_stats(loaded)
    for path, expected in stats.items():
        assert_close(again[path].mean, expected.mean)
        assert_close(again[path].var, expected.var)
    assert not np.any(variables["batch_stats"]["input"]["mean"]), "must stay"


def test_recalibrate_nnx():
    model = NNXNet()
    before = values(model)
    f = jaxbn.nnx.moments_fn(model)
    stats = recalibrate(f, BATCHES)
    jax.tree.map(partial(assert_close, rtol=0), values(model), before)
    assert set(stats) == {"norms/0", "norms/1"}
    mean, var, _ = truth(X)
    assert_close(stats["norms/0"].mean, mean, rtol=1e-6)
    assert_close(stats["norms/0"].var, var, rtol=3e-6)
    jaxbn.nnx.load_stats(model, stats)
    assert_close(model.norms[0].var[...], var, rtol=3e-6)
    # What the model is given later does not change a function that was made before.
    later = f(X)["norms/1"]
    model.conv.kernel[...] = 5 * model.conv.kernel[...]
    jax.tree.map(partial(assert_close, rtol=0), tuple(f(X)["norms/1"]), tuple(later))


def test_a_layer_that_is_called_twice_sees_both_inputs():
    net = Net(shared=True)
    variables = net.init(jax.random.key(0), X, training=False)
    m = jaxbn.linen.moments_fn(net, variables, training=True)(X)["block/first"]
    assert_close(m.count, np.full(2, 2.0 * X[..., 0].size))
    once = Net().init(jax.random.key(0), X, training=False)
    parts = jaxbn.linen.moments_fn(Net(), once, training=True)(X)
    both = [parts["block/first"], parts["block/second"]]
    merged = jaxbn.merge_moments(jax.tree.map(lambda *a: jnp.stack(a), *both))
    jax.tree.map(partial(assert_close, rtol=1e-5), tuple(m), tuple(merged))


def test_batches_that_are_sharded(variables):
    sharding = jax.sharding.NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    f = jaxbn.linen.moments_fn(Net(), variables, training=True)
    whole = recalibrate(f, [X, X + 1])
    spread = recalibrate(f, [jax.device_put(b, sharding) for b in (X, X + 1)])
    for path, stats in whole.items():
        close = partial(assert_close, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, tuple(spread[path]), tuple(stats))


def test_layers_with_an_axis_name_are_measured_under_shard_map():
    net = jaxbn.linen.BatchNorm(False, axis_name="data")
    variables = net.init(jax.random.key(0), X)
    f = jax.shard_map(
        jaxbn.linen.moments_fn(net, variables),
        mesh=mesh_of(8),
        in_specs=P("data"),
        out_specs=P(),
    )
    assert_moments(jax.jit(f)(X)[""], X)


def test_other_arguments_of_the_model(variables):
    method = lambda net, b: net(b["image"], training=b["flag"] is None)
    f = jaxbn.linen.moments_fn(Net(), variables, method=method)
    assert_moments(f({"image": X, "flag": None})["input"], X)

    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(x)
            return jaxbn.linen.BatchNorm(False)(x)

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    noisy = Noisy().init(rngs, X)
    f = jaxbn.linen.moments_fn(Noisy(), noisy, rngs={"dropout": jax.random.key(2)})
    assert (f(X)["BatchNorm_0"].var > 1.5 * np.var(X, (0, 1, 2))).all()
    model = NNXNet()
    method = lambda model, b, scale: model(b[0] * scale)
    f = jaxbn.nnx.moments_fn(model, method=method, scale=2.0)
    assert_moments(f((X, None))["norms/0"], 2 * X)


def test_a_module_with_an_array_for_a_field():
    layer = jaxbn.linen.BatchNorm(False, momentum=jnp.array([0.5, 0.9]))
    variables = layer.init(jax.random.key(0), X)
    assert_moments(jaxbn.linen.moments_fn(layer, variables)(X)[""], X)


def test_frozen_variables(variables):
    frozen = freeze(variables)
    stats = jaxbn.linen.running_stats(frozen)
    loaded = jaxbn.linen.load_stats(frozen, stats)
    assert type(loaded) is type(frozen)
    assert jax.tree.structure(loaded) == jax.tree.structure(frozen)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_renorm_takes_a_standard_deviation_and_keeps_its_step(kind):
    """And infers as batch norm does with these statistics."""
    x = numbers((50, 3), "float32", mean=3.0)
    schedule = optax.linear_schedule(1.0, 3.0, 100)
    stats = {"": jaxbn.RunningStats(*truth(x)[:2], jnp.int32(3))}
    if kind == "linen":
        layer = jaxbn.linen.BatchRenorm(r_max=schedule)
        variables = layer.init(jax.random.key(0), x, True)
        variables["batch_stats"]["step"] += 7
        variables = jaxbn.linen.load_stats(variables, stats)
        step, y = variables["batch_stats"]["step"], layer.apply(variables, x, True)
        back = jaxbn.linen.running_stats(variables)[""]
        measured = jaxbn.linen.moments_fn(layer, variables, use_running_average=False)
    else:
        layer = jaxbn.nnx.BatchRenorm(3, r_max=schedule, rngs=nnx.Rngs(0))
        layer.step[...] += 7
        jaxbn.nnx.load_stats(layer, stats)
        step, y = layer.step[...], layer(x, True)
        back = jaxbn.nnx.running_stats(layer)[""]
        measured = jaxbn.nnx.moments_fn(layer)
    assert step == 7
    mean, var, _ = truth(x)
    assert_close(back.var, var, rtol=1e-6)
    expected = oracle.normalize(np.asarray(x), mean, var, epsilon=0)
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    # Measured, its variance includes epsilon, as its running one does.
    assert_close(recalibrate(measured, [x])[""].var, var + 1e-5, rtol=2e-6)


def test_a_domain_without_examples_keeps_its_statistics():
    x = numbers((8, 3), "float32", mean=3.0)
    layer = jaxbn.linen.DomainBatchNorm(True, num_domains=2)
    variables = layer.init(jax.random.key(0), x, domain_ids=0)
    f = jaxbn.linen.moments_fn(layer, variables, domain_ids=jnp.int32(1))
    with pytest.raises(ValueError, match="3 of 6 entries of layer '' have"):
        recalibrate(f, [x])
    stats = adapt(jaxbn.linen.running_stats(variables), f(x))
    new = jaxbn.linen.load_stats(variables, stats)["batch_stats"]
    assert_close(new["mean"], np.stack([np.zeros(3), np.mean(x, 0)]), rtol=1e-6)


def test_drift_of_a_model_as_it_is_used(variables):
    f = jaxbn.linen.moments_fn(Net(), variables, training=False)
    found = drift(jaxbn.linen.running_stats(variables), f(X))
    assert found["input"].never_updated
    mean, _, _ = truth(X)
    assert_close(found["input"].mean_shift, mean / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_mixing_layer_by_layer_is_where_adapt_comes_to_rest():
    """Measured under adapted statistics, one layer more is right in every round."""
    x, old = X[..., :1] - 2, X[..., :1]

    class Two(nn.Module):
        pseudo_samples: float | None = None

        @nn.compact
        def __call__(self, x, training):
            for features in (4, 3):
                x = nn.Conv(features, (3, 3))(x)
                norm = partial(jaxbn.linen.BatchNorm, momentum=0.0)
                x = nn.relu(norm(not training, pseudo_samples=self.pseudo_samples)(x))
            return x

    variables = Two().init(jax.random.key(0), old, training=False)
    _, new = Two().apply(variables, old, training=True, mutable=["batch_stats"])
    variables = source = {**variables, **new}
    mix = {"pseudo_samples": 4.0, "samples": len(x)}
    for _ in range(2):
        measure = jaxbn.linen.moments_fn(Two(), variables, training=False)
        stats = adapt(jaxbn.linen.running_stats(source), measure(x), **mix)
        variables = jaxbn.linen.load_stats(source, stats)
    y = Two().apply(variables, x, training=False)
    at_once = Two(pseudo_samples=4.0).apply(source, x, training=False)
    assert_close(at_once, y, rtol=1e-4, atol=1e-5)
    # And the moments that are measured on the way are the right ones for `adapt`.
    measure = jaxbn.linen.moments_fn(Two(4.0), source, training=False)
    again = adapt(jaxbn.linen.running_stats(source), measure(x), **mix)
    for path, expected in stats.items():
        assert_close(again[path].mean, expected.mean, rtol=1e-4, atol=1e-5)

    nnx_layer = jaxbn.nnx.BatchNorm(2, pseudo_samples=4.0, rngs=nnx.Rngs(0))
    linen_layer = jaxbn.linen.BatchNorm(True, pseudo_samples=4.0)
    y, _ = linen_layer.init_with_output(jax.random.key(0), X)
    assert_close(nnx_layer(X, True), y, rtol=1e-6)


# Errors


def test_layers_that_did_not_run(variables):
    f = jaxbn.linen.moments_fn(Net(), variables, training=True, extra=False)
    with pytest.raises(ValueError, match="Layer 'extra' has seen no data"):
        recalibrate(f, BATCHES)
    f = jaxbn.nnx.moments_fn(NNXNet(), extra=False)
    with pytest.raises(ValueError, match="Layer 'norms/1' has seen no data"):
        recalibrate(f, BATCHES)
    kept = jaxbn.linen.running_stats(variables)
    stats = jaxbn.linen.running_stats(variables)
    stats.pop("extra")
    with pytest.raises(ValueError, match=r"It lacks \['extra'\]"):
        jaxbn.linen.load_stats(variables, stats)
    jaxbn.linen.load_stats(variables, kept | stats)


def test_models_of_other_batch_norms(variables):
    other = nn.BatchNorm(use_running_average=False)
    theirs = other.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="batch norm of another library"):
        jaxbn.linen.moments_fn(other, theirs)(X)
    inference = other.clone(use_running_average=True)
    with pytest.raises(ValueError, match=r"No layer .* `jaxbn.linen.BatchNorm`"):
        jaxbn.linen.moments_fn(inference, theirs)(X)
    with pytest.raises(ValueError, match=r"Build it with those of `jaxbn.nnx`"):
        jaxbn.nnx.moments_fn(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("function", ["running_stats", "moments_fn", "load_stats"])
def test_variables_without_statistics(function):
    more = {"moments_fn": (), "load_stats": ({},), "running_stats": ()}[function]
    first = (Net(),) if function == "moments_fn" else ()
    with pytest.raises(ValueError, match="has no running statistics of batch norms"):
        getattr(jaxbn.linen, function)(*first, {"params": {}}, *more)


def test_statistics_of_another_model(variables):
    stats = jaxbn.linen.running_stats(variables)
    wrong = stats | {"input": jaxbn.init_stats(5)}
    with pytest.raises(ValueError, match=r"`stats\['input'\]` has features of shape"):
        jaxbn.linen.load_stats(variables, wrong)
    with pytest.raises(TypeError, match=r"expected a `RunningStats`"):
        jaxbn.linen.load_stats(variables, stats | {"input": (1, 2)})
    complex_ = jaxbn.init_stats(2, dtype=jnp.complex64)
    with pytest.raises(TypeError, match="imaginary part would be lost"):
        jaxbn.linen.load_stats(variables, stats | {"input": complex_})
    with pytest.raises(
        ValueError, match=r"has \['else'\], which the model does not have"
    ):
        jaxbn.linen.load_stats(variables, stats | {"else": jaxbn.init_stats(2)})
    model = NNXNet()
    stats = jaxbn.nnx.running_stats(model)
    with pytest.raises(ValueError, match=r"It lacks \['norms/1'\]"):
        jaxbn.nnx.load_stats(model, {"norms/0": stats["norms/0"]})
