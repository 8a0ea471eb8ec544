"""Everything that may differ between JAX versions."""

import jax
from jax import lax


def varying(array: jax.Array) -> frozenset[str]:
    """The `jax.shard_map` axes along which an array varies, according to its type."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def as_varying(array: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Marks the type of `array` as varying along these axes."""
    return lax.pcast(array, names, to="varying")


def bound_axes() -> tuple:
    """The names of the mapped axes in scope."""
    try:  # No public JAX function includes the axes of vmap.
        from jax._src.core import get_axis_env

        return tuple(get_axis_env().axis_names())
    except (ImportError, AttributeError):
        return tuple(jax.sharding.get_abstract_mesh().manual_axes)
