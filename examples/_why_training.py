"""Batches, training and evaluation of "why batch norm"."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _digits_training import Digits
from _why_networks import Net, Params, logits

BATCH_SIZE = 128
MOMENTUM = 0.9
DIVERGED = 10.0  # Larger losses, and NaN, count as this.

Rate = jax.Array | float | optax.Schedule


class Batch(NamedTuple):
    """The images of one step.

    Attributes:
      x: Images as rows.
      y: Labels.
      counted: Weights of the images in the loss; None for all 1.
      statistics: Weights in the statistics, as a column; None for all 1.
    """

    x: jax.Array
    y: jax.Array
    counted: jax.Array | None = None
    statistics: jax.Array | None = None


class State(NamedTuple):
    """What training changes."""

    params: Any  # `Params`. optax returns the type that it is given.
    opt_state: Any
    step: jax.Array


Draw = Callable[[jax.Array], Batch]  # Makes a batch from a key.


def random_batches(data: Digits) -> Draw:
    """Batches of training images."""
    size = min(BATCH_SIZE, len(data.train_x))

    def draw(key: jax.Array) -> Batch:
        rows = jax.random.choice(key, len(data.train_x), (size,), replace=False)
        return Batch(data.train_x[rows], data.train_y[rows])

    return draw


def loss(params: Params, net: Net, batch: Batch, key: jax.Array) -> jax.Array:
    """Mean cross-entropy of the batch, in nats."""
    out = logits(net, params, batch.x, weights=batch.statistics, key=key)
    losses = optax.softmax_cross_entropy_with_integer_labels(out, batch.y)
    return jnp.average(losses, weights=batch.counted)


def optimizer(lr: Rate) -> optax.GradientTransformation:
    return optax.sgd(lr, momentum=MOMENTUM)


def begin(params: Params, lr: Rate) -> State:
    return State(params, optimizer(lr).init(params), jnp.zeros((), int))


def advance(
    net: Net, state: State, lr: Rate, steps: int, draw: Draw, key: jax.Array
) -> tuple[State, jax.Array]:
    """Takes `steps` steps. Returns the new state and the losses of their batches."""

    def step(state: State, _):
        of_batch, of_noise = jax.random.split(jax.random.fold_in(key, state.step))
        value, grads = jax.value_and_grad(loss)(
            state.params, net, draw(of_batch), of_noise
        )
        updates, opt_state = optimizer(lr).update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state, state.step + 1), value

    return jax.lax.scan(step, state, length=steps)


def evaluate(net: Net, params: Params, data: Digits) -> dict[str, jax.Array]:
    """Loss and accuracy on training and test images, without disturbance.

    The norms have the statistics of all training images with these parameters. Test
    images go through in the same batch, with weight 0 in the statistics.
    """
    x = jnp.concatenate([data.train_x, data.test_x])
    y = jnp.concatenate([data.train_y, data.test_y])
    train = jnp.arange(len(x)) < len(data.train_x)
    net = replace(net, disturbed=False)
    out = logits(net, params, x, weights=train[:, None], key=jax.random.key(0))
    losses = optax.softmax_cross_entropy_with_integer_labels(out, y)
    correct = out.argmax(-1) == y
    found = {}
    for name, counted in (("train", train), ("test", ~train)):
        found[f"{name} loss"] = capped(jnp.average(losses, weights=counted))
        found[f"{name} accuracy"] = jnp.average(correct, weights=counted)
    return found


def capped(losses: jax.Array) -> jax.Array:
    return jnp.where(losses < DIVERGED, losses, DIVERGED)
