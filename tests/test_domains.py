"""`layers.domain`: many domains, few, one; ids out of range; derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from data import assert_close, numbers, wide
from jax.sharding import PartitionSpec as P
from spread import mesh_of

from jaxbn import layers

EXAMPLES, FEATURES = 12, 3
COUNTS = [1, 4, 12, 13, 40, 100]  # rows of all domains, of examples; all moved, or few


def ids_of(domains, seed=0):
    return np.random.default_rng(seed).integers(0, domains, EXAMPLES)


def started(domains, seed=1, **options):
    """A layer with parameters and statistics at random, and its step, compiled."""
    layer = layers.domain(num_domains=domains, momentum=0.9, **options)
    params, state = layer.init(FEATURES)
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(rng.uniform(0.5, 1.5, p.shape).astype(p.dtype))
    params = {name: draw(p) for name, p in params.items()}
    state = state._replace(mean=draw(state.mean), var=draw(state.var))
    return layer, params, state


def step(layer, params, state, x, ids, w=None):
    apply = partial(layer.apply, training=True)
    return jax.jit(lambda p, s, x, i, w: apply(p, s, x, weights=w, domain_ids=i))(
        params, state, x, ids, w
    )


def expected(params, state, x, ids, w=None):
    """y, mean, var and step of the state by the formula."""
    ids = np.broadcast_to(ids, len(x))
    y, found = oracle.groups(wide(x), ids, w)
    shape = (len(x), *[1] * (x.ndim - 2), -1)
    own = {
        n: wide(p)[ids if p.ndim > 1 else None].reshape(shape if p.ndim > 1 else -1)
        for n, p in params.items()
    }
    mean, var, steps = (np.array(wide(v)) for v in state)
    for k, m in found.items():
        mean[k] = 0.9 * mean[k] + 0.1 * m.mean.ravel()
        var[k] = 0.9 * var[k] + 0.1 * m.var.ravel()
        steps[k] += 1
    return y * own.get("scale", 1) + own.get("bias", 0), mean, var, steps


def check(got, params, state, x, ids, w=None, tol=2e-5):
    y, new = got
    for a, b in zip((y, *new), expected(params, state, x, ids, w), strict=True):
        assert_close(wide(a), b, tol, tol)


@pytest.mark.parametrize("domains", COUNTS)
@pytest.mark.parametrize("positions", [(), (1,), (5,)])
def test_every_number_of_domains(domains, positions):
    x = numbers((EXAMPLES, *positions, FEATURES), "float32")
    layer, params, state = started(domains)
    ids = ids_of(domains)
    # What is alone in its domain is 0: its rounding error over the root of epsilon.
    tol = 2e-5 if x.ndim > 2 and x.shape[1] > 1 else 2e-4
    check(step(layer, params, state, x, ids), params, state, x, ids, tol=tol)


@pytest.mark.parametrize("domains", [1, 3, 40])
@pytest.mark.parametrize("shared", [False, True])
def test_one_id_for_all(domains, shared):
    x = numbers((EXAMPLES, 2, FEATURES), "float32")
    layer, params, state = started(domains, shared_affine=shared)
    which = np.int32(domains - 1)
    got = step(layer, params, state, x, which)
    check(got, params, state, x, which)
    each = step(layer, params, state, x, np.full(EXAMPLES, which))
    jax.tree.map(partial(assert_close, rtol=1e-5, atol=1e-6), got, each)
    ys = [
        layer.apply(params, state, x, training=False, domain_ids=i)[0]
        for i in (which, np.full(EXAMPLES, which))
    ]
    np.testing.assert_array_equal(*ys)


@pytest.mark.parametrize("domains", [4, 13, 100])
@pytest.mark.parametrize("positions", [(), (40,)])
def test_a_mean_of_1e4_deviations_in_float32(domains, positions):
    """Also where each domain has another mean, far from the others."""
    ids = ids_of(4)
    x = numbers((EXAMPLES, *positions, FEATURES), "float32", mean=1e3, std=0.1)
    x = x + 500 * jnp.asarray(ids, "float32").reshape(-1, *[1] * (x.ndim - 1))
    layer, params, state = started(domains, use_fast_variance=False)
    forward = jax.jit(partial(layer.forward, training=True))
    _, m = forward(params, state, x, domain_ids=ids)
    for k in np.unique(ids):
        own = oracle.moments(wide(x)[ids == k], tuple(range(x.ndim - 1)))
        assert_close(m.var[k], own.var.ravel(), 2e-6)
        assert_close(m.mean[k], own.mean.ravel(), 1e-7)


@pytest.mark.parametrize("domains", [4, 13, 100])
@pytest.mark.parametrize("fast", [True, False])
def test_ids_out_of_range_count_for_no_domain(domains, fast):
    x = numbers((EXAMPLES, 2, FEATURES), "float32").at[3].set(jnp.inf)
    layer, params, state = started(domains, use_fast_variance=fast)
    ids = ids_of(min(domains, 4))
    ids[3], ids[8], ids[9] = domains, -1, domains + 7
    out = np.isin(np.arange(EXAMPLES), (3, 8, 9))
    y, new = step(layer, params, state, x, ids)
    assert np.isnan(y[out]).all()
    y_kept, new_kept = step(layer, params, state, x[~out], ids[~out])
    assert_close(y[~out], y_kept, 1e-5, 1e-6)
    jax.tree.map(partial(assert_close, rtol=1e-5, atol=1e-6), new, new_kept)

    loss = lambda x: jnp.nansum(jnp.sin(step(layer, params, state, x, ids)[0]))
    gradient = jax.grad(loss)(x)
    assert np.isnan(gradient[out]).all()
    assert np.isfinite(gradient[~out]).all()
    for one in (-1, domains):
        y, new = step(layer, params, state, x, np.int32(one))
        assert np.isnan(y).all()
        jax.tree.map(np.testing.assert_array_equal, new, state)


@pytest.mark.parametrize("domains", [4, 40])
def test_a_domain_that_is_not_finite_leaves_the_others_alone(domains):
    ids = np.array([0, 1, 2] * 4)
    x = numbers((EXAMPLES, FEATURES), "float32").at[1, 0].set(jnp.inf)
    layer, params, state = started(domains)
    y, new = step(layer, params, state, x, ids)
    assert np.isfinite(y[ids != 1]).all()
    assert np.isfinite(new.mean[np.array([0, 2, 3])]).all()
    assert not np.isfinite(new.var[1, 0])


@pytest.mark.parametrize("domains", [4, 13, 100])
@pytest.mark.parametrize("kind", ["example", "position", "feature"])
def test_weights_of_every_kind(domains, kind):
    shape = {"example": (1, 1), "position": (5, 1), "feature": (5, FEATURES)}[kind]
    rng = np.random.default_rng(2)
    w = rng.integers(0, 3, (EXAMPLES, *shape)).astype(np.float32)
    x = numbers((EXAMPLES, 5, FEATURES), "float32")
    ids = ids_of(4)
    layer, params, state = started(domains)
    got = step(layer, params, state, x, ids, w)
    y, mean, var, _ = expected(params, state, x, ids, w)
    has = np.zeros(state.mean.shape, bool)
    for k in np.unique(ids):
        has[k] = np.broadcast_to(w, x.shape)[ids == k].sum((0, 1)) > 0
    own = np.broadcast_to(has[ids][:, None], x.shape)
    assert_close(np.where(own, got[0], 0), np.where(own, y, 0), 2e-5, 2e-5)
    assert_close(got[1].mean, np.where(has, mean, state.mean), 2e-5, 2e-5)
    assert_close(got[1].var, np.where(has, var, state.var), 2e-5, 2e-5)
    _, m = layer.forward(params, state, x, training=True, weights=w, domain_ids=ids)
    assert m.count.shape == ((domains, FEATURES) if kind == "feature" else (domains,))


@pytest.mark.parametrize("domains", [4, 40])
@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("each", [True, False])
def test_first_and_second_derivatives_in_every_mode(domains, positions, each, x64):
    layer, params, state = started(domains, param_dtype=jnp.float64)
    x = numbers((EXAMPLES, *positions, FEATURES), "float64")
    ids = ids_of(4) if each else np.int32(2)

    def loss(args):
        x, params = args
        apply = partial(layer.forward, training=True, domain_ids=ids)
        y, m = apply(params, state, x)
        return jnp.sum(jnp.sin(y)) + jnp.sum(m.mean**2 * m.var)

    at = x, params
    along = jax.tree.map(lambda a: numbers(a.shape, "float64", 7), at)
    move = lambda t: jax.tree.map(lambda a, b: a + t * b, at, along)
    dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
    slope = lambda t: dot(jax.grad(loss)(move(t)), along)
    value = lambda t: loss(move(t))
    h = 1e-5

    @jax.jit
    def found():
        first = slope(0.0), jax.jvp(value, (0.0,), (1.0,))[1]
        second = jax.grad(slope)(0.0), jax.jvp(slope, (0.0,), (1.0,))[1]
        steps = (value(h) - value(-h)) / (2 * h), (slope(h) - slope(-h)) / (2 * h)
        return first, second, steps

    first, second, steps = found()
    assert_close(np.stack(first), np.full(2, steps[0]), 2e-6)
    assert_close(np.stack(second), np.full(2, steps[1]), 2e-6)


def test_moments_of_parts_are_merged_and_moved_as_those_of_the_whole():
    import jaxbn

    layer, params, state = started(40)
    x, ids = numbers((EXAMPLES, FEATURES), "float32"), ids_of(40)

    def parts(x, ids):
        forward = partial(layer.forward, params, state, training=True)
        _, m = jax.vmap(lambda x, i: forward(x, domain_ids=i))(x, ids)
        return layer.update(state, jaxbn.merge_moments(m))

    got = jax.jit(parts)(x.reshape(3, 4, -1), ids.reshape(3, 4))
    _, *rest = expected(params, state, x, ids)
    for a, b in zip(got, rest, strict=True):
        assert_close(wide(a), b, 2e-5, 2e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_with_an_id_each(check_vma):
    layer, params, state = started(13, axis_name="data")
    x = numbers((16, 2, FEATURES), "float32")
    which = np.arange(8) % 3

    def part(params, state, x, one):
        given = {"training": True, "domain_ids": one[0]}
        return layer.apply(params, state, x, **given)

    rows, all_ = P("data"), P()
    f = jax.shard_map(
        part,
        mesh=mesh_of(8),
        in_specs=(all_, all_, rows, rows),
        out_specs=(rows, all_),
        check_vma=check_vma,
    )
    got = jax.jit(f)(params, state, x, which)
    check(got, params, state, x, which.repeat(2))
