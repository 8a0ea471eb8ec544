"""Reads a normalization from the call that marks it."""

from typing import NamedTuple

from jaxbn import _normalize
from jaxbn.folding import _layout, _program
from jaxbn.folding._program import INPUTS, PARAMS, Op, Value

# The result of two operands. `vmap` may have moved their axes, and a derivative may
# have changed the function under the same name: other steps are not folded.
STEPS = {
    ("add", "var", "epsilon"): "var",
    ("rsqrt", "var"): "factor",
    ("mul", "factor", "scale"): "factor",
    ("sub", "x", "mean"): "centred",
    ("mul", "centred", "factor"): "y",
    ("add", "y", "bias"): "y",
}
OF_X = ("x", "centred", "y")
Role = tuple[str, tuple[int, ...] | None]  # A name, and the axes of the features.

CHANGED = "a derivative or another transformation changed it"
DIFFERENT = "its vectors run along different axes, as one per example does"


class Left(NamedTuple):
    """A normalization that stays in the program, and why."""

    reason: str


class Normalization(NamedTuple):
    """A call of `normalize` in a program. Its vectors run along `axes` of `x`."""

    op: Op
    x: Value
    mean: Value
    var: Value
    scale: Value | None
    bias: Value | None
    epsilon: Value
    axes: tuple[int, ...]

    @property
    def y(self) -> Value:
        return self.op.outputs[0]

    @property
    def vectors(self) -> list[Value | None]:
        return [self.mean, self.var, self.scale, self.bias]


def read(op: Op) -> Normalization | Left:
    """The normalization of a marker, or why it does not apply parameters to data."""
    given = operands(op)
    role = _role(op, list(given))
    if role is None:
        return Left(CHANGED)
    why = _why_unknown(given)
    if why or role[1] is None:
        return Left(why or DIFFERENT)
    return Normalization(
        op,
        given["x"],
        given["mean"],
        given["var"],
        given.get("scale"),
        given.get("bias"),
        given["epsilon"],
        role[1],
    )


def of(op: Op) -> Normalization | None:
    """The normalization that an operation is, if it applies parameters to data."""
    name = op.params.get("name")
    if not (isinstance(name, str) and _program.is_marker(name)):
        return None
    found = read(op)
    return found if isinstance(found, Normalization) else None


def operands(op: Op) -> dict[str, Value]:
    """The operands of a marker, by name; empty if the call was changed."""
    names = _normalize.operands_of(op.params["name"]) or []
    same = len(op.inputs) == len(names) and len(op.outputs) == 1
    return dict(zip(names, op.inputs, strict=True)) if same else {}


def _why_unknown(given: dict[str, Value]) -> str | None:
    """Why a normalization does not apply parameters to data, or None."""
    for name, word in (("mean", "mean"), ("var", "variance")):
        if given[name].of != PARAMS:
            kind = "input" if given[name].of == INPUTS else "constants"
            return f"its {word} is not from `params` but of {kind}"
    for name in ("scale", "bias", "epsilon"):
        if name in given and given[name].of == INPUTS:
            return f"its {name} is not from `params` but of input"
    if given["epsilon"].shape:
        return "its epsilon is not a scalar"
    if given["x"].of != INPUTS:
        return "what it normalizes does not depend on the input"
    return None


def _role(op: Op, names: list[str]) -> Role | None:
    """The role of its result, if its function is `normalize`."""
    if not names:
        return None
    inner = _program.inner_program(op)
    roles: dict[Value, Role] = {
        value: (name, tuple(range(len(value.shape))))
        for name, value in zip(names, inner.params, strict=True)
    }
    for step in inner.ops:
        found = _step(step, [roles.get(value) for value in step.inputs])
        if found is None:
            return None
        roles[step.outputs[0]] = found
    role = roles.get(inner.outputs[0], ("", None))
    same = inner.outputs[0].shape == op.inputs[0].shape
    return role if role[0] == "y" and same and len(inner.outputs) == 1 else None


def _step(step: Op, given: list) -> Role | None:
    """The role of a step's result; without axes if the axes of its vectors differ."""
    if None in given:
        return None
    if step.name == "convert_element_type":
        return given[0]
    if _layout.is_layout(step):
        return _moved(step, *given[0])
    name = _program.only_operation(step)
    result = STEPS.get((name, *(name for name, _ in given)))
    vectors = {axes for name, axes in given if name not in ("x", "epsilon")}
    if result is None or not vectors:
        return None
    return result, vectors.pop() if len(vectors) == 1 else None


def _moved(step: Op, name: str, axes: tuple[int, ...] | None) -> Role | None:
    # An epsilon with axes is rejected anyway.
    if axes is None or name == "epsilon":
        return name, axes
    moved = _layout.forward(step, axes)
    # x must stay whole and in place.
    stays = moved == axes and not _layout.grows(step)
    return None if moved is None or (name in OF_X and not stays) else (name, moved)
