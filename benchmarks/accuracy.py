"""How exact is the variance of a batch? Relative errors, beside Flax's.

Prints a Markdown table: a row for each ratio of mean to standard deviation, a column
for Flax's default and for each way that jaxbn has: two passes, and one pass about a
shift that is 0, 1, 3 or 10 standard deviations from the mean. The error is that of the
worst channel against float64.

    python benchmarks/accuracy.py
"""

import flax.linen as nn
import jax
import numpy as np

import jaxbn

SHAPE = (4096, 128)
RATIOS = (0.0, 1.0, 1e2, 1e3, 1e4)
DISTANCES = (0, 1, 3, 10)


def flax_default(x: np.ndarray) -> jax.Array:
    """The batch variance that Flax's layer stores, with momentum 0."""
    layer = nn.BatchNorm(use_running_average=False, momentum=0.0)
    variables = layer.init(jax.random.key(0), x)
    return layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["var"]


def errors(ratio: float) -> list[float]:
    """Of each column, for one row."""
    x = np.random.default_rng(0).normal(ratio, size=SHAPE).astype(np.float32)
    mean, var = x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)
    moments = jax.jit(jaxbn.moments)
    found = [flax_default(x), moments(x).var]
    for distance in DISTANCES:
        shift = (mean - distance * np.sqrt(var)).astype(np.float32)
        found.append(moments(x, shift=shift).var)
    return [float(np.max(np.abs(np.asarray(v, np.float64) / var - 1))) for v in found]


def main() -> None:
    """Prints the table."""
    shifts = [f"shift {d} std off" for d in DISTANCES]
    head = ["mean/std", "flax default", "two passes", *shifts]
    print(f"Relative error of the variance, float32, {SHAPE[0]} × {SHAPE[1]}, worst\n")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for ratio in RATIOS:
        cells = [f"{ratio:g}", *(f"{e:.1e}" for e in errors(ratio))]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
