"""Sums over devices: the one collective, sub-groups, and varying axes.

Whatever differs between JAX versions around `shard_map` and its types belongs here.
"""

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

AxisName = str | tuple[str, ...]
Groups = Sequence[Sequence[int]]


def require_bound(
    axis_name: AxisName | None, axis_index_groups: Groups | None = None
) -> None:
    """Refuses axis names that nothing binds, and groups that do not partition one."""
    size = axis_size(axis_name)
    if axis_index_groups is None:
        return
    if len(as_names(axis_name)) != 1:
        raise ValueError(
            f"`axis_index_groups` needs a single `axis_name`, got {axis_name!r}. Name "
            "one axis, or make the groups an axis of the mesh."
        )
    if sorted(i for group in axis_index_groups for i in group) != list(range(size)):
        raise ValueError(
            f"`axis_index_groups` is {axis_index_groups!r}, which does not partition "
            f"the {size} indices of axis {axis_name!r}. Name each of 0 to {size - 1} "
            "exactly once."
        )


def all_sum(
    sums: Sequence[jax.Array],
    axis_name: AxisName | None,
    axis_index_groups: Groups | None = None,
) -> list[jax.Array]:
    """Each array summed over the devices, those of one type by one real all-reduce."""
    if axis_name is None:
        return list(sums)
    # Arrays that differ along other axes too (sharded features) are summed apart from
    # those that do not (the count): stacked, the count would take on their type.
    kinds = [_varying(s) - frozenset(as_names(axis_name)) for s in sums]
    found: dict[int, jax.Array] = {}
    for kind in dict.fromkeys(kinds):
        own = [i for i, k in enumerate(kinds) if k == kind]
        total = _stacked_sum([sums[i] for i in own], axis_name, axis_index_groups)
        found |= dict(zip(own, total, strict=True))
    return [found[i] for i in range(len(sums))]


def gather(arrays: Sequence[jax.Array], axis_name: AxisName) -> list[jax.Array]:
    """Each array of every device, stacked along a new first axis; the same on all."""
    # Not lax.all_gather, whose result counts as varying under shard_map's check_vma.
    flat = _vary_over_all(_raveled(arrays), axis_name)
    index = lax.axis_index(as_names(axis_name))
    table = _table(flat, index, axis_size(axis_name), axis_name)
    return _unravel(table, arrays)


def axis_size(axis_name: AxisName | None) -> int:
    """The number of devices along the named axes."""
    return prod(_size(name) for name in as_names(axis_name))


def hashable(axis_name, axis_index_groups) -> tuple:
    """Both as tuples all the way down, to be compared while tracing."""
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    if axis_index_groups is not None:
        axis_index_groups = tuple(tuple(map(int, g)) for g in axis_index_groups)
    return axis_name, axis_index_groups


def vary_like(array: jax.Array, *like: jax.Array | None) -> jax.Array:
    """`array`, marked as varying over every axis that one of `like` varies over."""
    wanted = frozenset().union(*(_varying(a) for a in like if a is not None))
    missing = tuple(sorted(wanted - _varying(array)))
    return lax.pcast(array, missing, to="varying") if missing else array


def shard_like(array: jax.Array, operand: jax.Array) -> jax.Array:
    """`array` in the sharding of `operand`, where meshes are explicit: by its type."""
    wanted, own = jax.typeof(operand).sharding, jax.typeof(array).sharding
    if own.spec == wanted.spec:
        return array
    if wanted.mesh.empty:  # Of no mesh: the same on all devices of the array's.
        wanted = own.update(spec=P())
    return jax.sharding.reshard(array, wanted)


def split_axis(array: jax.Array, axis: int, sizes: tuple[int, int]) -> jax.Array:
    """`array` with one axis split in two, sharded along the first if it divides."""
    shape = array.shape[:axis] + sizes + array.shape[axis + 1 :]
    sharding = jax.typeof(array).sharding
    spec = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    if spec[axis] is None:
        return array.reshape(shape)
    shards = prod(sharding.mesh.shape[name] for name in as_names(spec[axis]))
    along = (spec[axis], None) if sizes[0] % shards == 0 else (None, None)
    spec[axis : axis + 1] = along
    return lax.reshape(array, shape, out_sharding=sharding.update(spec=P(*spec)))


def reshape_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """`array` in the shape of `like`, and in its sharding where meshes are explicit."""
    sharding = jax.typeof(like).sharding
    if not any(sharding.spec):
        return array.reshape(like.shape)
    return lax.reshape(array, like.shape, out_sharding=sharding)


def repeat_along(
    vector: jax.Array, place: int, like: jax.Array, axis: int
) -> jax.Array:
    """`vector` with a new axis, as long, and on explicit meshes sharded, as `like`'s.

    The vector's cotangent is then summed over the devices, and not gathered.
    """
    shape = (*vector.shape[:place], like.shape[axis], *vector.shape[place:])
    sharding, of_like = jax.typeof(vector).sharding, jax.typeof(like).sharding
    along = of_like.spec[axis] if of_like.spec else None
    spec = [*sharding.spec, *[None] * (vector.ndim - len(sharding.spec))]
    spec.insert(place, along)
    sharding = of_like.update(spec=P(*spec)) if along is not None else None
    return jnp.broadcast_to(
        jnp.expand_dims(vector, place), shape, out_sharding=sharding
    )


def whole_along_first(array: jax.Array) -> jax.Array:
    """`array`, its first axis not sharded, on explicit meshes: for a scan."""
    sharding = jax.typeof(array).sharding
    if not sharding.spec or sharding.spec[0] is None:
        return array
    spec = P(None, *sharding.spec[1:])
    return jax.sharding.reshard(array, sharding.update(spec=spec))


