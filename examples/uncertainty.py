"""Predictions with an uncertainty: Monte Carlo batch normalization.

Trains six convolutions with ordinary batch norm on scikit-learn's handwritten digits.
At inference, it normalizes by the statistics of a batch of training images instead of
the running statistics. It repeats this with 32 batches, and averages the predictions.
The noise of the statistics is that of training, so the average is over models that are
plausible after training (Teye et al., 2018). Three ways to predict with the same
parameters are compared on clean and corrupted test images:

    running statistics   one prediction: ordinary inference
    MC, batches of 128   32 predictions, batches as large as in training
    MC, batches of 16    32 predictions, smaller batches: more noise than in training

The table shows the accuracy, the mean confidence, the negative log-likelihood (NLL),
and the expected calibration error (ECE): the difference between confidence and
accuracy, averaged over 15 bins of confidence.

What to expect: see the table. With batches as large as in training, the predictions
hardly change. On corrupted images, where the confidence is too high, smaller batches
lower it, and with it NLL and ECE, but not the accuracy. They do not make the network
calibrated.

Run it with

    python examples/uncertainty.py

Options:
    --seed N       Seed of split, parameters, batches and corruptions (default 0).
    --steps N      Training steps (default 200).
    --small        A quick run with little data.
    --out DIR      Folder for the results (default out/uncertainty).
    --figure PATH  Also write the picture to this path.
    --table PATH   Also write the table to this path.

Needs `pip install 'jaxbn[examples]'`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _corruptions import LEVELS, corrupt
from _covariate_shift import Digits, Network, Variables
from _digits_figure import STYLE
from _recipe import digits, finish, options, table, trained
from matplotlib import rc_context
from matplotlib.figure import Figure

from jaxbn.linen import load_stats, moments_fn, running_stats
from jaxbn.population import adapt

SAMPLES = 32
SIZES = (128, 16)
STRENGTH = 3
BINS = 15
LOOKS = {"clean": ("#0072B2", "o"), "corrupted": ("#D55E00", "s")}

Probabilities = dict[str, np.ndarray]  # By method.
Scores = dict[str, float]


@partial(jax.jit, static_argnums=0)
def sampled_stats(net: Network, variables: Variables, batches: jax.Array):
    """The statistics of all layers, for each batch of training images."""

    def of_batch(batch):
        moments = moments_fn(net, variables, training=True)(batch)
        return adapt(running_stats(variables), moments)

    return jax.vmap(of_batch)(batches)


@partial(jax.jit, static_argnums=0)
def probabilities(net: Network, variables: Variables, x: jax.Array) -> jax.Array:
    """The probability of each class, by ordinary inference."""
    return jax.nn.softmax(jnp.asarray(net.apply(variables, x, training=False)))


@partial(jax.jit, static_argnums=0)
def averaged(net: Network, variables: Variables, stats, x: jax.Array) -> jax.Array:
    """The probability of each class, averaged over sets of statistics."""

    def by_one(stats):
        return probabilities(net, load_stats(variables, stats), x)

    return jax.vmap(by_one)(stats).mean(0)


def training_batches(images: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Batches drawn as in training: no image occurs twice in a batch."""
    rng = np.random.default_rng(seed)
    rows = [rng.choice(len(images), size, replace=False) for _ in range(SAMPLES)]
    return images[np.stack(rows)]


def predictions(
    net: Network, variables: Variables, data: Digits, sets: list[np.ndarray], seed: int
) -> Probabilities:
    """The predictions of all methods, for the concatenated sets of images."""
    found = {"running statistics": [probabilities(net, variables, x) for x in sets]}
    for size in SIZES:
        batches = training_batches(data.train_x, size, seed)
        stats = sampled_stats(net, variables, batches)
        found[f"MC, batches of {size}"] = [
            averaged(net, variables, stats, x) for x in sets
        ]
    return {method: np.concatenate(p) for method, p in found.items()}


def reliability(p: np.ndarray, labels: np.ndarray) -> list[tuple[float, float, float]]:
    """Confidence, accuracy and share of the predictions in each nonempty bin."""
    confidence, right = p.max(-1), p.argmax(-1) == labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        (confidence[own].mean().item(), right[own].mean().item(), own.mean().item())
        for own in (bins == b for b in range(BINS))
        if own.any()
    ]


def scores(p: np.ndarray, labels: np.ndarray) -> Scores:
    """Accuracy and ECE as shares, and NLL in nats."""
    of_label = p[np.arange(len(labels)), labels]
    bins = reliability(p, labels)
    return {
        "accuracy": (p.argmax(-1) == labels).mean().item(),
        "NLL": -np.log(of_label.clip(1e-12)).mean().item(),
        "ECE": sum(share * abs(seen - right) for seen, right, share in bins),
        "confidence": p.max(-1).mean().item(),
    }


def report(results: dict[str, dict[str, Scores]]) -> str:
    head = ["", "accuracy, %", "confidence, %", "ECE, %", "NLL"]
    rows = [
        [
            f"{kind}: {method}",
            f"{100 * s['accuracy']:.1f}",
            f"{100 * s['confidence']:.1f}",
            f"{100 * s['ECE']:.1f}",
            f"{s['NLL']:.3f}",
        ]
        for kind, by_method in results.items()
        for method, s in by_method.items()
    ]
    return table(head, rows)


def draw(found: dict[str, Probabilities], labels: dict[str, np.ndarray], path: Path):
    """A reliability diagram for each method."""
    methods = list(found["clean"])
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        panels = figure.subplots(1, len(methods), sharey=True)
        for axes, method in zip(panels, methods, strict=True):
            axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
            for kind, (color, marker) in LOOKS.items():
                bins = reliability(found[kind][method], labels[kind])
                few = 10 / len(labels[kind])  # Too few predictions for an accuracy.
                seen, right, share = np.array([b for b in bins if b[2] > few]).T
                axes.plot(seen, right, color=color, linewidth=1)
                axes.scatter(
                    seen, right, 10 + 300 * share, color=color, marker=marker, alpha=0.7
                )
            axes.set_title(method)
            axes.set_xlabel("confidence")
            axes.set(xlim=(0, 1.05), ylim=(0, 1.05))
        panels[0].set_ylabel("accuracy")
        for kind, (color, marker) in LOOKS.items():
            panels[0].plot([], [], color=color, marker=marker, label=kind)
        panels[0].legend(loc="upper left")
        figure.savefig(path, dpi=200)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Scores]]:
    args = options(__doc__, "uncertainty", argv)
    net = Network(width=8, strides=(2, 2)) if args.small else Network()
    data = digits(args)
    variables = trained(net, data, args)
    corrupted = [corrupt(data.test_x, name, STRENGTH, args.seed) for name in LEVELS]
    images = {"clean": [data.test_x], "corrupted": corrupted}
    labels = {"clean": data.test_y, "corrupted": np.tile(data.test_y, len(LEVELS))}
    found = {
        kind: predictions(net, variables, data, sets, args.seed)
        for kind, sets in images.items()
    }
    results = {
        kind: {method: scores(p, labels[kind]) for method, p in by_method.items()}
        for kind, by_method in found.items()
    }
    finish(args, report(results), results, lambda path: draw(found, labels, path))
    return results


if __name__ == "__main__":
    main()
