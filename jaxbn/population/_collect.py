"""The moments of a whole data set, batch by batch."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxbn import _devices
from jaxbn._moments import Moments, merge_moments, whole_count
from jaxbn.population._trees import map_layers, named_layers

OF_PARTS = (
    "The batch that `moments_fn` was given is a {}. If the model takes a part of it, "
    "give it that part: pass `(x for x, _ in batches)`, or make `moments_fn` with "
    "`method=lambda model, batch: model(batch[0])`."
)


def collect(moments_fn: Callable[[Any], Any], batches: Iterable[Any]) -> Any:
    """Pools the moments of all batches, holding one batch in memory at a time.

        n = Σnₖ      mean = Σnₖ·meanₖ / n
        var = Σnₖ·varₖ / n + Σnₖ|meanₖ − mean|² / n        over batches k

    Batches may differ in size. Their moments are merged in pairs, then in pairs of
    pairs, so rounding errors grow with the logarithm of the number of batches.

    Args:
      moments_fn: A function that takes a batch and returns a tree of `Moments`, with
        the same layers for every batch. `jaxbn.linen.moments_fn` and
        `jaxbn.nnx.moments_fn` make one.
      batches: Any iterable of arguments for `moments_fn`, including `tqdm(batches)`.

    Returns:
      A tree of `Moments` with the same structure as for one batch.

    Raises:
      TypeError: The result of `moments_fn` has leaves other than `Moments`, or
        `batches` is an array or a dict.
      ValueError: There is no batch, or a batch has no layers, or other layers than the
        first batch.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0], [9.0]])]
      >>> m = jaxbn.population.collect(jaxbn.moments, batches)
      >>> print(m.mean, m.var, m.count)
      [5.] [8.] 5.0

    References:
      Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983).
    """
    return pool(partial(measured, moments_fn), batches)[1]


def measured(moments_fn: Callable[[Any], Any], batch: Any) -> Any:
    """Calls `moments_fn`; if it fails on a batch of parts, the error gets a note."""
    try:
        return moments_fn(batch)
    except Exception as error:
        if isinstance(batch, (tuple, list, Mapping)):
            error.add_note(OF_PARTS.format(_described(batch)))
        raise


def _described(batch: tuple | list | Mapping) -> str:
    if isinstance(batch, Mapping):
        return f"dict of {sorted(map(str, batch))}"
    return f"{type(batch).__name__} of {len(batch)}"


def pool(moments_fn: Callable[[Any], Any], batches: Iterable[Any]) -> tuple[int, Any]:
    """The number of batches, and the result of `collect`."""
    if isinstance(batches, (jax.Array, np.ndarray, Mapping)):
        raise TypeError(
            f"`batches` is {type(batches).__name__}, expected an iterable of batches. "
            "Pass `[x]` if it is one batch, `list(x)` if it is an array of batches."
        )
    done: list[tuple[int, Any]] = []  # Each has at least twice the next's.
    for batch in batches:
        size, part = 1, moments_fn(batch)
        named_layers("moments_fn(batch)", part, Moments)
        while done and done[-1][0] == size:
            size, part = 2 * size, _merged(done.pop()[1], part)
        done.append((size, part))
    if not done:
        raise ValueError(
            "`batches` is empty. If it is an iterator, another loop may have used it "
            "up: pass a list, or make a new one."
        )
    number, pooled = done.pop()
    while done:
        size, part = done.pop()
        number, pooled = number + size, _merged(part, pooled)
    return number, pooled


def _merged(first: Any, second: Any) -> Any:
    structures = [jax.tree.structure(tree) for tree in (first, second)]
    if structures[0] != structures[1]:
        raise ValueError(
            "`moments_fn` returned different layers for different batches: "
            f"{structures[0]} and {structures[1]}."
        )
    shapes = [[np.shape(m.mean) for m in _moments_in(t)] for t in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "`moments_fn` returned moments of different shapes for different batches: "
            f"{shapes[0]} and {shapes[1]}. If they are the moments of groups, pool "
            "them in `moments_fn`, with `jaxbn.merge_moments`."
        )
    return _merge_pair(first, second)


def _moments_in(tree: Any) -> list[Moments]:
    return list(named_layers("moments_fn(batch)", tree, Moments).values())


@jax.jit
def _merge_pair(first: Any, second: Any) -> Any:
    def merge(a: Moments, b: Moments) -> Moments:
        if np.shape(a.count) != np.shape(b.count):
            a, b = (m._replace(count=whole_count(m)) for m in (a, b))
        return merge_moments(jax.tree.map(_devices.stack, a, b))

    return map_layers(merge, first, second)
