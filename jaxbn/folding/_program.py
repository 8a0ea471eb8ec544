"""A traced function as a flat list of operations that can be rewritten."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core
from jax.extend.core import primitives

from jaxbn import _compat, _normalize

CONSTANT, PARAMS, INPUTS = range(3)  # What a value depends on.


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program."""

    shape: tuple[int, ...]
    dtype: Any
    of: int
    op: "Op | None" = None
    constant: Any = None

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size


@dataclasses.dataclass(eq=False)
class Op:
    """One operation: `run` takes the inputs and returns the list of outputs.

    `eqn` is the equation in the traced program; operations that folding adds have none,
    and keep their details in `params`.
    """

    name: str
    inputs: list[Value]
    run: Callable[..., Sequence[Any]]
    outputs: list[Value] = dataclasses.field(default_factory=list)
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    eqn: Any = None


@dataclasses.dataclass(eq=False)
class Program:
    """`ops` in an order in which they can run."""

    params: list[Value]
    inputs: list[Value]
    outputs: list[Value]
    ops: list[Op]

    def drop_unneeded(self) -> None:
        """Drops the operations that no output needs."""
        kept = set(in_order(self._roots()))
        self.ops = [op for op in self.ops if op in kept]

    def reorder(self) -> None:
        """Collects the operations that outputs now need, in an order that can run."""
        self.ops = in_order(self._roots())

    def _roots(self) -> list[Op]:
        roots = [op for op in self.ops if has_effects(op)]
        return roots + [v.op for v in self.outputs if v.op is not None]

    def users(self) -> dict[Value, list[tuple[Op | None, int]]]:
        """Where each value is used: an operation, or None for an output."""
        found: dict[Value, list[tuple[Op | None, int]]] = {}
        for op in self.ops:
            for index, value in enumerate(op.inputs):
                found.setdefault(value, []).append((op, index))
        for index, value in enumerate(self.outputs):
            found.setdefault(value, []).append((None, index))
        return found

    def replace(self, old: Value, new: Value) -> None:
        """Replaces every use of `old` with `new`."""
        for op in self.ops:
            op.inputs = [new if v is old else v for v in op.inputs]
        self.outputs = [new if v is old else v for v in self.outputs]


def in_order(roots: Sequence[Op], stop: Callable[[Value], bool] | None = None) -> list:
    """The operations that `roots` need, each after the operations that it needs.

    Operations that only make values at which to `stop` are left out.
    """
    order: dict[Op, None] = {}
    stack = [(op, False) for op in reversed(roots)]
    while stack:
        op, complete = stack.pop()
        if op in order:
            continue
        if complete:
            order[op] = None
            continue
        stack.append((op, True))
        for value in reversed(op.inputs):
            if value.op is not None and not (stop and stop(value)):
                stack.append((value.op, False))
    return list(order)


def program_of(closed: Any, params: int) -> Program:
    """The program of a traced function, whose first `params` inputs are parameters."""
    jaxpr = closed.jaxpr
    arguments = [
        Value(v.aval.shape, v.aval.dtype, PARAMS if i < params else INPUTS)
        for i, v in enumerate(jaxpr.invars)
    ]
    ops: list[Op] = []
    outputs = _inline(jaxpr, closed.consts, arguments, ops)
    program = Program(arguments[:params], arguments[params:], outputs, ops)
    program.drop_unneeded()
    return program


def inner_program(op: Op) -> Program:
    """The program of the function that a marker calls."""
    closed = op.params["jaxpr"]
    return program_of(closed, len(closed.jaxpr.invars))


def only_operation(op: Op) -> str:
    """The name of an operation, or of the only one in a function with its own rule."""
    if op.name != "custom_jvp_call":
        return op.name
    inside = op.params["call_jaxpr"].jaxpr.eqns
    return inside[0].primitive.name if len(inside) == 1 else op.name


def make(
    name: str,
    inputs: Sequence[Value],
    like: Sequence[Any],
    run: Callable,
    params: dict[str, Any],
) -> Op:
    """An operation; `like` are its outputs' shapes and dtypes."""
    op = Op(name, list(inputs), run, params=params)
    of = max((value.of for value in inputs), default=CONSTANT)
    op.outputs = [Value(tuple(a.shape), a.dtype, of, op) for a in like]
    return op


def derived(name: str, function: Callable, inputs: Sequence[Value], **params) -> Op:
    """An operation from a function that returns a tuple of arrays."""
    structs = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in inputs]
    return make(name, inputs, jax.eval_shape(function, *structs), function, params)


def again(op: Op, value: Value) -> Op:
    """The same operation applied to another array of the same shape."""
    like = jax.ShapeDtypeStruct(op.outputs[0].shape, value.dtype)
    new = make(op.name, [value], [like], op.run, op.params)
    new.eqn = op.eqn
    return new


