"""Statistics over a data set: pooled, averaged, adapted and watched, by formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import assert_close, numbers, squeeze
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn
from jaxbn.population import adapt, collect, drift, recalibrate, summary


def truth(x, weights=None):
    m = oracle.moments(x, tuple(range(x.ndim - 1)), weights)
    return [squeeze(v, tuple(range(x.ndim - 1))) for v in m]


def layers_of(batch):
    """A tree of two layers, that see different things."""
    return {"a": jaxbn.moments(batch), "b": [jaxbn.moments(jnp.square(batch[:, :1]))]}


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=9), seed=st.integers(0, 9)
)
def test_batches_of_any_sizes_are_one_batch(sizes, seed):
    if not any(sizes):
        sizes = [*sizes, 1]
    x = np.asarray(numbers((sum(sizes), 3), "float32", seed, mean=20.0))
    parts = np.split(x, np.cumsum(sizes)[:-1])
    m = collect(jaxbn.moments, map(jnp.asarray, parts))
    mean, var, count = truth(x)
    assert_close(m.mean, mean, rtol=1e-6)
    assert_close(m.var, var, rtol=2e-5, atol=1e-5)
    assert_close(m.count, count[0])


def test_trees_of_layers_and_what_comes_back():
    x = numbers((10, 3), "float32")
    stats = recalibrate(jax.jit(layers_of), iter([x[:6], x[6:]]))
    assert isinstance(stats["a"], jaxbn.RunningStats)
    assert stats["a"].step == 2
    assert stats["a"].step.dtype == jnp.int32
    for got, data in [(stats["a"], x), (stats["b"][0], np.square(x[:, :1]))]:
        mean, var, _ = truth(data)
        assert_close(got.mean, mean, rtol=1e-6)
        assert_close(got.var, var, rtol=2e-6)


def test_a_thousand_batches_lose_no_precision():
    """Merging them one after the other loses a hundred times as much."""
    rng = np.random.default_rng(0)
    x = np.float32(1e4 + rng.normal(size=(1000, 8, 2)))
    m = collect(jax.jit(jaxbn.moments), list(x))
    mean, var, _ = truth(x)
    assert_close(m.mean, mean, rtol=1.5e-7)
    assert_close(m.var, var, rtol=2e-5)


@pytest.mark.parametrize("unbiased", [False, True])
def test_estimators(x64, unbiased):
    """Uneven batches; one has no weight for the last feature, and NaN there."""
    x = numbers((12, 3), "float64", mean=5.0).at[0:4, 2].set(jnp.nan)
    w = np.ones((12, 3))
    w[0:4, 2] = 0
    batches = [(x[a:b], jnp.asarray(w[a:b])) for a, b in [(0, 4), (4, 6), (6, 12)]]
    moments_fn = lambda batch: jaxbn.moments(batch[0], weights=batch[1])
    got = {
        name: recalibrate(moments_fn, batches, estimator=name, unbiased=unbiased)
        for name in ("pooled", "average")
    }

    def factor(n):
        return n / (n - 1) if unbiased else 1.0

    mean, var, count = truth(x, w)
    assert_close(got["pooled"].mean, mean, rtol=1e-13)
    assert_close(got["pooled"].var, var * factor(count), rtol=1e-13)
    each = [truth(a, b) for a, b in batches]
    for feature in range(3):
        own = [m for m in each if m[2][feature] > 0]
        mean = np.mean([m[0][feature] for m in own])
        var = np.mean([m[1][feature] * factor(m[2][feature]) for m in own])
        assert_close(got["average"].mean[feature], mean, rtol=1e-13)
        assert_close(got["average"].var[feature], var, rtol=1e-13)
    assert got["average"].step == got["pooled"].step == 3


def test_complex_data():
    x = numbers((9, 2), "complex64")
    for estimator in ("pooled", "average"):
        stats = recalibrate(jaxbn.moments, [x], estimator=estimator)
        mean, var, _ = truth(x)
        assert_close(stats.mean, mean, rtol=1e-6)
        assert_close(stats.var, var, rtol=1e-6)


def test_batches_on_several_devices_are_pooled_exactly():
    x = numbers((2, 16, 3), "float32", mean=9.0)
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec("data")
    )
    batches = (jax.device_put(batch, sharding) for batch in x)
    stats = recalibrate(jax.jit(jaxbn.moments), batches)
    mean, var, _ = truth(np.asarray(x))
    assert_close(stats.mean, mean, rtol=1e-6)
    assert_close(stats.var, var, rtol=1e-6)


def test_no_batches():
    used_up = iter([])
    with pytest.raises(ValueError, match="`batches` is empty"):
        recalibrate(jaxbn.moments, used_up)


def test_a_layer_that_never_ran():
    def moments_fn(x):
        none = jaxbn.moments(x, weights=jnp.zeros(()))
        return {"ran": jaxbn.moments(x), "did not": none}

    with pytest.raises(ValueError, match=r"'did not' has seen no data: it never ran"):
        recalibrate(moments_fn, [jnp.ones((3, 2))])


def test_features_that_never_had_data():
    mask = jnp.array([True, False])
    with pytest.raises(ValueError, match=r"1 of 2 entries of layer '' have seen no"):
        recalibrate(partial(jaxbn.moments, weights=mask), [jnp.ones((3, 2))])


@pytest.mark.parametrize(
    ("moments_fn", "kind", "message"),
    [
        (lambda x: {"a": x}, TypeError, r"`moments_fn\(batch\)\['a'\]` is Array"),
        (lambda x: {}, ValueError, "has no layer"),
        (
            lambda x: {"a" if x.shape[0] == 3 else "b": jaxbn.moments(x)},
            ValueError,
            "different layers",
        ),
    ],
)
def test_what_is_no_tree_of_moments(moments_fn, kind, message):
    with pytest.raises(kind, match=message):
        recalibrate(moments_fn, [jnp.ones((3, 2)), jnp.ones((2, 2))])


def test_an_unknown_estimator():
    with pytest.raises(ValueError, match="`estimator` must be one of"):
        recalibrate(jaxbn.moments, [], estimator="ema")


# adapt


def trained():
    mean, var = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    return jaxbn.RunningStats(mean, var, jnp.int32(7))


@pytest.mark.parametrize("prior", [0.0, 16.0, np.inf])
def test_adapt_is_the_mix_of_the_paper(x64, prior):
    """n are examples, not the positions that a convolution's moments are of."""
    stats = jaxbn.RunningStats(
        jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.int32(7)
    )
    x = numbers((8, 5, 5, 2), "float64", mean=-3.0)
    got = adapt(stats, jaxbn.moments(x), pseudo_samples=prior, samples=8)
    mean, var, _ = truth(x)
    share = 1.0 if np.isinf(prior) else prior / (prior + 8)
    assert_close(got.mean, share * stats.mean + (1 - share) * mean, rtol=1e-13)
    assert_close(got.var, share * stats.var + (1 - share) * var, rtol=1e-13)


