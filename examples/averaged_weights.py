"""Averages of weights, and three choices for the statistics of the average.

Trains convolutions with batch norm on scikit-learn's handwritten digits, and averages
weights in five ways:

    EMA            an exponential moving average over a run, at a constant learning rate
    SWA            the mean of checkpoints of the same run (stochastic weight averaging)
    soup           the mean of three runs that share their first steps
    two networks   halfway between two networks that were trained separately
    aligned        the same, with the channels of one in the order of the other's

Each average is tested with the statistics of one member (one of the networks that are
averaged), with the average of the members' statistics, and with statistics that are
measured again (`jaxbn.population.recalibrate`).

What to expect (80 steps, seeds 0 and 1): for an average of similar networks (EMA over
about ten steps, SWA, soup), the choice hardly matters, and new statistics are not
always the best. An EMA over about 50 steps still contains weights of the first steps.
With seed 1 it has 90 % with the statistics of the last weights, 96 % with averaged and
98 % with new ones. Halfway between two networks that were trained separately, the
statistics decide: 10 % with those of a member, 17 % with averaged and 46 to 49 % with
new ones. With aligned channels these are 41 to 44, 82 to 86 and 92 to 94 %. In a
network with batch norm, alignment and new statistics amount to the method REPAIR.

Run it with

    python examples/averaged_weights.py

Options:
    --seed N       Seed of split, parameters and batches (default 0).
    --steps N      Training steps of each run (default 80).
    --small        A quick run with little data.
    --out DIR      Folder for the results (default out/averaged_weights).
    --figure PATH  Also write the picture to this path.
    --table PATH   Also write the table to this path.

Needs `pip install 'jaxbn[examples]'`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from _covariate_shift import (
    Digits,
    Network,
    State,
    Variables,
    accuracy,
    init,
    train_step,
)
from _digits_figure import STYLE
from _recipe import digits, finish, options, percent, table, trained
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

import jaxbn
from jaxbn.interop.optax import incremental_update
from jaxbn.linen import load_stats, moments_fn

DECAYS = (0.9, 0.98)  # Of the EMA, per step.
HEAD = ["", "of one member", "averaged", "measured again"]
LOOKS = {
    "as they are, averaged": ("#333333", "s", (0, (3.5, 1.5))),
    "as they are, measured again": ("#333333", "s", "-"),
    "aligned, averaged": ("#0072B2", "o", (0, (3.5, 1.5))),
    "aligned, measured again": ("#0072B2", "o", "-"),
}

Found = dict[str, list[float]]  # Accuracies of each average.


def recalibrated(net: Network, variables: Variables, data: Digits) -> Variables:
    """The same weights, with statistics measured for these weights."""
    measure = moments_fn(net, variables, training=True)
    batches = np.array_split(data.train_x, -(-len(data.train_x) // 128))
    return load_stats(variables, jaxbn.population.recalibrate(measure, batches))


def mean(members: Sequence[Variables]) -> Variables:
    """The mean of weights and statistics. Step counts stay integers."""
    average = members[0]
    for number, member in enumerate(members[1:], 2):
        average = incremental_update(member, average, 1 / number)
    return average


def run(
    net: Network, state: State, data: Digits, seed: int, steps: int, numbers: range
) -> Iterator[State]:
    """The states after each of the steps `numbers`, in a schedule of `steps`."""
    for i in tqdm(numbers, "training", unit="step", dynamic_ncols=True):
        state = train_step(net, state, data, seed, steps, i)
        yield state


def channels(net: Network, variables: Variables, x: np.ndarray) -> list[np.ndarray]:
    """The standardized channels after each batch norm and relu: (places, channels)."""
    _, found = net.apply(
        variables,
        x,
        training=False,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(
            module, jaxbn.linen.BatchNorm
        ),
    )
    layers = []
    for i in range(len(net.strides)):
        (y,) = found["intermediates"][f"BatchNorm_{i}"]["__call__"]
        y = np.maximum(y, 0).reshape(-1, net.width)
        layers.append((y - y.mean(0, keepdims=True)) / (y.std(0, keepdims=True) + 1e-6))
    return layers


def aligned(
    net: Network, fixed: Variables, other: Variables, x: np.ndarray
) -> Variables:
    """`other`, with its channels in the order of the most similar channels of `fixed`.

    The order of a layer's channels is arbitrary as long as the next layer uses the same
    order, so the network computes the same function as before.
    """
    pairs = zip(channels(net, fixed, x), channels(net, other, x), strict=True)
    orders = [linear_sum_assignment(a.T @ b, maximize=True)[1] for a, b in pairs]
    new = jax.tree.map(np.asarray, other)
    params = new["params"]
    for i, order in enumerate(orders):
        kernel = params[f"Conv_{i}"]["kernel"][..., order]
        params[f"Conv_{i}"]["kernel"] = kernel[:, :, orders[i - 1]] if i else kernel
        for collection in ("params", "batch_stats"):
            norm = new[collection][f"BatchNorm_{i}"]
            for name, value in norm.items():
                norm[name] = value[order] if value.ndim else value
    dense = params["Dense_0"]["kernel"]
    by_place = dense.reshape(-1, net.width, dense.shape[-1])
    params["Dense_0"]["kernel"] = by_place[:, orders[-1]].reshape(dense.shape)
    return new


def averages_of_one_run(
    net: Network, data: Digits, seed: int, steps: int
) -> dict[str, tuple[Variables, Variables]]:
    """Averages of the states of one run, each with one of its members."""
    start = init(net, seed)
    # In so long a schedule, the cosine hardly falls: the rate is nearly constant.
    states = list(run(net, start, data, seed, 100 * steps, range(steps)))
    last = states[-1].variables
    found = {"last weights": (last, last)}
    for decay in DECAYS:
        ema = start.variables
        for state in states:
            ema = incremental_update(state.variables, ema, 1 - decay)
        found[f"EMA, decay {decay}"] = ema, last
    checkpoints = [state.variables for state in states[steps // 4 :: 5]]
    found["SWA"] = mean(checkpoints), checkpoints[-1]
    branch = steps // 10
    members = []
    for i in (1, 2, 3):
        numbers = range(branch + 1, steps)
        *_, end = run(net, states[branch], data, seed + i, steps, numbers)
        members.append(end.variables)
    found["soup of three"] = mean(members), members[-1]
    return found


def accuracies(
    net: Network, data: Digits, average: Variables, member: Variables
) -> list[float]:
    """Accuracies of the average, with each choice of statistics."""
    choices = [
        {**average, "batch_stats": member["batch_stats"]},
        average,
        recalibrated(net, average, data),
    ]
    return [accuracy(net, v, data.test_x, data.test_y).item() for v in choices]


def path_between(
    net: Network, data: Digits, one: Variables, other: Variables, shares: np.ndarray
) -> list[list[float]]:
    """Accuracies on the line from one network to the other."""
    line = [incremental_update(other, one, share) for share in shares]
    return [accuracies(net, data, point, one) for point in line]


def draw(paths: Found, shares: np.ndarray, path: Path) -> None:
    """Writes the picture: accuracy on the line from one network to another."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.5, 4), layout="constrained")
        axes = figure.subplots()
        for name, (color, marker, dashes) in LOOKS.items():
            axes.plot(
                shares,
                paths[name],
                color=color,
                marker=marker,
                linestyle=dashes,
                label=name,
            )
        axes.set_title("Between two networks trained separately")
        axes.set_xlabel("share of the second network's weights")
        axes.set_ylabel("test accuracy")
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        figure.legend(
            title="channels, statistics", loc="outside right center", fontsize=9
        )
        figure.savefig(path, dpi=200)


def main(argv: Sequence[str] | None = None, net: Network | None = None) -> Found:
    args = options(__doc__, "averaged_weights", argv, steps=80)
    net, data = net or Network(), digits(args)
    one_run = averages_of_one_run(net, data, args.seed, args.steps)
    found = {name: accuracies(net, data, *pair) for name, pair in one_run.items()}

    one, other = (trained(net, data, args, args.seed + i) for i in (10, 11))
    ordered = aligned(net, one, other, data.train_x)
    found["one network"] = accuracies(net, data, one, one)
    shares = np.linspace(0, 1, 3 if args.small else 9)
    paths: Found = {}
    for kind, end in {"as they are": other, "aligned": ordered}.items():
        points = path_between(net, data, one, end, shares)
        found[f"two networks, {kind}"] = points[len(points) // 2]
        paths[f"{kind}, averaged"] = [point[1] for point in points]
        paths[f"{kind}, measured again"] = [point[2] for point in points]

    rows = [[name, *map(percent, row)] for name, row in found.items()]
    results = {"accuracies": found, "shares": shares.tolist(), "paths": paths}
    finish(args, table(HEAD, rows), results, lambda path: draw(paths, shares, path))
    return found


if __name__ == "__main__":
    main()