def is_marker(name: str) -> bool:
    """Whether a call of this name is `jaxbn.normalize`."""
    return _normalize.operands_of(name) is not None


def evaluate(ops: Sequence[Op], known: dict[Value, Any]) -> dict[Value, Any]:
    """Runs operations on the known arrays, and adds their outputs."""

    def read(value: Value):
        return known.get(value, value.constant)

    for op in ops:
        results = op.run(*map(read, op.inputs))
        known.update(zip(op.outputs, results, strict=True))
    return known


def markers_inside(op: Op) -> Iterator[Value | None]:
    """Yields the outer value of the mean of each marker inside loops and branches."""
    for jaxpr in _compat.jaxprs_in(op.params):
        names = dict(zip(reversed(jaxpr.invars), reversed(op.inputs), strict=False))
        yield from _markers(jaxpr, names)


def _markers(jaxpr: Any, names: dict) -> Iterator[Value | None]:
    for eqn in jaxpr.eqns:
        variables = [None if isinstance(v, core.Literal) else v for v in eqn.invars]
        values = [names.get(v) for v in variables]
        if eqn.primitive is primitives.jit_p and is_marker(eqn.params["name"]):
            yield values[1]
            continue
        for inner in _compat.jaxprs_in(eqn.params):
            pairs = zip(reversed(inner.invars), reversed(values), strict=False)
            yield from _markers(inner, dict(pairs))


def is_random(op: Op) -> bool:
    """Whether it makes random numbers or keys, perhaps in a loop."""
    return _is_random(op.name, op.params)


def _is_random(name: str, params: dict) -> bool:
    return name.startswith(("random_", "threefry", "rng_")) or any(
        _is_random(eqn.primitive.name, eqn.params)
        for jaxpr in _compat.jaxprs_in(params)
        for eqn in jaxpr.eqns
    )


def _inline(
    jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Value], ops: list[Op]
) -> list[Value]:
    """Appends the operations of `jaxpr` and of its calls; returns its outputs."""
    known = dict(zip(jaxpr.invars, arguments, strict=True))
    for variable, constant in zip(jaxpr.constvars, constants, strict=True):
        aval: Any = variable.aval
        known[variable] = Value(aval.shape, aval.dtype, CONSTANT, constant=constant)

    def read(atom: Any) -> Value:
        if not isinstance(atom, core.Literal):
            return known[atom]
        aval: Any = atom.aval
        return Value(aval.shape, aval.dtype, CONSTANT, constant=atom.val)

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        called = _called(eqn)
        if called is None:
            op = _operation(jaxpr, eqn, inputs)
            ops.append(op)
            kept = [v for v in eqn.outvars if not _compat.is_dropped(v)]
            known.update(zip(kept, op.outputs, strict=True))
        else:
            inner, consts = getattr(called, "jaxpr", called), _consts(called)
            outputs = _inline(inner, consts, inputs, ops)
            known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _operation(jaxpr: Any, eqn: Any, inputs: list[Value]) -> Op:
    # Evaluated as a separate program: the arguments of a primitive's `bind` differ
    # between versions of JAX, and the context (matmul precision, metadata) is kept.
    given = [not isinstance(atom, core.Literal) for atom in eqn.invars]
    variables = [v for v, g in zip(eqn.invars, given, strict=True) if g]
    kept = [v for v in eqn.outvars if not _compat.is_dropped(v)]
    alone = jaxpr.replace(
        constvars=[],
        invars=variables,
        outvars=kept,
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=_compat.unnamed(jaxpr, len(variables), len(kept)),
    )
    function = core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))

    def run(*arrays):
        return function(*(a for a, g in zip(arrays, given, strict=True) if g))

    op = make(eqn.primitive.name, inputs, [v.aval for v in kept], run, eqn.params)
    op.eqn = eqn
    if eqn.effects:
        for value in op.outputs:
            value.of = INPUTS
    return op


def _called(eqn: Any) -> Any:
    """The program that an equation calls, if it may be inlined."""
    if eqn.primitive is primitives.jit_p:
        places = (*eqn.params["in_shardings"], *eqn.params["out_shardings"])
        free = all(type(p).__name__ == "UnspecifiedValue" for p in places)
        return eqn.params["jaxpr"] if free and not is_marker(_name(eqn)) else None
    if _compat.is_remat(eqn):
        return eqn.params["jaxpr"]
    if eqn.primitive in (primitives.closed_call_p, primitives.call_p):
        return eqn.params["call_jaxpr"]
    return None


def _consts(called: Any) -> Sequence[Any]:
    return getattr(called, "consts", ())


def _name(eqn: Any) -> str:
    return eqn.params["name"]


def has_effects(op: Op) -> bool:
    """Whether it has side effects, such as printing."""
    return op.eqn is not None and bool(op.eqn.effects)