@pytest.mark.parametrize("kind", ["number", "array", "tree"])
def test_adapt_to_a_mixture(x64, kind):
    """The statistics of both domains' data, in these parts."""
    old, new = (numbers((8, 2), "float64", seed, mean=seed) for seed in (1, 4))
    stats = {
        name: jaxbn.RunningStats(*jaxbn.moments(old)[:2], jnp.int32(7)) for name in "ab"
    }
    m = {name: jaxbn.moments(new) for name in "ab"}
    own = {"number": 0.25, "array": np.array([0.25, 0.5])}
    weight = own.get(kind, {"a": 0.25, "b": own["array"]})
    got = adapt(stats, m, weight=weight)
    for name in "ab":
        share = weight[name] if kind == "tree" else weight
        for i, a in enumerate(np.broadcast_to(share, (2,))):
            parts = [old[:, i]] * int(4 * (1 - a)) + [new[:, i]] * int(4 * a)
            assert_close(got[name].mean[i], np.mean(parts), rtol=1e-13)
            assert_close(got[name].var[i], np.var(parts), rtol=1e-13)
        assert got[name].step == 8


def test_mixtures_of_stacked_layers_and_of_renorm(x64):
    x = numbers((3, 8, 2), "float64", mean=3.0)
    stacked = jax.vmap(lambda _: jaxbn.init_stats(2))(jnp.arange(3))
    m = jax.vmap(jaxbn.moments)(x)
    weight = np.array([0.25, 1.0])
    got = adapt(stacked, m, weight=weight)
    for i in range(3):
        own, part = (jax.tree.map(lambda a, i=i: a[i], tree) for tree in (stacked, m))
        alone = adapt(own, part, weight=weight)
        jax.tree.map(assert_close, jax.tree.map(lambda a, i=i: a[i], got), alone)
    _, renorm = jaxbn.layers.renorm().init(2)
    part = jax.tree.map(lambda a: a[0], m)
    got = adapt(renorm, part, weight=1.0)
    assert_close(got.std, np.sqrt(part.var), rtol=1e-6)


