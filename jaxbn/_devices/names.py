"""Names of mapped axes, and groups of devices along one of them."""

import operator
from collections.abc import Sequence
from math import prod

from jax import lax

from jaxbn import _compat

AxisName = str | tuple[str, ...]
Groups = Sequence[Sequence[int]]


def require_bound(
    axis_name: AxisName | None, axis_index_groups: Groups | None = None
) -> None:
    """Raises for unbound axis names, and for groups that do not partition an axis."""
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


def axis_size(axis_name: AxisName | None) -> int:
    """The number of devices along the named axes."""
    return prod(_size(name) for name in as_names(axis_name))


def hashable(axis_name, axis_index_groups) -> tuple:
    """Converts both to tuples at every level, so they can be compared while tracing."""
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


def as_names(axis_name: AxisName | None) -> tuple[str, ...]:
    """Returns one name, several, or None as a tuple."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)


def _size(name: str) -> int:
    if name is None or isinstance(name, int):  # For JAX, integers are positions.
        raise TypeError(
            f"`axis_name` must be the name of a mapped axis, or a tuple of names, got "
            f"{name!r}. The axes to reduce are all but `feature_axes`."
        )
    try:
        return lax.axis_size(name)
    except NameError as error:
        bound = ", ".join(map(repr, _compat.bound_axes())) or "no axis"
        raise NameError(
            f"`axis_name` has {name!r}, which is not bound here ({bound} is). Name an "
            "axis of the `jax.shard_map`, `jax.pmap` or `jax.vmap` around this call, "
            "or leave it out: under plain `jax.jit`, statistics of a sharded batch are "
            "global."
        ) from error
