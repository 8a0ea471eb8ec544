"""One batch, computed at once or spread over eight devices in every way JAX has.

Every context makes the same function of the whole batch, `(x, scale, bias, weights) ->
(loss, (y, moments, running statistics))`, so that values and gradients of any order
can be compared with those of `whole`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from data import assert_close, numbers
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn

FORMS = ("vjp", "jvp")
ROWS, COUNT = 24, 8
CASES = [(form, shift) for form in FORMS for shift in (None, 0.7)]


def arguments(dtype="float64"):
    x = numbers((ROWS, 3), dtype)
    # Weights that differ between devices; device 2 has none, and NaN under the mask.
    w = np.random.default_rng(1).integers(0, 3, size=(ROWS, 1)).astype(np.float64)
    w[6:9] = 0
    x = x.at[7].set(jnp.nan)
    vectors = numbers(3, dtype, 5), numbers(3, dtype, 6)
    return x, *vectors, jnp.asarray(w, dtype)


def terms(x, scale, bias, w, form, shift, axis_name=None, groups=None):
    """A loss of each row and one of the moments, and what was computed on the way."""
    y, m = jaxbn.batch_norm(
        x,
        scale,
        bias,
        weights=w,
        shift=shift_of(shift),
        axis_name=axis_name,
        axis_index_groups=groups,
        derivatives=form,
    )
    stats = jaxbn.update(jaxbn.init_stats(3, dtype=x.dtype), m)
    y = jnp.where(w > 0, y, 0)
    return jnp.sin(y).sum(1), (m.mean**2 * m.var).sum(), (y, m, stats)


def shift_of(value):
    return None if value is None else jnp.full(3, value)


def whole(x, scale, bias, w, *, form, shift):
    rows, extra, out = terms(x, scale, bias, w, form, shift)
    return rows.sum() + extra, out


def part(x, scale, bias, w, **options):
    """The share of one device in the loss. (A mapped axis must have a length.)"""
    rows, extra, out = terms(x, scale, bias, w, **options)
    return (rows.sum() + extra / COUNT)[None], out


def over_shard_map(
    x, scale, bias, w, *, names="data", check_vma=True, f=part, **options
):
    mesh = mesh_of(8) if names == "data" else mesh_of(4, 2, names=names)
    rows, all_ = P(names), P()
    spread = jax.shard_map(
        partial(f, axis_name=names, **options),
        mesh=mesh,
        in_specs=(rows, all_, all_, rows),
        out_specs=(rows, (rows, all_, all_)),
        check_vma=check_vma,
    )
    losses, out = spread(x, scale, bias, w)
    return losses.sum(), out


def over_map(x, scale, bias, w, *, map_, **options):
    mapped = map_(
        partial(part, axis_name="data", **options),
        in_axes=(0, None, None, 0),
        axis_name="data",
    )
    losses, (y, m, stats) = mapped(in_parts(x), scale, bias, in_parts(w))
    m, stats = jax.tree.map(lambda a: a[0], (m, stats))
    return losses.sum(), (y.reshape(x.shape), m, stats)


def in_scan(x, scale, bias, w, **options):
    """The second of two steps; the first, of other rows, does not count."""

    def step(_, k):
        return None, part(x + k, scale, bias, w, **options)

    _, out = lax.scan(step, None, jnp.arange(2) - 1.0)
    return jax.tree.map(lambda a: a[1], out)


CONTEXTS = {
    "shard_map": over_shard_map,
    "shard_map unchecked": partial(over_shard_map, check_vma=False),
    "two names": partial(over_shard_map, names=("data", "fsdp")),
    "two names unchecked": partial(
        over_shard_map, names=("data", "fsdp"), check_vma=False
    ),
    "scan": partial(over_shard_map, f=in_scan),
    "checkpoint": partial(
        over_shard_map, f=lambda *a, **o: jax.checkpoint(partial(part, **o))(*a)
    ),
    "pmap": partial(over_map, map_=jax.pmap),
    "vmap": partial(over_map, map_=jax.vmap),
}


def in_parts(array):
    """The rows of each device."""
    return array.reshape(COUNT, -1, *array.shape[1:])


def mesh_of(*shape, names=("data",), kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def close(got, expected, tolerance=1e-10):
    near = partial(assert_close, rtol=tolerance, atol=tolerance)
    jax.tree.map(near, got, expected)


def derivatives(f):
    """Outputs, first derivatives, and the gradient of a function of these."""

    def penalty(*args):
        grads, out = jax.grad(f, (0, 1, 2), has_aux=True)(*args)
        return sum(jnp.sum(jnp.sin(g)) for g in grads), (grads, out)

    return jax.jit(jax.grad(penalty, (0, 1, 2), has_aux=True))
