"""What each layer of the family must hold, beyond its formula."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from data import assert_close, numbers, wide
from flax import nnx
from jax.sharding import PartitionSpec as P
from spread import mesh_of

import jaxbn
from jaxbn import layers


def steps(layer, batches, weights=None, **given):
    """The outputs and states of training on one batch after the other."""
    params, state = layer.init(batches[0].shape[-1])
    step = jax.jit(partial(layer.apply, training=True))
    out = []
    for i, x in enumerate(batches):
        y, state = step(params, state, x, weights=weights and weights[i], **given)
        out.append((y, state))
    return out


# Ghost


def test_one_group_is_batch_norm():
    x = numbers((8, 3), "float32")
    ghost, standard = layers.ghost(num_groups=1), layers.standard()
    got, expected = steps(ghost, [x, 2 * x]), steps(standard, [x, 2 * x])
    jax.tree.map(partial(assert_close, rtol=1e-5, atol=1e-6), got, expected)


@pytest.mark.parametrize("strided", [False, True])
def test_one_step_per_group(strided):
    x = numbers((6, 3), "float32")
    layer = layers.ghost(
        group_size=2,
        strided=strided,
        update_per_group=True,
        momentum=0.5,
        unbiased=True,
    )
    ((_, state),) = steps(layer, [x])
    expected = jaxbn.init_stats(3)
    for group in x.reshape(2, 3, 3).swapaxes(0, 1) if strided else x.reshape(3, 2, 3):
        m = jaxbn.moments(group)
        expected = jaxbn.update(expected, m, momentum=0.5, unbiased=True)
    jax.tree.map(partial(assert_close, rtol=1e-5), state, expected)
    assert state.step == 3


def test_pooled_statistics_are_those_of_the_batch():
    x = numbers((6, 3), "float32")
    ((_, state),) = steps(layers.ghost(group_size=2, momentum=0.0, unbiased=True), [x])
    assert_close(state.mean, wide(x).mean(0), 1e-5)
    assert_close(state.var, wide(x).var(0, ddof=1), 1e-5)


# Renorm


def test_r_1_and_d_0_are_batch_norm():
    x = numbers((8, 3), "float32")
    got = steps(layers.renorm(r_max=1, d_max=0), [x, 2 * x])
    expected = steps(layers.standard(), [x, 2 * x])
    for (y, _), (y_standard, _) in zip(got, expected, strict=True):
        assert_close(y, y_standard, 1e-5, 1e-6)
    assert set(got[0][1]._fields) == {"mean", "std", "step"}


@pytest.mark.parametrize("rows", [2, 8])
def test_unclipped_training_is_inference_before_the_update(rows):
    layer = layers.renorm(r_max=jnp.inf, d_max=jnp.inf, momentum=0.5)
    params, state = layer.init(3)
    for seed in range(4):
        x = numbers((rows, 5, 3), "float32", seed)
        before, _ = layer.apply(params, state, x, training=False)
        y, state = layer.apply(params, state, x, training=True)
        assert_close(y, before, 1e-4, 1e-4)


def test_limits_follow_schedules():
    r_max = optax.linear_schedule(1.0, 3.0, 2, 1)
    d_max = optax.linear_schedule(0.0, 5.0, 2, 1)
    x = numbers((8, 3), "float32", mean=7.0, std=9.0)
    layer = layers.renorm(r_max=r_max, d_max=d_max)
    params, state = layer.init(3)
    for step, limits in enumerate([(1, 0), (1, 0), (2, 2.5), (3, 5), (3, 5)]):
        assert state.step == step
        expected, _, _ = oracle.renorm(wide(x), *map(wide, state[:2]), limits)
        y, state = layer.apply(params, state, x, training=True)
        assert_close(y, expected, 1e-4, 1e-4)


def test_no_gradient_passes_r_and_d():
    """With r and d constant, a constant added to x cancels; through d it would not."""
    layer = layers.renorm(r_max=jnp.inf, d_max=jnp.inf)
    params, state = layer.init(3)
    x = numbers((8, 3), "float32")
    output = lambda t: jnp.sum(layer.apply(params, state, x + t, training=True)[0])
    assert_close(jax.grad(output)(0.0), 0.0, atol=1e-4)


# Streaming


@pytest.mark.parametrize("rows", [(1, 1, 1, 1), (1, 4, 2, 3)])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_no_start_up_error_at_any_step(rows, mean):
    batches = [
        numbers((n, 3), "float32", seed, mean, 1.0) for seed, n in enumerate(rows)
    ]
    weights = [np.ones((n, 1), np.float32) for n in rows]
    found = steps(layers.streaming(momentum=0.9), batches)
    for i, (y, state) in enumerate(found, 1):
        m = oracle.exponential(batches[:i], weights[:i], 0.9)
        assert_close(state.mean, m.mean[0], 1e-5, 1e-5)
        assert_close(state.var, m.var[0], 1e-3, 1e-5)
        expected = oracle.normalize(batches[i - 1], m.mean, m.var)
        assert_close(y, expected, 3e-2 if mean else 1e-3, 3e-2 if mean else 1e-3)


def test_cumulative_streaming_is_the_population():
    batches = [numbers((2, 3), "float32", seed) for seed in range(5)]
    _, state = steps(layers.streaming(momentum=jaxbn.cumulative()), batches)[-1]
    everything = np.concatenate([wide(b) for b in batches])
    assert_close(state.mean, everything.mean(0), 1e-5)
    assert_close(state.var, everything.var(0), 1e-5)


# Domain and conditional


def test_absent_domains_keep_their_state_bit_for_bit():
    layer = layers.domain(num_domains=3, momentum=jaxbn.debiased(0.9))
    params, state = layer.init(2)
    x, ids = numbers((4, 2), "float32"), jnp.array([0, 2, 2, 0])
    _, first = layer.apply(params, state, x, domain_ids=ids, training=True)
    _, second = layer.apply(params, first, 3 * x, domain_ids=1, training=True)
    np.testing.assert_array_equal(first.step, [1, 0, 1])
    np.testing.assert_array_equal(second.step, [1, 1, 1])
    kept = jax.tree.map(lambda a: a[jnp.array([0, 2])], (first, second))
    jax.tree.map(np.testing.assert_array_equal, *kept)


def test_a_domain_is_a_batch_norm_of_its_own():
    x, ids = numbers((6, 5, 2), "float32"), np.array([1, 0, 1, 1, 0, 0])
    layer = layers.domain(num_domains=2, momentum=0.5, unbiased=True)
    ((y, state),) = steps(layer, [x], domain_ids=ids)
    for k in (0, 1):
        own = layers.standard(momentum=0.5, unbiased=True)
        ((y_k, state_k),) = steps(own, [x[ids == k]])
        assert_close(y[ids == k], y_k, 1e-5, 1e-5)
        of_k = [leaf[k] for leaf in state]
        for got, expected in zip(of_k, state_k, strict=True):
            assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_ids_out_of_range_are_not_taken_for_others(training):
    x, ids = numbers((4, 2), "float32"), jnp.array([0, 1, 2, -1])
    for layer, given in [
        (layers.domain(num_domains=2), {"domain_ids": ids}),
        (layers.conditional(num_classes=2), {"condition": ids}),
    ]:
        params, state = layer.init(2)
        y, new = layer.apply(params, state, x, training=training, **given)
        np.testing.assert_array_equal(np.isnan(y).all(1), [False, False, True, True])
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


# Inference options


@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_example_weight_mixes_raw_moments(alpha, masked):
    """ "Four Things" averages E[x] and E[x²]."""
    layer = layers.standard(example_weight=alpha)
    params, state = layer.init(3)
    state = state._replace(mean=state.mean + 0.5, var=state.var * 2)
    x = numbers((4, 5, 3), "float32")
    w = np.arange(20).reshape(4, 5, 1) % 3 > 0 if masked else np.ones((4, 5, 1))
    y, kept = layer.apply(params, state, x, training=False, weights=w)
    assert kept is state
    own = oracle.moments(x, (1,), w)
    first = (1 - alpha) * 0.5 + alpha * own.mean
    second = (1 - alpha) * (2 + 0.25) + alpha * (own.var + own.mean**2)
    assert_close(y, oracle.normalize(x, first, second - first**2), 1e-4, 1e-4)


@pytest.mark.parametrize("option", ["example_weight", "pseudo_samples"])
@pytest.mark.parametrize("kind", ["layer", "linen", "nnx"])
def test_weights_of_features(option, kind):
    """An array is as its numbers, feature by feature."""
    values = {"example_weight": [0.0, 0.3, 1.0], "pseudo_samples": [0.0, 8.0, np.inf]}
    x = numbers((4, 5, 3), "float32", mean=2.0)

    def infer(value):
        if kind == "layer":
            layer = layers.standard(**{option: value})
            return layer.apply(*layer.init(3), x, training=False)[0]
        if kind == "linen":
            module = jaxbn.linen.BatchNorm(True, **{option: value})
            return module.apply(module.init(jax.random.key(0), x), x)
        module = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **{option: value})
        return module(x, use_running_average=True)

    own = values[option]
    y = infer(np.asarray(own, np.float32))
    for i, value in enumerate(own):
        assert_close(y[..., i], infer(value)[..., i], rtol=1e-5, atol=1e-5)
    assert_close(infer(jnp.asarray(own)), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("option", ["example_weight", "pseudo_samples"])
def test_traced_weights_have_gradients(option):
    """TTN learns them."""
    x, weight = numbers((4, 5, 3), "float32", mean=2.0), jnp.array([0.2, 0.5, 0.8])

    @jax.jit
    @jax.grad
    def slope(weight):
        layer = layers.standard(**{option: weight})
        return jnp.sum(layer.apply(*layer.init(3), x, training=False)[0] ** 2)

    def total(weight):
        layer = layers.standard(**{option: np.asarray(weight)})
        return jnp.sum(layer.apply(*layer.init(3), x, training=False)[0] ** 2)

    for i, found in enumerate(slope(weight)):
        step = np.eye(3)[i] * 1e-2
        difference = total(weight + step) - total(weight - step)
        assert_close(found, difference / 2e-2, rtol=2e-2, atol=1e-2)


def test_example_weight_1_over_m_is_the_expectation_of_the_batch():
    """Over batches of m of which one example is given: EvalNorm's premise."""
    rng, m = np.random.default_rng(0), 4
    own, others = rng.normal(2.0, 1.0, (5, 1)), rng.normal(0, 1, (200_000, m - 1, 5))
    batches = np.concatenate([np.broadcast_to(own.T[None], (200_000, 1, 5)), others], 1)
    expected = batches.mean((0, 1, 2)), (batches**2).mean((0, 1, 2))
    layer = layers.standard(example_weight=1 / m, epsilon=0.0)
    params, state = layer.init(1)
    y, _ = layer.apply(params, state, own[None].astype(np.float32), training=False)
    std = np.sqrt(expected[1] - expected[0] ** 2)
    assert_close(y[0], (own - expected[0]) / std, 2e-2, 2e-2)


