"""`report`: what `fold` does with each normalization, and why."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxbn import _compat
from jaxbn.folding import _markers, _plan, _program
from jaxbn.folding._branches import Branch
from jaxbn.folding._fold import shapes_of, trace
from jaxbn.folding._markers import Left
from jaxbn.folding._match import Match
from jaxbn.folding._merge import Merged

INFERENCE = (
    "what folds is inference by running statistics (`training=False`, "
    "`use_running_average=True`)"
)
NOTHING = (
    "No batch norm of jaxbn found. Fold a function that infers by running statistics "
    "(`training=False`, `use_running_average=True`); if its layers are Flax's, replace "
    "them by `jaxbn.linen.replace_batch_norm` or `jaxbn.nnx.replace_batch_norm`."
)
RULES = ("custom_vjp_call", "custom_jvp_call")


class FoldedLayer(NamedTuple):
    """One normalization of a program.

    Attributes:
      path: The path of its statistics in `params`, such as "batch_stats/BatchNorm_0",
        or of its scale or bias if the statistics come from elsewhere.
      into: The path of the kernel that it was folded into, or None if it stays.
      position: "after" or "before" that layer; "beside" it if it normalizes the input
        of the layer in a parallel branch; None if it stays.
      reason: Why it stays, or None.

    Example:
      >>> from jaxbn.folding import FoldedLayer
      >>> FoldedLayer("norm", "dense/kernel", "after", None).into
      'dense/kernel'
    """

    path: str
    into: str | None
    position: str | None
    reason: str | None


class MergedBranches(NamedTuple):
    """Parallel branches of a program that are one layer after folding.

    Attributes:
      into: The path of the kernel that they were added to.
      branches: The paths of the kernels that were added up. A normalized input is
        listed by the path of its statistics, and the input itself as "(input)".

    Example:
      >>> from jaxbn.folding import MergedBranches
      >>> MergedBranches("a/kernel", ("a/kernel", "b/kernel", "(input)")).into
      'a/kernel'
    """

    into: str
    branches: tuple[str, ...]


class FoldReport(NamedTuple):
    """What `fold` does with each normalization of a program; prints as a table.

    Attributes:
      layers: A tuple of `FoldedLayer`, in the order of the program.
      merged: A tuple of `MergedBranches`.

    Example:
      >>> from jaxbn.folding import FoldedLayer, FoldReport
      >>> print(FoldReport((FoldedLayer("norm", "dense/kernel", "after", None),)))
      norm  folded, after dense/kernel
      1 folded, 0 left
    """

    layers: tuple[FoldedLayer, ...]
    merged: tuple[MergedBranches, ...] = ()

    @property
    def folded(self) -> tuple[FoldedLayer, ...]:
        """The normalizations that were folded into a layer."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def left(self) -> tuple[FoldedLayer, ...]:
        """The normalizations that stay in the program."""
        return tuple(layer for layer in self.layers if layer.reason is not None)

    def __str__(self) -> str:
        count = f"{len(self.folded)} folded, {len(self.left)} left"
        if not self.layers:
            return f"{NOTHING}\n{count}"
        width = max((len(layer.path) for layer in self.layers), default=0)
        lines = [
            f"{path:{width}}  "
            + (f"left: {reason}" if reason else f"folded, {position} {into}")
            for path, into, position, reason in self.layers
        ]
        lines += [f"{into}  = {' + '.join(own)}" for into, own in self.merged]
        return "\n".join([*lines, count])


