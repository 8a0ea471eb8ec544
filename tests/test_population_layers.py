"""Statistics over a data set, for every layer of the family: a pair of functions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import assert_close, numbers, squeeze
from family import CASES, IDS, inputs

import jaxbn
from jaxbn import layers
from jaxbn.population import adapt, collect, drift, recalibrate, summary

EPSILON = 1e-5
STATS = np.mean, np.var
every = pytest.mark.parametrize("name", CASES)
DATA = numbers((8, 4, 3), "float32", mean=3.0)


def seen_all(case):
    """Batches in which every domain has an example."""
    own = dict(inputs(case, jnp.float32))
    if "domain_ids" in own:
        own["domain_ids"] = jnp.asarray((IDS + np.arange(8)) % 3)
    batches = [np.arange(0, 4), np.arange(4, 8)]
    return [(DATA[r], {n: v[r] for n, v in own.items()}) for r in batches]


def network(name, dtype=jnp.float32):
    """Two layers, one after the other: states, what measures, and what trains."""
    case = CASES[name]
    layer = case.make(momentum=0.9, stats_dtype=dtype)
    params, _ = layer.init(3)
    states = {"first": layer.init(3)[1], "rest": [layer.init(3)[1]]}

    def run(states, batch, function):
        x, more = batch
        x, first = function(params, states["first"], x, training=True, **more)
        _, second = function(params, states["rest"][0], x, training=True, **more)
        return {"first": first, "rest": [second]}

    measure = jax.jit(lambda batch: run(states, batch, layer.forward))
    train = partial(run, function=layer.apply)
    return states, measure, train


def kinds(tree):
    """Structure, shapes and dtypes."""
    return jax.tree.structure(tree), jax.tree.map(lambda a: (a.shape, a.dtype), tree)


def assert_as_the_layers_own(new, states, train, batch):
    """Like `states`; and training goes on, compiled, with `new` given away."""
    assert kinds(new) == kinds(states)
    later = jax.jit(train, donate_argnums=0)(new, batch)
    assert kinds(later) == kinds(states)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(new))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(states))
    finite = jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), later)
    assert all(jax.tree.leaves(finite))


def truth(name, state, batches):
    """Mean and variance of all the data, by the oracle, as the layer tracks them."""
    x = np.concatenate([x for x, _ in batches])
    own = np.ones(len(x), int)[None]
    if name == "domain":
        ids = np.concatenate([more["domain_ids"] for _, more in batches])
        own = np.arange(3)[:, None] == ids
    found = [oracle.moments(x[rows > 0], (0, 1)) for rows in own]
    mean, var = (np.stack([squeeze(m[i], (0, 1)) for m in found]) for i in (0, 1))
    second = np.sqrt(var + EPSILON) if name == "renorm" else var
    return mean.reshape(state.mean.shape), second.reshape(state.mean.shape)


@every
@pytest.mark.parametrize(
    ("dtype", "estimator"), [("float32", "pooled"), ("bfloat16", "average")]
)
def test_recalibrate_returns_what_the_layers_have(name, dtype, estimator):
    states, measure, train = network(name, dtype)
    batches = seen_all(CASES[name])
    new = recalibrate(measure, batches, stats=states, estimator=estimator)
    if estimator == "pooled":
        mean, second = truth(name, new["first"], batches)
        assert_close(new["first"].mean, mean, rtol=1e-5)
        assert_close(new["first"][1], second, rtol=1e-5)
    assert np.all(new["first"].step == 2)
    assert_as_the_layers_own(new, states, train, batches[0])


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapt_returns_what_the_layers_have(name, dtype):
    states, measure, train = network(name, dtype)
    batches = seen_all(CASES[name])
    m = collect(measure, batches)
    mix = {"pseudo_samples": 8.0, "samples": 8}
    new = jax.jit(partial(adapt, **mix))(states, m)
    mean, second = truth(name, new["first"], batches)
    if name == "renorm":
        second = np.sqrt(np.square(second) / 2 + 0.5)
    else:
        second = second / 2 + 0.5
    close = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    assert_close(new["first"].mean.astype("float32"), mean / 2, rtol=close)
    assert_close(new["first"][1].astype("float32"), second, rtol=close)
    assert np.all(new["first"].step == 1)
    assert_as_the_layers_own(adapt(states, m, **mix), states, train, batches[0])


@every
def test_drift_and_summary(name):
    """Of recalibrated layers there is none; of fresh ones there is."""
    states, measure, _ = network(name)
    batches = seen_all(CASES[name])
    m = collect(measure, batches)
    found = jax.jit(drift)(recalibrate(measure, batches, stats=states), m)
    assert_close(found["first"].mean_shift, np.zeros_like(m["first"].mean), atol=1e-5)
    assert_close(found["first"].var_ratio, np.ones_like(m["first"].mean), rtol=1e-5)
    assert not found["first"].never_updated
    fresh = drift(states, m)
    assert fresh["first"].never_updated
    assert (fresh["first"].kl > 1).all()
    rows = summary(fresh).splitlines()
    assert [row.split()[1] for row in rows[2:]] == ["first", "rest/0"]


def test_drift_of_a_renorm_is_what_comes_out_of_it():
    """Its variances include epsilon, which is not added once more."""
    layer = layers.renorm(epsilon=1.0)
    params, state = layer.init(3)
    state = state._replace(mean=jnp.ones(3), std=jnp.full(3, 2.0))
    y, m = layer.forward(params, state, DATA, training=False)
    found = drift(state, m)
    assert_close(found.mean_shift, np.mean(y, (0, 1)), rtol=1e-5)
    assert_close(found.var_ratio, (np.var(DATA, (0, 1)) + 1) / 4, rtol=1e-5)


@pytest.mark.parametrize("name", ["standard", "renorm", "domain"])
def test_stacked_layers(name):
    case, depth = CASES[name], 2
    layer = case.make(momentum=0.9)
    params, states = jax.vmap(lambda _: layer.init(3))(jnp.arange(depth))

    @jax.jit
    def measure(batch):
        x, more = batch
        apply = lambda p, s: layer.forward(p, s, x, training=True, **more)[1]
        return jax.vmap(apply)(params, states)

    def train(states, batch):
        x, more = batch
        apply = lambda p, s: layer.apply(p, s, x, training=True, **more)[1]
        return jax.vmap(apply)(params, states)

    batches = seen_all(case)
    new = recalibrate(measure, batches, stats=states)
    mean, second = truth(name, jax.tree.map(lambda a: a[0], new), batches)
    assert_close(new.mean, np.stack([mean] * depth), rtol=1e-5)
    assert_close(new[1], np.stack([second] * depth), rtol=1e-5)
    assert_as_the_layers_own(new, states, train, batches[0])
    m = collect(measure, batches)
    adapted = adapt(states, m)
    assert_close(adapted.mean, np.stack([mean] * depth), rtol=1e-5)
    assert drift(adapted, m).kl.shape == adapted.mean.shape
    assert_as_the_layers_own(adapted, states, train, batches[0])


@pytest.mark.parametrize("stacked", [False, True])
def test_moments_of_groups(stacked):
    """A layer that makes a step for each group: its moments have an axis more."""
    layer = layers.ghost(group_size=2, update_per_group=True)
    params, state = layer.init(3)
    batches, states = [DATA[:2], DATA[2:6]], state  # of one group, and of two
    measure = lambda x: layer.forward(params, state, x, training=True)[1]
    if stacked:
        measure = jax.vmap(measure)
        *batches, states = jax.tree.map(lambda a: jnp.stack([a, a]), (*batches, state))
    new = recalibrate(measure, batches, stats=states)
    assert kinds(new) == kinds(states)
    mean, var = (np.broadcast_to(f(DATA[:6], (0, 1)), new.mean.shape) for f in STATS)
    assert_close(new.mean, mean, rtol=1e-6)
    assert_close(new.var, var, rtol=1e-5)
    with pytest.raises(ValueError, match="moments of different shapes"):
        recalibrate(measure, batches)

    m = measure(batches[1])
    adapted = adapt(states, m)
    assert kinds(adapted) == kinds(states)
    var = np.broadcast_to(np.var(DATA[2:6], (0, 1)), new.mean.shape)
    assert_close(adapted.var, var, rtol=1e-5)
    assert drift(states, m).kl.shape == states.mean.shape


def test_without_states_it_is_running_stats_that_may_be_donated():
    _, measure, _ = network("standard")
    batches = seen_all(CASES["standard"])
    for made in (collect(measure, batches), recalibrate(measure, batches)):
        jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)(
            made
        )
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(made))
    new = recalibrate(measure, batches, estimator="average")
    assert isinstance(new["first"], jaxbn.RunningStats)
    assert new["first"].step.dtype == jnp.int32


def test_complex_states():
    x = numbers((9, 2), "complex64")
    layer = layers.renorm(stats_dtype=jnp.complex64)
    params, state = layer.init(2)
    measure = lambda x: layer.forward(params, state, x, training=True)[1]
    new = recalibrate(measure, [x], stats=state)
    assert kinds(new) == kinds(state)
    assert_close(new.std, np.sqrt(np.var(x, 0) + EPSILON), rtol=1e-5)
    _, real = layers.renorm().init(2)
    for call in (
        lambda: recalibrate(measure, [x], stats=real),
        lambda: adapt(real, measure(x)),
    ):
        with pytest.raises(TypeError, match="its imaginary part would be lost"):
            call()


@pytest.mark.parametrize(
    ("stats", "kind", "message"),
    [
        ({"b": jaxbn.init_stats(3)}, ValueError, "are of different layers"),
        ({"a": jaxbn.init_stats(2)}, ValueError, "have features of shape"),
        ({"a": jnp.ones(3)}, TypeError, "`RunningStats` or `RenormStats`"),
        ({"a": jaxbn.moments(DATA)}, TypeError, r"`stats\['a'\]` is Moments"),
    ],
)
def test_states_of_other_layers(stats, kind, message):
    with pytest.raises(kind, match=message):
        recalibrate(lambda x: {"a": jaxbn.moments(x)}, [DATA], stats=stats)
