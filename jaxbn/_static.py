"""Keywords of a call: what a function is compiled for, and what it is given."""

from typing import Any

import jax


class Static:
    """What a function is compiled for: values that are no arrays, and their places.

    Unlike tuples it tells 1 from True and from 1.0.
    """

    def __init__(self, values: list[Any], treedef: Any):
        self.values, self.treedef = values, treedef
        self.key = tuple((type(v), v) for v in values), treedef

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


TRACED = object()


def static_and_traced(call: dict[str, Any]) -> tuple[Static, list[Any]]:
    """Keywords apart: what a function is compiled for, and arrays that it is given."""
    leaves, treedef = jax.tree.flatten(call)
    kept = [leaf if is_static(leaf) else TRACED for leaf in leaves]
    return Static(kept, treedef), [v for v in leaves if not is_static(v)]


def together(static: Static, traced: list[Any]) -> dict[str, Any]:
    """The keywords again."""
    arrays = iter(traced)
    leaves = [next(arrays) if v is TRACED else v for v in static.values]
    return jax.tree.unflatten(static.treedef, leaves)


def is_static(value: Any) -> bool:
    """Whether a function can be compiled for a value."""
    try:
        hash(value)
    except TypeError:
        return False
    return not isinstance(value, jax.Array)