def take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]`; NaN where there is no such row (an index below 0 included)."""
    rows, features = jax.typeof(index).sharding, jax.typeof(table).sharding
    spec = *rows.spec, *features.spec[1:]
    sharding = rows.update(spec=P(*spec)) if any(spec) else None
    return table.at[index].get(
        mode="fill",
        fill_value=jnp.nan,
        wrap_negative_indices=False,
        out_sharding=sharding,
    )


def is_spread_further(
    x: jax.Array, weights: jax.Array | None, axis_name: AxisName | None
) -> bool:
    """Whether by its type `x` differs along axes that its weights are the same along.

    Axes that are summed over do not count.
    """
    if weights is None:
        return False
    return bool(_varying(x) - _varying(weights) - frozenset(as_names(axis_name)))


def require_same_on_all(name: str, array: jax.Array, axis_name: AxisName | None):
    """Refuses an array that, by its type, differs along the axes summed over."""
    differs = sorted(_varying(array) & frozenset(as_names(axis_name)))
    if differs:
        raise ValueError(
            f"`{name}` varies over the axes {differs}, which `axis_name` sums over. "
            "It must be the same on every device: pass a replicated array, or combine "
            f"it first, for example `lax.pmean({name}, {axis_name!r})`."
        )


def same_on_all(array: jax.Array, local: jax.Array, axis_name: AxisName | None) -> bool:
    """Whether `array` is known, by its type, to be the same along the axes.

    Types tell only where they say of `local`, which differs along them, that it does.
    """
    names = frozenset(as_names(axis_name))
    return names <= _varying(local) and not names & _varying(array)


def cotangent_like(
    operand: jax.Array, local: jax.Array, total: jax.Array, axis_name: AxisName | None
) -> jax.Array:
    """The cotangent of `operand`: its sum on this device, or `total` over `axis_name`.

    An operand that its type says is the same along an axis gets the sum over that axis.
    Where this is the sum over `axis_name`, `total` has it without another all-reduce
    (but not where the sums are over groups: then `total` differs along the axis).
    """
    missing = _varying(local) - _varying(operand)
    summed = frozenset(as_names(axis_name)) - _varying(total)
    if summed and summed <= missing:
        local, missing = total, missing - summed
    return lax.psum(local, tuple(sorted(missing))) if missing else local


def as_names(axis_name: AxisName | None) -> tuple[str, ...]:
    """One name or several, or None, as a tuple."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def _size(name: str) -> int:
    try:
        return lax.axis_size(name)
    except NameError as error:
        bound = ", ".join(map(repr, _bound())) or "no axis"
        raise NameError(
            f"`axis_name` has {name!r}, which is not bound here ({bound} is). Name an "
            "axis of the `jax.shard_map`, `jax.pmap` or `jax.vmap` around this call, "
            "or leave it out: under plain `jax.jit`, statistics of a sharded batch are "
            "global."
        ) from error


def _bound() -> tuple:
    """The names of the mapped axes around this call."""
    try:  # JAX has no public function that knows those of vmap too.
        from jax._src.core import get_axis_env

        return tuple(get_axis_env().axis_names())
    except (ImportError, AttributeError):
        return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _varying(array: jax.Array) -> frozenset:
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def _vary_over_all(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """`array`, marked as varying over all of the names if it is over one of them.

    A psum takes only what varies over all of its axes, or over none.
    """
    names, varying = frozenset(as_names(axis_name)), _varying(array)
    if not names & varying:
        return array
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    missing = tuple(sorted((names & manual) - varying))
    return lax.pcast(array, missing, to="varying") if missing else array


def _stacked_sum(sums, axis_name, axis_index_groups) -> list[jax.Array]:
    flat = _vary_over_all(_raveled(sums), axis_name)
    if axis_index_groups is None:
        flat = lax.psum(flat, axis_name)
    else:
        flat = _group_sum(flat, axis_name, axis_index_groups)
    return _unravel(flat, sums)


def _group_sum(flat: jax.Array, axis_name: AxisName, groups: Groups) -> jax.Array:
    # psum(axis_index_groups=...) exists neither under shard_map's check_vma nor under
    # vmap. A table with a row per group does, and so does its derivative.
    group_of = {index: g for g, group in enumerate(groups) for index in group}
    group_of = jnp.asarray([group_of[index] for index in range(len(group_of))])
    own = group_of[lax.axis_index(as_names(axis_name)[0])]
    return _table(flat, own, len(groups), axis_name)[own]


def _table(flat: jax.Array, row: jax.Array, rows: int, axis_name: AxisName):
    # Selected, not multiplied by 0 or 1: a NaN stays in its own row.
    own = jnp.expand_dims(jnp.arange(rows) == row, 1)
    return lax.psum(jnp.where(own, flat[None], 0), axis_name)


def _real_parts(array: jax.Array) -> tuple[jax.Array, ...]:
    return (array.real, array.imag) if jnp.iscomplexobj(array) else (array,)


def _raveled(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.ravel(part) for a in arrays for part in _real_parts(a)])


def _unravel(flat: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays that `_raveled` made the last axis of."""
    ends = np.cumsum([part.size for array in like for part in _real_parts(array)])
    pieces = iter(jnp.split(flat, ends[:-1], axis=-1))
    return [
        (
            lax.complex(next(pieces), next(pieces))
            if jnp.iscomplexobj(array)
            else next(pieces)
        ).reshape(flat.shape[:-1] + array.shape)
        for array in like
    ]
