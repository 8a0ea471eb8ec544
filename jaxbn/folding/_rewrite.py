"""Folds a matched normalization: new kernel, one bias, no normalization."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxbn import _dtypes
from jaxbn.folding import _arithmetic, _layout, _markers
from jaxbn.folding._markers import Left, Normalization
from jaxbn.folding._match import ADDED, Match, No, Vector, match
from jaxbn.folding._program import Op, Program, Value, again, derived, is_marker, make

KERNEL_AND_BIAS = "kernel and bias"
Results = dict[Op, Match | Left]


def fold_all(program: Program) -> Results:
    """Folds in place where possible. Returns each marker's match, or why it is left.

    Starts with markers after a layer, so that one before the same layer can still fold.
    """
    results: Results = {}
    markers = [
        op
        for op in program.ops
        if isinstance(op.params.get("name"), str) and is_marker(op.params["name"])
    ]
    for op in markers:
        results[op] = _fold(program, op, "after")
    for op in markers:
        first = results[op]
        if isinstance(first, Left) and isinstance(_markers.read(op), Normalization):
            second = _fold(program, op, "before")
            if isinstance(second, Left):
                second = Left(f"{first.reason}; {second.reason}")
            results[op] = second
    return results


def _fold(program: Program, op: Op, position: str) -> Match | Left:
    norm = _markers.read(op)
    if isinstance(norm, Left):
        return norm
    try:
        found = match(norm, program, position)
    except No as no:
        return Left(str(no))
    _rewrite(program, norm, found)
    program.reorder()
    return found


def _rewrite(program: Program, norm: Normalization, found: Match) -> None:
    layer = found.product.op
    old = found.product.kernel
    kernel, bias = _kernel_and_bias(norm, found).outputs
    layer.inputs[found.product.kernel_index] = varying(cast(kernel, old.dtype), old)
    value = layer.outputs[0]
    for op in found.chain:
        value = again(op, value).outputs[0]
    bias = cast(bias, value.dtype) if value.dtype == found.out.dtype else bias
    new = add(value, varying(bias, old), found.out_axes, found.out.dtype)
    program.replace(found.out, new)
    if found.position == "before":
        program.replace(norm.y, cast(norm.x, norm.y.dtype))


def _kernel_and_bias(norm: Normalization, found: Match) -> Op:
    """The operation, on parameters alone, that computes both in a wide dtype."""
    given = [v for v in norm.vectors if v is not None]
    added = [bias.value for bias in found.biases]
    values = [found.product.kernel, *given, *added, norm.epsilon]

    def function(*arrays):
        *every, epsilon = map(jnp.asarray, arrays)
        kernel, *wide = (_dtypes.widen(a, *every) for a in every)
        vectors: dict[Any, Any] = dict(zip(given, wide, strict=False))
        mean, var = vectors[norm.mean], vectors[norm.var]
        scale, summand = vectors.get(norm.scale), vectors.get(norm.bias)
        bias = sum_of(wide[len(given) :], found.biases)
        if found.position == "after":
            own = mean - bias  # A bias before a normalization shifts its mean.
            factor, offset = _arithmetic.affine(own, var, scale, summand, epsilon)
            return _arithmetic.after(kernel, factor, found.axes), offset
        factor, offset = _arithmetic.affine(mean, var, scale, summand, epsilon)
        return _before(kernel, bias, factor, offset, found)

    return derived(KERNEL_AND_BIAS, function, [widened(v) for v in values])


def _before(kernel, bias, factor, offset, found: Match):
    product, axes = found.product, found.axes
    if product.groups > 1:
        out = next(a for a in range(kernel.ndim) if a not in product.summed)
        inputs, outputs = kernel.shape[axes[0]], kernel.shape[out]
        axes = (*axes, out)
        factor, offset = (
            _arithmetic.per_group(v, inputs, outputs) for v in (factor, offset)
        )
    kernel, moved = _arithmetic.before(kernel, factor, offset, axes, product.summed)
    return kernel, moved + bias


def sum_of(arrays: Sequence[jax.Array], vectors: Sequence[Vector]):
    """The sum of the biases, each laid out like the features."""
    total = 0
    for array, vector in zip(arrays, vectors, strict=True):
        rest = [a for a in range(array.ndim) if a not in vector.axes]
        moved = array.transpose((*vector.axes, *rest)) if vector.axes else array
        one = moved.reshape(moved.shape[: len(vector.axes)])
        total = total - one if vector.negative else total + one
    return total


def widened(value: Value, exact: bool = False) -> Value:
    """The value before any cast, with its present layout.

    But not before a cast that rounds, if an `exact` cast to a wider dtype follows: that
    rounding is intended.
    """
    op = value.op
    if op is None or not (_layout.is_cast(op) or _layout.is_layout(op)):
        return value
    if _layout.is_cast(op):
        rounds = _layout.rounds(op)
        return value if exact and rounds else widened(op.inputs[0], not rounds)
    inner = widened(op.inputs[0], exact)
    if op.name in _layout.VARYING:
        return inner
    return value if inner is op.inputs[0] else again(op, inner).outputs[0]


def varying(value: Value, like: Value) -> Value:
    """Makes `value` vary over the mesh axes that `like` was made to vary over."""
    op = like.op
    while op is not None and _layout.is_layout(op) | _layout.is_cast(op):
        if op.name in _layout.VARYING:
            return make(op.name, [value], [value], op.run, op.params).outputs[0]
        op = op.inputs[0].op
    return value


def cast(value: Value, dtype) -> Value:
    """`value` in another dtype."""
    if value.dtype == dtype:
        return value
    function = lambda a: (a.astype(dtype),)  # noqa: E731
    return derived("convert_element_type", function, [value]).outputs[0]


def add(value: Value, bias: Value, axes: tuple[int, ...], dtype) -> Value:
    """`value` plus a bias along `axes`, in `dtype`."""

    def function(value, bias):
        bias = _arithmetic.lay(bias, axes, value.ndim)
        # For convolutions in bfloat16, XLA fuses a sum in bfloat16 into cuDNN's
        # convolution; in float32 it is a separate pass through memory: 9.0 against 5.0
        # arrays for two layers. Elsewhere the sum in float32 costs less or as much.
        if value.dtype != dtype or jnp.finfo(dtype).bits >= 32:
            return (_wide_sum(value, bias, dtype),)
        wide = functools.partial(_wide_sum, dtype=dtype)
        return (lax.platform_dependent(value, bias, cuda=jnp.add, default=wide),)

    return derived(ADDED, function, [value, bias], axes=axes).outputs[0]


def _wide_sum(value: jax.Array, bias: jax.Array, dtype) -> jax.Array:
    wide = _dtypes.widen(value, bias)
    return (wide + bias.astype(wide.dtype)).astype(dtype)
