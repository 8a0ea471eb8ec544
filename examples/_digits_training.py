"""Data, network and training of the digits demo."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import jaxbn

BATCH_SIZE = 128
EVALUATE_EVERY = 5
LEARNING_RATES = [d * 10.0**e for e in range(-4, 1) for d in (1, 2, 5)] + [10.0]
TRAINS = 0.9  # A learning rate "trains" if it reaches this test accuracy.


class Digits(NamedTuple):
    """Images as rows of 64 standardized pixels, and their labels 0 to 9."""

    train_x: jax.Array
    train_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


class Network(nn.Module):
    """Layers of Dense, optional batch norm and sigmoid, then a Dense to 10 classes."""

    batch_norm: bool
    depth: int = 12
    width: int = 100

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        """Logits of the rows of `x`."""
        for _ in range(self.depth):
            # Batch norm subtracts the mean, so a bias before it would have no effect.
            x = nn.Dense(self.width, use_bias=not self.batch_norm)(x)
            if self.batch_norm:
                # Debiased: after the first step, the initial statistics have no weight,
                # so the curve over the first steps does not show them.
                norm = jaxbn.linen.BatchNorm(momentum=jaxbn.debiased(0.9))
                x = norm(x, use_running_average=not training)
            x = nn.sigmoid(x)
        return nn.Dense(10)(x)


class State(NamedTuple):
    """What training changes."""

    params: Any
    batch_stats: Any
    opt_state: Any


@dataclass
class Run:
    """One network in training: its state, and the evaluations so far."""

    net: Network
    state: State
    gradient_norms: list[float]
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # Of training and evaluating, without compiling.
    sweep: dict[float, float] = field(default_factory=dict)


def load_data(seed: int) -> Digits:
    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        x, y, test_size=0.25, stratify=y, random_state=seed
    )
    scaler = StandardScaler().fit(train_x)
    return Digits(
        jnp.asarray(scaler.transform(train_x), jnp.float32),
        jnp.asarray(train_y),
        jnp.asarray(scaler.transform(test_x), jnp.float32),
        jnp.asarray(test_y),
    )


def sgd(lr: float) -> optax.GradientTransformation:
    return optax.sgd(lr, momentum=0.9)


def init(net: Network, data: Digits, seed: int) -> State:
    """The initial state. Both networks get the same kernels."""
    variables = net.init(jax.random.key(seed), data.train_x[:1], training=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return State(params, batch_stats, sgd(0.0).init(params))


def batch(data: Digits, seed: int, step: int) -> tuple[jax.Array, jax.Array]:
    """The examples of one step, which depend on the seed and the step only."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    rows = jax.random.choice(key, len(data.train_x), (BATCH_SIZE,), replace=False)
    return data.train_x[rows], data.train_y[rows]


def gradient(net: Network, state: State, x: jax.Array, y: jax.Array):
    """The gradient of the mean cross-entropy, and the new running statistics."""

    def loss(params):
        logits, new = net.apply(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            training=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), new.get("batch_stats", {})

    return jax.grad(loss, has_aux=True)(state.params)


@partial(jax.jit, static_argnums=0)
def train(
    net: Network,
    state: State,
    data: Digits,
    seed: int,
    lr: float,
    start: int,
    stop: int,
) -> State:
    """Takes the steps from `start` to `stop`.

    The bounds are operands, so one compiled program serves every number of steps. It
    compiles once, and a run in two pieces gives the same bits as a run in one.
    """

    def step(i, state):
        grads, batch_stats = gradient(net, state, *batch(data, seed, i))
        updates, opt_state = sgd(lr).update(grads, state.opt_state)
        params = optax.apply_updates(state.params, updates)
        return State(params, batch_stats, opt_state)

    return jax.lax.fori_loop(start, stop, step, state)


@partial(jax.jit, static_argnums=0)
def evaluate(net: Network, state: State, data: Digits) -> dict[str, jax.Array]:
    """Loss and accuracy on both halves of the data, with the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found = {}
    for name, x, y in [
        ("train", data.train_x, data.train_y),
        ("test", data.test_x, data.test_y),
    ]:
        logits = jnp.asarray(net.apply(variables, x, training=False))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        found[f"{name}_loss"] = losses.mean()
        found[f"{name}_accuracy"] = (logits.argmax(-1) == y).mean()
    return found


@partial(jax.jit, static_argnums=0)
def gradient_norms(net: Network, state: State, data: Digits, seed: int):
    """The gradient norm of each kernel on the first batch, starting at the input."""
    grads, _ = gradient(net, state, *batch(data, seed, 0))
    layers = [grads[f"Dense_{i}"]["kernel"] for i in range(net.depth + 1)]
    return jnp.stack([jnp.linalg.norm(kernel) for kernel in layers])


def new_run(net: Network, data: Digits, seed: int) -> Run:
    """A run at step 0."""
    state = init(net, data, seed)
    run = Run(net, state, gradient_norms(net, state, data, seed).tolist())
    record(run, data, 0)
    train(net, state, data, seed, 0.0, 0, 0)  # Compiles, outside of the measured time.
    return run


def record(run: Run, data: Digits, step: int) -> None:
    found = evaluate(run.net, run.state, data)
    run.history.append({"step": step} | {k: v.item() for k, v in found.items()})


def pieces(start: int, steps: int) -> Iterator[tuple[int, int]]:
    """The pieces between one evaluation and the next."""
    while start < steps:
        stop = min(steps, start - start % EVALUATE_EVERY + EVALUATE_EVERY)
        yield start, stop
        start = stop


def advance(
    run: Run, data: Digits, seed: int, lr: float, start: int, stop: int
) -> None:
    """Trains and evaluates one piece."""
    began = time.perf_counter()
    run.state = train(run.net, run.state, data, seed, lr, start, stop)
    record(run, data, stop)
    run.seconds += time.perf_counter() - began


def sweep(
    run: Run, data: Digits, seed: int, steps: int, tick: Callable[[int], object]
) -> None:
    """Trains from the start at every learning rate. `tick` counts the steps."""
    first = init(run.net, data, seed)
    for lr in LEARNING_RATES:
        state = train(run.net, first, data, seed, lr, 0, steps)
        run.sweep[lr] = evaluate(run.net, state, data)["test_accuracy"].item()
        tick(steps)
