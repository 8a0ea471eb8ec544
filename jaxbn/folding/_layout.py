"""Operations that only move values, and how they map the axes of their input."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from jaxbn.folding._program import Op

# One input, one output, the same values.
VARYING = ("pvary", "pcast")  # Marks a parameter as varying, inside `shard_map`.
IDENTITIES = ("name", "copy", "copy_p", "sharding_constraint", *VARYING)
Axes = tuple[int, ...]


def is_cast(op: Op) -> bool:
    """Whether it casts between floating dtypes of at least 16 bits.

    A cast to fewer bits is meant to round.
    """
    return op.name == "convert_element_type" and all(
        jnp.issubdtype(value.dtype, jnp.floating) and jnp.finfo(value.dtype).bits >= 16
        for value in (op.inputs[0], op.outputs[0])
    )


def rounds(op: Op) -> bool:
    """Whether a cast may change values."""
    old, new = (jnp.finfo(v.dtype) for v in (op.inputs[0], op.outputs[0]))
    return new.nmant < old.nmant or new.maxexp < old.maxexp


def is_layout(op: Op) -> bool:
    """Whether it only moves its input's values, and may repeat them."""
    if op.name == "reshape":
        return op.params.get("dimensions") is None and len(op.inputs) == 1
    names = ("transpose", "squeeze", "broadcast_in_dim", *IDENTITIES)
    return op.name in names and len(op.inputs) == 1


def grows(op: Op) -> bool:
    """Whether its output is larger than its input."""
    return op.outputs[0].size > op.inputs[0].size


def forward(op: Op, axes: Sequence[int]) -> Axes | None:
    """Where `axes` of the input are in the output, or None if one is missing."""
    found = [_map(op).get(axis) for axis in axes]
    return None if None in found else tuple(found)  # type: ignore


def backward(op: Op, axes: Sequence[int]) -> Axes | None:
    """Where `axes` of the output are in the input, or None if one is missing."""
    inverse = {b: a for a, b in _map(op).items()}
    found = [inverse.get(axis) for axis in axes]
    return None if None in found else tuple(found)  # type: ignore


def _map(op: Op) -> dict[int, int]:
    """Maps axes of the input to the same axes of the output."""
    before, after = op.inputs[0].shape, op.outputs[0].shape
    if op.name == "transpose":
        return {a: b for b, a in enumerate(op.params["permutation"])}
    if op.name == "squeeze":
        dropped = op.params["dimensions"]
        kept = [a for a in range(len(before)) if a not in dropped]
        return {a: b for b, a in enumerate(kept)}
    if op.name == "broadcast_in_dim":
        pairs = enumerate(op.params["broadcast_dimensions"])
        return {a: b for a, b in pairs if before[a] == after[b]}
    if op.name == "reshape":
        return _reshaped(before, after)
    return {a: a for a in range(len(before))}


def _reshaped(before: Sequence[int], after: Sequence[int]) -> dict[int, int]:
    """Maps axes of the same length with the same number of elements before them."""
    found: dict[int, int] = {}
    for a, n in enumerate(before):
        for b, m in enumerate(after):
            same = m == n and math.prod(before[:a]) == math.prod(after[:b])
            if same and b not in found.values():
                found[a] = b
                break
    return found