def report(
    inference_fn: Callable[..., Any], params: Any, *example_inputs: Any
) -> FoldReport:
    """Lists which normalizations `fold` folds into which layers, and why others stay.

        every normalization  =  report.folded  +  report.left

    It looks only at the program, not at the values of `params`, so all arguments may be
    `jax.ShapeDtypeStruct`.

    Args:
      inference_fn: Function `(params, *inputs)`, as for `fold`.
      params: Any pytree of arrays, or of their shapes and dtypes.
      *example_inputs: Pytrees of arrays, or of their shapes and dtypes.

    Returns:
      A `FoldReport`. Print it, or look at its `folded` and `left`, tuples of
      `FoldedLayer(path, into, position, reason)`.

    Raises:
      TypeError: `inference_fn` is not callable.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> def infer(params, x):
      ...     y = jax.nn.relu(x @ params["kernel"])
      ...     return jaxbn.normalize(y, **params["norm"])
      >>> norm = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
      >>> params = {"kernel": jnp.ones((2, 3)), "norm": norm}
      >>> print(jaxbn.folding.report(infer, params, jnp.ones((1, 2))))
      norm  left: it normalizes the output of `relu`; its output is an output
      0 folded, 1 left

    References:
      Jacob et al., "Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference" (2018), section 3.2.
    """
    abstract = shapes_of(inference_fn, params)
    plan, _ = trace(inference_fn, abstract, example_inputs)
    layers = []
    for op in plan.order:
        if op in plan.results:
            layers.append(_layer(op, plan.results[op], plan.paths))
            continue
        layers += [
            FoldedLayer(_path(mean, op, plan.paths), None, None, _why_inside(op, mean))
            for mean in _program.markers_inside(op)
        ]
    return FoldReport(tuple(layers), tuple(_branches_of(m, plan) for m in plan.merged))


def _layer(op: _program.Op, found: Match | Left, paths: dict) -> FoldedLayer:
    mean = _markers.operands(op).get("mean")
    path = _path(mean, op, paths)
    if isinstance(found, Left):
        reason = found.reason
        if mean is not None and _is_of_the_batch(mean, op):
            reason = f"{reason}, as in training: {INFERENCE}"
        return FoldedLayer(path, None, None, reason)
    into = _plan.path_of(found.product.kernel, paths)
    return FoldedLayer(path, into, found.position, None)


def _branches_of(merged: Merged, plan: _plan.Plan) -> MergedBranches:
    def path_of(branch: Branch) -> str:
        if branch.product is not None:
            return _plan.path_of(branch.product.kernel, plan.paths)
        if branch.norm is not None:
            return _path(branch.norm.mean, branch.norm.op, plan.paths)
        return "(input)"

    into = _plan.path_of(merged.product.kernel, plan.paths)
    return MergedBranches(into, tuple(map(path_of, merged.branches)))


def _why_inside(op: _program.Op, mean: _program.Value | None) -> str:
    """Why a normalization in the loops, branches or rules of `op` is left."""
    by_batch = f"normalized by the batch, as in training: {INFERENCE}"
    if mean is not None and _is_of_the_batch(mean, op):
        return f"it is {by_batch}"
    if _has_rule(op.params):
        return f"it is inside `{op.name}`, and {by_batch}"
    return f"it is inside `{op.name}`"


def _is_of_the_batch(mean: _program.Value, op: _program.Op) -> bool:
    """Whether the mean depends on an input that `op` also gets in another way."""
    if mean.of != _program.INPUTS:
        return False
    others = (_inputs_of(value) for value in op.inputs if value is not mean)
    return not _inputs_of(mean).isdisjoint(set().union(*others))


def _inputs_of(value: _program.Value) -> set[_program.Value]:
    ops = [value.op] if value.op is not None else []
    used = [v for op in _program.in_order(ops) for v in op.inputs]
    return {v for v in (value, *used) if v.op is None and v.of == _program.INPUTS}


def _has_rule(params: dict[str, Any]) -> bool:
    """Whether a function inside normalizes and has its own derivative, as in training.

    Inference by running statistics has no such function.
    """
    for eqn in (e for j in _compat.jaxprs_in(params) for e in j.eqns):
        name, call = eqn.primitive.name, eqn.primitive.bind
        inner = _program.Op(name, [], call, params=eqn.params)
        if inner.name in RULES and any(True for _ in _program.markers_inside(inner)):
            return True
        if _has_rule(eqn.params):
            return True
    return False


def _path(mean: _program.Value | None, op: _program.Op, paths: dict) -> str:
    """The path of the statistics, without the name of the mean unless that is all.

    If they come from elsewhere, the path of the first other vector from `params`.
    """
    vectors = [mean, *(v for v in op.inputs if v.of == _program.PARAMS)]
    roots = (_plan.root(v) for v in vectors if v is not None)
    own = next((root for root in roots if root is not None), None)
    if own is None:
        return "(not from `params`)"
    return paths[own].rpartition("/")[0] or paths[own]
