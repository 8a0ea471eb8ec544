"""What an array's type says of devices: along which axes it differs."""

import jax
from jax import lax

from jaxbn import _compat
from jaxbn._devices.names import AxisName, as_names


def vary_like(array: jax.Array, *like: jax.Array | None) -> jax.Array:
    """`array`, marked as varying over every axis that one of `like` varies over."""
    wanted = frozenset().union(*(_compat.varying(a) for a in like if a is not None))
    missing = tuple(sorted(wanted - _compat.varying(array)))
    return _compat.as_varying(array, missing) if missing else array


def is_spread_further(
    x: jax.Array, weights: jax.Array | None, axis_name: AxisName | None
) -> bool:
    """Whether by its type `x` differs along axes that its weights are the same along.

    Axes that are summed over do not count.
    """
    if weights is None:
        return False
    return bool(
        _compat.varying(x) - _compat.varying(weights) - frozenset(as_names(axis_name))
    )


def require_same_on_all(name: str, array: jax.Array, axis_name: AxisName | None):
    """Refuses an array that, by its type, differs along the axes summed over."""
    differs = sorted(_compat.varying(array) & frozenset(as_names(axis_name)))
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
    return names <= _compat.varying(local) and not names & _compat.varying(array)


def cotangent_like(
    operand: jax.Array, local: jax.Array, total: jax.Array, axis_name: AxisName | None
) -> jax.Array:
    """The cotangent of `operand`: its sum on this device, or `total` over `axis_name`.

    An operand that its type says is the same along an axis gets the sum over that axis.
    Where this is the sum over `axis_name`, `total` has it without another all-reduce
    (but not where the sums are over groups: then `total` differs along the axis).
    """
    missing = _compat.varying(local) - _compat.varying(operand)
    summed = frozenset(as_names(axis_name)) - _compat.varying(total)
    if summed and summed <= missing:
        local, missing = total, missing - summed
    return lax.psum(local, tuple(sorted(missing))) if missing else local
