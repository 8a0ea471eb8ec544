"""Draws the picture that links to the site show: `python docs/social_card.py`."""

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

TARGET = pathlib.Path(__file__).parent / "_static" / "social.png"
BLUE, ORANGE, INK, GREY = "#3b6fd4", "#e0803a", "#1f2328", "#59636e"


def main() -> None:
    """Two distributions, one of them normalized, and the name."""
    figure = plt.figure(figsize=(12, 6.3), dpi=100, facecolor="white")
    axes = figure.add_axes((0.05, 0.1, 0.42, 0.8))
    x = np.linspace(-4, 7, 400)
    axes.plot(x, 0.45 * np.exp(-(((x - 4) / 0.8) ** 2) / 2), color=ORANGE, lw=8)
    axes.plot(x, np.exp(-(x**2) / 2), color=BLUE, lw=11)
    axes.axhline(-0.08, color=GREY, lw=4)
    axes.set_axis_off()
    figure.text(0.5, 0.55, "jaxbn", size=92, weight="bold", color=INK)
    figure.text(0.505, 0.42, "Batch normalization for JAX", size=27, color=INK)
    figure.text(
        0.505, 0.33, "exact under masks and across devices", size=21, color=GREY
    )
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
