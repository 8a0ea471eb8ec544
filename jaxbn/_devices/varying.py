"""The device axes along which an array varies, according to its type."""

import jax
from jax import lax

from jaxbn import _compat
from jaxbn._devices.names import AxisName, as_names


def vary_like(array: jax.Array, *like: jax.Array | None) -> jax.Array:
    """Marks `array` as varying over every axis that any of `like` varies over."""
    wanted = frozenset().union(*(_compat.varying(a) for a in like if a is not None))
    missing = tuple(sorted(wanted - _compat.varying(array)))
    return _compat.as_varying(array, missing) if missing else array


def is_spread_further(
    x: jax.Array, weights: jax.Array | None, axis_name: AxisName | None
) -> bool:
    """Whether, by its type, `x` varies along axes that its weights do not vary along.

    Axes that are summed over do not count.
    """
    if weights is None:
        return False
    return bool(
        _compat.varying(x) - _compat.varying(weights) - frozenset(as_names(axis_name))
    )


def require_same_on_all(name: str, array: jax.Array, axis_name: AxisName | None):
    """Raises for an array that, by its type, varies along the axes summed over."""
    differs = sorted(_compat.varying(array) & frozenset(as_names(axis_name)))
    if differs:
        raise ValueError(
            f"`{name}` varies over the axes {differs}, which `axis_name` sums over. "
            "It must be the same on every device: pass a replicated array, or combine "
            f"it first, for example `lax.pmean({name}, {axis_name!r})`."
        )


def same_on_all(array: jax.Array, local: jax.Array, axis_name: AxisName | None) -> bool:
    """Whether the type of `array` shows that it is the same along the axes.

    Types only show this if the type of `local`, which varies along them, says so.
    """
    names = frozenset(as_names(axis_name))
    return names <= _compat.varying(local) and not names & _compat.varying(array)


def cotangent_like(
    operand: jax.Array, local: jax.Array, total: jax.Array, axis_name: AxisName | None
) -> jax.Array:
    """The cotangent of `operand`: the `local` sum, or `total` over `axis_name`.

    If the type of an operand is the same along an axis, it gets the sum over that axis.
    Where this is the sum over `axis_name`, `total` saves another all-reduce (except for
    sums over groups, where `total` varies along the axis).
    """
    missing = _compat.varying(local) - _compat.varying(operand)
    summed = frozenset(as_names(axis_name)) - _compat.varying(total)
    if summed and summed <= missing:
        local, missing = total, missing - summed
    return lax.psum(local, tuple(sorted(missing))) if missing else local
