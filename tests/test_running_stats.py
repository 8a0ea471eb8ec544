"""`update`, `init_stats` and the momenta, against float64 recurrences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data import assert_close, numbers, wide
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn


def batches(steps, features=3, size=16):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        mean, std = rng.normal(size=features), rng.uniform(0.5, 2, size=features)
        yield jnp.asarray(mean + std * rng.normal(size=(size, features)), jnp.float32)


def run(momentum, steps, unbiased=False):
    """Statistics after `steps` updates, and every batch's mean and variance."""
    stats, seen = jaxbn.init_stats(3), []
    step = jax.jit(
        lambda s, x: jaxbn.update(
            s, jaxbn.moments(x), momentum=momentum, unbiased=unbiased
        )
    )
    for x in batches(steps):
        stats = step(stats, x)
        seen.append((wide(x).mean(0), wide(x).var(0, ddof=int(unbiased))))
    return stats, np.array(seen)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999, 1.0])
def test_exponential_average(momentum, unbiased):
    stats, seen = run(momentum, 50, unbiased)
    expected = np.array([np.zeros(3), np.ones(3)])
    for batch in seen:
        expected = momentum * expected + (1 - momentum) * batch
    assert_close(stats[:2], expected, 1e-5, 1e-6)
    assert stats.step == 50


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_debiased_is_a_weighted_mean_of_the_batches_alone(decay, steps):
    stats, seen = run(jaxbn.debiased(decay), steps)
    weight = decay ** np.arange(steps)[::-1]
    expected = np.tensordot(weight / weight.sum(), seen, 1)
    assert_close(stats[:2], expected, 1e-5, 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 300])
def test_cumulative_is_the_mean_of_the_batches(steps):
    stats, seen = run(jaxbn.cumulative(), steps)
    assert_close(stats[:2], seen.mean(0), 2e-5, 2e-6)


@pytest.mark.usefixtures("x64")
def test_schedules_are_as_exact_as_jax_is():
    for step in range(5):
        own = jaxbn.debiased(0.9)(jnp.int32(step)), jaxbn.cumulative()(jnp.int32(step))
        truth = 0.9 * (1 - 0.9**step) / (1 - 0.9 ** (step + 1)), step / (step + 1)
        assert_close(own, truth, 1e-14, 1e-300)


def test_debiased_momentum_near_one():
    # Computed as 1 − decay**t, float32 would give 0 / 0 here.
    weight = jaxbn.debiased(1 - 1e-9)(jnp.int32(1))
    assert_close(weight, 0.5, 1e-6)


def test_momenta_are_values():
    assert jaxbn.debiased(0.9) == jaxbn.debiased(0.9) != jaxbn.debiased(0.99)
    assert jaxbn.cumulative() == jaxbn.cumulative()
    assert len({jaxbn.debiased(0.9), jaxbn.debiased(0.9), jaxbn.cumulative()}) == 2
    with pytest.raises(AttributeError):
        jaxbn.debiased(0.9).decay = 0.5  # type: ignore


def test_momentum_as_optax_schedule_and_as_array():
    m = jaxbn.moments(numbers((8, 3), "float32"))
    stats = jaxbn.init_stats(3)._replace(step=jnp.int32(5))
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    by_schedule = jaxbn.update(stats, m, momentum=schedule)
    by_number = jaxbn.update(stats, m, momentum=0.5)
    assert_close(by_schedule.mean, by_number.mean, 1e-6)
    by_array = jaxbn.update(stats, m, momentum=jnp.array([0.0, 0.5, 1.0]))
    expected = [m.mean[0], by_number.mean[1], stats.mean[2]]
    assert_close(by_array.mean, expected, 1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 3, width=32), min_size=4, max_size=4))
def test_unbiased_with_float_weights(w):
    w = np.array(w, np.float32)
    x = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
    m = jaxbn.moments(x[:, None], weights=w[:, None])
    new = jaxbn.update(jaxbn.init_stats(1), m, momentum=0.0, unbiased=True)
    n, biased = float(m.count[0]), float(m.var[0])
    expected = 1.0 if n == 0 else biased * n / (n - 1) if n > 1 else biased
    assert_close(new.var[0], expected, 1e-4)


def test_features_without_weight_keep_their_values():
    x = numbers((4, 2), "float32")
    m = jaxbn.moments(x, weights=np.array([1.0, 0.0]))
    new = jaxbn.update(jaxbn.init_stats(2), m, momentum=0.0)
    assert_close(new.mean, [m.mean[0], 0], 1e-6)
    assert_close(new.var, [m.var[0], 1], 1e-6)
    assert new.step == 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_structure_and_dtypes_never_change(dtype):
    stats = jaxbn.init_stats((2, 3), dtype=dtype)
    x = numbers((4, 2, 3), dtype)
    m = jaxbn.moments(x, feature_axes=(1, 2))
    for momentum in (0.9, jnp.float32(0.9), jaxbn.debiased(0.9)):
        new = jaxbn.update(stats, m, momentum=momentum, unbiased=True)
        assert jax.tree.structure(new) == jax.tree.structure(stats)
        for a, b in zip(new, stats, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_float32_statistics_stay_so_with_float64_data(x64):
    stats = jaxbn.init_stats(3)
    step = lambda s, x: (jaxbn.update(s, jaxbn.moments(x)), None)
    new, _ = jax.lax.scan(step, stats, numbers((5, 4, 3), "float64"))
    assert new.mean.dtype == jnp.float32


def test_no_gradient_passes():
    def loss(x):
        _, m = jaxbn.batch_norm(x)
        new = jaxbn.update(jaxbn.init_stats(3), m)
        return jnp.sum(new.mean) + jnp.sum(new.var)

    np.testing.assert_array_equal(jax.grad(loss)(numbers((4, 3), "float32")), 0)


@pytest.mark.parametrize("momentum", [0.99, 0.9999])
def test_rounding_does_not_pile_up(momentum):
    stats = jaxbn.init_stats(1)._replace(mean=jnp.full(1, 1000.0))
    batch = jaxbn.Moments(jnp.full(1, 1000.0), jnp.ones(1), jnp.float32(8))
    step = lambda _, s: jaxbn.update(s, batch, momentum=momentum)
    stats = jax.jit(lambda s: jax.lax.fori_loop(0, 20_000, step, s))(stats)
    assert_close(stats.mean, 1000.0, 1e-6)


def test_momentum_is_data():
    m = jaxbn.moments(numbers((8, 3), "float32"))
    mean = lambda momentum: jaxbn.update(jaxbn.init_stats(3), m, momentum=momentum).mean
    assert jax.grad(lambda p: mean(p).sum())(0.9) == 0
