"""Every difference between JAX versions, with the version that ends it."""

import jax
from jax import lax


def varying(array: jax.Array) -> frozenset[str]:
    """The axes of `jax.shard_map` that an array, by its type, differs along."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def as_varying(array: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """`array`, with a type that says that it differs along these axes."""
    return lax.pcast(array, names, to="varying")


def bound_axes() -> tuple:
    """The names of the mapped axes around this call."""
    try:  # JAX has no public function that knows those of vmap too.
        from jax._src.core import get_axis_env

        return tuple(get_axis_env().axis_names())
    except (ImportError, AttributeError):
        return tuple(jax.sharding.get_abstract_mesh().manual_axes)
