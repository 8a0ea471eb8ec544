"""Sums over devices, the only collective, optionally in groups."""

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
    """Sums each array over the devices, with one real all-reduce per type of array."""
    if axis_name is None:
        return list(sums)

    def total(packed):
        if axis_index_groups is None:
            return lax.psum(packed, axis_name)
        return _group_sum(packed, axis_name, axis_index_groups)

    return _by_type(total, sums, axis_name)


def gather(arrays: Sequence[jax.Array], axis_name: AxisName) -> list[jax.Array]:
    """Stacks each array of all devices along a new first axis; the same everywhere."""
    # Not lax.all_gather, whose result counts as varying under shard_map's check_vma.
    index = lax.axis_index(as_names(axis_name))
    rows = axis_size(axis_name)
    return _by_type(lambda a: _table(a, index, rows, axis_name), arrays, axis_name)


def any_feature(flags: jax.Array, features: jax.Array, like: jax.Array) -> jax.Array:
    """Whether a flag is set for any feature, on any device if features are split.

    Types show the split: `features` varies along the axes that features are split over;
    `like`, which belongs to all features, does not.
    """
    found = jnp.any(flags)
    names = tuple(
        sorted(
            _compat.varying(found) & _compat.varying(features) - _compat.varying(like)
        )
    )
    return lax.psum(found.astype(jnp.int32), names) > 0 if names else found


def _vary_over_all(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """Marks `array` as varying over all of the names if it varies over one of them.

    A psum only takes arrays that vary over all of its axes, or over none.
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
    """Applies `f` to each array, with one call for all arrays of one type, packed.

    `f` sums elementwise over `axis_name`, and may add leading axes.
    """
    # Arrays that vary along other axes too (sharded features) are packed separately
    # from the rest (the count): packed together, the count would take on their type.
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
    # psum(axis_index_groups=...) works neither under shard_map's check_vma nor under
    # vmap. A table with a row per group does, and so does its derivative.
    group_of = {index: g for g, group in enumerate(groups) for index in group}
    group_of = jnp.asarray([group_of[index] for index in range(len(group_of))])
    own = group_of[lax.axis_index(as_names(axis_name)[0])]
    return _table(flat, own, len(groups), axis_name)[own]


def _table(flat: jax.Array, row: jax.Array, rows: int, axis_name: AxisName):
    # Select instead of multiplying by 0 or 1, so a NaN stays in its own row.
    own = (jnp.arange(rows) == row).reshape(rows, *[1] * flat.ndim)
    return lax.psum(jnp.where(own, flat[None], 0), axis_name)


def _real_parts(array: jax.Array) -> tuple[jax.Array, ...]:
    return (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)


def _sharded_as(array: jax.Array) -> tuple | None:
    """Shape and spec of an array whose type is sharded; None for other arrays."""
    spec = jax.typeof(array).sharding.spec
    return (array.shape, spec) if any(spec) else None


def _packed(arrays: Sequence[jax.Array]) -> jax.Array:
    """Packs arrays of one kind: concatenated, or stacked if they are sharded."""
    parts = [part for array in arrays for part in _real_parts(array)]
    if _sharded_as(parts[0]):
        return jnp.stack(parts)
    return _compat.concatenate([jnp.ravel(part) for part in parts])


def _unpacked(packed: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """Undoes `_packed`, which made the last axes of `packed`."""
    parts = [part for array in like for part in _real_parts(array)]
    if _sharded_as(parts[0]):
        axis = packed.ndim - 1 - parts[0].ndim
        ends = range(1, len(parts) + 1)
        pieces = [jnp.squeeze(p, axis) for p in _compat.split(packed, ends, axis)]
    else:
        ends = [int(end) for end in np.cumsum([part.size for part in parts])]
        flat = _compat.split(packed, ends, packed.ndim - 1)
        lead = packed.shape[:-1]
        pieces = [
            p.reshape(lead + part.shape) for p, part in zip(flat, parts, strict=True)
        ]
    rest = iter(pieces)
    return [
        lax.complex(next(rest), next(rest)) if jnp.iscomplexobj(array) else next(rest)
        for array in like
    ]
