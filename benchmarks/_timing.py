"""Times that can be compared: every library's in every round, in one process."""

import importlib.util
import math
import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from _machine import threads
from _peers import Run, jax_run

BLOCK = 0.01


def interleaved(
    runs: Mapping[str, Run], rounds: int, block: float = BLOCK
) -> dict[str, list[float]]:
    """Milliseconds a call, in each round, of functions that make so many calls.

    A round takes all of them in a new order, so that a machine that slows down does so
    for all. What is timed is `block` seconds of calls, after one that is not: it wakes
    the threads of the one library, and outlasts those of the last, which go on spinning
    for a while and take a core each.
    """
    counts = {name: _count(run, block) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffled = list(runs), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            runs[name](1)
            found[name].append(1e3 * _seconds(runs[name], counts[name]))
    return found


def quartiles(times: list[float]) -> list[float]:
    """The first, the median, and the third, to four digits."""
    return [float(f"{q:.4g}") for q in np.quantile(times, (0.25, 0.5, 0.75))]


def copies(shape, dtype: str) -> dict[str, Run]:
    """Ways to copy an array of this size; the fastest is the limit of the machine."""
    if jax.default_backend() != "cpu":
        x = jnp.ones(shape, dtype)
        return {
            "copy by XLA": jax_run(jax.jit(jnp.copy), x),
            "negation": jax_run(jax.jit(jnp.negative), x),
        }
    bytes_ = math.prod(shape) * jnp.dtype(dtype).itemsize
    source, target = (np.ones(bytes_, np.uint8) for _ in range(2))
    ways = {
        f"copy by {n} threads": _numpy_copy(source, target, n) for n in {1, threads()}
    }
    if importlib.util.find_spec("torch"):
        ways["copy by torch"] = _torch_copy(source, target)
    return ways


def _numpy_copy(source: np.ndarray, target: np.ndarray, count: int) -> Run:
    pool = ThreadPoolExecutor(count)
    parts = [np.array_split(a, count) for a in (target, source)]

    def run(n: int) -> None:
        for _ in range(n):
            if count == 1:
                np.copyto(target, source)
            else:
                list(pool.map(np.copyto, *parts))

    return run


def _torch_copy(source: np.ndarray, target: np.ndarray) -> Run:
    import torch

    a, b = map(torch.from_numpy, (source, target))

    def run(n: int) -> None:
        for _ in range(n):
            b.copy_(a)

    return run


def _count(run: Run, block: float) -> int:
    """How many calls last `block` seconds; the first, which compiles, is not timed."""
    run(1)
    return max(1, math.ceil(block / max(_seconds(run, 1), 1e-7)))


def _seconds(run: Run, n: int) -> float:
    start = time.perf_counter()
    run(n)
    return (time.perf_counter() - start) / n
