"""Finds the branches of a sum: layers of one input, and the input itself."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxbn.folding import _grid, _layout, _markers
from jaxbn.folding._grid import Grid
from jaxbn.folding._markers import Normalization
from jaxbn.folding._match import (
    ADDED,
    No,
    Vector,
    added,
    require_own_kernel,
    require_range,
)
from jaxbn.folding._product import Axes, Product, product
from jaxbn.folding._program import INPUTS, Op, Value


class Term(NamedTuple):
    """A term of a sum, and what it is without casts and the vectors that it adds."""

    value: Value
    leaf: Value
    biases: list[Vector]


class Branch(NamedTuple):
    """A term that is a layer, or else the layer's input, perhaps normalized."""

    term: Term
    x: Value  # Before casts.
    product: Product | None = None
    norm: Normalization | None = None


def is_sum(op: Op) -> bool:
    """Whether it adds two arrays of data."""
    return op.name == "add" and all(
        v.of == INPUTS and v.shape == op.outputs[0].shape for v in op.inputs
    )


def whole_sum(total: Value, axes: Axes, users: dict) -> Value | None:
    """A sum with the vectors that are added to it; None if it is part of another."""
    while len(users.get(total, ())) == 1:
        ((user, _),) = users[total]
        if user is None:
            break
        if is_sum(user):
            return None
        to, _ = added(user, axes) or (None, None)
        if to is not total and not _layout.is_cast(user):
            break
        total = user.outputs[0]
    return total


def feature_axes(total: Value, users: dict) -> Axes | None:
    """The axes of the features: those of the outputs of the first layer in a sum."""
    stack = [total]
    while stack:
        value = stack.pop()
        op = value.op
        if op is None or (value is not total and len(users[value]) != 1):
            continue
        found = product(op)
        if found is not None:
            return tuple(sorted(found.axes_of_added()))
        if _layout.is_cast(op) or op.name in ("add", "sub", ADDED):
            stack += [v for v in reversed(op.inputs) if v.shape == total.shape]
    return None


def terms_of(
    value: Value, axes: Axes, users: dict, first: bool = True
) -> tuple[list[Term], list[Vector]]:
    """Splits a sum into terms, and vectors that are added to several of them."""
    alone = [Term(value, value, [])]
    op = value.op
    if op is None or not (first or len(users[value]) == 1):
        return alone, []
    if is_sum(op):
        left, right = (terms_of(v, axes, users, first=False) for v in op.inputs)
        return left[0] + right[0], left[1] + right[1]
    is_cast = _layout.is_cast(op)
    inside, bias = (op.inputs[0], None) if is_cast else added(op, axes) or (None, None)
    if inside is None:
        return alone, []
    terms, biases = terms_of(inside, axes, users, first=False)
    own = [] if bias is None else [bias]
    if len(terms) == 1 and not biases:
        return [Term(value, terms[0].leaf, terms[0].biases + own)], []
    return terms, biases + own


def branch_of(term: Term, axes: Axes, users: dict) -> Branch:
    """What a term is."""
    leaf = term.leaf
    if leaf.op is not None and len(users[leaf]) == 1:
        found, norm = product(leaf.op), _markers.of(leaf.op)
        if found is not None and _has_own_kernel(found, users):
            data = found.op.inputs[1 - found.kernel_index]
            return Branch(term, _before_casts(data), found)
        if norm is not None and norm.axes == axes:
            return Branch(term, _before_casts(norm.x), norm=norm)
    return Branch(term, _before_casts(leaf))


def _has_own_kernel(found: Product, users: dict) -> bool:
    try:
        require_own_kernel(found, users)
        require_range(found.kernel.dtype)
    except No:
        return False
    return found.op.eqn is not None and found.op.params.get("batch_group_count", 1) == 1


def _before_casts(value: Value) -> Value:
    while value.op is not None and _layout.is_cast(value.op):
        value = value.op.inputs[0]
    return value


def alike(branches: Sequence[Branch]) -> list[Branch]:
    """The branches that can be one layer, first the one with the largest kernel."""
    layers = [b for b in branches if b.product is not None]
    layers.sort(key=lambda b: -b.product.kernel.size)  # type: ignore  (not None)
    inputs = [b for b in branches if b.product is None]
    for first in layers:
        own = [first]
        for branch in (*layers, *inputs):
            if branch is not first and _fits(branch, first.product):  # type: ignore
                grids = [grid_of(b, first.product) for b in (*own, branch)]  # type: ignore
                if _grid.common_grid(grids) is not None:
                    own.append(branch)
        # One layer and its input are left: XLA adds in the layer's own kernel.
        if sum(b.product is not None or b.norm is not None for b in own) > 1:
            return own
    return []


def _fits(branch: Branch, layer: Product) -> bool:
    """Whether a branch reads the same input in the same way as a layer."""
    data = layer.op.inputs[1 - layer.kernel_index]
    if branch.x is not _before_casts(data):
        return False
    if branch.product is None:
        return _can_be_unit(layer, data)
    return _kind(branch.product) == _kind(layer)


def _kind(layer: Product) -> tuple:
    """All but the kernel's grid and values."""
    grid = ("padding", "rhs_dilation") if layer.kind == "convolution" else ()
    params = {k: v for k, v in layer.op.params.items() if k not in grid}
    sizes = [layer.kernel.shape[axis] for axis in channels(layer)]
    dtypes = [value.dtype for value in (*layer.op.inputs, *layer.op.outputs)]
    return layer.kind, layer.kernel_index, sizes, params, dtypes


def _can_be_unit(layer: Product, data: Value) -> bool:
    """Whether a kernel of this layer can return the input itself."""
    params = layer.op.params
    if layer.op.outputs[0].shape != data.shape or len(channels(layer)) != 2:
        return False
    if layer.kind == "product":
        last = len(data.shape) - 1
        return set(layer.inputs) == {last} == set(layer.axes_of_added())
    numbers = params["dimension_numbers"]
    plain = all(n == 1 for n in (*params["window_strides"], *params["lhs_dilation"]))
    return plain and numbers.lhs_spec == numbers.out_spec


def channels(layer: Product) -> Axes:
    """The axes of the kernel for inputs and outputs, in this order."""
    if layer.kind == "product":
        return tuple(range(len(layer.kernel.shape)))
    out, into, *_ = layer.op.params["dimension_numbers"].rhs_spec
    return into, out


def grid_of(branch: Branch, layer: Product) -> Grid:
    own = branch.product or layer
    grid = _grid.grid_of(own)
    return grid if branch.product is not None else _grid.unit_grid(grid)
