"""Batch norm in federated learning: what is averaged, and what stays with the client.

Each of five clients has a fifth of scikit-learn's handwritten digits, which look
different for each client: unchanged, dark, negative, blurred or noisy. In every round,
each client takes a few steps on its own images. Then the server averages the networks:

    alone    nothing: each client trains its own network
    FedAvg   everything, including the running statistics
    SiloBN   all parameters; the statistics stay with the client
    FedBN    everything except batch norms; their scale, bias and statistics stay with
             the client

All variables have a leading axis of clients, which `jax.vmap` maps. A mask says what is
averaged: `jaxbn.interop.optax.batch_norm_mask` for the parameters, and all or nothing
for the collection `batch_stats`.

A sixth client, with pale images, takes no part in training. It gets the average of all
variables, once with the averaged statistics, and once with statistics measured on its
own unlabelled training images (`jaxbn.population.recalibrate`).

What to expect: see the table. FedAvg is worse if a client's data have other statistics
than the average, and guesses on dark images. SiloBN and FedBN are better than training
alone, by one or two points on average. For the new client, averaged statistics are much
worse than measured ones.

Run it with

    python examples/federated.py

Options:
    --seed N       Seed of split, parameters, batches and noise (default 0).
    --steps N      Rounds, of 4 steps each (default 40).
    --small        A quick run with little data.
    --out DIR      Folder for the results (default out/federated).
    --figure PATH  Also write the picture to this path.
    --table PATH   Also write the table to this path.

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
NEW = 64  # The number of unlabelled images on which the new client measures statistics.
OPTIMIZER = optax.sgd(LEARNING_RATE, momentum=0.9)


def split(data: Digits, seed: int) -> Digits:
    """The data of all clients, on a leading axis. Each has its own training images."""
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
    """A tree of booleans: whether the server averages each variable."""
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
    """The plain mean: all have the same number of images. Integers stay integers."""
    return leaf.mean(0).astype(leaf.dtype)


@partial(jax.jit, static_argnums=0)
def communicate(method: str, variables: Variables) -> Variables:
    """Gives every client the mean of the variables that the method averages."""

    def mean(shared, leaf):
        return jnp.broadcast_to(mean_of_clients(leaf), leaf.shape) if shared else leaf

    return jax.tree.map(mean, averaged_by(method, variables), variables)


def local_step(net: Network, variables: Variables, momenta: Any, x, y):
    """A step of one client, on its own batch."""

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
    """The variables of all clients, and the accuracies by round, after averaging."""
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
