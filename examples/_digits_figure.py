"""The picture of the digits demo: four panels with one result each."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _digits_training import TRAINS, Run
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter

# Okabe and Ito's vermilion and blue, which people with any color vision can tell apart.
COLORS = {"without": "#D55E00", "with": "#0072B2"}
MARKERS = {"without": "s", "with": "o"}
DASHES = (0, (3.5, 1.5))
GREY = "#666666"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.12,
}


def draw(runs: dict[str, Run], lr: float, paths: Iterable[Path]) -> None:
    """Writes the picture to every path."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 7.2), layout="constrained")
        (upper_left, upper_right), (lower_left, lower_right) = figure.subplots(2, 2)
        gradient_panel(upper_left, runs)
        accuracy_panel(upper_right, runs)
        learning_rate_panel(lower_left, runs, lr)
        gap_panel(lower_right, runs)
        heading(figure, runs)
        for path in paths:
            figure.savefig(path, dpi=200)


def heading(figure: Figure, runs: dict[str, Run]) -> None:
    net = runs["with"].net
    figure.suptitle(
        f"Handwritten digits, {net.depth} sigmoid layers of {net.width}",
        x=0.015,
        ha="left",
        fontsize=13,
        fontweight="bold",
    )
    handles = [
        Line2D([], [], color=COLORS[name], marker=MARKERS[name], label=name)
        for name in runs
    ]
    labels = [f"{name} batch norm" for name in runs]
    figure.legend(
        handles, labels, loc="upper right", ncols=2, bbox_to_anchor=(0.995, 1.0)
    )


def gradient_panel(axes: Axes, runs: dict[str, Run]) -> None:
    shrinks = {}
    for name, run in runs.items():
        norms = run.gradient_norms
        layers = range(1, len(norms) + 1)
        axes.semilogy(layers, norms, color=COLORS[name], marker=MARKERS[name])
        axes.set_xticks(layers, [*map(str, layers[:-1]), "out"], fontsize=9.5)
        shrinks[name] = f"{float(f'{norms[-1] / norms[0]:.2g}'):,.10g}×"
    axes.set_title(
        "From last layer to first, the gradient shrinks\n"
        f"{shrinks['without']} without, {shrinks['with']} with"
    )
    axes.set(xlabel="layer", ylabel="gradient norm at initialization")
    axes.yaxis.set_minor_locator(NullLocator())


def accuracy_panel(axes: Axes, runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        axes.plot(*series(run, "test_accuracy"), color=COLORS[name])
    last = {name: run.history[-1] for name, run in runs.items()}
    axes.set_title(
        f"Test accuracy after {last['with']['step']} steps:\n"
        f"{last['without']['test_accuracy']:.1%} without, "
        f"{last['with']['test_accuracy']:.1%} with"
    )
    axes.set(xlabel="step", ylabel="test accuracy")
    accuracy_axis(axes)


def learning_rate_panel(axes: Axes, runs: dict[str, Run], lr: float) -> None:
    counts = {}
    for name, run in runs.items():
        rates, accuracies = list(run.sweep), list(run.sweep.values())
        axes.semilogx(rates, accuracies, color=COLORS[name], marker=MARKERS[name])
        counts[name] = sum(accuracy >= TRAINS for accuracy in accuracies)
    axes.axvline(lr, color=GREY, linewidth=0.9, linestyle=":")
    axes.annotate(
        "panels on\nthe right",
        (lr, 0.3),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=GREY,
        fontsize=9,
    )
    axes.set_title(
        f"Learning rates that reach {TRAINS:.0%} test accuracy:\n"
        f"{counts['without']} of {len(rates)} without, "
        f"{counts['with']} of {len(rates)} with"
    )
    axes.set(xlabel="learning rate", ylabel="test accuracy at the end")
    accuracy_axis(axes)


def gap_panel(axes: Axes, runs: dict[str, Run]) -> None:
    gaps = {}
    for name, run in runs.items():
        steps, train = series(run, "train_loss")
        _, test = series(run, "test_loss")
        axes.semilogy(steps, test, color=COLORS[name])
        axes.semilogy(steps, train, color=COLORS[name], linestyle=DASHES)
        axes.fill_between(steps, train, test, color=COLORS[name], alpha=0.12, lw=0)
        gaps[name] = test[-1] - train[-1]
    axes.set_title(
        "Test loss above train loss at the end:\n"
        f"{gaps['without']:z.3f} without, {gaps['with']:z.3f} with"
    )
    axes.set(xlabel="step", ylabel="cross-entropy, nats")
    axes.legend(
        [
            Line2D([], [], color=GREY),
            Line2D([], [], color=GREY, linestyle=DASHES),
        ],
        ["test", "train"],
        loc="upper right",
        bbox_to_anchor=(1.0, 0.88),
        ncols=2,
    )


def accuracy_axis(axes: Axes) -> None:
    """Percent from 0 to 100, with a line for guessing among ten digits."""
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.axhline(0.1, color=GREY, linewidth=0.9, linestyle="--", zorder=1)
    axes.annotate(
        "chance",
        (1, 0.1),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=GREY,
        fontsize=9,
    )


def series(run: Run, key: str) -> tuple[list[float], list[float]]:
    """The steps of the evaluations, and the values of `key`."""
    return [row["step"] for row in run.history], [row[key] for row in run.history]