def test_features_without_weight_do_not_mix():
    m = jaxbn.moments(jnp.full((3, 2), 9.0), weights=jnp.array([True, False]))
    got = adapt(jaxbn.init_stats(2), m, weight=0.5)
    assert_close(got.mean, [4.5, 0.0])
    assert_close(got.var, [0.5 + 0.25 * 81, 1.0])


def test_adapt_in_a_compiled_function():
    stats = {"a": jaxbn.init_stats(2)}
    x = numbers((8, 2), "float32")

    @jax.jit
    def adapted(stats, x, prior):
        m = {"a": jaxbn.moments(x)}
        return adapt(stats, m, pseudo_samples=prior, samples=len(x))

    for prior in (0.0, 8.0):
        got = adapted(stats, x, prior)["a"]
        assert_close(got.mean, np.mean(x, 0) * 8 / (8 + prior), rtol=1e-6)


def test_what_has_no_weight_stays():
    stats = jaxbn.RunningStats(
        jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.int32(7)
    )
    m = jaxbn.moments(jnp.full((3, 2), 9.0), weights=jnp.array([True, False]))
    got = adapt(stats, m)
    assert_close(got.mean, [9.0, 2.0])
    assert_close(got.var, [0.0, 4.0])


STATS, MOMENTS = jaxbn.init_stats(2), jaxbn.moments(jnp.ones((3, 2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: adapt(STATS, MOMENTS, pseudo_samples=4), "`samples` is needed"),
        (lambda: adapt(STATS, MOMENTS, pseudo_samples=-1), "`pseudo_samples` must be"),
        (lambda: adapt(STATS, MOMENTS, samples=-1), "`samples` must be a number of"),
        (lambda: adapt(STATS, MOMENTS, weight=1.5), "`weight` is that of `moments`"),
        (lambda: adapt(STATS, MOMENTS, weight=np.ones(3)), r"`weight` of layer '' has"),
        (lambda: adapt(STATS, MOMENTS, weight={"a": 1.0}), "`weight` must be a number"),
        (lambda: adapt(STATS, MOMENTS, weight=1, samples=3), "Give one of the two"),
        (lambda: adapt({"a": STATS}, {"b": MOMENTS}), "are of different layers"),
        (lambda: adapt({}, {}), "`stats` has no layer"),
        (lambda: drift(jaxbn.init_stats(3), MOMENTS), "features of shape"),
        (lambda: drift([STATS], (MOMENTS,)), "different containers"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_leaves():
    with pytest.raises(TypeError, match="`stats` is Moments, expected a tree of `Run"):
        drift(MOMENTS, MOMENTS)
    with pytest.raises(TypeError, match="`moments` is RunningStats"):
        adapt(STATS, STATS)
    with pytest.raises(TypeError, match=r"`drifts\['a'\]\.mean` is Array"):
        summary({"a": MOMENTS})


def test_no_samples_and_no_prior_leave_the_statistics():
    got = adapt(trained(), MOMENTS, pseudo_samples=0.0, samples=0)
    assert_close(got.mean, trained().mean)


def test_the_step_of_a_domain_without_data_stays(x64):
    stats = jax.tree.map(lambda a: jnp.stack([a, a]), jaxbn.init_stats(3))
    own = jaxbn.moments(numbers((4, 3), "float64"))
    none = own._replace(count=jnp.zeros(()))
    m = jax.tree.map(lambda *a: jnp.stack(a), own, none)
    got = adapt(stats, m)
    assert got.step.tolist() == [1, 0]
    assert_close(got.mean[0], own.mean, rtol=1e-6)
    assert_close(got.mean[1], np.zeros(3))


@pytest.mark.parametrize("batches", [jnp.ones((3, 2)), np.ones((3, 2)), {"a": 1}])
def test_what_is_one_batch_is_not_taken_for_several(batches):
    with pytest.raises(TypeError, match=r"Pass `\[x\]` if it is one batch"):
        recalibrate(jaxbn.moments, batches)


def test_a_layer_without_features():
    m = collect(lambda x: jaxbn.moments(x), [jnp.ones((3, 0)), jnp.ones((2, 0))])
    assert m.mean.shape == (0,)


# drift


def kl(mean, var, other_mean, other_var):
    ratio = var / other_var
    return (ratio - 1 - np.log(ratio) + (mean - other_mean) ** 2 / other_var) / 2


def test_drift_by_definition(x64):
    rng = np.random.default_rng(0)
    mean, var = rng.normal(size=4), rng.uniform(0.5, 2, 4)
    x = numbers((50, 4), "float64", mean=3.0)
    stats = jaxbn.RunningStats(jnp.asarray(mean), jnp.asarray(var), jnp.int32(3))
    got = jax.jit(partial(drift, epsilon=0.0))(stats, jaxbn.moments(x))
    m, v, _ = truth(x)
    assert_close(got.kl, kl(m, v, mean, var) + kl(mean, var, m, v), rtol=1e-12)
    assert_close(got.mean_shift, (m - mean) / np.sqrt(var), rtol=1e-12)
    assert_close(got.var_ratio, v / var, rtol=1e-12)
    assert not got.dead.any()
    assert not got.non_finite.any()
    assert not got.never_updated


def test_a_small_drift_is_not_lost_to_rounding():
    """σ² and σ²(1 + 1e-4): 5e-9 nats, far below the resolution of 1 in float32."""
    stats = jaxbn.RunningStats(jnp.zeros(1), jnp.full(1, 2.0), jnp.int32(1))
    m = jaxbn.Moments(jnp.zeros(1), jnp.full(1, 2.0 * (1 + 1e-4)), jnp.ones(()))
    ratio = np.float64(m.var[0]) / 2.0
    expected = (ratio + 1 / ratio) / 2 - 1
    assert_close(drift(stats, m, epsilon=0.0).kl[0], expected, rtol=1e-3)


def test_what_drift_flags():
    stats = jaxbn.init_stats(5)
    x = numbers((16, 5), "float32")
    x = x.at[:, 1].set(1e4).at[3, 2].set(jnp.nan).at[4, 3].set(jnp.inf)
    found = drift(stats, jaxbn.moments(x))
    assert found.dead.tolist() == [False, True, False, False, False]
    assert found.non_finite.tolist() == [False, False, True, True, False]
    assert found.never_updated
    moved = jaxbn.update(stats, jaxbn.moments(jnp.repeat(x[:, :1], 5, 1)))
    assert not drift(moved, jaxbn.moments(x)).never_updated
    never_ran = jaxbn.moments(x, weights=jnp.zeros(()))
    assert not drift(stats, never_ran).dead.any()


def test_where_there_are_no_data_there_is_no_drift():
    m = jaxbn.moments(jnp.ones((3, 2)), weights=jnp.array([True, False]))
    found = drift(trained(), m)
    assert np.isnan([found.kl[1], found.mean_shift[1], found.var_ratio[1]]).all()
    assert np.isfinite(found.kl[0])
    assert not found.non_finite.any()
    none = drift(trained(), m._replace(count=jnp.zeros(())))
    row = summary({"a": none}).splitlines()[2]
    assert row.count(" - ") == 5
    assert "no data" in row


def test_drift_of_large_and_small_numbers_and_of_stacks():
    stats = jaxbn.RunningStats(jnp.zeros(1), jnp.ones(1), jnp.int32(1))
    m = jaxbn.Moments(jnp.zeros(1), jnp.full(1, 1e20), jnp.ones(()))
    assert_close(drift(stats, m, epsilon=0.0).kl, [0.5e20], rtol=1e-5)
    tiny = stats._replace(var=jnp.full(1, 1e-24))
    m = m._replace(var=jnp.full(1, 2e-24))
    assert_close(drift(tiny, m, epsilon=0.0).kl, [0.25], rtol=1e-5)
    stack = lambda tree: jax.tree.map(lambda a: jnp.stack([a, a]), tree)
    found = jax.vmap(drift)(stack(stats), stack(m))
    assert "| a " in summary({"a": found})


def test_summary_is_a_table():
    x = numbers((16, 5), "float32").at[:, 1].set(2.0).at[0, 0].set(jnp.nan)
    tree = {"a": {"b": drift(jaxbn.init_stats(5), jaxbn.moments(x))}}
    tree["broken"] = drift(jaxbn.init_stats(1), jaxbn.moments(x[:, :1]))
    lines = summary(tree).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[:2] == ["a/b", "5"]
    assert cells[-3:] == ["1", "1", "never updated"]
    assert np.isclose(
        float(cells[4]), np.abs(tree["a"]["b"].mean_shift[1:]).max(), 1e-2
    )
    assert [c.strip() for c in lines[3].strip("|").split("|")][2:7] == ["-"] * 5
