"""The picture of the study of covariate shift: accuracies, and where drift enters."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from _corruptions import LEVELS, UNITS
from _digits_figure import STYLE
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter

# Okabe and Ito's colors, which people with any color vision can tell apart. Each method
# has one, with a marker and a dash pattern.
LOOKS = [
    ("#333333", "s", "-"),
    ("#0072B2", "o", "-"),
    ("#56B4E9", "^", (0, (3.5, 1.5))),
    ("#D55E00", "v", (0, (3.5, 1.5))),
    ("#009E73", "D", "-"),
]
DRIFT_OF = {"contrast": " of the original", "rotation": "°"}
FLOOR = 1e-2  # In nats. Smaller drift gets the same color.


def draw(results: dict, drifts: dict, strength: int, paths: Iterable[Path]) -> None:
    """Writes the picture to every path."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 9), layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[2.5, 1])[
            :, 0
        ]
        accuracy_panels(upper, results)
        drift_panels(lower, drifts, strength)
        for path in paths:
            figure.savefig(path, dpi=200)


def accuracy_panels(figure: SubFigure, results: dict) -> None:
    """A panel for each corruption, starting with clean images."""
    panels = figure.subplots(2, 3, sharey=True)
    for axes, name in zip(panels.flat, LEVELS, strict=True):
        by_strength = {0: results["clean"][0]} | results[name]
        for method, look in zip(by_strength[0], LOOKS, strict=True):
            color, marker, dashes = look
            axes.plot(
                list(by_strength),
                [found[method] for found in by_strength.values()],
                color=color,
                marker=marker,
                linestyle=dashes,
                label="source (not adapted)" if method == "source" else method,
            )
        axes.set_title(name)
        axes.set_xlabel(UNITS[name])
        axes.set_xticks(range(6), [f"{level:g}" for level in LEVELS[name]])
        axes.set_ylim(-0.02, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy")
    heading(figure, "Accuracy on corrupted digits, by where the statistics come from")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)


def heading(figure: SubFigure, text: str) -> None:
    figure.suptitle(text, x=0.015, ha="left", fontsize=12, fontweight="bold")


def drift_panels(figure: SubFigure, drifts: dict, strength: int) -> None:
    """Layers × channels, side by side in the same colors."""
    panels = figure.subplots(1, len(DRIFT_OF), sharey=True)
    pictures = {name: layers_by_channels(drifts[name]) for name in DRIFT_OF}
    norm = LogNorm(FLOOR, max(1.0, *(kl.max() for kl in pictures.values())))
    for axes, (name, kl) in zip(panels, pictures.items(), strict=True):
        image = heat_map(axes, kl, norm)
        axes.set_title(f"{name}: {LEVELS[name][strength]:g}{DRIFT_OF[name]}")
    panels[0].set_ylabel("layer")
    heading(figure, "Drift of each channel from its running statistics")
    bar = figure.colorbar(image, ax=panels, extend="min", pad=0.015, format="%g")
    bar.set_label("symmetric KL, nats")


def heat_map(axes: Axes, kl: np.ndarray, norm: LogNorm):
    layers, channels = kl.shape
    # Numbered from 1, with the first layer at the top.
    edges = (0.5, channels + 0.5, layers + 0.5, 0.5)
    image = axes.imshow(
        kl.clip(FLOOR), norm=norm, cmap="viridis", aspect="auto", extent=edges
    )
    axes.grid(False)
    axes.set_xlabel("channel")
    axes.set_xticks([1, *range(8, channels + 1, 8)])
    axes.set_yticks(range(1, layers + 1))
    return image


def layers_by_channels(drift: dict) -> np.ndarray:
    """The divergence of every channel. The first layer is that next to the input."""
    return np.stack([np.asarray(layer.kl) for layer in drift.values()])
