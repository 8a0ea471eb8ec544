"""The pictures of "why batch norm", one for each experiment."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _digits_figure import DASHES, GREY, STYLE, accuracy_axis
from _why_experiments import DRIFT_RATE, PIECES, Rows
from _why_tables import ACCURACY, mean_loss, split
from _why_training import DIVERGED
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator, NullLocator, PercentFormatter


class Look(NamedTuple):
    """The look of a line, and its label in the legend."""

    label: str
    color: str
    marker: str
    dashes: object = "-"


# Okabe and Ito's colors, which people with any color vision can tell apart.
WITHOUT = Look("without batch norm", "#D55E00", "s")
WITH = Look("with batch norm", "#0072B2", "o")
NORMS = {
    "none": WITHOUT,
    "before": WITH,
    "after": Look("after the activation", "#009E73", "D", DASHES),
}
PLACES = NORMS | {"before": WITH._replace(label="before the activation")}
NETWORKS = {
    "without": WITHOUT,
    "with": WITH,
    "disturbed": Look("with batch norm, disturbed", "#CC79A7", "^", DASHES),
}
STATISTICS = {
    "none": WITHOUT,
    "batch": WITH._replace(label="statistics of the batch"),
    "all": Look("statistics of all training images", "#009E73", "D", DASHES),
}
DEPTHS = ["-", DASHES, (0, (1, 1.2))]  # Of the shallowest, the middle and the deepest.


def draw(name: str, rows: Rows, paths: Iterable[Path]) -> None:
    """Writes the picture of an experiment to every path."""
    with rc_context(STYLE):
        figure = FIGURES[name](rows)
        for path in paths:
            figure.savefig(path, dpi=200)


def panels(rows: int, columns: int, height: float, **shared) -> tuple[Figure, list]:
    """A figure, and its panels row by row."""
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def legend(figure: Figure, looks: Iterable[Look], more: Sequence[Line2D] = ()) -> None:
    handles = [handle(look) for look in looks]
    figure.legend(
        handles=[*handles, *more],
        loc="outside lower center",
        ncols=min(4, len(handles) + len(more)),
    )


def handle(look: Look) -> Line2D:
    style: dict = {"linestyle": look.dashes, "marker": look.marker}
    return Line2D([], [], color=look.color, label=look.label, **style)


def line(
    axes: Axes, look: Look, x: Sequence[float], values: Sequence | np.ndarray
) -> None:
    """The mean over seeds, and a band from the smallest to the largest value."""
    style: dict = {"linestyle": look.dashes, "marker": look.marker}
    axes.plot(x, np.mean(values, axis=1), color=look.color, **style)
    low, high = np.min(values, axis=1), np.max(values, axis=1)
    axes.fill_between(x, low, high, color=look.color, alpha=0.15, lw=0)


def by_rate(axes: Axes, looks: dict[str, Look], rows: Rows, key: str) -> None:
    """Results of training against the learning rate."""
    for norm, of in split(rows, "norm").items():
        line(axes, looks[norm], [row["lr"] for row in of], [row[key] for row in of])
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", ylabel=key)
    if key == ACCURACY:
        accuracy_axis(axes)
    else:
        axes.set_yscale("log")
        axes.set_ylabel(f"{key}, nats")
        axes.axhline(np.log(10), color=GREY, linewidth=0.9, linestyle="--", zorder=1)
        mark_diverged(axes, np.max([row[key] for row in rows]))


def mark_diverged(axes: Axes, highest: float) -> None:
    """Explains a loss at the cap, if there is one."""
    if highest >= DIVERGED:
        place = {"xy": (0.02, DIVERGED), "xycoords": ("axes fraction", "data")}
        axes.annotate("10: diverged →", color=GREY, fontsize=8, va="center", **place)


def gradients(rows: Rows) -> Figure:
    figure, grid = panels(2, 2, 7, sharey="col", sharex=True)
    depths = sorted({row["depth"] for row in rows})
    dashes = dict(zip(depths, DEPTHS, strict=False))
    cases = [
        (when, init)
        for when in ("at first", "trained")
        for init in dict.fromkeys(row["init"] for row in rows)
    ]
    for axes, (when, init) in zip(grid, cases, strict=True):
        for row in rows:
            if row["init"] == init:
                norms = np.median(row[when], axis=0)
                style: dict = {"linestyle": dashes[row["depth"]]}
                layers = range(1, len(norms) + 1)
                axes.semilogy(layers, norms, color=NORMS[row["norm"]].color, **style)
        kernels = "He's kernels" if init == "He" else "Kernels half as large"
        time = "at initialization" if when == "at first" else "after training"
        axes.set_title(f"{kernels}, {time}")
        axes.yaxis.set_minor_locator(NullLocator())
    for axes in grid[2:]:
        axes.set_xlabel("layer, from the input on")
    grid[1].set_ylim(bottom=1e-18)  # Below this, the deepest network also has zeros.
    for axes in grid[::2]:
        axes.set_ylabel("gradient norm of its kernel")
    lengths = [
        Line2D([], [], color=GREY, label=f"{depth} layers", linestyle=dash)  # type: ignore
        for depth, dash in dashes.items()
    ]
    plain = [Line2D([], [], color=n.color, label=n.label) for n in (WITHOUT, WITH)]
    figure.legend(handles=[*plain, *lengths], loc="outside lower center", ncols=5)
    return figure


def steps(rows: Rows) -> Figure:
    figure, (left, right) = panels(1, 2, 4.2)
    by_rate(left, NORMS, rows, "train loss")
    by_rate(right, NORMS, rows, ACCURACY)
    left.set_title("Train loss at the end")
    right.set_title("Test accuracy at the end")
    legend(figure, [WITHOUT, WITH])
    return figure


def drift(rows: Rows) -> Figure:
    figure, (products, inputs, losses, both) = panels(2, 2, 7.4)
    for row in rows:
        if row["lr"] == DRIFT_RATE:
            look = NETWORKS[row["network"]]
            for axes, key in ((products, "products"), (inputs, "inputs")):
                over_steps(axes, look, row, np.mean(row[key], axis=2).T)
            over_steps(losses, look, row, in_pieces(row).T)
    length = max(1, len(rows[0]["loss"][0]) // PIECES)
    for axes, title in (
        (products, "Drift of inputs × kernel, before any norm"),
        (inputs, "Drift of what the activation gets"),
    ):
        axes.set_yscale("log")
        axes.set_title(title)
        axes.set_ylabel(f"symmetric KL in {length} steps, nats")
    losses.set_title("Loss of the batches")
    losses.set(ylabel="cross-entropy, nats", yscale="log")
    for axes in (products, inputs, losses):
        axes.set_xlabel(f"step, learning rate {DRIFT_RATE:g}")
    drift_and_speed(both, rows)
    legend(figure, NETWORKS.values())
    return figure


def over_steps(axes: Axes, look: Look, row: dict, values: np.ndarray) -> None:
    length = len(row["loss"][0]) // len(values)
    line(axes, look, [length * (i + 1) for i in range(len(values))], values)


def in_pieces(row: dict) -> np.ndarray:
    """The mean loss of each piece of training, for each seed."""
    losses = np.asarray(row["loss"])
    pieces = len(row["inputs"][0])
    return losses.reshape(len(losses), pieces, -1).mean(-1)


def drift_and_speed(axes: Axes, rows: Rows) -> None:
    """Drift against mean loss: a point for each learning rate."""
    for name, of in split(rows, "network").items():
        look = NETWORKS[name]
        x = [np.mean(row["inputs"]) for row in of]
        y = [np.mean(mean_loss(row)) for row in of]
        style: dict = {"linestyle": look.dashes, "marker": look.marker}
        axes.plot(x, y, color=look.color, **style)
        for row, at_x, at_y in zip(of, x, y, strict=True):
            offset: dict = {"xytext": (4, 3), "textcoords": "offset points"}
            point, label = (at_x, at_y), f"{row['lr']:g}"
            axes.annotate(label, point, fontsize=7, color=GREY, **offset)
    axes.set_title("Drift and speed, a point for each learning rate")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("mean drift of what the activation gets, nats")
    axes.set_ylabel("mean loss over training, nats")


def place(rows: Rows) -> Figure:
    by_activation = split(rows, "activation")
    count = len(by_activation)
    figure, grid = panels(count, 2, 3.5 * count, sharex=True)
    for i, (activation, of) in enumerate(by_activation.items()):
        for axes, key in zip(
            grid[2 * i : 2 * i + 2], (ACCURACY, "train loss"), strict=True
        ):
            by_rate(axes, PLACES, of, key)
            axes.set_title(f"{activation}: {key}")
            axes.tick_params(labelbottom=True)
    legend(figure, PLACES.values())
    return figure


def noise(rows: Rows) -> Figure:
    figure, (left, right) = panels(1, 2, 4.4)
    by_statistics = split(rows, "statistics")
    for name, of in by_statistics.items():
        sizes = [row["batch"] for row in of]
        line(left, STATISTICS[name], sizes, [row[ACCURACY] for row in of])
    gains = [
        np.subtract(own[ACCURACY], whole[ACCURACY])
        for own, whole in zip(by_statistics["batch"], by_statistics["all"], strict=True)
    ]
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("batch size")
    right.axhline(0, color=GREY, linewidth=0.9)
    line(right, WITH, sizes, 100 * np.array(gains))
    left.set_title("Test accuracy")
    left.yaxis.set_major_locator(MultipleLocator(0.01))
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.set_ylabel("mean, and range over seeds")
    right.set_title("What the noise of the statistics adds")
    right.set_ylabel("batch − all training images, points")
    legend(figure, STATISTICS.values())
    return figure


FIGURES = {
    "gradients": gradients,
    "steps": steps,
    "drift": drift,
    "place": place,
    "noise": noise,
}
