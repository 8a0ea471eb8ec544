"""Batch norm in federated learning: what is averaged, and what stays with the client.

Five clients each have a fifth of scikit-learn's handwritten digits, as their own camera
sees them: as they are, dark, as a negative, blurred, noisy. In every round each client
takes some steps on its images, and then the server averages the networks:

    alone    nothing: each client trains its own network
    FedAvg   everything, the running statistics too
    SiloBN   all parameters; statistics stay with the client
    FedBN    all but batch norms; their scale, bias and statistics stay with the client

The clients are a leading axis of all variables, mapped by `jax.vmap`. What is averaged
is a mask: `jaxbn.interop.optax.batch_norm_mask` for the parameters, all or nothing for
the collection `batch_stats`.

A sixth client, with pale images, takes no part in training. It gets the average of all
variables, once with the average of the statistics, and once with statistics measured on
its own unlabelled training images (`jaxbn.population.recalibrate`).

What to expect: see the tables. FedAvg is behind wherever a client's data have other
statistics than the average, and at chance where they are dark. SiloBN and FedBN are
ahead of training alone, by a point or two on average. For a client that was not there,
the averaged statistics are of no use, and measured ones are of some.

Run it with

    python examples/federated.py

Options:
    --seed N       Of split, parameters, batches and noise (default 0).
    --steps N      Rounds (default 40), of 4 steps each.
    --small        Little of everything, in seconds.
    --out DIR      Where results go (default out/federated).
    --figure PATH  Also write the picture there.
    --table PATH   Also write the table there.

Needs `pip install 'jaxbn[examples]'`.
"""

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _corruptions import corrupt
from _covariate_shift import Digits, Network, Variables, accuracy, init
from _federated_figure import draw
from _recipe import digits, finish, options, percent, table
from tqdm import tqdm

from jaxbn.interop.optax import batch_norm_mask
from jaxbn.linen import load_stats, moments_fn
from jaxbn.population import recalibrate

LOCAL_STEPS = 4
BATCH = 32
LEARNING_RATE = 0.05
EVERY = 4  # Rounds between measurements.
METHODS = ("alone", "FedAvg", "SiloBN", "FedBN")


def darker(images: np.ndarray, seed: int) -> np.ndarray:
    return (0.2 * images).astype(np.float32)


def paler(images: np.ndarray, seed: int) -> np.ndarray:
    return (0.6 + 0.3 * images).astype(np.float32)


def corruption(name: str, strength: int):
    return lambda images, seed: corrupt(images, name, strength, seed)


CLIENTS = {
    "as it is": lambda images, seed: images,
    "dark": darker,
    "negative": corruption("inversion", 5),
    "blurred": corruption("blur", 4),
    "noisy": corruption("noise", 2),
}
NEWCOMER = ("new: averaged", "new: measured")
NEW = 64  # Unlabelled images that a new client measures statistics on.
OPTIMIZER = optax.sgd(LEARNING_RATE, momentum=0.9)


def split(data: Digits, seed: int) -> Digits:
    """Data of the clients, with a leading axis: each has its own training images."""
    number = len(CLIENTS)
    size = len(data.train_x) // number
    parts = data.train_x[: number * size].reshape(number, size, 8, 8)
    seen = [see(x, seed) for see, x in zip(CLIENTS.values(), parts, strict=True)]
    test = [see(data.test_x, seed + 1) for see in CLIENTS.values()]
    return Digits(
        np.stack(seen),
        data.train_y[: number * size].reshape(number, size),
        np.stack(test),
        np.stack([data.test_y] * number),
    )


def averaged_by(method: str, variables: Variables) -> Variables:
    """Whether the server averages a variable: a tree of booleans."""
    is_norm = batch_norm_mask(variables["params"], variables["batch_stats"])
    shared = {
        "alone": lambda own: False,
        "FedAvg": lambda own: True,
        "SiloBN": lambda own: True,
        "FedBN": lambda own: not own,
    }[method]
    with_stats = method == "FedAvg"
    return {
        "params": jax.tree.map(shared, is_norm),
        "batch_stats": jax.tree.map(lambda _: with_stats, variables["batch_stats"]),
    }


