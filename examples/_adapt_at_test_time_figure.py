"""The picture of test-time adaptation: accuracy by stream, and the weights of TTN."""

import statistics
from pathlib import Path

import numpy as np
from _adapt_at_test_time import ORDER
from _corruptions import LEVELS
from _digits_figure import GREY, STYLE
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colors, one for each stream.
LOOKS = [("#0072B2", "o"), ("#56B4E9", "D"), ("#E69F00", "^"), ("#D55E00", "s")]


def draw(results: dict, weights: dict, path: Path) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[2.1, 1])
        accuracy_panel(left, results)
        weight_panel(right, weights)
        figure.savefig(path, dpi=200)


def accuracy_panel(axes: Axes, results: dict) -> None:
    """A row for each method, a mark for each stream."""
    places = np.arange(len(ORDER))[::-1]
    for i, (stream, found) in enumerate(results.items()):
        color, marker = LOOKS[i]
        means = [statistics.fmean(found[m][n] for n in LEVELS) for m in ORDER]
        if stream == next(iter(results)):
            axes.axvline(means[0], color=GREY, linewidth=1, linestyle="--")
        rows = places + 0.24 - 0.16 * i
        axes.plot(means, rows, marker, color=color, markersize=6, label=stream)
    axes.set_yticks(places, ORDER)
    axes.set_title("Accuracy, mean of six corruptions")
    axes.set_xlabel("test accuracy (dashed: without adaptation)")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=4)


def weight_panel(axes: Axes, weights: dict) -> None:
    """The weight of the batch, a point for each channel."""
    for i, values in enumerate(weights.values(), 1):
        spread = np.linspace(-0.2, 0.2, len(values))
        axes.plot(i + spread, values, ".", color="#009E73", alpha=0.7)
        axes.hlines(np.mean(values), i - 0.3, i + 0.3, color=GREY)
    axes.set_title("TTN: weight of the batch")
    axes.set_xticks(range(1, len(weights) + 1))
    axes.set_xlabel("layer (dots: channels)")
    axes.set_ylim(0, 1)
