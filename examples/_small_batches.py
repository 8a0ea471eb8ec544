"""Network and training of the study of small batches."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _digits_training import Digits, load_data

from jaxbn import layers

DEPTH = 3
WIDTH = 100
WINDOW = 1024  # Examples after which the weight in the running statistics is 1/e.
REFERENCE_BATCH = 32  # The batch size at which the learning rate is --lr.
NORMS = ["batch norm", "renorm", "ghost", "streaming"]


@dataclass(frozen=True)
class Setting:
    """One cell of the table. It is hashable, so that it can be a static argument."""

    norm: str
    batch: int
    steps: int
    lr: float
    epsilon: float
    limits: tuple[float, float]  # Where r_max and d_max of renorm end.
    frozen: bool = False  # Whether the kernels stay as they were at first.


class State(NamedTuple):
    """What training changes, and the largest gradient norm so far."""

    params: Any
    stats: list[Any]
    opt_state: Any
    peak: jax.Array


def ghost_group(batch: int) -> int:
    """Half of the batch, but at least 2 examples, so that there is a variance."""
    return max(2, batch // 2)


def layer(setting: Setting) -> layers.Layer:
    # The averages cover the same number of examples, not steps, at every batch size.
    momentum = math.exp(-setting.batch / WINDOW)
    same: Any = {"momentum": momentum, "epsilon": setting.epsilon}
    if setting.norm == "batch norm":
        return layers.standard(**same)
    if setting.norm == "ghost":
        return layers.ghost(group_size=ghost_group(setting.batch), **same)
    if setting.norm == "streaming":
        return layers.streaming(**same)
    r_max, d_max = setting.limits
    return layers.renorm(
        **same,
        r_max=relaxing(1.0, r_max, setting.steps, until=0.3),
        d_max=relaxing(0.0, d_max, setting.steps, until=0.2),
    )


def relaxing(start: float, end: float, steps: int, until: float):
    """A limit of renorm: `start` in the warm-up, `end` after a share `until` of steps.

    Ioffe relaxes the limits from step 5000 of about 130 000 on, d_max until step 25 000
    and r_max until step 40 000. Here these are the same shares of fewer steps.
    """
    if math.isinf(end):  # No line reaches infinity: clip nothing from the start.
        return end
    warm_up = max(1, round(0.04 * steps))
    rise = max(1, round(until * steps) - warm_up)
    return optax.linear_schedule(start, end, rise, transition_begin=warm_up)


def optimizer(setting: Setting) -> optax.GradientTransformation:
    # In proportion to the batch, so that an example moves the parameters equally far
    # at every batch size.
    peak = setting.lr * setting.batch / REFERENCE_BATCH
    schedule = optax.cosine_decay_schedule(peak, setting.steps)
    sgd = optax.sgd(schedule, momentum=0.9)
    if not setting.frozen:
        return sgd
    frozen = {"kernels": True, "norms": False, "head": False}
    return optax.chain(sgd, optax.masked(optax.set_to_zero(), frozen))


def init(setting: Setting, key: jax.Array) -> State:
    """The initial state. A key gives the same kernels for all norms and batch sizes."""
    widths = [64] + [WIDTH] * DEPTH
    kernels, norms, stats = [], [], []
    for i, (before, after) in enumerate(pairwise(widths)):
        normal = jax.random.normal(jax.random.fold_in(key, i), (before, after))
        kernels.append(normal * math.sqrt(2 / before))
        of_norm, state = layer(setting).init(after)
        norms.append(of_norm)
        stats.append(state)
    head = {"kernel": jnp.zeros((WIDTH, 10)), "bias": jnp.zeros((1, 10))}
    params = {"kernels": kernels, "norms": norms, "head": head}
    return State(params, stats, optimizer(setting).init(params), jnp.zeros(()))


def logits(setting: Setting, params, stats, x: jax.Array, *, training: bool):
    """Logits of the rows of `x`, and the new running statistics."""
    norm = layer(setting)
    new = []
    for kernel, of_norm, old in zip(
        params["kernels"], params["norms"], stats, strict=True
    ):
        x, state = norm.apply(of_norm, old, x @ kernel, training=training)
        new.append(state)
        x = jax.nn.relu(x)
    return x @ params["head"]["kernel"] + params["head"]["bias"], new


def train_step(setting: Setting, state: State, x: jax.Array, y: jax.Array) -> State:
    def loss(params):
        out, stats = logits(setting, params, state.stats, x, training=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(out, y)
        return losses.mean(), stats

    grads, stats = jax.grad(loss, has_aux=True)(state.params)
    updates, opt_state = optimizer(setting).update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    peak = jnp.maximum(state.peak, optax.tree.norm(grads["kernels"]))
    return State(params, stats, opt_state, peak)


def first_states(setting: Setting, seeds: jax.Array) -> State:
    return jax.vmap(lambda seed: init(setting, jax.random.key(seed)))(seeds)


@partial(jax.jit, static_argnums=0)
def advance(
    setting: Setting, states: State, data: Digits, order: jax.Array, start, stop
) -> State:
    """Takes the steps from `start` to `stop`, all seeds at once.

    The bounds are operands, so that every piece is the same compiled program.
    """

    def one(state: State, data: Digits, order: jax.Array) -> State:
        def step(i, state):
            rows = order[i]
            return train_step(setting, state, data.train_x[rows], data.train_y[rows])

        return jax.lax.fori_loop(start, stop, step, state)

    return jax.vmap(one)(states, data, order)


@partial(jax.jit, static_argnums=0)
def evaluate(setting: Setting, states: State, data: Digits) -> dict[str, jax.Array]:
    """Accuracies on the test images, with either kind of statistics.

    "inference" normalizes by the running statistics. "training" normalizes as
    in training, by batches of the same size.
    """

    def correct(state: State, x, y, training: bool):
        out, _ = logits(setting, state.params, state.stats, x, training=training)
        return (out.argmax(-1) == y).mean()

    def one(state: State, data: Digits):
        x, y = data.test_x, data.test_y
        batches = len(x) // setting.batch
        used = batches * setting.batch
        split = x[:used].reshape(batches, -1, 64), y[:used].reshape(batches, -1)
        in_batches = jax.lax.map(lambda xy: correct(state, xy[0], xy[1], True), split)
        return {
            "inference": correct(state, x, y, False),
            "training": in_batches.mean(),
        }

    return jax.vmap(one)(states, data)


def stacked_data(seeds: int) -> Digits:
    """The data, split separately for every seed, with seeds on the leading axis."""
    splits = [load_data(seed) for seed in range(seeds)]
    return Digits(*(jnp.stack(arrays) for arrays in zip(*splits, strict=True)))


def stacked_orders(seeds: int, rows: int, examples: int) -> np.ndarray:
    """For every seed, the rows in the order of training, shuffled in each epoch.

    The order is the same for every batch size.
    """
    epochs = -(-examples // rows)
    orders = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(rows) for _ in range(epochs)])
        orders.append(order[:examples])
    return np.stack(orders)
