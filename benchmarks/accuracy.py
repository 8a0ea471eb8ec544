"""How exact is the variance of a batch? Relative errors, beside other libraries'.

Prints three Markdown tables and writes JSON. Errors are those of the worst channel,
against the variance of the same numbers in float64.

    python benchmarks/accuracy.py

Ways: a row for each ratio of mean to standard deviation, a column for Flax's default
and for each way that jaxbn has: two passes, and one pass about a shift that is 0, 1, 3
or 10 standard deviations from the mean. Libraries: each with its defaults, jaxbn warm
(about a shift that is the mean) and in two passes. Cold start: the steps of a training,
where the shift is a running mean that begins at 0, or comes from a sample of the batch.
"""

import argparse
import pathlib
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _layers import LAYERS
from _peers import NAMES, installed, torch_variance
from _tables import RESULTS, markdown, write

import jaxbn

SHAPE = (4096, 128)
# In bfloat16, 1e4 has no neighbour nearer than 64.
RATIOS = {"float32": (0.0, 1.0, 1e2, 1e3, 1e4), "bfloat16": (0.0, 1.0, 1e2, 1e3)}
DISTANCES = (0, 1, 3, 10)
EXCEPT = ("jaxbn jvp", "jaxbn sample", "textbook", "torch channels first")
LIBRARIES = [name for name in NAMES if name not in EXCEPT]
# Of the cold start: large enough that not all of a batch is sampled.
COLD = (16384, 128)
RATIO, STEPS = 1e3, (1, 2, 10, 50, 100, 200, 300, 400)


def batch(
    ratio: float, dtype: str = "float32", seed: int = 0, shape=SHAPE
) -> np.ndarray:
    """Normal numbers with standard deviation 1 about `ratio`."""
    x = np.random.default_rng(seed).normal(ratio, size=shape)
    return x.astype(np.float32).astype(dtype)


def error(var, x: np.ndarray) -> float:
    """Of a variance of `x`, relative, in the worst channel."""
    exact = x.astype(np.float64).var(0)
    return float(np.max(np.abs(np.asarray(var, np.float64) / exact - 1)))


def ways(ratio: float) -> dict:
    """A row of the first table."""
    x = batch(ratio)
    mean, var = x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)
    moments = jax.jit(partial(jaxbn.moments, implementation="xla"))
    found = {"flax default": variance("linen", x), "two passes": moments(x).var}
    for distance in DISTANCES:
        shift = (mean - distance * np.sqrt(var)).astype(np.float32)
        found[f"shift {distance} std off"] = moments(x, shift=shift).var
    return {"mean/std": ratio} | {way: error(v, x) for way, v in found.items()}


def libraries(ratio: float, dtype: str, names: list[str]) -> dict:
    """A row of the second table."""
    x = batch(ratio, dtype)
    found = {name: error(variance(name, x), x) for name in names}
    return {"dtype": dtype, "mean/std": ratio} | found


def variance(name: str, x: np.ndarray):
    """The variance of a batch that a library's layer stores, with momentum 0."""
    if name == "torch":
        return torch_variance(x.astype(np.float32), x.dtype.name)
    zeros, ones = jnp.zeros(SHAPE[-1:]), jnp.ones(SHAPE[-1:])
    mean = jnp.asarray(x.mean(0, dtype=np.float64), jnp.float32)
    train = partial(LAYERS[name]().train, momentum=0.0)
    _, stored = jax.jit(train)(jnp.asarray(x), ones, zeros, mean, ones)
    return stored[1]


def cold_start(steps: Iterable[int]) -> list[dict]:
    """The rows of the third table: each step has a new batch, and moves the shift."""
    momenta = {"shift, momentum 0.99": 0.99, "shift, debiased": jaxbn.debiased(0.99)}
    stats = {way: jaxbn.init_stats(SHAPE[-1]) for way in momenta}
    moments = jax.jit(partial(jaxbn.moments, implementation="xla"))
    sampled = jax.jit(partial(jaxbn.moments, shift="sample", implementation="xla"))
    rows = []
    for step in range(1, max(steps) + 1):
        x = batch(RATIO, seed=step, shape=COLD)
        row = {"step": step}
        for way, momentum in momenta.items():
            m = moments(x, shift=stats[way].mean)
            stats[way] = jaxbn.update(stats[way], m, momentum=momentum)
            row[way] = error(m.var, x)
        if step in steps:
            row["sample"] = error(sampled(x).var, x)
            row["two passes"] = error(moments(x).var, x)
            row["flax default"] = error(variance("linen", x), x)
            rows.append(row)
    return rows


def show(title: str, rows: list[dict], left: int = 1) -> None:
    """Prints a table."""

    def cell(column: int, value) -> str:
        if isinstance(value, str):
            return value
        return f"{value:g}" if column < left else f"{value:.1e}"

    cells = [[cell(i, v) for i, v in enumerate(row.values())] for row in rows]
    print(f"\n{title}\n\n{markdown(rows[0], cells, left)}", flush=True)


def main() -> None:
    """Prints each table when it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS)
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=NAMES)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS / "accuracy.json")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    size = f"{SHAPE[0]} × {SHAPE[1]}, worst channel"
    found = {"ways": [ways(ratio) for ratio in RATIOS["float32"]]}
    show(f"Relative error of the variance, float32, {size}", found["ways"])
    names = installed(args.libraries)
    found["libraries"] = [libraries(r, d, names) for d in RATIOS for r in RATIOS[d]]
    show("Beside other libraries", found["libraries"], left=2)
    found["cold_start"] = cold_start(args.steps)
    show(f"Steps of a training at mean/std {RATIO:g}", found["cold_start"])
    write(args.out, {"shape": SHAPE}, **found)


if __name__ == "__main__":
    main()
