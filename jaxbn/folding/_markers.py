"""Reads a normalization off the call that marks it."""

from typing import NamedTuple

from jaxbn.folding import _layout, _program
from jaxbn.folding._program import Op, Value

# What two operands make together. `vmap` may have moved their axes, a derivative may
# have changed the function under the same name: what is not in here is not folded.
STEPS = {
    ("add", "var", "epsilon"): "var",
    ("rsqrt", "var"): "factor",
    ("mul", "factor", "scale"): "factor",
    ("sub", "x", "mean"): "centred",
    ("mul", "centred", "factor"): "y",
    ("add", "y", "bias"): "y",
}
OF_X = ("x", "centred", "y")


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


def read(op: Op) -> Normalization | None:
    """The normalization that a marker is, or None: of a derivative, for example."""
    words = op.params["name"].split("_")
    optional = [name for name in ("scale", "bias") if name in words]
    names = ["x", "mean", "var", *optional, "epsilon"]
    if len(op.inputs) != len(names) or len(op.outputs) != 1:
        return None
    axes = _feature_axes(op, names)
    if axes is None:
        return None
    given = dict(zip(names, op.inputs, strict=True))
    return Normalization(
        op,
        given["x"],
        given["mean"],
        given["var"],
        given.get("scale"),
        given.get("bias"),
        given["epsilon"],
        axes,
    )


def _feature_axes(op: Op, names: list[str]) -> tuple[int, ...] | None:
    """The axes that all vectors run along, if the function is `normalize`'s."""
    inner = _program.inner_program(op)
    roles = {
        value: (name, tuple(range(len(value.shape))))
        for name, value in zip(names, inner.params, strict=True)
    }
    for step in inner.ops:
        given = [roles.get(value) for value in step.inputs]
        found = _step(step, given)
        if found is None:
            return None
        roles[step.outputs[0]] = found
    name, axes = roles.get(inner.outputs[0], ("", ()))
    same = inner.outputs[0].shape == op.inputs[0].shape
    return axes if name == "y" and same and len(inner.outputs) == 1 else None


def _step(step: Op, given: list) -> tuple[str, tuple[int, ...]] | None:
    if None in given:
        return None
    if step.name == "convert_element_type":
        return given[0]
    if _layout.is_layout(step):
        name, axes = given[0]
        moved = _layout.forward(step, axes)
        # Of x, only the whole array in its own place will do.
        stays = moved == axes and not _layout.grows(step)
        return None if moved is None or (name in OF_X and not stays) else (name, moved)
    result = STEPS.get((step.name, *(name for name, _ in given)))
    vectors = {axes for name, axes in given if name not in ("x", "epsilon")}
    return (result, vectors.pop()) if result and len(vectors) == 1 else None
