"""`axis_index_groups`: each group of devices has the statistics of its own rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from allpairspy import AllPairs
from data import assert_close, half_slow, numbers
from jax import lax
from jax.sharding import PartitionSpec as P
from spread import FORMS, arguments, close, derivatives, in_parts, mesh_of, terms

import jaxbn

EQUAL, UNEQUAL = ((0, 1, 2, 3), (4, 5, 6, 7)), ((0, 3), (1, 2, 4, 5, 6, 7))


def part(x, scale, bias, w, **options):
    rows, _, (y, m, _) = terms(x, scale, bias, w, **options)
    loss = rows.sum() + (m.mean**2 * m.var).sum() / m.count
    return loss[None], (y, m.mean[None])


def over_shard_map(x, scale, bias, w, *, check_vma=True, f=part, **options):
    rows, all_ = P("data"), P()
    losses, out = jax.shard_map(
        functools.partial(f, **options),
        mesh=mesh_of(8),
        in_specs=(rows, all_, all_, rows),
        out_specs=(rows, (rows, rows)),
        check_vma=check_vma,
    )(x, scale, bias, w)
    return losses.sum(), out


def over_map(x, scale, bias, w, *, map_, **options):
    mapped = map_(
        functools.partial(part, **options),
        in_axes=(0, None, None, 0),
        axis_name="data",
    )
    losses, out = mapped(in_parts(x), scale, bias, in_parts(w))
    return losses.sum(), jax.tree.map(lambda a: a.reshape(-1, 3), out)


def one_by_one(x, scale, bias, w, *, groups, form, shift):
    """Each group as a batch of its own, its loss counted as often as devices do."""
    loss, ys, means = 0, jnp.zeros_like(x), jnp.zeros((8, 3))
    for group in groups:
        rows = np.arange(len(x)).reshape(8, -1)[np.array(group)].ravel()
        own, _, (y, m, _) = terms(x[rows], scale, bias, w[rows], form, shift)
        loss += own.sum() + len(group) * (m.mean**2 * m.var).sum() / m.count
        ys = ys.at[rows].set(y)
        means = means.at[np.array(group)].set(m.mean)
    return loss, (ys, means)


def in_scan(x, scale, bias, w, **options):
    step = lambda _, x: (None, part(x, scale, bias, w, **options))
    return jax.tree.map(lambda a: a[0], lax.scan(step, None, x[None])[1])


def in_checkpoint(*args, **options):
    return jax.checkpoint(functools.partial(part, **options))(*args)


CONTEXTS = {
    "shard_map": over_shard_map,
    "shard_map unchecked": functools.partial(over_shard_map, check_vma=False),
    "scan": functools.partial(over_shard_map, f=in_scan),
    "checkpoint": functools.partial(over_shard_map, f=in_checkpoint),
    "pmap": functools.partial(over_map, map_=jax.pmap),
    "vmap": functools.partial(over_map, map_=jax.vmap),
}


@functools.cache
def truth(form, shift, groups):
    f = functools.partial(one_by_one, form=form, shift=shift, groups=groups)
    return derivatives(f)(*arguments())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("context", "form", "groups", "shift"),
    half_slow(AllPairs([list(CONTEXTS), FORMS, (EQUAL, UNEQUAL), (None, 0.7)])),
)
def test_groups_of_devices(context, form, groups, shift):
    f = functools.partial(
        CONTEXTS[context], axis_name="data", form=form, shift=shift, groups=groups
    )
    close(derivatives(f)(*arguments()), truth(form, shift, groups))


@pytest.mark.usefixtures("x64")
def test_groups_as_an_axis_of_the_mesh():
    args = arguments()
    rows, all_ = P(("group", "data")), P()
    f = jax.shard_map(
        functools.partial(part, axis_name="data", form="vjp", shift=None),
        mesh=mesh_of(2, 4, names=("group", "data")),
        in_specs=(rows, all_, all_, rows),
        out_specs=(rows, (rows, rows)),
    )
    got = derivatives(lambda *a: (f(*a)[0].sum(), f(*a)[1]))(*args)
    close(got, truth("vjp", None, EQUAL))


def test_groups_train_with_their_own_statistics():
    layer = jaxbn.layers.standard(axis_name="data", axis_index_groups=EQUAL)
    params, state = layer.init(3)

    def two_steps(x, state):
        state = jax.tree.map(lambda a: lax.pcast(a, "data", to="varying"), state)
        for _ in range(2):
            _, state = layer.apply(params, state, x, training=True)
        return jax.tree.map(lambda a: a[None], state)

    f = jax.shard_map(
        two_steps, mesh=mesh_of(8), in_specs=(P("data"), P()), out_specs=P("data")
    )
    x = numbers((16, 3), "float32")
    new = jax.jit(f)(x, state)
    half = 0.0199 * np.asarray(x).reshape(2, 8, 3).mean(1)
    assert_close(new.mean, np.repeat(half, 4, axis=0), 1e-4, 1e-6)
