"""Sharding of arrays on meshes with explicit axes, where it is part of the type."""

import functools
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxbn._devices.names import as_names


def shard_like(array: jax.Array, operand: jax.Array) -> jax.Array:
    """Reshards `array` like `operand`, on explicit meshes, according to its type."""
    wanted, own = jax.typeof(operand).sharding, jax.typeof(array).sharding
    if own.spec == wanted.spec:
        return array
    if wanted.mesh.empty:  # Without a mesh: replicated on the mesh of `array`.
        wanted = own.update(spec=P())
    return jax.sharding.reshard(array, wanted)


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """Shards arrays of one shape, and scalars, alike, as JAX's arithmetic does.

    Each axis is sharded as in the first array that shards it. Other functions raise if
    shardings differ.
    """
    sharded = [s for a in arrays if any((s := jax.typeof(a).sharding).spec)]
    if not sharded or len({jnp.shape(a) for a in arrays} - {()}) > 1:
        return list(arrays)
    specs = zip(*(s.spec for s in sharded), strict=True)
    spec = P(*(next(filter(None, names), None) for names in specs))
    like = sharded[0].update(spec=spec)
    return [jax.sharding.reshard(a, like) if jnp.ndim(a) else a for a in arrays]


def where(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """`jnp.where` that allows arrays with different shardings."""
    return jnp.where(*alike(condition, x, y))


def stack(*arrays: jax.Array) -> jax.Array:
    """`jnp.stack` that allows arrays with different shardings."""
    return jnp.stack(alike(*arrays))


def split_axis(array: jax.Array, axis: int, sizes: tuple[int, int]) -> jax.Array:
    """Splits one axis of `array` in two, sharded along the first part if divisible."""
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
    """Reshapes `array` to the shape of `like`, and its sharding on explicit meshes."""
    sharding = jax.typeof(like).sharding
    if not any(sharding.spec):
        return array.reshape(like.shape)
    return lax.reshape(array, like.shape, out_sharding=sharding)


def repeat_along(
    vector: jax.Array, place: int, like: jax.Array, axis: int
) -> jax.Array:
    """Repeats `vector` along a new axis, with the length and sharding of `like`'s axis.

    Sharding counts on explicit meshes: the vector's cotangent is then summed over the
    devices, not gathered.
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


def parts_along(array: jax.Array, axis: int) -> int:
    """In how many parts the type says that an axis is split, on explicit meshes."""
    sharding = jax.typeof(array).sharding
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = names if isinstance(names, tuple) else (names,)
    return prod(sharding.mesh.shape[name] for name in names if name is not None)


def whole_along_first(array: jax.Array) -> jax.Array:
    """Unshards the first axis of `array`, on explicit meshes, for a scan."""
    sharding = jax.typeof(array).sharding
    if not sharding.spec or sharding.spec[0] is None:
        return array
    spec = P(None, *sharding.spec[1:])
    return jax.sharding.reshard(array, sharding.update(spec=spec))


def take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]`; NaN where there is no such row (also for an index below 0)."""
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
    # JAX cannot infer a gather's sharding next to manual axes: take all rows first.
    index = jax.sharding.reshard(index, rows.update(spec=P()))
    return jax.sharding.reshard(table.at[index].get(**options), like)


def sum_rows(rows: jax.Array, index: jax.Array, count: int) -> jax.Array:
    """The transpose of `take_rows`: a table of `count` rows, row k the sum of those of
    `rows` whose index is k. Rows with any other index are in no sum.
    """

    def here(rows, index, names=()):
        table = jnp.zeros((count, *rows.shape[1:]), rows.dtype)
        options = {"mode": "drop", "wrap_negative_indices": False}
        table = table.at[index].add(rows, **options)
        return lax.psum(table, names) if names else table

    sharding = jax.typeof(rows).sharding
    along = jax.typeof(index).sharding.spec
    if not any((*sharding.spec, *along)):
        return here(rows, index)
    # JAX has no scatter of sharded rows.
    mesh = sharding.mesh if any(sharding.spec) else jax.typeof(index).sharding.mesh
    if AxisType.Manual in mesh.axis_types:
        whole = jax.sharding.reshard
        return here(whole(rows, P()), whole(index, P()))
    spec = [*sharding.spec, *[None] * (rows.ndim - len(sharding.spec))]
    spec[0] = spec[0] or next(iter(along), None)
    specs = P(*spec), P(spec[0])
    placed = map(jax.sharding.reshard, (rows, index), specs)
    names = as_names(spec[0])
    local = functools.partial(here, names=names)
    out = P(None, *spec[1:])
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(*placed)
