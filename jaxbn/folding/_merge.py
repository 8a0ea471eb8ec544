"""Adds up parallel branches, layers of one input, into one layer."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _dtypes
from jaxbn.folding import _arithmetic, _branches, _grid, _rewrite
from jaxbn.folding._branches import Branch
from jaxbn.folding._grid import Grid
from jaxbn.folding._markers import Normalization
from jaxbn.folding._match import Match, Vector
from jaxbn.folding._product import Axes, Product, product
from jaxbn.folding._program import Op, Program, Value, derived


class Merged(NamedTuple):
    """Branches that are now one layer, first the one with the largest kernel."""

    product: Product
    branches: list[Branch]


def merge_all(program: Program, results: _rewrite.Results) -> list[Merged]:
    """Merges in place. The normalizations in `results` then name the merged layer."""
    found = []
    for op in list(program.ops):
        merged = _merge(program, op, results) if _branches.is_sum(op) else None
        if merged is not None:
            _point(results, merged)
            found.append(merged)
    return found


def _merge(program: Program, op: Op, results: _rewrite.Results) -> Merged | None:
    users, total = program.users(), op.outputs[0]
    axes = _branches.feature_axes(total, users)
    total = None if axes is None else _branches.whole_sum(total, axes, users)
    if axes is None or total is None:
        return None
    terms, biases = _branches.terms_of(total, axes, users)
    own = _branches.alike([_branches.branch_of(term, axes, users) for term in terms])
    if not any(_is_normalized(branch, results) for branch in own):
        return None
    biases += [bias for branch in own for bias in branch.term.biases]
    value, bias, whole = _layer(own, biases, axes)
    bias = _rewrite.cast(bias, value.dtype) if value.dtype == total.dtype else bias
    bias = _rewrite.varying(bias, own[0].product.kernel)  # type: ignore  (not None)
    value = _rewrite.add(value, bias, axes, total.dtype)
    for term in terms:
        if not any(term is branch.term for branch in own):
            summands = [value, _rewrite.cast(term.value, total.dtype)]
            value = derived("add", lambda a, b: (a + b,), summands).outputs[0]
    program.replace(total, value)
    program.reorder()
    return Merged(whole, own)


def _point(results: _rewrite.Results, merged: Merged) -> None:
    """Makes the results of normalizations name the merged layer."""
    whole, old = merged.product, [b.product.op for b in merged.branches if b.product]
    for op, result in results.items():
        if isinstance(result, Match) and result.product.op in old:
            results[op] = dataclasses.replace(result, product=whole)
    for norm in (branch.norm for branch in merged.branches):
        if norm is not None:
            results[norm.op] = Match("beside", whole, (), [], [], norm.y, norm.axes)


def _is_normalized(branch: Branch, results: _rewrite.Results) -> bool:
    """Whether a branch is a normalization, or one was folded into it."""
    if branch.product is None:
        return branch.norm is not None
    matches = [r for r in results.values() if isinstance(r, Match)]
    return any(branch.product.op is match.product.op for match in matches)


def _layer(
    own: list[Branch], biases: list[Vector], axes: Axes
) -> tuple[Value, Value, Product]:
    """The output of the merged layer, its bias, and the layer."""
    layer = own[0].product
    assert layer is not None
    grids = [_branches.grid_of(branch, layer) for branch in own]
    grid = _grid.common_grid(grids)
    assert grid is not None
    both = _kernel_and_bias(own, biases, axes, grids, grid)
    kernel, bias = both.outputs
    kernel = _rewrite.cast(kernel, layer.kernel.dtype)
    inputs = list(layer.op.inputs)
    inputs[layer.kernel_index] = _rewrite.varying(kernel, layer.kernel)
    params = layer.op.params | _grid.params_of(grid, layer)
    bind = layer.op.eqn.primitive.bind
    run = lambda *arrays: (bind(*arrays, **params),)  # noqa: E731
    op = derived(layer.op.name, run, inputs, **params)
    whole = product(op)
    assert whole is not None
    return op.outputs[0], bias, whole


def _kernel_and_bias(
    own: list[Branch], biases: list[Vector], axes: Axes, grids: list[Grid], grid: Grid
) -> Op:
    """The operation, on parameters alone, that adds up kernels and biases."""
    first = own[0].product
    assert first is not None
    norms = [branch.norm for branch in own if branch.norm is not None]
    values = [branch.product.kernel for branch in own if branch.product is not None]
    values += [bias.value for bias in biases]
    values += [v for norm in norms for v in norm.vectors if v is not None]
    epsilons = [norm.epsilon for norm in norms]
    size = [first.op.outputs[0].shape[axis] for axis in axes]

    def function(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        every = [jnp.asarray(a) for a in arrays[: len(values)]]
        wide = dict(zip(values, (_dtypes.widen(a, *every) for a in every), strict=True))
        epsilon = iter(arrays[len(values) :])
        total = _rewrite.sum_of([wide[bias.value] for bias in biases], biases)
        kernel = jnp.zeros((), every[0].dtype)
        for branch, its in zip(own, grids, strict=True):
            if branch.product is not None:
                part = wide[branch.product.kernel]
            else:
                factor, offset = _affine(branch.norm, wide, epsilon)
                part, total = _unit_kernel(first, factor, axes), total + offset
            kernel = kernel + _grid.placed(part, its, grid, _grid.axes_of(first))
        return kernel, jnp.broadcast_to(jnp.asarray(total, kernel.dtype), size)

    inputs = [_rewrite.widened(value) for value in (*values, *epsilons)]
    return derived(_rewrite.KERNEL_AND_BIAS, function, inputs)


def _affine(norm: Normalization | None, wide: dict, epsilon) -> tuple:
    """A normalization, or nothing, as a factor and an offset."""
    if norm is None:
        return 1, 0
    scale, bias = (v if v is None else wide[v] for v in (norm.scale, norm.bias))
    return _arithmetic.affine(
        wide[norm.mean], wide[norm.var], scale, bias, next(epsilon)
    )


def _unit_kernel(layer: Product, factor, axes: Axes) -> jax.Array:
    """The kernel that multiplies each feature by its factor."""
    unit = jnp.asarray(
        _grid.unit_kernel(layer.kernel.shape, *_branches.channels(layer))
    )
    outputs = layer.kernel_axes_of_outputs(axes)
    assert outputs is not None
    if jnp.ndim(factor) == 0:
        return unit * factor
    return _arithmetic.after(unit.astype(factor.dtype), factor, outputs)
