"""Splits a program into work done once, on parameters, and work for every input."""

import dataclasses
import itertools
from collections.abc import Container, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn.folding import _layout, _merge, _program, _rewrite
from jaxbn.folding._program import PARAMS, Op, Program, Value
from jaxbn.folding._structure import structure

# Parts of a parameter may depend on the input's length, so they are not computed once.
PARTS = ("slice", "dynamic_slice", "gather")


@dataclasses.dataclass(eq=False)
class Plan:
    """A folded program.

    `names` are its parameters, `ops` the operations for every input, and `order` the
    operations in the order of the trace.
    """

    program: Program
    order: list[Op]
    results: _rewrite.Results
    merged: list[_merge.Merged]
    paths: dict[Value, str]
    ops: list[Op]
    names: dict[str, Value]

    def parameters(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """The folded parameters, from the leaves of the original ones."""
        own = dict(zip(self.program.params, leaves, strict=True))
        made = jax.jit(self.derive)(leaves)
        return {name: own.get(v, made.get(name)) for name, v in self.names.items()}

    def derive(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """The folded parameters that are not leaves themselves."""
        values = {n: v for n, v in self.names.items() if v.op is not None}
        known = dict(zip(self.program.params, leaves, strict=True))
        roots = [v.op for v in values.values() if v.op is not None]
        _program.evaluate(_program.in_order(roots), known)
        return {name: known[value] for name, value in values.items()}

    def run(self, parameters: dict[str, Any], leaves: Sequence[Any]) -> list[Any]:
        """The outputs, from folded parameters and the leaves of the inputs."""
        known = {value: parameters[name] for name, value in self.names.items()}
        known.update(zip(self.program.inputs, leaves, strict=True))
        _program.evaluate(self.ops, known)
        return [known.get(v, v.constant) for v in self.program.outputs]

    def signature(self, leaves: Sequence[Any]) -> tuple:
        """Equal for two plans whose folded parameters are the same."""
        closed = jax.make_jaxpr(self.derive)(leaves)
        kinds = {n: (v.shape, str(v.dtype)) for n, v in self.names.items()}
        kept = {n: self.paths[v] for n, v in self.names.items() if v.op is None}
        return kinds, kept, structure(closed)


def plan(closed: Any, paths: Sequence[str]) -> Plan:
    """Folds a traced function whose first inputs are parameters at `paths`."""
    program = _program.program_of(closed, len(paths))
    order = list(program.ops)
    results = _rewrite.fold_all(program)
    merged = _merge.merge_all(program, results)
    late = _late(program)

    def once(value: Value) -> bool:
        if value.of != PARAMS or value in late:
            return False
        op = value.op
        # Layout operations on one parameter stay in the program, and the parameter
        # keeps its shape.
        return op is None or not _layout.is_layout(op)

    roots = [op for op in program.ops if _program.has_effects(op)]
    roots += [v.op for v in program.outputs if v.op is not None and not once(v)]
    ops = _program.in_order(roots, once)
    used = [v for op in ops for v in op.inputs] + program.outputs
    boundary = dict.fromkeys(v for v in used if once(v))
    own = dict(zip(program.params, paths, strict=True))
    return Plan(program, order, results, merged, own, ops, _names(list(boundary), own))


def _late(program: Program) -> set[Value]:
    """Values of parameters that are computed for every input.

    Broadcasts, which may be as large as the input (even with one example), parts,
    random numbers, whose keys must stay keys, and anything computed from these.
    """
    late: set[Value] = set()
    for op in program.ops:
        of_params = bool(op.outputs) and op.outputs[0].of == PARAMS
        if not of_params or op.name == _rewrite.KERNEL_AND_BIAS:
            continue
        same = op.inputs[0].shape == op.outputs[0].shape
        large = op.name == "broadcast_in_dim" and not same
        drawn = _program.is_random(op)
        if drawn:
            late.update(_seeds(op))
        if large or drawn or op.name in PARTS or any(v in late for v in op.inputs):
            late.update(op.outputs)
    return late


def _seeds(op: Op) -> Iterator[Value]:
    """The inputs of an operation that are keys or integers made from parameters."""
    for value in op.inputs:
        whole = not jnp.issubdtype(value.dtype, jnp.inexact)
        if whole and value.of == PARAMS and value.op is not None:
            yield value
            yield from _seeds(value.op)


def root(value: Value) -> Value | None:
    """The parameter that a value is made from, the first if there are several."""
    while value.op is not None:
        of_params = [v for v in value.op.inputs if v.of == PARAMS]
        if not of_params:
            return None
        value = of_params[0]
    return value if value.of == PARAMS else None


def path_of(value: Value, paths: dict[Value, str]) -> str:
    """The path of the parameter that a value comes from."""
    while value.op is not None and _layout.is_cast(value.op):
        value = value.op.inputs[0]
    op, own = value.op, root(value)
    path = "constant" if own is None else paths[own]
    if (
        op is not None
        and op.name == _rewrite.KERNEL_AND_BIAS
        and value is op.outputs[1]
    ):
        return "/".join([*path.split("/")[:-1], "bias"])
    return path


def distinct(name: str, others: Container[str]) -> str:
    """`name`, with a number if it is among the others."""
    if name not in others:
        return name
    numbers = (f"{name}_{count}" for count in itertools.count(1))
    return next(other for other in numbers if other not in others)


def _names(values: list[Value], paths: dict[Value, str]) -> dict[str, Value]:
    """A unique name for each value, in the order of the original parameters."""
    order: dict[Any, int] = {value: index for index, value in enumerate(paths)}
    names: dict[str, Value] = {}
    # Parameters keep their paths, so they come first.
    for value in sorted(values, key=lambda v: v.op is not None):
        names[distinct(path_of(value, paths), names)] = value
    return dict(sorted(names.items(), key=lambda item: order.get(root(item[1]), -1)))
