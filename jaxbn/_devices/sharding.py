"""How arrays are sharded on meshes of explicit axes, where types say so."""

from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxbn._devices.names import as_names


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
