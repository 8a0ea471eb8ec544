"""Sums over devices: the one collective, also in groups."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxbn import _compat
from jaxbn._devices.names import AxisName, Groups, as_names, axis_size


def all_sum(
    sums: Sequence[jax.Array],
    axis_name: AxisName | None,
    axis_index_groups: Groups | None = None,
) -> list[jax.Array]:
    """Each array summed over the devices, those of one type by one real all-reduce."""
    if axis_name is None:
        return list(sums)

    def total(packed):
        if axis_index_groups is None:
            return lax.psum(packed, axis_name)
        return _group_sum(packed, axis_name, axis_index_groups)

    return _by_type(total, sums, axis_name)


def gather(arrays: Sequence[jax.Array], axis_name: AxisName) -> list[jax.Array]:
    """Each array of every device, stacked along a new first axis; the same on all."""
    # Not lax.all_gather, whose result counts as varying under shard_map's check_vma.
    index = lax.axis_index(as_names(axis_name))
    rows = axis_size(axis_name)
    return _by_type(lambda a: _table(a, index, rows, axis_name), arrays, axis_name)


def any_feature(flags: jax.Array, features: jax.Array, like: jax.Array) -> jax.Array:
    """Whether one is set for any feature; on other devices too, if these have others.

    By their types: `features` differ along the axes that they are split over, and
    `like`, which is of all features, does not.
    """
    found = jnp.any(flags)
    names = tuple(
        sorted(
            _compat.varying(found) & _compat.varying(features) - _compat.varying(like)
        )
    )
    return lax.psum(found.astype(jnp.int32), names) > 0 if names else found


def _vary_over_all(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """`array`, marked as varying over all of the names if it is over one of them.

    A psum takes only what varies over all of its axes, or over none.
    """
    names, varying = frozenset(as_names(axis_name)), _compat.varying(array)
    if not names & varying:
        return array
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    missing = tuple(sorted((names & manual) - varying))
    return _compat.as_varying(array, missing) if missing else array


def _by_type(
    f: Callable[[jax.Array], jax.Array],
    arrays: Sequence[jax.Array],
    axis_name: AxisName,
) -> list[jax.Array]:
    """`f` of each array, called once for all of one type, which it gets as one array.

    `f` sums elementwise over `axis_name`, and may add axes before the first.
    """
    # Arrays that differ along other axes too (sharded features) go apart from those
    # that do not (the count): packed together, the count would take on their type.
    names = frozenset(as_names(axis_name))
    kinds = [(_compat.varying(a) - names, _sharded_as(a)) for a in arrays]
    found: dict[int, jax.Array] = {}
    for kind in dict.fromkeys(kinds):
        own = [i for i, k in enumerate(kinds) if k == kind]
        parts = [arrays[i] for i in own]
        packed = f(_vary_over_all(_packed(parts), axis_name))
        found |= dict(zip(own, _unpacked(packed, parts), strict=True))
    return [found[i] for i in range(len(arrays))]


def _group_sum(flat: jax.Array, axis_name: AxisName, groups: Groups) -> jax.Array:
    # psum(axis_index_groups=...) exists neither under shard_map's check_vma nor under
    # vmap. A table with a row per group does, and so does its derivative.
    group_of = {index: g for g, group in enumerate(groups) for index in group}
    group_of = jnp.asarray([group_of[index] for index in range(len(group_of))])
    own = group_of[lax.axis_index(as_names(axis_name)[0])]
    return _table(flat, own, len(groups), axis_name)[own]


def _table(flat: jax.Array, row: jax.Array, rows: int, axis_name: AxisName):
    # Selected, not multiplied by 0 or 1: a NaN stays in its own row.
    own = (jnp.arange(rows) == row).reshape(rows, *[1] * flat.ndim)
    return lax.psum(jnp.where(own, flat[None], 0), axis_name)


def _real_parts(array: jax.Array) -> tuple[jax.Array, ...]:
    return (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)


def _sharded_as(array: jax.Array) -> tuple | None:
    """Shape and spec of an array that its type says is sharded, of others None."""
    spec = jax.typeof(array).sharding.spec
    return (array.shape, spec) if any(spec) else None


def _packed(arrays: Sequence[jax.Array]) -> jax.Array:
    """The numbers of arrays of one kind: end to end, or, if sharded, stacked."""
    parts = [part for array in arrays for part in _real_parts(array)]
    if _sharded_as(parts[0]):
        return jnp.stack(parts)
    return jnp.concatenate([jnp.ravel(part) for part in parts])


def _unpacked(packed: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays that `_packed` made the last axes of."""
    parts = [part for array in like for part in _real_parts(array)]
    if _sharded_as(parts[0]):
        axis = packed.ndim - 1 - parts[0].ndim
        pieces = [jnp.squeeze(p, axis) for p in jnp.split(packed, len(parts), axis)]
    else:
        ends = np.cumsum([part.size for part in parts])
        flat = jnp.split(packed, ends[:-1], axis=-1)
        lead = packed.shape[:-1]
        pieces = [
            p.reshape(lead + part.shape) for p, part in zip(flat, parts, strict=True)
        ]
    rest = iter(pieces)
    return [
        lax.complex(next(rest), next(rest)) if jnp.iscomplexobj(array) else next(rest)
        for array in like
    ]
