"""Formats drift as a table."""

from typing import Any

import jax
import numpy as np

from jaxbn.population._drift import Drift
from jaxbn.population._trees import path_name

HEADER = (
    "layer",
    "channels",
    "KL median",
    "KL max",
    "shift max",
    "ratio min",
    "ratio max",
    "dead",
    "non-finite",
    "remark",
)


def summary(drifts: Any) -> str:
    """Formats the result of `drift` as a table with a row for each layer.

    Args:
      drifts: A tree of `Drift`.

    Returns:
      A Markdown table that lines up as plain text. For each layer, it has the number of
      channels, the median and the largest symmetric KL divergence, the largest mean
      shift in running standard deviations, the smallest and the largest variance ratio,
      the numbers of dead and of non-finite channels, and a remark if the layer has no
      data or was never updated.

    Raises:
      TypeError: The tree has leaves other than `Drift`.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> stats = {"norm": jaxbn.init_stats(1)}
      >>> moments = {"norm": jaxbn.moments(jnp.array([[1.0], [5.0]]))}
      >>> table = jaxbn.population.summary(jaxbn.population.drift(stats, moments))
      >>> print(table.splitlines()[2][:40])
      | norm  |        1 |      6.75 |   6.75

    References:
      https://en.wikipedia.org/wiki/Kullback%E2%80%93Leibler_divergence#Symmetrised_divergence
    """
    found = jax.tree_util.tree_leaves_with_path(drifts, is_leaf=_is_drift)
    for path, leaf in found:
        if not _is_drift(leaf):
            raise TypeError(
                f"`drifts{jax.tree_util.keystr(path)}` is {type(leaf).__name__}, "
                "expected a tree of `Drift`, as `drift` returns it."
            )
    rows = [HEADER, *(_row(path_name(path), leaf) for path, leaf in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    line = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:-1])]
    rows.insert(1, (*line, "-" * widths[-1]))
    return "\n".join(_line(row, widths) for row in rows)


def _row(name: str, drift: Drift) -> tuple[str, ...]:
    kl, shift, ratio, dead, bad, count, never = (np.asarray(v) for v in drift)
    good = ~bad & (count > 0)
    remarks = ["never updated"] * bool(never.all()) + ["no data"] * (not count.any())

    def best(function, values: np.ndarray) -> str:
        return f"{function(values[good]):.3g}" if good.any() else "-"

    return (
        name,
        str(kl.size),
        best(np.median, kl),
        best(np.max, kl),
        best(np.max, np.abs(shift)),
        best(np.min, ratio),
        best(np.max, ratio),
        str(int(dead.sum())),
        str(int(bad.sum())),
        ", ".join(remarks),
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first, *numbers, remark = row
    cells = [n.rjust(w) for n, w in zip(numbers, widths[1:], strict=False)]
    aligned = [first.ljust(widths[0]), *cells, remark.ljust(widths[-1])]
    return f"| {' | '.join(aligned)} |"


def _is_drift(node: Any) -> bool:
    return isinstance(node, Drift)
