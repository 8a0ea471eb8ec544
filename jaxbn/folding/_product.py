"""Convolutions and matrix products with a kernel from the parameters."""

from typing import NamedTuple

from jaxbn.folding._program import INPUTS, Op, Value

Axes = tuple[int, ...]


class Product(NamedTuple):
    """A product of data and a kernel, and how their axes map to the output's.

    `outputs` maps axes of the output to axes of the kernel; `inputs` does so for axes
    of the data. The product sums over `summed` axes of the kernel.
    """

    kind: str
    op: Op
    kernel_index: int
    outputs: dict[int, int]
    inputs: dict[int, int]
    summed: Axes
    groups: int = 1

    @property
    def kernel(self) -> Value:
        return self.op.inputs[self.kernel_index]

    def kernel_axes_of_outputs(self, axes: Axes) -> Axes | None:
        """The axes of the kernel for axes of the output."""
        return _look_up(self.outputs, axes)

    def kernel_axes_of_inputs(self, axes: Axes) -> Axes | None:
        """The axes of the kernel for axes of the data."""
        return _look_up(self.inputs, axes)

    def axes_of_added(self) -> Axes:
        """The output axes of the kernel axes that are not summed, in order."""
        inverse = {b: a for a, b in self.outputs.items()}
        return tuple(
            inverse[b] for b in range(len(self.kernel.shape)) if b not in self.summed
        )

    def why_not_before(self) -> str:
        """Why a batch norm before it cannot be folded; empty if it can."""
        if self.kind == "product":
            return ""
        params = self.op.params
        if any(n > 1 for n in params["lhs_dilation"]):
            return "the convolution after it puts zeros between its inputs"
        if any(width > 0 for pair in params["padding"] for width in pair):
            return "the convolution after it pads with zeros"
        return "" if params["batch_group_count"] == 1 else "the batch is in groups"


def product(op: Op) -> Product | None:
    """`op` as a product, if it multiplies data by something else."""
    if op.name == "conv_general_dilated" and op.inputs[1].of != INPUTS:
        return _convolution(op)
    if op.name == "dot_general" and any(v.of != INPUTS for v in op.inputs):
        return _matrix_product(op)
    return None


def _convolution(op: Op) -> Product:
    numbers, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
    out, into, *spatial = numbers.rhs_spec
    return Product(
        "convolution",
        op,
        1,
        {numbers.out_spec[1]: out},
        {numbers.lhs_spec[1]: into},
        (into, *spatial),
        groups,
    )


def _matrix_product(op: Op) -> Product:
    contracting, batch = op.params["dimension_numbers"]
    side = 1 if op.inputs[1].of != INPUTS else 0
    free = [
        [a for a in range(len(value.shape)) if a not in (*contracting[i], *batch[i])]
        for i, value in enumerate(op.inputs)
    ]
    # The output has the batch axes, then the left axes, then the right axes.
    first = len(batch[0]) + (len(free[0]) if side else 0)
    outputs = dict(enumerate(batch[side]))
    outputs |= {first + i: a for i, a in enumerate(free[side])}
    pairs = [*zip(contracting[1 - side], contracting[side], strict=True)]
    pairs += zip(batch[1 - side], batch[side], strict=True)
    return Product("product", op, side, outputs, dict(pairs), tuple(contracting[side]))


def _look_up(table: dict[int, int], axes: Axes) -> Axes | None:
    found = [table.get(axis) for axis in axes]
    return None if None in found else tuple(found)  # type: ignore
