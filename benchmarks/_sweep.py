"""Every kind of shape, by the CPU kernels and by XLA: is there one that is slow?

Rows are how many values each channel has. They come with the channels last, first (some
of the rows are behind them), and as two feature axes before all rows.
"""

import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _peers import Run, jax_run
from _timing import interleaved, quartiles

import jaxbn

ROWS = (1, 2, 3, 4, 8, 32, 1000, 10**6)
CHANNELS = (1, 3, 32, 1024, 10**5)
LAYOUTS = ("last", "first", "two axes")
DTYPES = ("float32", "bfloat16")
MODES = ("moments", "forward", "forward+backward")
LARGEST = 2 * 10**7  # Elements of an array.
BLOCK = 0.004  # Seconds of calls in a round: there are a thousand programs.


def shape_of(layout: str, rows: int, channels: int) -> tuple[tuple, tuple]:
    """The shape of x and its feature axes."""
    if layout == "last":
        return (rows, channels), (1,)
    if layout == "first":
        outer, inner = _two_factors(rows)
        return (outer, channels, inner), (1,)
    return (*_two_factors(channels), rows), (0, 1)


def sweep(rows: Iterable[int], channels: Iterable[int], rounds: int) -> list[dict]:
    """A row for each shape and dtype: quartiles in milliseconds, and who computes."""
    shapes = [
        (layout, n, c)
        for layout in LAYOUTS
        for n in rows
        for c in channels
        if n * c <= LARGEST
    ]
    return [_measured(*s, dtype, rounds) for s in shapes for dtype in DTYPES]


HEAD = ["x", "features", "dtype", "by"]
HEAD += [column for mode in MODES for column in (f"{mode}, ms", "of XLA's")]


def cells(row: dict) -> list[str]:
    """A line of the table."""
    shape = " × ".join(map(str, row["shape"]))
    line = [shape, *map(str, (row["feature_axes"], row["dtype"], row["by"]))]
    for mode in MODES:
        ours, xla = (row[mode][name][1] for name in ("jaxbn", "xla"))
        line += [f"{ours:.3g}", f"{ours / xla:.2f}"]
    return line


def _measured(layout: str, rows: int, channels: int, dtype: str, rounds: int) -> dict:
    shape, axes = shape_of(layout, rows, channels)
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in "xd")
    vector = jnp.ones([shape[axis] for axis in axes])
    runs: dict[str, Run] = {}
    row: dict = {"shape": shape, "feature_axes": axes, "dtype": dtype, "by": "XLA"}
    for name, implementation in (("jaxbn", None), ("xla", "xla")):
        for mode in MODES:
            f = jax.jit(partial(_step, mode, axes, implementation))
            compiled = f.lower(x, vector, dy).compile()
            if 'custom_call_target="jaxbn_' in (compiled.as_text() or ""):
                row["by"] = "kernels"
            runs[f"{mode} {name}"] = jax_run(compiled, x, vector, dy)
    found = interleaved(runs, rounds, BLOCK)
    for mode in MODES:
        row[mode] = {n: quartiles(found[f"{mode} {n}"]) for n in ("jaxbn", "xla")}
    jax.clear_caches()
    return row


def _step(mode: str, axes: tuple, implementation: str | None, x, vector, dy):
    options = {"feature_axes": axes, "implementation": implementation}
    if mode == "moments":
        return jaxbn.moments(x, **options)
    f = partial(jaxbn.batch_norm, **options)
    if mode == "forward":
        return f(x, vector, vector)
    y, vjp, m = jax.vjp(f, x, vector, vector, has_aux=True)
    return y, m, vjp(dy)


def _two_factors(n: int) -> tuple[int, int]:
    """As near to each other as possible, the smaller one first."""
    small = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return small, n // small