def test_example_weight_0_changes_nothing():
    params, state = layers.standard().init(3)
    x = numbers((4, 5, 3), "float32")
    lowered = [
        jax.jit(partial(layer.apply, training=False)).lower(params, state, x).as_text()
        for layer in (layers.standard(), layers.standard(example_weight=0.0))
    ]
    assert lowered[0] == lowered[1]


@pytest.mark.parametrize("prior", [0.0, 16.0, np.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_pseudo_samples_count_examples(prior, masked):
    """Not positions: of the four examples here, one is masked."""
    layer = layers.standard(pseudo_samples=prior)
    params, state = layer.init(3)
    state = state._replace(mean=state.mean + 0.5, var=state.var * 2)
    x = numbers((4, 5, 3), "float32", mean=3.0)
    w = (np.arange(4) != (1 if masked else 4)).reshape(-1, 1, 1)
    y, kept = layer.apply(params, state, x, training=False, weights=w)
    assert kept is state
    batch, n = oracle.moments(x, (0, 1), w), 4 - masked
    share = 1.0 if np.isinf(prior) else prior / (prior + n)
    mean = share * 0.5 + (1 - share) * batch.mean
    var = share * 2 + (1 - share) * batch.var
    assert_close(y, oracle.normalize(x, mean, var), 1e-5, 1e-5)


@pytest.mark.parametrize("options", [{"pseudo_samples": n} for n in (0.0, 3.0)])
def test_gradients_pass_the_mix(x64, options):
    """And 64-bit batches are not rounded to statistics in float32."""
    layer = layers.standard(**options)
    params, state = layer.init(2)
    x = numbers((6, 3, 2), "float64")

    def loss(x):
        y, _ = layer.apply(params, state, x, training=False)
        return jnp.sum(jnp.sin(y) * jnp.arange(36.0).reshape(6, 3, 2))

    chex.assert_numerical_grads(loss, (x,), order=1, atol=1e-3, rtol=1e-3)
    jax.clear_caches()  # chex traces with another `stop_gradient`.
    x += 1e6
    n, m = options["pseudo_samples"], oracle.moments(x, (0, 1))
    share = n / (n + 6)
    mean, var = (1 - share) * m.mean, share + (1 - share) * m.var
    y, _ = layer.apply(params, state, x, training=False)
    assert_close(y, oracle.normalize(x, mean, var), 1e-9, 1e-9)


def test_pseudo_samples_of_a_batch_on_several_devices():
    layer = layers.standard(pseudo_samples=8.0, axis_name="data")
    alone = layers.standard(pseudo_samples=8.0)
    params, state = layer.init(3)
    x = numbers((16, 5, 3), "float32", mean=3.0)
    infer = lambda layer: lambda x: layer.apply(params, state, x, training=False)[0]
    spread = jax.shard_map(
        infer(layer), mesh=mesh_of(8), in_specs=P("data"), out_specs=P("data")
    )
    assert_close(jax.jit(spread)(x), infer(alone)(x), 1e-5, 1e-5)


@pytest.mark.parametrize(
    "options",
    [{"pseudo_samples": -1.0}, {"pseudo_samples": 1.0, "example_weight": 0.1}],
)
def test_mixtures_that_exclude_each_other(options):
    with pytest.raises(ValueError, match="`pseudo_samples` must be None or at least 0"):
        layers.standard(**options)


# Dtypes of the state


def test_renorm_with_narrow_statistics():
    """A std of 1000 is in float16's range, its square is not."""
    layer = layers.renorm(momentum=0.0, stats_dtype=jnp.float16)
    params, state = layer.init(1)
    x = jnp.array([[1000.0], [3000.0]])
    _, state = layer.apply(params, state, x, training=True)
    y, _ = layer.apply(params, state, x, training=False)
    assert_close(y, [[-1.0], [1.0]], 1e-3)


def test_streaming_and_example_weight_use_a_wide_state(x64):
    wide_state = {"stats_dtype": jnp.float64}
    layer = layers.standard(example_weight=0.01, **wide_state)
    params, state = layer.init(1)
    state = state._replace(mean=state.mean + 1e8 + 1)
    x = jnp.full((2, 1), 1e8, jnp.float32)
    y, _ = layer.apply(params, state, x, training=False)
    assert_close(y, np.full((2, 1), -0.99 / (0.99 + 0.0099) ** 0.5), 1e-4)
    layer = layers.streaming(stats_dtype=jnp.complex64)
    params, state = layer.init(1)
    with pytest.raises(TypeError, match=r"`state\.mean` is complex"):
        layer.apply(params, state, x, training=True)


def test_conditional_with_neither_scale_nor_bias_has_every_mode():
    layer = jaxbn.layers.conditional(num_classes=2, use_scale=False, use_bias=False)
    params, state = layer.init(3)
    x, ids = numbers((8, 3), "float32"), jnp.arange(8) % 2

    def f(x):
        return layer.apply(params, state, x, training=True, condition=ids)[0]

    plain = lambda x: jaxbn.batch_norm(x, derivatives="jvp")[0]
    expected = jax.jvp(plain, (x,), (jnp.sin(x),))
    assert_close(jax.jvp(f, (x,), (jnp.sin(x),)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tracks", ["std", "var"])
def test_renorm_after_its_warm_up(x64, tracks):
    """Batch norm for two steps, then renorm with its limits, against NumPy."""
    options = {"r_max": 1.1, "d_max": 0.2, "warm_up_steps": 2, "momentum": 0.9}
    layer = layers.renorm(tracks=tracks, stats_dtype="float64", **options)
    params, state = layer.init(3)
    apply = jax.jit(partial(layer.apply, training=True))
    mean, spread = np.zeros(3), np.ones(3)
    for step in range(4):
        x = numbers((6, 3), "float64", seed=step, mean=2.0)
        y, state = apply(params, state, x)
        std = np.sqrt(spread + 1e-5) if tracks == "var" else spread
        limits = (1.0, 0.0) if step < 2 else (1.1, 0.2)
        expected, m, _ = oracle.renorm(x, mean, std, limits)
        assert_close(y, expected, rtol=1e-10, atol=1e-10)
        new = m.var if tracks == "var" else np.sqrt(m.var + 1e-5)
        mean = 0.9 * mean + 0.1 * m.mean[0]
        spread = 0.9 * spread + 0.1 * new[0]
        assert_close(state.mean, mean, rtol=1e-10)
        assert_close(state[1], spread, rtol=1e-10)
        assert state.step == step + 1
    y, _ = layer.apply(params, state, x, training=False)
    std = np.sqrt(spread + 1e-5) if tracks == "var" else spread
    assert_close(y, (wide(x) - mean) / std, rtol=1e-10, atol=1e-10)
