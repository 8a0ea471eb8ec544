"""Every layer with its batch spread over eight devices: as if it were on one."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import older
import pytest
from data import assert_close, numbers
from family import CASES
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from spread import in_parts, mesh_of
from test_collectives import over, reduced, struct

from jaxbn import layers

ROWS, ALL = P("data"), P()
N = 16  # two examples on each device
IDS = np.array([0, 2, 0, 2, 2, 0, 2, 0, 0, 0, 2, 2, 0, 2, 0, 2])
EXTRA = {
    "domain": {"domain_ids": IDS},
    "classes": {"condition": IDS},
    "embedding": {"condition": np.random.default_rng(3).normal(size=(N, 2))},
}
# Groups of one, two, four and all devices; of two layouts, and one step per group.
GHOSTS = {
    f"ghost {option} {value}{' strided' * strided}{' in turn' * in_turn}": partial(
        layers.ghost, **{option: value}, strided=strided, update_per_group=in_turn
    )
    for option, value, strided, in_turn in [
        ("group_size", 1, False, False),
        ("group_size", 2, False, True),
        ("group_size", 4, False, False),
        ("num_groups", 2, False, True),
        ("group_size", 16, False, False),
        ("num_groups", 2, True, True),
        ("num_groups", 4, True, False),
        ("num_groups", 8, True, True),
    ]
}
MAKERS = {n: c.make for n, c in CASES.items() if not n.startswith("ghost")} | GHOSTS


def batch(name):
    x = numbers((N, 3, 2), "float64").at[7].set(jnp.nan)
    w = np.random.default_rng(1).integers(1, 3, size=(N, 1, 1)).astype(np.float64)
    w[6:8], w[3] = 0, 0  # the fourth device has nothing, and NaN under the mask
    return (
        x,
        jnp.asarray(w),
        {k: jnp.asarray(v) for k, v in EXTRA.get(name, {}).items()},
    )


def started(name, **options):
    layer = MAKERS[name](momentum=0.9, **options)
    params, state = layer.init(2)
    params = jax.tree.map(
        lambda p: p + numbers(p.shape, "float64", 5, 0.0, 0.3), params
    )
    cast = lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a
    return layer, params, jax.tree.map(cast, state)


def loss(layer, params, state, x, w, given):
    y, new = layer.apply(params, state, x, training=True, weights=w, **given)
    return jnp.sum(jnp.sin(jnp.where(w > 0, y, 0))), (y, new)


@functools.cache
def whole(name):
    layer, params, state = started(name)
    f = jax.jit(jax.grad(partial(loss, layer), (0, 2), has_aux=True))
    return f(params, state, *batch(name))


def over_shard_map(name, check_vma):
    layer, params, state = started(name, axis_name="data")

    def part(*args):
        value, out = loss(layer, *args)
        return lax.psum(value, "data"), out

    f = jax.shard_map(
        part,
        mesh=mesh_of(8),
        in_specs=(ALL, ALL, ROWS, ROWS, ROWS),
        out_specs=(ALL, (ROWS, ALL)),
        check_vma=check_vma,
    )
    return jax.jit(jax.grad(f, (0, 2), has_aux=True))(params, state, *batch(name))


def over_vmap(name, map_=jax.vmap):
    layer, params, state = started(name, axis_name="data")
    x, w, given = batch(name)

    def total(params, x):
        args = in_parts(x), in_parts(w), jax.tree.map(in_parts, given)
        f = map_(partial(loss, layer), in_axes=(None, None, 0, 0, 0), axis_name="data")
        values, (y, new) = f(params, state, *args)
        return values.sum(), (y.reshape(x.shape), jax.tree.map(lambda a: a[0], new))

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))(params, x)


def under_jit(name, kind):
    layer, params, state = started(name)
    mesh = mesh_of(8, kind=kind)
    with jax.set_mesh(mesh):
        place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        put = lambda tree, spec: jax.tree.map(lambda a: place(a, spec), tree)
        args = put((params, state), ALL) + put(batch(name), ROWS)
        return jax.jit(jax.grad(partial(loss, layer), (0, 2), has_aux=True))(*args)


CONTEXTS = {
    "shard_map": partial(over_shard_map, check_vma=True),
    "unchecked": partial(over_shard_map, check_vma=False),
    "vmap": over_vmap,
    "pmap": partial(over_vmap, map_=jax.pmap),
    "auto": partial(under_jit, kind=AxisType.Auto),
    "explicit": partial(under_jit, kind=AxisType.Explicit),
}
QUICK = {"shard_map", "explicit"}  # the others are slow in sum, not in kind
PAIRS = [
    pytest.param(n, c, marks=() if c in QUICK else pytest.mark.slow)
    for n in MAKERS
    for c in CONTEXTS
]


@pytest.mark.parametrize(("name", "context"), PAIRS)
def test_is_as_on_one_device(name, context, x64):
    expected = whole(name)
    got = CONTEXTS[context](name)

    def close(a, b):
        a, b = np.asarray(a), np.asarray(b)
        hidden = np.isnan(b)  # what is normalized under the mask
        assert_close(np.where(hidden, 0, a), np.where(hidden, 0, b), 1e-9, 1e-9)

    jax.tree.map(close, got, expected)


@pytest.mark.optimized
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_groups_aligned_with_shards_need_no_collective_for_y(kind):
    """One for the state, one for the gradients of scale and bias."""
    layer = layers.ghost(group_size=4, use_fast_variance="running_mean")
    params, state = layer.init(4)
    mesh = mesh_of(8, kind=kind)

    def step(params, state, x, ct, *, which):
        f = lambda p, x: layer.apply(p, state, x, training=True)
        y, vjp, new = jax.vjp(f, params, x, has_aux=True)
        return {"y": y, "dx": vjp(ct)[1], "state": new, "dparams": vjp(ct)[0]}[which]

    def compiled(which):
        with jax.set_mesh(mesh):
            here = lambda a: struct(mesh, a.shape, ALL)
            args = jax.tree.map(here, (params, state._replace(step=state.mean)))
            state_ = args[1]._replace(
                step=jax.ShapeDtypeStruct(
                    (), jnp.int32, sharding=NamedSharding(mesh, ALL)
                )
            )
            x = struct(mesh, (64, 3, 4), ROWS)
            lowered = jax.jit(partial(step, which=which)).lower(args[0], state_, x, x)
            return lowered.compile().as_text()

    texts = {which: compiled(which) for which in ("y", "dx", "state", "dparams")}
    found = {k: len(reduced(t)) for k, t in texts.items()}
    if older.JAX < (0, 8):  # whose XLA does not combine all-reduces on a CPU
        found |= {k: min(found[k], 1) for k in ("state", "dparams")}
    assert found == {"y": 0, "dx": 0, "state": 1, "dparams": 1}
    for text in texts.values():
        assert "all-gather" not in text
        assert "all-to-all" not in text
        assert "collective-permute" not in text


@pytest.mark.optimized
def test_groups_within_devices_issue_one_all_reduce_for_the_state():
    layer = layers.ghost(group_size=2, axis_name="data")
    params, state = layer.init(4)
    f = jax.shard_map(
        lambda x: layer.apply(params, state, x, training=True),
        mesh=over(jax.devices()),
        in_specs=ROWS,
        out_specs=(ROWS, ALL),
    )
    lowered = jax.jit(f).lower(jnp.ones((32, 4)))
    assert lowered.as_text().count("stablehlo.all_reduce") == 1
