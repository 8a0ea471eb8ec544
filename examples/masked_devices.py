"""Padded sequences in linen, on eight devices, with micro-batches.

Reads each handwritten digit as a sequence of its rows, cut off at a random length. The
batch is padded, split over eight simulated devices under `jax.jit`, and split into two
micro-batches for each step of the optimizer. The statistics of batch norm ignore the
padding, are those of the whole batch, and take one step for both micro-batches.

At the end, the running means after one step are compared with those of one device and a
whole batch. What to expect: in the first layer they agree to float32 precision. In
later layers they differ slightly, because each micro-batch is normalized by its own
statistics in training.

Run it with

    python examples/masked_devices.py

Options:
    --steps N    Optimizer steps (default 100).

Needs `pip install 'jaxbn[examples]'`.
"""

import argparse
import os
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _options import positive
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import jaxbn

DEVICES, MICRO_BATCHES, BATCH = 8, 2, 128
STATE = ("batch_stats", "batch_moments")


class Data(NamedTuple):
    """Sequences of shape (n, 8, 8), masks of shape (n, 8, 1), and labels."""

    x: np.ndarray
    mask: np.ndarray
    y: np.ndarray


class Net(nn.Module):
    """Two convolutions along time, and the mean over the positions in the mask."""

    accumulate: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Logits of ten digits."""
        norm = partial(jaxbn.linen.BatchNorm, not train, accumulate=self.accumulate)
        for _ in range(2):
            x = norm(momentum=0.9)(nn.Conv(32, (3,), use_bias=False)(x), mask=mask)
            x = jnp.where(mask, nn.relu(x), 0)  # The next layer sees no padding.
        return nn.Dense(10)(x.sum(1) / mask.sum(1))


def load(seed: int) -> Data:
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    x = (images[order].reshape(-1, 8, 8) / 16).astype(np.float32)
    lengths = rng.integers(4, 9, len(x))
    mask = (np.arange(8) < lengths[:, None])[..., None]
    return Data(np.where(mask, x, 0), mask, labels[order])


def optimizer(every: int) -> optax.MultiSteps:
    mask = jaxbn.interop.optax.weight_decay_mask
    return optax.MultiSteps(optax.adamw(3e-3, mask=mask), every_k_schedule=every)


def init(net: Net, batch: Data, every: int) -> tuple:
    """Variables, and the state of the optimizer."""
    variables = net.init(jax.random.key(0), batch.x, batch.mask, train=False)
    return variables, optimizer(every).init(variables["params"])


@partial(jax.jit, static_argnums=(0, 4))
def micro_step(net: Net, variables, opt_state, batch: Data, every: int):
    mutable = [name for name in STATE if name in variables]

    def loss(params):
        given = {**variables, "params": params}
        logits, new = net.apply(given, batch.x, batch.mask, train=True, mutable=mutable)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.y)
        return losses.mean(), new

    params = variables["params"]
    grads, new = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer(every).update(grads, opt_state, params)
    variables = {"params": optax.apply_updates(params, updates), **new}
    if net.accumulate:  # The window ends with the step of the optimizer.
        done = optimizer(every).has_updated(opt_state)
        closed = jaxbn.linen.end_accumulation(variables)
        variables = jax.tree.map(partial(jnp.where, done), closed, variables)
    return variables, opt_state


@partial(jax.jit, static_argnums=0)
def accuracy(net: Net, variables, data: Data) -> jax.Array:
    logits = jnp.asarray(net.apply(variables, data.x, data.mask, train=False))
    return (logits.argmax(-1) == data.y).mean()


def train(net: Net, data: Data, steps: int, parts: int, place=None):
    """The variables after `steps` steps of one batch each, split into `parts`."""
    rng = np.random.default_rng(1)
    variables, opt_state = init(net, Data(*(a[:2] for a in data)), parts)
    for _ in range(steps):
        rows = rng.choice(len(data.x), BATCH, replace=False)
        for own in np.split(rows, parts):
            batch = Data(*(a[own] for a in data))
            batch = batch if place is None else jax.device_put(batch, place)
            variables, opt_state = micro_step(net, variables, opt_state, batch, parts)
    return variables


def distance(one: dict, other: dict, layer: str) -> float:
    """The largest difference of two running means, in standard deviations."""
    a, b = (v["batch_stats"][layer] for v in (one, other))
    return float(jnp.max(jnp.abs(a["mean"] - b["mean"]) / jnp.sqrt(b["var"])))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=positive(int), default=100, metavar="N")
    args = parser.parse_args(argv)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P("data"))
    data = load(0)
    known, held_out = (
        Data(*(a[s] for a in data)) for s in (slice(1400), slice(1400, None))
    )

    spread = train(Net(accumulate=True), known, args.steps, MICRO_BATCHES, place)
    one_step = train(Net(accumulate=True), known, 1, MICRO_BATCHES, place)
    whole_step = train(Net(), known, 1, 1)
    found = {
        "test accuracy": float(accuracy(Net(), spread, held_out)),
        "first layer": distance(one_step, whole_step, "BatchNorm_0"),
        "second layer": distance(one_step, whole_step, "BatchNorm_1"),
    }
    print(
        f"test accuracy after {args.steps} steps: {100 * found['test accuracy']:.1f} %"
    )
    print("running means after one step, compared with one device and a whole batch:")
    for layer in ("first layer", "second layer"):
        print(f"  {layer}: {found[layer]:.1e} standard deviations apart")
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
