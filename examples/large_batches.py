"""LARS and LAMB on large batches, with batch norm, with and without masks.

Trains convolutions with batch norm on scikit-learn's handwritten digits, for 30 steps
on batches of 1024 out of 1285 images. The optimizers are SGD with momentum, LARS and
LAMB, each at three learning rates with warmup. LARS and LAMB scale the step of each
array by the ratio of its norm to that of its update. It is usual to leave scale, bias
and the biases of dense layers out of weight decay and, in LARS, out of that ratio. The
mask is `jaxbn.interop.optax.weight_decay_mask` in both places.

What to expect (seeds 0 and 1): in so few steps, the masks do not help. SGD has about
95 % at all three rates, with and without a mask. LARS and LAMB are not clearly better.
With masks they lose accuracy at the larger rates (LARS with seed 1 at all rates), and
the scales more than double. In LARS, scale and bias then take the full learning rate,
which is ten times that of SGD. If SGD trains scale and bias at its own rate, the scales
stay near 1 and LARS has 91 to 94 %.

Run it with

    python examples/large_batches.py

Options:
    --seed N       Seed of split, parameters and batches (default 0).
    --steps N      Training steps (default 30).
    --small        A quick run with little data.
    --out DIR      Folder for the results (default out/large_batches).
    --table PATH   Also write the table to this path.

Needs `pip install 'jaxbn[examples]'`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _covariate_shift import Digits, Network, Variables, accuracy, init
from _recipe import digits, finish, options, percent, table
from tqdm import tqdm

from jaxbn.interop.optax import weight_decay_mask

BATCH = 1024
FACTORS = (1 / 3, 1.0, 3.0)  # That the learning rate is multiplied by.

Make = Callable[[int], optax.GradientTransformation]
Results = dict[str, dict[str, Any]]


def warm(rate: float, steps: int) -> optax.Schedule:
    return optax.warmup_cosine_decay_schedule(0.0, rate, -(-steps // 5), steps)


def sgd(mask: Any, steps: int) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(1e-3, mask=mask)
    return optax.chain(decay, optax.sgd(warm(0.3, steps), momentum=0.9))


def lars(mask: Any, steps: int) -> optax.GradientTransformation:
    return optax.lars(
        warm(3.0, steps),
        weight_decay=1e-3,
        trust_coefficient=0.01,
        weight_decay_mask=mask,
        trust_ratio_mask=mask,
    )


def lamb(mask: Any, steps: int) -> optax.GradientTransformation:
    """LAMB. It has no mask for the ratio, which applies to all arrays."""
    return optax.lamb(warm(0.1, steps), weight_decay=0.1, mask=mask)


def lars_and_sgd(mask: Any, steps: int) -> optax.GradientTransformation:
    """LARS where the mask is True, and SGD with its own learning rate elsewhere."""

    def labels(params):
        return jax.tree.map(lambda own: "lars" if own else "sgd", mask(params))

    rules: dict[Any, optax.GradientTransformation] = {
        "lars": lars(everything, steps),
        "sgd": optax.sgd(warm(0.3, steps), momentum=0.9),
    }
    return optax.partition(rules, labels)


def everything(params: Any) -> Any:
    """A mask that is True everywhere."""
    return jax.tree.map(lambda _: True, params)


METHODS: dict[str, Make] = {
    "SGD, no mask": partial(sgd, everything),
    "SGD, mask": partial(sgd, weight_decay_mask),
    "LARS, no mask": partial(lars, everything),
    "LARS, masks": partial(lars, weight_decay_mask),
    "LARS, SGD for the rest": partial(lars_and_sgd, weight_decay_mask),
    "LAMB, no mask": partial(lamb, everything),
    "LAMB, mask": partial(lamb, weight_decay_mask),
}


@partial(jax.jit, static_argnames="net")
def gradients(net: Network, variables: Variables, x: jax.Array, y: jax.Array):
    """Gradients and new statistics."""

    def loss(params):
        given = {**variables, "params": params}
        logits, new = net.apply(given, x, training=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), new

    return jax.grad(loss, has_aux=True)(variables["params"])


@partial(jax.jit, static_argnames=("make", "steps"))
def updated(
    make: Make, steps: int, factor: float, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """Parameters and state of the optimizer after one of `steps` steps.

    The updates of all these optimizers are proportional to the learning rate, so
    `factor` multiplies them instead, and one compiled program serves all rates.
    """
    updates, opt_state = make(steps).update(grads, opt_state, params)
    updates = jax.tree.map(lambda u: factor * u, updates)
    return optax.apply_updates(params, updates), opt_state


def trained(
    net: Network, data: Digits, make: Make, factor: float, seed: int, steps: int
) -> Variables:
    """The variables after `steps` steps on large batches."""
    variables = init(net, seed).variables
    opt_state = make(steps).init(variables["params"])
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.permutation(len(data.train_x))[:BATCH]
        grads, new = gradients(net, variables, data.train_x[rows], data.train_y[rows])
        params, opt_state = updated(
            make, steps, factor, grads, opt_state, variables["params"]
        )
        variables = {"params": params, **new}
    return variables


def mean_scale(params: Any) -> float:
    norms = [p["scale"] for name, p in params.items() if name.startswith("BatchNorm")]
    return float(jnp.concatenate(norms).mean())


def main(argv: Sequence[str] | None = None, net: Network | None = None) -> Results:
    args = options(__doc__, "large_batches", argv, steps=30)
    net, data = net or Network(width=16, strides=(1, 2, 2)), digits(args)
    results: Results = {}
    for name, make in (bar := tqdm(METHODS.items(), unit="method")):
        bar.set_description(name)
        runs = [
            trained(net, data, make, factor, args.seed, args.steps)
            for factor in FACTORS
        ]
        results[name] = {
            "accuracies": [
                accuracy(net, v, data.test_x, data.test_y).item() for v in runs
            ],
            "scale": mean_scale(runs[1]["params"]),
        }
    head = ["", "rate / 3", "rate", "3 · rate", "mean scale"]
    rows = [
        [name, *map(percent, found["accuracies"]), f"{found['scale']:.2f}"]
        for name, found in results.items()
    ]
    finish(args, table(head, rows), results)
    return results


if __name__ == "__main__":
    main()
