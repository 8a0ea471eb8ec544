"""Finds the layer that a normalization can be folded into, or why there is none."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from jaxbn.folding import _layout
from jaxbn.folding._markers import Normalization
from jaxbn.folding._product import Product, product
from jaxbn.folding._program import INPUTS, PARAMS, Op, Program, Value, is_marker

ADDED = "bias added"  # The name of folding's own addition of a bias.


class No(Exception):
    """The reason why a normalization cannot be folded."""


class Vector(NamedTuple):
    """A parameter that is added: its axes, matching the feature axes, and its sign."""

    value: Value
    axes: tuple[int, ...]
    negative: bool = False


@dataclasses.dataclass
class Match:
    """How to fold a normalization.

    `position` is "after" or "before" the layer, or "beside" it, as a branch that was
    added to it. `product` is the layer, and `axes` are the kernel axes that the vectors
    run along. `biases` are added between the two, `chain` has the other operations
    between them, and `out` is the value to replace; it has its features at `out_axes`.
    """

    position: str
    product: Product
    axes: tuple[int, ...]
    chain: list[Op]
    biases: list[Vector]
    out: Value
    out_axes: tuple[int, ...]


def match(norm: Normalization, program: Program, position: str) -> Match:
    """The layer before or after the normalization; raises `No`."""
    users = program.users()
    found = _after(norm, users) if position == "after" else _before(norm, users)
    require_own_kernel(found.product, users)
    require_range(found.product.kernel.dtype)
    vectors = [*norm.vectors, *(bias.value for bias in found.biases)]
    if not jnp.issubdtype(found.product.kernel.dtype, jnp.complexfloating) and any(
        v is not None and jnp.issubdtype(v.dtype, jnp.complexfloating) for v in vectors
    ):
        raise No("it is complex and the kernel is real")
    return found


def _after(norm: Normalization, users: dict) -> Match:
    """Walks up from the normalized value to the product that makes it."""
    value, axes = norm.x, norm.axes
    chain, biases = [], []
    while True:
        if len(users[value]) != 1:
            raise No("what it normalizes is used elsewhere too")
        op = value.op
        if op is None:
            raise No("it normalizes an input")
        found = product(op)
        if found is not None:
            break
        value, bias = _step_up(op, axes)
        if bias is not None:
            biases.append(bias)
        elif not _layout.is_cast(op):
            axes = _required(_layout.backward(op, axes))
            chain.insert(0, op)
    kernel_axes = found.kernel_axes_of_outputs(axes)
    if kernel_axes is None:
        raise No(f"its features are not outputs of the kernel of the {found.kind}")
    return Match("after", found, kernel_axes, chain, biases, norm.y, norm.axes)


def _step_up(op: Op, axes: tuple[int, ...]) -> tuple[Value, Vector | None]:
    """The input of `op`, and the bias that it adds, if any."""
    if _layout.is_cast(op) or (_layout.is_layout(op) and not _layout.grows(op)):
        return op.inputs[0], None
    bias = added(op, axes)
    if bias is not None:
        return bias
    raise No(f"it normalizes the output of {called(op)}")


def _before(norm: Normalization, users: dict) -> Match:
    """Walks down from the normalization to the product that uses it."""
    value, axes = norm.y, norm.axes
    while True:
        if len(users[value]) != 1:
            raise No("its output is used more than once")
        ((op, index),) = users[value]
        if op is None:
            raise No("its output is an output")
        found = product(op)
        if found is not None:
            break
        axes = _step_down(op, axes)
        value = op.outputs[0]
    if found.kernel_index == index:
        raise No(f"the {found.kind} after it has no kernel from `params`")
    why = found.why_not_before()
    if why:
        raise No(why)
    kernel_axes = found.kernel_axes_of_inputs(axes)
    if kernel_axes is None:
        raise No(f"its features are not inputs of the kernel of the {found.kind}")
    out_axes = found.axes_of_added()
    out, biases = _own_bias(op.outputs[0], out_axes, users)
    return Match("before", found, kernel_axes, [], biases, out, out_axes)


def _step_down(op: Op, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of the output of `op`, if it only moves its input."""
    if _layout.is_cast(op):
        return axes
    if _layout.is_layout(op) and not _layout.grows(op):
        return _required(_layout.forward(op, axes))
    raise No(f"its output goes into {called(op)}")


def _own_bias(
    out: Value, axes: tuple[int, ...], users: dict
) -> tuple[Value, list[Vector]]:
    """The bias added to `out`, to be merged with the new one, and the sum."""
    user = users[out][0][0]
    found = added(user, axes) if len(users[out]) == 1 and user is not None else None
    if user is None or found is None or found[0] is not out:
        return out, []
    return user.outputs[0], [found[1]]


def require_own_kernel(found: Product, users: dict) -> None:
    """Raises `No` unless the kernel is a parameter that nothing else uses."""
    value = found.kernel
    if value.of != PARAMS:
        raise No(f"the kernel of the {found.kind} is not from `params`")
    while True:
        if len(users[value]) != 1:
            raise No(f"the kernel of the {found.kind} is used elsewhere too")
        op = value.op
        if op is None or not (_layout.is_cast(op) or _layout.is_layout(op)):
            return
        value = op.inputs[0]


def require_range(dtype) -> None:
    """Raises `No` if the dtype may not hold the kernel times a factor."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise No("the kernel is not floating")
    bits = jnp.finfo(dtype).bits
    if bits < 16:
        raise No(f"the kernel has {bits} bits")


def _required(axes: tuple[int, ...] | None) -> tuple[int, ...]:
    if axes is None:
        raise No("a reshape mixes its features with other axes")
    return axes


def added(op: Op, axes: tuple[int, ...]) -> tuple[Value, Vector] | None:
    """The value that `op` adds a vector along `axes` to, and the vector, if it does."""
    if op.name == ADDED:
        own, to = op.params["axes"], op.inputs[0]
        found = Vector(op.inputs[1], tuple(own.index(a) for a in axes if a in own))
        return (to, found) if set(own) == set(axes) else None
    if op.name not in ("add", "sub"):
        return None
    to, other = op.inputs
    negative = op.name == "sub"
    if to.of != INPUTS and not negative:
        to, other = other, to
    if to.of != INPUTS or other.of == INPUTS or to.shape != op.outputs[0].shape:
        return None
    found = _vector(other, axes)
    return None if found is None else (to, found._replace(negative=negative))


def _vector(value: Value, axes: tuple[int, ...]) -> Vector | None:
    """`value` as a vector that varies along `axes` only, or None."""
    rest = [n for a, n in enumerate(value.shape) if a not in axes]
    if not value.shape or all(n == 1 for n in rest):
        return Vector(value, axes if value.shape else ())
    op = value.op
    if op is None or not (_layout.is_cast(op) or _layout.is_layout(op)):
        return None
    if not op.inputs[0].shape:
        return _vector(op.inputs[0], axes)
    inside = axes if _layout.is_cast(op) else _layout.backward(op, axes)
    return None if inside is None else _vector(op.inputs[0], inside)


def called(op: Op) -> str:
    """The name of an operation in a report."""
    name = op.params.get("name")
    inner = op.params.get("call_jaxpr")
    if name is None and inner is not None:
        name = getattr(inner, "jaxpr", inner).debug_info.func_name
    if isinstance(name, str) and is_marker(name):
        return "another normalization"
    return f"`{name}`" if isinstance(name, str) else f"`{op.name}`"
