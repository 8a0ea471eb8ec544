"""`report`: what `fold` does with each normalization, and why."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxbn.folding import _markers, _plan, _program
from jaxbn.folding._fold import shapes_of, trace
from jaxbn.folding._match import Match


class FoldedLayer(NamedTuple):
    """One normalization of a program.

    Attributes:
      path: Of its statistics in `params`, such as "batch_stats/BatchNorm_0".
      into: The path of the kernel that took it up, or None where it is left.
      position: "after" or "before" that layer, or None.
      reason: Why it is left, or None.

    Example:
      >>> from jaxbn.folding import FoldedLayer
      >>> FoldedLayer("norm", "dense/kernel", "after", None).into
      'dense/kernel'
    """

    path: str
    into: str | None
    position: str | None
    reason: str | None


class FoldReport(NamedTuple):
    """Every normalization of a program; prints as a table.

    Attributes:
      layers: A tuple of `FoldedLayer`, in the order of the program.

    Example:
      >>> from jaxbn.folding import FoldedLayer, FoldReport
      >>> print(FoldReport((FoldedLayer("norm", "dense/kernel", "after", None),)))
      norm  folded, after dense/kernel
      1 folded, 0 left
    """

    layers: tuple[FoldedLayer, ...]

    @property
    def folded(self) -> tuple[FoldedLayer, ...]:
        """Those that a layer took up."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def left(self) -> tuple[FoldedLayer, ...]:
        """Those that stay in the program."""
        return tuple(layer for layer in self.layers if layer.reason is not None)

    def __str__(self) -> str:
        width = max((len(layer.path) for layer in self.layers), default=0)
        lines = [
            f"{path:{width}}  "
            + (f"left: {reason}" if reason else f"folded, {position} {into}")
            for path, into, position, reason in self.layers
        ]
        return "\n".join(
            [*lines, f"{len(self.folded)} folded, {len(self.left)} left"]
        )  # fmt: skip


def report(
    inference_fn: Callable[..., Any], params: Any, *example_inputs: Any
) -> FoldReport:
    """Tells which normalizations `fold` takes into which layers, and why others not.

        every normalization  =  report.folded  +  report.left

    Looks at the program only, not at the values of `params`, so `jax.ShapeDtypeStruct`
    will do for all arguments.

    Args:
      inference_fn: Function `(params, *inputs)`, as for `fold`.
      params: Any pytree of arrays, or of their shapes and dtypes.
      *example_inputs: Pytrees of arrays, or of their shapes and dtypes.

    Returns:
      A `FoldReport`: print it, or look at its `folded` and `left`, tuples of
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
        reason = f"it is inside `{op.name}`"
        layers += [
            FoldedLayer(_prefix(mean, plan.paths), None, None, reason)
            for mean in _program.markers_inside(op)
        ]
    return FoldReport(tuple(layers))


def _layer(op: _program.Op, found: Match | str, paths: dict) -> FoldedLayer:
    # A derivative is given the same vectors, or what is made of them, in other places.
    any_vector = next((v for v in op.inputs if v.of == _program.PARAMS), None)
    path = _prefix(_markers.operands(op).get("mean", any_vector), paths)
    if isinstance(found, str):
        return FoldedLayer(path, None, None, found)
    into = _plan.path_of(found.product.kernel, paths)
    return FoldedLayer(path, into, found.position, None)


def _prefix(mean: _program.Value | None, paths: dict) -> str:
    """The path of the statistics, without the name of the mean unless that is all."""
    own = None if mean is None else _plan.root(mean)
    if own is None:
        return "(not from `params`)"
    return paths[own].rpartition("/")[0] or paths[own]
