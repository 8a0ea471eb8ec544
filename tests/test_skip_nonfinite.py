"""`skip_nonfinite`: a bad batch leaves running statistics alone, by feature."""

import functools

import family
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from spread import mesh_of
from test_accumulate import NNX, PARTS, Linen, given
from test_family_devices import MAKERS, N, batch, started
from test_family_flax import FAMILY

import jaxbn

BAD = {"NaN": np.nan, "infinity": np.inf, "overflow": 3e38}
x_of = functools.partial(numbers, (8, 4, 3), "float32")


def spoiled(x, bad, feature=1, example=0):
    return x.at[example, ..., feature].set(bad)


def run(layer, params, state, x, **given):
    return family.compiled(layer).apply(params, state, x, training=True, **given)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", family.CASES)
def test_a_bad_feature_keeps_its_statistics(name, bad):
    case = family.CASES[name]
    layer, params, state = family.started(case, jnp.float32, skip_nonfinite=True)
    plain = case.make(momentum=0.9)
    more, x = family.inputs(case, jnp.float32), x_of()
    y, new = run(layer, params, state, spoiled(x, BAD[bad]), **more)
    wanted, good = run(plain, params, state, x, **more)
    ok = [0, 2]
    for a, before, b in zip(new[:2], state[:2], good[:2], strict=True):
        assert_close(a[..., ok], b[..., ok], rtol=1e-5)
        if name == "domain":  # Example 0 is of the first domain.
            np.testing.assert_array_equal(a[:2, 1], before[:2, 1])
            assert_close(a[2, 1], b[2, 1], rtol=1e-5)
        else:
            np.testing.assert_array_equal(a[..., 1], before[..., 1])
    np.testing.assert_array_equal(new.step, good.step)  # The others moved.
    assert not np.all(np.isfinite(y[..., 1]))
    assert_close(y[..., ok], wanted[..., ok], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", family.CASES)
def test_a_batch_without_a_good_feature_counts_no_step(name):
    case = family.CASES[name]
    layer, params, state = family.started(case, jnp.float32, skip_nonfinite=True)
    more = family.inputs(case, jnp.float32)
    _, new = run(layer, params, state, jnp.full((8, 4, 3), np.nan), **more)
    jax.tree.map(np.testing.assert_array_equal, tuple(new), tuple(state))


@pytest.mark.parametrize("name", family.CASES)
def test_without_the_option_nan_stays(name):
    case = family.CASES[name]
    layer, params, state = family.started(case, jnp.float32)
    more, x = family.inputs(case, jnp.float32), x_of()
    _, new = run(layer, params, state, spoiled(x, np.nan), **more)
    _, new = run(layer, params, new, x, **more)
    assert np.isnan(np.asarray(new[1])[..., 1]).any()


@pytest.mark.parametrize("name", family.CASES)
def test_what_a_mask_hides_is_not_bad(name):
    case = family.CASES[name]
    layer, params, state = family.started(case, jnp.float32, skip_nonfinite=True)
    more, x = family.inputs(case, jnp.float32), x_of()
    w = jnp.asarray(np.arange(8) != 3).reshape(8, 1, 1)
    _, new = run(layer, params, state, x.at[3].set(np.nan), weights=w, **more)
    plain = case.make(momentum=0.9)
    _, expected = run(plain, params, state, x, weights=w, **more)
    jax.tree.map(functools.partial(assert_close, rtol=1e-5), new, expected)


@pytest.mark.parametrize("name", family.CASES)
def test_the_moments_say_which_features_are_left_out(name):
    """So parts can be merged; a bad part does not spoil the good ones."""
    case = family.CASES[name]
    layer, params, state = family.started(case, jnp.float32, skip_nonfinite=True)
    layer = family.compiled(layer)
    more, x = family.inputs(case, jnp.float32), x_of()
    parts = []
    for rows in PARTS:
        own = {k: v[rows] for k, v in more.items()}
        part = x[rows] if rows.start else spoiled(x[rows], np.nan)
        parts.append(layer.forward(params, state, part, training=True, **own)[1])
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *parts)
    new = layer.update(state, jax.jit(jaxbn.merge_moments)(stacked))
    left_out = 1 if name == "domain" else 2  # The next example is of another domain.
    w = jnp.ones((8, 1, 3)).at[:left_out, :, 1].set(0)
    plain = family.compiled(case.make(momentum=0.9))
    _, m = plain.forward(params, state, x, training=True, weights=w, **more)
    expected = plain.update(state, m)
    for a, b in zip(new, expected, strict=True):
        assert_close(a, b, rtol=1e-4)


