"""The Flax modules with their batch spread over eight devices, in every context."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import assert_close, numbers
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from spread import in_parts, mesh_of

import jaxbn

ROWS, ALL = P("data"), P()


def linen(**options):
    """Parameters, statistics and a function of both, `-> (y, statistics)`."""
    layer = jaxbn.linen.BatchNorm(False, momentum=0.5, **options)
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((2, 3)))

    def apply(params, stats, x, mask):
        given = {"params": params, "batch_stats": stats}
        y, new = layer.apply(given, x, mask=mask, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return variables["params"], variables["batch_stats"], apply


def nnx_(**options):
    module = jaxbn.nnx.BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0), **options)
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)

    def apply(params, stats, x, mask):
        module = nnx.merge(graph, params, stats, copy=True)
        y = module(x, mask=mask)
        return y, nnx.state(module, nnx.BatchStat)

    return params, stats, apply


def batch():
    x = numbers((24, 3), "float32").at[7].set(jnp.nan)
    mask = np.random.default_rng(1).uniform(size=(24, 1)) < 0.6
    mask[6:9] = False  # the third device's rows, NaN among them
    return x, jnp.asarray(mask)


def loss(apply, params, stats, x, mask):
    y, stats = apply(params, stats, x, mask)
    return jnp.sum(jnp.sin(jnp.where(mask, y, 0))), stats


def over_shard_map(make, x, mask, check_vma, wrap=lambda f: f, names="data", two=False):
    params, stats, apply = make(axis_name=names)

    def inner(params, stats, x, mask):
        value, new = wrap(partial(loss, apply))(params, stats, x, mask)
        return lax.psum(value, names), new

    rows = P(names)
    f = jax.shard_map(
        inner,
        mesh=mesh_of(4, 2, names=("data", "more")) if two else mesh_of(8),
        in_specs=(ALL, ALL, rows, rows),
        out_specs=(ALL, ALL),
        check_vma=check_vma,
    )
    grad = jax.jit(jax.grad(f, (0, 2), has_aux=True))
    return grad(params, stats, x, mask)


def in_scan(f):
    def scanned(params, stats, x, mask):
        def step(stats, x):
            value, stats = f(params, stats, x, mask)
            return stats, value

        stats, values = lax.scan(step, stats, x[None])
        return values.sum(), stats

    return scanned


def over_map(make, x, mask, map_):
    params, stats, apply = make(axis_name="data")
    mapped = map_(
        jax.grad(partial(loss, apply), (0, 2), has_aux=True),
        in_axes=(None, None, 0, 0),
        axis_name="data",
    )
    args = params, stats, in_parts(x), in_parts(mask)
    (dparams, dx), new = jax.jit(mapped)(*args)
    jaxbn.assert_replicated(new, stacked=True)
    first = jax.tree.map(lambda a: a[0], new)
    return (jax.tree.map(lambda a: a.sum(0), dparams), dx.reshape(x.shape)), first


def under_jit(make, x, mask, kind):
    params, stats, apply = make()
    mesh = mesh_of(8, kind=kind)
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(partial(loss, apply), (0, 2), has_aux=True))(
            put(params, ALL), put(stats, ALL), put(x, ROWS), put(mask, ROWS)
        )


CONTEXTS = {
    "shard_map": partial(over_shard_map, check_vma=True),
    "shard_map unchecked": partial(over_shard_map, check_vma=False),
    "scan": partial(over_shard_map, check_vma=True, wrap=in_scan),
    "checkpoint": partial(over_shard_map, check_vma=True, wrap=jax.checkpoint),
    "two names": partial(
        over_shard_map, check_vma=True, names=("data", "more"), two=True
    ),
    "one axis of two": partial(over_shard_map, check_vma=True, two=True),
    "pmap": partial(over_map, map_=jax.pmap),
    "vmap": partial(over_map, map_=jax.vmap),
    "jit auto": partial(under_jit, kind=AxisType.Auto),
    "jit explicit": partial(under_jit, kind=AxisType.Explicit),
}


@pytest.mark.parametrize("make", [linen, nnx_])
@pytest.mark.parametrize("context", CONTEXTS)
def test_module(context, make):
    x, mask = batch()
    params, stats, apply = make()
    alone = jax.jit(jax.grad(partial(loss, apply), (0, 2), has_aux=True))
    got = CONTEXTS[context](make, x, mask)
    jax.tree.map(
        lambda a, b: assert_close(a, b, 1e-4, 1e-5), got, alone(params, stats, x, mask)
    )


@pytest.mark.parametrize("make", [linen, nnx_])
@pytest.mark.parametrize("context", ["shard_map unchecked", "pmap", "vmap"])
def test_module_with_groups(context, make):
    groups = [[0, 5], [1, 2, 3, 4, 6, 7]]
    x, mask = batch()
    own = [np.concatenate([3 * i + np.arange(3) for i in group]) for group in groups]
    params, stats, apply = make()
    y, alone = np.zeros(x.shape, np.float32), jax.jit(apply)
    for rows in own:
        y[rows] = alone(params, stats, x[rows], mask[rows])[0]

    params, stats, apply = make(axis_name="data", axis_index_groups=groups)
    if context == "shard_map unchecked":
        f = jax.shard_map(
            lambda x, mask: apply(params, stats, x, mask)[0],
            mesh=mesh_of(8),
            in_specs=(ROWS, ROWS),
            out_specs=ROWS,
            check_vma=False,
        )
        got = jax.jit(f)(x, mask)
    else:
        map_ = getattr(jax, context)
        f = map_(lambda x, mask: apply(params, stats, x, mask)[0], axis_name="data")
        got = jax.jit(f)(in_parts(x), in_parts(mask)).reshape(x.shape)
    present = np.asarray(mask)[:, 0]
    assert_close(got[present], y[present], 1e-4, 1e-5)
