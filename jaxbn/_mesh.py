"""Sums over devices: the one collective, sub-groups, and varying axes.

Whatever differs between JAX versions around `shard_map` and its types belongs here.
"""

import operator
from collections.abc import Callable, Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
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
    _, groups = hashable(None, axis_index_groups)
    if len(as_names(axis_name)) != 1:
        raise ValueError(
            f"`axis_index_groups` needs a single `axis_name`, got {axis_name!r}. Name "
            "one axis, or make the groups an axis of the mesh."
        )
    if sorted(i for group in groups for i in group) != list(range(size)):
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


def axis_size(axis_name: AxisName | None) -> int:
    """The number of devices along the named axes."""
    return prod(_size(name) for name in as_names(axis_name))


def hashable(axis_name, axis_index_groups) -> tuple:
    """Both as tuples all the way down, to be compared while tracing."""
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    if axis_index_groups is not None:
        try:
            groups = (tuple(map(operator.index, g)) for g in axis_index_groups)
            axis_index_groups = tuple(groups)
        except TypeError:
            raise TypeError(
                "`axis_index_groups` must be lists of integers, one for each group, "
                f"got {axis_index_groups!r}."
            ) from None
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


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays of one shape, and scalars, as JAX's arithmetic lays them: along each axis
    as any one of them is sharded. Other functions refuse arrays that differ."""
    sharded = [s for a in arrays if any((s := jax.typeof(a).sharding).spec)]
    if not sharded or len({jnp.shape(a) for a in arrays} - {()}) > 1:
        return list(arrays)
    specs = zip(*(s.spec for s in sharded), strict=True)
    spec = P(*(next(filter(None, names), None) for names in specs))
    like = sharded[0].update(spec=spec)
    return [jax.sharding.reshard(a, like) if jnp.ndim(a) else a for a in arrays]


def where(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.where`, also of arrays that are sharded differently."""
    return jnp.where(*alike(condition, x, y))


def stack(*arrays: jax.Array) -> jax.Array:
    """`jnp.stack`, also of arrays that are sharded differently."""
    return jnp.stack(alike(*arrays))


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
    options = {
        "mode": "fill",
        "fill_value": jnp.nan,
        "wrap_negative_indices": False,
    }
    if not any(rows.spec):
        return table.at[index].get(**options)
    like = rows.update(spec=P(*rows.spec, *features.spec[1:]))
    if AxisType.Manual not in rows.mesh.axis_types:
        return table.at[index].get(**options, out_sharding=like)
    # JAX cannot say how a gather comes out beside manual axes: all rows, then a part.
    index = jax.sharding.reshard(index, rows.update(spec=P()))
    return jax.sharding.reshard(table.at[index].get(**options), like)


def is_spread_further(
    x: jax.Array, weights: jax.Array | None, axis_name: AxisName | None
) -> bool:
    """Whether by its type `x` differs along axes that its weights are the same along.

    Axes that are summed over do not count.
    """
    if weights is None:
        return False
    return bool(_varying(x) - _varying(weights) - frozenset(as_names(axis_name)))


def any_feature(flags: jax.Array, features: jax.Array, like: jax.Array) -> jax.Array:
    """Whether one is set for any feature; on other devices too, if these have others.

    By their types: `features` differ along the axes that they are split over, and
    `like`, which is of all features, does not.
    """
    found = jnp.any(flags)
    names = tuple(sorted(_varying(found) & _varying(features) - _varying(like)))
    return lax.psum(found.astype(jnp.int32), names) > 0 if names else found


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
    if name is None or isinstance(name, int):  # JAX takes integers for positions.
        raise TypeError(
            f"`axis_name` must be the name of a mapped axis, or a tuple of such, got "
            f"{name!r}. The axes to reduce are all but `feature_axes`."
        )
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
    kinds = [(_varying(a) - names, _sharded_as(a)) for a in arrays]
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