def test_groups_in_turn():
    layer = jaxbn.layers.ghost(
        group_size=2, update_per_group=True, momentum=0.5, skip_nonfinite=True
    )
    params, state = layer.init(1)
    x = jnp.array([[1.0], [3.0], [np.inf], [2.0], [4.0], [8.0]])
    _, new = run(layer, params, state, x)
    _, expected = run(layer, params, state, x[jnp.array([0, 1, 4, 5])])
    jax.tree.map(assert_close, new, expected)
    assert new.step == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_statistics(dtype):
    """float16 overflows: the usual reason for infinity in mixed precision."""
    layer = jaxbn.layers.standard(skip_nonfinite=True, stats_dtype=dtype)
    params, state = layer.init(2)
    state = state._replace(mean=state.mean + 0.3, step=state.step + 5)
    x = jnp.array([[1.0, np.inf], [2.0, 1.0]], dtype)
    _, new = run(layer, params, state, x)
    assert new.mean[1] == state.mean[1]
    assert new.var[1] == state.var[1]
    assert new.mean[0] != state.mean[0]
    assert new.mean.dtype == dtype


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"identity", "elu"}))
def test_over_devices(name, x64):
    """What one device has seen is bad on all of them."""
    x, w, given = batch(name)
    x = x.at[9, 1, 0].set(np.nan)
    layer, params, state = started(name, skip_nonfinite=True)

    def moved(layer, params, state, x, w, given):
        return layer.apply(params, state, x, training=True, weights=w, **given)[1]

    expected = jax.jit(functools.partial(moved, layer))(params, state, x, w, given)
    assert np.isfinite(np.asarray(expected[0])).all()
    split = started(name, skip_nonfinite=True, axis_name="data")[0]
    mapped = jax.shard_map(
        functools.partial(moved, split),
        mesh=mesh_of(8),
        in_specs=(P(), P(), P("data"), P("data"), P("data")),
        out_specs=P(),
    )
    close = functools.partial(assert_close, rtol=1e-10)
    got = jax.jit(mapped)(params, state, x, w, given)
    jax.tree.map(close, tuple(got), tuple(expected))
    place = NamedSharding(mesh_of(8), P("data"))
    x, w, given = jax.device_put((x, w, given), place)
    got = jax.jit(functools.partial(moved, layer))(params, state, x, w, given)
    jax.tree.map(close, tuple(got), tuple(expected))
    assert len(x) == N


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("make", [Linen, NNX])
def test_modules(make, name):
    module = make(name, skip_nonfinite=True)
    before = jax.tree.map(np.asarray, dict(module.stats()))
    module(spoiled(x_of(), np.nan), **given(name, slice(None)))
    for field, new in dict(module.stats()).items():
        old, new = np.asarray(before[field]), np.asarray(new)
        assert np.isfinite(new).all()
        if field != "step":
            rows = slice(0, 2) if name == "domain" else slice(None)
            np.testing.assert_array_equal(
                np.atleast_2d(new)[rows, 1], np.atleast_2d(old)[rows, 1]
            )
            assert not np.array_equal(new, old)


@pytest.mark.parametrize("make", [Linen, NNX])
def test_a_window_leaves_out_a_bad_micro_batch(make):
    x = x_of()
    module = make("standard", skip_nonfinite=True, accumulate=True)
    for rows in PARTS:
        bad = np.nan if rows.start == 2 else np.asarray(x[rows][0, :, 1])
        module(spoiled(x[rows], bad))
    whole = make("standard")
    whole(x, mask=jnp.ones((8, 1, 3)).at[2:4, :, 1].set(0))
    for field, value in dict(whole.stats()).items():
        assert_close(dict(module.stats())[field], value, rtol=1e-5)


def test_the_verb():
    stats = jaxbn.init_stats(3)
    m = jaxbn.Moments(jnp.array([1.0, np.nan, 2.0]), jnp.array([1, 1, np.inf]), 4.0)
    new = jaxbn.update(stats, m, momentum=0.5, skip_nonfinite=True)
    assert new.mean.tolist() == [0.5, 0.0, 0.0]
    assert new.var.tolist() == [1.0, 1.0, 1.0]
    assert new.step == 1
    complex_ = jaxbn.init_stats(1, dtype=jnp.complex64)
    own = jaxbn.Moments(jnp.array([1 + 1j * np.inf]), jnp.ones(1), jnp.array(4.0))
    assert jaxbn.update(complex_, own, skip_nonfinite=True).mean[0] == 0
    with pytest.raises(TypeError, match="`skip_nonfinite` must be True or False"):
        jaxbn.update(stats, m, skip_nonfinite="yes")
    with pytest.raises(TypeError, match="`skip_nonfinite` must be True or False"):
        jaxbn.layers.standard(skip_nonfinite=1)


def test_in_a_scan_with_loss_scaling():
    """The carry keeps its types, and one bad step of five leaves four."""
    layer = jaxbn.layers.standard(skip_nonfinite=True, momentum=jaxbn.cumulative())
    params, state = layer.init(1)
    xs = jnp.arange(40.0).reshape(5, 8, 1).at[2, 3].set(jnp.inf)
    step = lambda state, x: layer.apply(params, state, x, training=True)[::-1]
    state, _ = lax.scan(step, state, xs)
    good = xs[jnp.array([0, 1, 3, 4])]
    assert_close(state.mean, good.mean((0, 1)), rtol=1e-6)
    assert state.step == 4