def mean_of_clients(leaf: jax.Array) -> jax.Array:
    """A plain mean, as all have the same number of images; a count stays a count."""
    return leaf.mean(0).astype(leaf.dtype)


@partial(jax.jit, static_argnums=0)
def communicate(method: str, variables: Variables) -> Variables:
    """Every client gets the mean of what the method averages."""

    def mean(shared, leaf):
        return jnp.broadcast_to(mean_of_clients(leaf), leaf.shape) if shared else leaf

    return jax.tree.map(mean, averaged_by(method, variables), variables)


def local_step(net: Network, variables: Variables, momenta: Any, x, y):
    """A step of one client, on a batch of its own."""

    def loss(params):
        now = {**variables, "params": params}
        logits, new = net.apply(now, x, training=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    updates, momenta = OPTIMIZER.update(grads, momenta)
    params = optax.apply_updates(variables["params"], updates)
    return {"params": params, **new}, momenta


@partial(jax.jit, static_argnums=0)
def step_of_all(net: Network, variables: Variables, momenta: Any, x, y):
    return jax.vmap(partial(local_step, net))(variables, momenta, x, y)


def federated(
    net: Network, method: str, start: Variables, data: Digits, rounds: int, seed: int
) -> tuple[Variables, dict[int, list[float]]]:
    """Variables of all clients, and accuracies by round, just after an average."""
    rng = np.random.default_rng(seed)
    clients, size = data.train_y.shape
    variables = jax.tree.map(lambda leaf: jnp.stack([leaf] * clients), start)
    momenta = jax.vmap(OPTIMIZER.init)(variables["params"])
    history = {}
    for i in tqdm(range(1, rounds + 1), method, unit="round", dynamic_ncols=True):
        for _ in range(LOCAL_STEPS):
            rows = rng.choice(size, min(size, BATCH), replace=False)
            x, y = data.train_x[:, rows], data.train_y[:, rows]
            variables, momenta = step_of_all(net, variables, momenta, x, y)
        variables = communicate(method, variables)
        if i % EVERY == 0 or i == rounds:
            history[i] = of_clients(net, variables, data.test_x, data.test_y).tolist()
    return variables, history


@partial(jax.jit, static_argnums=0)
def of_clients(net: Network, variables: Variables, x, y) -> jax.Array:
    return jax.vmap(partial(accuracy, net))(variables, x, y)


def of_newcomer(net: Network, variables: Variables, data: Digits, seed: int):
    """Accuracies on a new client: with averaged statistics, and with its own."""
    theirs = jax.tree.map(mean_of_clients, variables)
    batches = [paler(data.train_x[:NEW], seed)]
    measured = recalibrate(moments_fn(net, theirs, training=True), batches)
    x, y = paler(data.test_x, seed), data.test_y
    return [
        accuracy(net, now, x, y).item()
        for now in (theirs, load_stats(theirs, measured))
    ]


def report(found: dict[str, dict[str, float]]) -> str:
    columns = [*CLIENTS, "mean", *NEWCOMER]
    rows = [
        [name, *(percent(row[c]) if c in row else "–" for c in columns)]
        for name, row in found.items()
    ]
    return table(["", *columns], rows)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    args = options(__doc__, "federated", argv, steps=40)
    net = Network(width=16, strides=(2, 2) if args.small else (1, 2, 2))
    data = digits(args)
    parts, start = split(data, args.seed), init(net, args.seed).variables
    results, histories = {}, {}
    for method in METHODS:
        variables, history = federated(net, method, start, parts, args.steps, args.seed)
        histories[method] = history
        row = dict(zip(CLIENTS, history[args.steps], strict=True))
        row["mean"] = statistics.fmean(row.values())
        if method != "alone":
            newcomer = of_newcomer(net, variables, data, args.seed)
            row |= dict(zip(NEWCOMER, newcomer, strict=True))
        results[method] = row
    finish(args, report(results), results, lambda path: draw(histories, path))
    return results


if __name__ == "__main__":
    main()
