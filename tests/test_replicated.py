"""`sync_stats` and `assert_replicated`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import assert_close, numbers, wide
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import layers


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def over_devices(f, *args, check_vma=True):
    """`f` of each device's rows, its result equal on all by its type."""
    return jax.jit(
        jax.shard_map(
            f, mesh=mesh(), in_specs=P("data"), out_specs=P(), check_vma=check_vma
        )
    )(*args)


def tracked(x, momentum=0.0):
    stats = jaxbn.init_stats(x.shape[-1])
    return jaxbn.update(stats, jaxbn.moments(x), momentum=momentum)


X = numbers((32, 3), "float32") + jnp.arange(32.0)[:, None]


@pytest.mark.parametrize("check_vma", [True, False])
def test_equal_parts_pool_to_the_moments_of_the_whole(check_vma):
    f = lambda x: jaxbn.sync_stats(tracked(x), "data")
    stats = over_devices(f, X, check_vma=check_vma)
    truth = oracle.moments(wide(X), (0,))
    assert_close(stats.mean, truth.mean[0], 1e-6)
    assert_close(stats.var, truth.var[0], 1e-5)
    assert stats.step == 1
    jaxbn.assert_replicated(stats)


@pytest.mark.parametrize("over", ["vmap", "pmap"])
def test_in_every_map(over):
    f = getattr(jax, over)(lambda x: jaxbn.sync_stats(tracked(x), "i"), axis_name="i")
    stats = jax.jit(f)(X.reshape(8, 4, 3))
    assert_close(stats.var, np.repeat(X.var(0)[None], 8, 0), 1e-5)
    jaxbn.assert_replicated(stats, stacked=True)


def test_over_two_axes():
    two = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    f = lambda x: jaxbn.sync_stats(tracked(x), ("a", "b"))
    spread = jax.shard_map(f, mesh=two, in_specs=P(("a", "b")), out_specs=P())
    assert_close(jax.jit(spread)(X).var, X.var(0), 1e-5)


def test_devices_without_updates_do_not_count():
    def f(x, w):
        stats = jaxbn.init_stats(3)
        m = jaxbn.moments(x, weights=w)
        return jaxbn.sync_stats(jaxbn.update(stats, m, momentum=0.0), "data")

    w = (np.arange(32) >= 8)[:, None]  # none on the first two devices
    stats = over_devices(f, X, w)
    assert_close(stats.mean, X[8:].mean(0), 1e-5)
    assert_close(stats.var, X[8:].var(0), 1e-5)
    none = over_devices(f, X, w & False)
    jax.tree.map(np.testing.assert_array_equal, none, jaxbn.init_stats(3))


@pytest.mark.parametrize("steps", [False, True])
def test_flax_batch_stats(steps):
    momentum = (lambda step: 0.0) if steps else 0.0
    net = nn.Sequential(
        [jaxbn.linen.BatchNorm(False, momentum=momentum) for _ in range(2)]
    )
    variables = net.init(jax.random.key(0), X)

    def f(x):
        _, new = net.apply(variables, x, mutable=["batch_stats"])
        return jaxbn.sync_stats(new, "data")

    new = over_devices(f, X)
    assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )
    assert_close(new["batch_stats"]["layers_0"]["var"], X.var(0), 1e-5)


def test_keeps_types_and_lists():
    stats = jaxbn.init_stats(3, dtype=jnp.bfloat16)
    synced = jax.vmap(
        lambda _: jaxbn.sync_stats([stats, {"a": stats}], "i"), axis_name="i"
    )(jnp.ones(2))
    assert synced[0].mean.dtype == jnp.bfloat16
    assert isinstance(synced[1]["a"], jaxbn.RunningStats)


def test_assert_replicated_names_the_leaf_and_the_devices():
    x = jnp.ones((8, 3)).at[3].set(2.0).at[5].set(0.0)
    f = lambda x: {"a": lax.pmean(x, "data"), "norm": tracked(x)}
    tree = over_devices(f, x, check_vma=False)
    jaxbn.assert_replicated(tree["a"])
    with pytest.raises(AssertionError) as error:
        jaxbn.assert_replicated(tree)
    assert "`tree['norm'].mean`" in str(error.value)
    assert "devices [3, 5] differ from 0" in str(error.value)
    with pytest.raises(ValueError, match="replicated"):
        over_devices(f, x)


def test_assert_replicated_of_stacked_arrays():
    x = jnp.zeros((8, 3)).at[6].set(jnp.nan)
    for stacked in (jax.pmap(lambda x: x)(x), x, np.asarray(x)):
        with pytest.raises(AssertionError, match=r"rows \[6\] differ from 0"):
            jaxbn.assert_replicated(stacked, stacked=True)
    jaxbn.assert_replicated(x * jnp.nan, stacked=True)  # NaN as NaN is the same


def test_assert_replicated_refuses_sharded_and_traced_arrays():
    sharded = jax.device_put(X, jax.sharding.NamedSharding(mesh(), P("data")))
    with pytest.raises(AssertionError, match="`tree` is sharded"):
        jaxbn.assert_replicated(sharded)
    with pytest.raises(TypeError, match="traced"):
        jax.jit(jaxbn.assert_replicated)(X)
    jaxbn.assert_replicated({"key": jax.random.key(0), "n": 3, "name": np.ones(2)})


def test_the_family_s_states_are_pooled():
    """Renorm's standard deviation as variances are; each domain by its own devices."""
    renorm = layers.RenormStats(jnp.zeros(1), jnp.ones(1), jnp.ones((), jnp.int32))
    stds = jnp.array([3.0, 4.0]).reshape(2, 1)
    means = jnp.array([1.0, -1.0]).reshape(2, 1)
    pool = lambda mean, std: jaxbn.sync_stats(renorm._replace(mean=mean, std=std), "i")
    got = jax.jit(jax.vmap(pool, axis_name="i"))(means, stds)
    assert isinstance(got, layers.RenormStats)
    assert_close(got.mean, np.zeros((2, 1)), atol=1e-6)
    assert_close(got.std, np.full((2, 1), (12.5 + 1) ** 0.5), 1e-6)

    _, state = layers.domain(num_domains=2).init(1)
    steps = jnp.array([[1, 0], [3, 2]])  # the first device has not seen domain 1
    values = jnp.array([[[1.0], [9.0]], [[3.0], [5.0]]])
    pool = lambda mean, step: jaxbn.sync_stats(
        state._replace(mean=mean, step=step), "i"
    )
    got = jax.jit(jax.vmap(pool, axis_name="i"))(values, steps)
    assert_close(got.mean[0, :, 0], [2.0, 5.0], 1e-6)
    np.testing.assert_array_equal(got.step[0], [3, 2])
