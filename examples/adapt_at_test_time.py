"""Eight methods to adapt a network at test time, on corrupted digits.

Trains four convolutions with batch norm on scikit-learn's handwritten digits. The
network then predicts streams of test images, each with one of six corruptions, in
batches of 64, 16 or 1, or in batches of 64 sorted by digit. No labels of test images
are used. These are the methods, and the statistics that they normalize by:

    source                the running statistics of training: no adaptation
    batch statistics      those of the batch (prediction-time batch norm)
    pseudo-samples        a mixture of both, in which training counts as N images
    α-BN                  a mixture of both, in which training counts as the batch does
    TTN                   a mixture of both, with a trained weight for each channel
    AdaBN                 those of the whole stream, measured before any prediction
    average of the stream running statistics that keep moving along the stream
    Tent                  those of the batch; scale and bias are trained to lower the
                          entropy of the predictions
    Tent, renormalized    running statistics of the stream; scale and bias as in Tent

TTN (test-time normalization) trains the weights on labelled training images, with a
random gain, background and noise for each batch. The parameters of the network are
fixed. (The paper also penalizes the distance of the weights from a prior. This script
does not.)

What to expect: see the table. The statistics of a batch help if a corruption scales
and shifts the inputs of layers (contrast, blur). They cannot undo a rotation or a
negative. On single images they gain little or nothing, and on batches of one digit they
do harm. Fixed mixtures and the average of the stream do little or no harm there. In so
few steps, Tent adds little to batch statistics, and on single images it is worse than
no adaptation.

Run it with

    python examples/adapt_at_test_time.py

Options:
        --seed N       Seed of split, parameters, batches and corruptions (default 0).
    --steps N      Training steps (default 200).
        --small        A quick run with little data, and batches of 64 only.
        --out DIR      Folder for the results (default out/adapt_at_test_time).
    --figure PATH  Also write the picture to this path.
    --table PATH   Also write the table to this path.

Needs `pip install 'jaxbn[examples]'`.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from _adapt_at_test_time import ORDER, methods, predictions, ttn_weights
from _adapt_at_test_time_figure import draw
from _corruptions import LEVELS, corrupt
from _covariate_shift import Digits, Network, Variables, accuracy, adabn
from _recipe import digits, finish, options, percent, table, trained
from tqdm import tqdm

STRIDES = (1, 2, 1, 2)
STRENGTH = 4
TTN_STEPS = 60
# The batch size, and whether images are sorted by label.
STREAMS = {
    "batches of 64": (64, False),
    "of 16": (16, False),
    "of 1": (1, False),
    "of 64, sorted": (64, True),
}

Accuracies = dict[str, float]  # By corruption, including "clean".
Results = dict[str, dict[str, Accuracies]]  # By stream and method.


def corrupted(data: Digits, seed: int) -> dict[str, np.ndarray]:
    """The test images under each corruption, all in the same order."""
    streams = {name: corrupt(data.test_x, name, STRENGTH, seed) for name in LEVELS}
    return streams | {"clean": data.test_x}


def study(
    net: Network,
    variables: Variables,
    weights: Any,
    data: Digits,
    streams: dict[str, tuple[int, bool]],
    seed: int,
) -> Results:
    """Accuracies of all methods on all streams."""
    images, labels = corrupted(data, seed), data.test_y
    order = np.argsort(labels, kind="stable")
    # AdaBN measures before it predicts, so the order and the batches do not matter.
    whole = {
        name: accuracy(net, adabn(net, variables, [x]), x, labels).item()
        for name, x in images.items()
    }
    by_size = {}
    results: Results = {}
    for stream, (size, is_sorted) in tqdm(streams.items(), "streams", unit="stream"):
        if size not in by_size:
            by_size[size] = methods(net, variables, weights, size)
        rows = order if is_sorted else np.arange(len(labels))
        x = np.stack([x[rows] for x in images.values()])
        batches = x.reshape(len(x), -1, size, *x.shape[2:])
        results[stream] = {"AdaBN": whole}
        for name, method in by_size[size].items():
            right = predictions(method, batches).reshape(len(x), -1) == labels[rows]
            shares = right.mean(-1).tolist()
            results[stream][name] = dict(zip(images, shares, strict=True))
    return results


def mean(accuracies: Accuracies) -> float:
    """The mean over the corruptions."""
    return statistics.fmean(accuracies[name] for name in LEVELS)


def report(results: Results) -> str:
    """Two tables: means for each stream, and the corruptions of the first stream."""
    first, *_, last = results
    names = sorted(results[first], key=ORDER.index)
    by_stream = [
        [name, *(percent(mean(found[name])) for found in results.values())]
        + [percent(results[stream][name]["clean"]) for stream in (first, last)]
        for name in names
    ]
    by_corruption = [
        [name, *(percent(results[first][name][corruption]) for corruption in LEVELS)]
        for name in names
    ]
    head = ["mean of the six", *results, "clean, of 64", "clean, sorted"]
    return (
        table(head, by_stream)
        + "\n\n"
        + table(["batches of 64", *LEVELS], by_corruption)
    )


def main(argv: Sequence[str] | None = None) -> Results:
    args = options(__doc__, "adapt_at_test_time", argv)
    net = Network(width=8, strides=(2,)) if args.small else Network(strides=STRIDES)
    data = digits(args)
    variables = trained(net, data, args)
    steps = min(args.steps, TTN_STEPS)
    weights = ttn_weights(net, variables, data, args.seed, steps)
    streams = STREAMS
    if args.small:
        streams = {name: stream for name, stream in STREAMS.items() if 64 in stream}
    results = study(net, variables, weights, data, streams, args.seed)
    by_layer = {name: w["test"].tolist() for name, w in weights.items()}
    finish(
        args,
        report(results),
        {"accuracies": results, "TTN": by_layer},
        lambda path: draw(results, by_layer, path),
    )
    return results


if __name__ == "__main__":
    main()
