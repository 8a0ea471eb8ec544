"""The experiments of "why batch norm".

Each takes the data, split separately for every seed, and the number of training steps.
It returns rows. A row says what was trained and what was measured, with a value for
each seed.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _digits_training import Digits
from _why_networks import NORMS, Net, Params, init, scaled, seen
from _why_training import (
    Batch,
    State,
    advance,
    begin,
    capped,
    evaluate,
    loss,
    random_batches,
)

import jaxbn
from jaxbn.population import drift as drift_of

DEPTHS = (5, 20, 50)
GAINS = {"He": 1.0, "half of it": 0.5}  # Factors of the initial kernels.
GENTLE = 0.003  # The learning rate in the experiment on gradients, for all depths.
DEPTH = 10  # Layers in the experiment on learning rates.
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHALLOW = 5  # Layers in the experiments on drift and on the place of the norm.
DRIFT_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
DRIFT_RATE = 0.01  # The rate at which networks are compared step by step.
PIECES = 20  # Of training. Drift is measured over each.
PLACE_ACTIVATIONS = ("relu", "sigmoid")
PLACE_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FEW = 512  # Training images in the experiment on noise.
BATCHES = (8, 16, 32, 128, 512)
NOISE_DEPTH = 3
NOISE_RATE = 0.03
NOISE_STEPS = 3  # The factor of the number of steps, because batches are small.

Rows = list[dict[str, Any]]
Found = dict[str, jax.Array]


def over_seeds(
    function: Callable[..., Found], net: Net, data: Digits, values: Sequence[float]
) -> Found:
    """`function(net, data, parameters, key, values)` for each seed, on axis 0."""
    seeds = range(len(data.train_x))
    first = jax.tree.map(lambda *a: jnp.stack(a), *(init(net, seed) for seed in seeds))
    keys = jax.vmap(jax.random.key)(jnp.arange(len(seeds)))
    mapped = jax.vmap(partial(function, net), (0, 0, 0, None))
    return jax.jit(mapped)(data, first, keys, jnp.array(values))


def rows_of(found: Found, name: str, values: Sequence, **same) -> Rows:
    """A row for each value. The axes of the arrays are seeds, values, and others."""
    return [
        same | {name: value} | {key: a[:, i].tolist() for key, a in found.items()}
        for i, value in enumerate(values)
    ]


def gradients(data: Digits, steps: int) -> Rows:
    """The gradient of each layer's kernel, before and after half of the steps."""
    rows: Rows = []
    for depth in DEPTHS:
        for norm in ("none", "before"):
            measure = partial(gradient_norms, steps // 2)
            found = over_seeds(measure, Net(depth, norm), data, [*GAINS.values()])
            rows += rows_of(found, "init", [*GAINS], depth=depth, norm=norm)
    return rows


def gradient_norms(
    steps: int, net: Net, data: Digits, params: Params, key, gains: jax.Array
) -> Found:
    def norms(state: State) -> jax.Array:
        batch = Batch(data.train_x, data.train_y)
        grads = jax.grad(loss)(state.params, net, batch, key)
        return jnp.linalg.norm(grads.layers.kernel, axis=(1, 2))

    def one(gain: jax.Array) -> Found:
        first = begin(scaled(params, gain), GENTLE)
        last, _ = advance(net, first, GENTLE, steps, random_batches(data), key)
        found = {"at first": norms(first), "trained": norms(last)}
        return found | evaluate(net, last.params, data)

    return jax.vmap(one)(gains)


def steps(data: Digits, steps: int) -> Rows:
    """Results of training at every learning rate, without and with batch norm."""
    rows: Rows = []
    for norm in ("none", "before"):
        found = trained_at(Net(DEPTH, norm), data, steps, RATES)
        rows += rows_of(found, "lr", RATES, norm=norm)
    return rows


def place(data: Digits, steps: int) -> Rows:
    """The same for batch norm before and after the activation, for two activations."""
    rows: Rows = []
    for activation in PLACE_ACTIVATIONS:
        for norm in NORMS:
            net = Net(SHALLOW, norm, activation)
            found = trained_at(net, data, steps, PLACE_RATES)
            same = {"activation": activation, "norm": norm}
            rows += rows_of(found, "lr", PLACE_RATES, **same)
    return rows


def trained_at(net: Net, data: Digits, steps: int, rates: Sequence[float]) -> Found:
    def of_seed(net: Net, data: Digits, params: Params, key, rates: jax.Array) -> Found:
        def one(lr: jax.Array) -> Found:
            draw = random_batches(data)
            state, _ = advance(net, begin(params, lr), lr, steps, draw, key)
            return evaluate(net, state.params, data)

        return jax.vmap(one)(rates)

    return over_seeds(of_seed, net, data, rates)


def drift(data: Digits, steps: int) -> Rows:
    """How far the inputs of layers move in each piece of training, and the loss."""
    rows: Rows = []
    for name, net in {
        "without": Net(SHALLOW),
        "with": Net(SHALLOW, "before"),
        "disturbed": Net(SHALLOW, "before", disturbed=True),
    }.items():
        found = over_seeds(partial(watched, steps), net, data, DRIFT_RATES)
        rows += rows_of(found, "lr", DRIFT_RATES, network=name)
    return rows


def watched(
    steps: int, net: Net, data: Digits, params: Params, key, rates: jax.Array
) -> Found:
    length = max(1, steps // PIECES)

    def measured(state: State):
        noise = jax.random.fold_in(key, state.step)
        return seen(net, state.params, data.train_x, noise)

    def one(lr: jax.Array) -> Found:
        def piece(carry, _):
            state, old = carry
            state, losses = advance(net, state, lr, length, random_batches(data), key)
            new = measured(state)
            moved = [nats(*pair) for pair in zip(old, new, strict=True)]
            return (state, new), (*moved, losses)

        first = begin(params, lr)
        carry = first, measured(first)
        (state, _), moved = jax.lax.scan(piece, carry, length=steps // length)
        products, inputs, losses = moved
        found = {"products": products, "inputs": inputs, "loss": capped(losses.ravel())}
        return found | evaluate(net, state.params, data)

    return jax.vmap(one)(rates)


def nats(old: jaxbn.Moments, new: jaxbn.Moments) -> jax.Array:
    """The drift of each layer: the median over its channels."""

    def of_layer(old: jaxbn.Moments, new: jaxbn.Moments) -> jax.Array:
        stats = jaxbn.RunningStats(old.mean, old.var, jnp.ones((), int))
        return jnp.median(drift_of(stats, new).kl)

    return jax.vmap(of_layer)(old, new)


def noise(data: Digits, steps: int) -> Rows:
    """Test accuracy after training on few images, with batches of several sizes.

    "batch" normalizes by the statistics of the batch, and "all" by those of all
    training images at each step. Both have the loss of the batch, with its noise.
    """
    data = few(data)
    rows: Rows = []
    for statistics, norm in (("none", "none"), ("batch", "before"), ("all", "before")):
        train = partial(with_noise, statistics, steps)
        found = over_seeds(train, Net(NOISE_DEPTH, norm), data, BATCHES)
        rows += rows_of(found, "batch", BATCHES, statistics=statistics)
    return rows


def with_noise(
    statistics: str,
    steps: int,
    net: Net,
    data: Digits,
    params: Params,
    key: jax.Array,
    batches: jax.Array,
) -> Found:
    steps = NOISE_STEPS * steps
    lr = optax.cosine_decay_schedule(NOISE_RATE, steps)

    def one(size: jax.Array) -> Found:
        def draw(key: jax.Array) -> Batch:
            order = jax.random.permutation(key, len(data.train_x))
            counted = (order < size).astype(float)
            own = counted[:, None] if statistics == "batch" else None
            return Batch(data.train_x, data.train_y, counted, own)

        state, _ = advance(net, begin(params, lr), lr, steps, draw, key)
        return evaluate(net, state.params, data)

    return jax.vmap(one)(batches)


def few(data: Digits) -> Digits:
    """Fewer images for training. All others are for testing."""
    x, y = data.train_x, data.train_y
    return Digits(
        x[:, :FEW],
        y[:, :FEW],
        jnp.concatenate([x[:, FEW:], data.test_x], 1),
        jnp.concatenate([y[:, FEW:], data.test_y], 1),
    )


EXPERIMENTS: dict[str, Callable[[Digits, int], Rows]] = {
    "gradients": gradients,
    "steps": steps,
    "drift": drift,
    "place": place,
    "noise": noise,
}
