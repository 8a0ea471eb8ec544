"""The tables of "why batch norm"."""

import statistics
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from _digits_training import TRAINS
from _why_experiments import Rows

TITLES = {
    "gradients": "Gradient norm of the kernels, medians over seeds",
    "steps": "Learning rates",
    "drift": "Drift of what layers see, and training",
    "place": "Before the activation, after it, or not at all",
    "noise": "Batch sizes, on few images",
}


def spread(values: Sequence[float]) -> float:
    """The standard deviation over seeds, and 0 for a single seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def percent(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * spread(values):.1f}" if len(values) > 1 else mean


def number(values: Sequence[float]) -> str:
    if not np.isfinite(values).all():
        return "diverged"
    mean = f"{statistics.fmean(values):.2g}"
    return f"{mean} ± {spread(values):.1g}" if len(values) > 1 else mean


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    lines = []
    for label, *others in cells:
        aligned = [c.rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        lines.append(" | ".join(["| " + label.ljust(widths[0]), *aligned]) + " |")
    return "\n".join(lines)


def split(rows: Rows, *names: str) -> dict[Any, Rows]:
    """Rows grouped by their value under one name, or under several."""

    def key(row: dict):
        return row[names[0]] if len(names) == 1 else tuple(row[n] for n in names)

    return {value: list(group) for value, group in groupby(rows, key)}


def gradients(rows: Rows) -> str:
    def ends(norms: list) -> tuple[float, float]:
        by_layer = np.median(norms, axis=0)
        return by_layer[0], by_layer[-1]

    header = ["layers", "kernels", "batch norm", "first", "last", "first / last"]
    cells = []
    for row in rows:
        first, last = ends(row["at first"])
        trained = ends(row["trained"])
        norms = f"{first:.1e}", f"{last:.1e}", f"{first / last:.2g}"
        label = f"{row['depth']}", row["init"], row["norm"]
        cells.append(
            [*label, *norms, f"{trained[0] / trained[1]:.2g}", percent(row[ACCURACY])]
        )
    return table([*header, "trained: first / last", "test accuracy, %"], cells)


def steps(rows: Rows) -> str:
    by_norm = split(rows, "norm")
    header = ["learning rate"]
    for name in ("without", "with"):
        header += [f"train loss, {name}", f"test accuracy, {name}"]
    cells = []
    for pair in zip(*by_norm.values(), strict=True):
        measured = [f(row[n]) for row in pair for n, f in (LOSS, PERCENT)]
        cells.append([f"{pair[0]['lr']:g}", *measured])
    notes = [
        f"{name}: trains at {span(of)}; {best(of)}"
        for name, of in zip(("without", "with"), by_norm.values(), strict=True)
    ]
    return "\n\n".join([table(header, cells), *notes])


def span(rows: Rows) -> str:
    """The learning rates at which every seed trains."""
    trains = [row["lr"] for row in rows if min(row[ACCURACY]) >= TRAINS]
    return f"{trains[0]:g} to {trains[-1]:g}" if trains else "none"


def best(rows: Rows) -> str:
    row = max(rows, key=lambda row: statistics.fmean(row[ACCURACY]))
    return f"best test accuracy {percent(row[ACCURACY])} % at {row['lr']:g}"


def mean_loss(row: dict) -> list[float]:
    """The mean loss over all steps, for each seed. Lower means faster training."""
    return np.mean(row["loss"], axis=1).tolist()


def mean_drift(row: dict, key: str) -> list[float]:
    """The mean over pieces and layers, for each seed."""
    return np.mean(row[key], axis=(1, 2)).tolist()


def fastest(rows: Rows) -> dict:
    """The row of the learning rate with the lowest mean loss."""
    return min(rows, key=lambda row: statistics.fmean(mean_loss(row)))


def drift(rows: Rows) -> str:
    header = ["network", "learning rate", "drift, products", "drift, inputs"]
    header += ["mean loss", "test accuracy, %"]
    cells = []
    for name, of in split(rows, "network").items():
        quickest = fastest(of)
        for row in of:
            mark = ", its fastest" if row is quickest else ""
            moved = [mean_drift(row, key) for key in ("products", "inputs")]
            measured = [*map(number, moved), number(mean_loss(row))]
            cells.append(
                [name, f"{row['lr']:g}{mark}", *measured, percent(row[ACCURACY])]
            )
    return table(header, cells)


def place(rows: Rows) -> str:
    tables = []
    for key, show in (PERCENT, LOSS):
        cells = [
            [f"{activation}, {norm}", *(show(row[key]) for row in of)]
            for (activation, norm), of in split(rows, "activation", "norm").items()
        ]
        rates = sorted({row["lr"] for row in rows})
        tables += [
            f"{key.capitalize()}:",
            table(["", *(f"{r:g}" for r in rates)], cells),
        ]
    return "\n\n".join(tables)


def noise(rows: Rows) -> str:
    by_statistics = split(rows, "statistics")
    header = ["statistics of", *(f"{row['batch']}" for row in by_statistics["none"])]
    tables = []
    for key in (ACCURACY, "train accuracy"):
        cells = [
            [name, *(percent(row[key]) for row in of)]
            for name, of in by_statistics.items()
        ]
        tables += [f"{key.capitalize()}, %:", table(header, cells)]
    both = zip(by_statistics["batch"], by_statistics["all"], strict=True)
    gained = [
        percent(np.subtract(own[ACCURACY], whole[ACCURACY]).tolist())
        for own, whole in both
    ]
    gains = table(header, [["batch − all", *gained]])
    return "\n\n".join([*tables, "Test accuracy by noise, points:", gains])


ACCURACY = "test accuracy"
PERCENT = (ACCURACY, percent)
LOSS = ("train loss", number)
TABLES = {
    "gradients": gradients,
    "steps": steps,
    "drift": drift,
    "place": place,
    "noise": noise,
}
