"""The figures of results that the pages show, from `benchmarks/results`.

    python benchmarks/figures.py

Writes to docs/figures, or another `--folder`. Needs `pip install 'jaxbn[examples]'`.
"""

import argparse
import pathlib

from _tables import read
from matplotlib import rc_context
from matplotlib.figure import Figure

FOLDER = pathlib.Path(__file__).parents[1] / "docs/figures"
# As the figures of the examples.
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#333333",
    "axes.grid": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}
# Okabe and Ito's colours, which every kind of colour vision can tell apart.
LOOKS = {
    "flax default": ("#D55E00", "s", "-"),
    "shift, momentum 0.99": ("#0072B2", "o", "-"),
    "shift, debiased": ("#009E73", "D", "-"),
    "sample": ("#CC79A7", "v", "-"),
    "two passes": ("#333333", "^", (0, (3.5, 1.5))),
}
LABELS = {"flax default": "flax, its default", "sample": 'jaxbn, shift="sample"'}


def cold_start() -> Figure:
    """Errors of the variance over the steps of a training that starts from 0."""
    rows = read("accuracy")["cold_start"]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for way, (color, marker, dashes) in LOOKS.items():
        axes.plot(
            [row["step"] for row in rows],
            [row[way] for row in rows],
            color=color,
            marker=marker,
            linestyle=dashes,
            label=LABELS.get(way, f"jaxbn, {way}"),
        )
    axes.set(xscale="log", yscale="log", xlabel="step")
    axes.set_ylabel("relative error of the variance")
    axes.set_title("Error of the variance, mean/std = 1000")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


FIGURES = {"cold_start": cold_start}


def main() -> None:
    """Writes every figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
    folder = parser.parse_args().folder
    with rc_context(STYLE):
        for name, draw in FIGURES.items():
            draw().savefig(folder / f"{name}.png", dpi=200)


if __name__ == "__main__":
    main()
