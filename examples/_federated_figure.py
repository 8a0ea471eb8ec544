"""The picture of federated learning: accuracy by round."""

from pathlib import Path

import numpy as np
from _digits_figure import STYLE
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colors, and dashes.
LOOKS = [("#999999", ":"), ("#D55E00", "-"), ("#009E73", "--"), ("#0072B2", "-")]


def draw(histories: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Writes the picture: mean and worst accuracy of the clients, by round."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for (method, history), (color, dashes) in zip(
            histories.items(), LOOKS, strict=True
        ):
            found = np.array(list(history.values()))
            for axes, values in zip(panels, (found.mean(1), found.min(1)), strict=True):
                axes.plot(
                    list(history), values, color=color, linestyle=dashes, label=method
                )
        for axes, title in zip(
            panels, ("mean of clients", "worst client"), strict=True
        ):
            axes.set_title(title)
            axes.set_xlabel("round")
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[0].set_ylabel("test accuracy")
        panels[0].legend(loc="lower right")
        figure.savefig(path, dpi=200)
