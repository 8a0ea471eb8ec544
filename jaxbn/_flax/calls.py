"""Compiles calls of a model: static and traced arguments, and repeated calls."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class Static:
    """The static arguments of a compiled function: non-array values and their places.

    Unlike tuples, it distinguishes 1 from True and from 1.0.
    """

    def __init__(self, values: list[Any], treedef: Any):
        self.values, self.treedef = values, treedef
        self.key = tuple((type(v), v) for v in values), treedef

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


TRACED = object()


def static_and_traced(call: dict[str, Any]) -> tuple[Static, list[Any]]:
    """Splits keywords into static values to compile for and arrays to pass."""
    leaves, treedef = jax.tree.flatten(call)
    kept = [leaf if is_static(leaf) else TRACED for leaf in leaves]
    return Static(kept, treedef), [v for v in leaves if not is_static(v)]


def together(static: Static, traced: list[Any]) -> dict[str, Any]:
    """Joins them into keywords again."""
    arrays = iter(traced)
    leaves = [next(arrays) if v is TRACED else v for v in static.values]
    return jax.tree.unflatten(static.treedef, leaves)


def is_static(value: Any) -> bool:
    """Whether a value can be a static argument."""
    return _is_hashable(value) and not isinstance(value, jax.Array)


def compiled(function: Callable, *static: Any) -> Callable:
    """Compiles `function` for its first arguments, `static`; the rest are traced.

    Equal static arguments share a program, which JAX keeps forever, together with the
    arguments. If an argument is not hashable or may hold a model, the program is
    separate and is freed with the returned function.
    """
    if _is_hashable(static) and all(map(_may_be_kept, static)):
        return partial(_shared, function, static)
    return jax.jit(partial(function, *static))


@partial(jax.jit, static_argnums=(0, 1))
def _shared(function: Callable, static: tuple, *rest: Any) -> Any:
    return function(*static, *rest)


def _may_be_kept(value: Any) -> bool:
    """Whether keeping it keeps no model alive: a module-level function lives anyway."""
    if isinstance(value, Static):
        return all(map(_may_be_kept, value.values))
    if inspect.ismethod(value) or isinstance(value, partial):
        return False
    return "<" not in getattr(value, "__qualname__", "")


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


class Repeated:
    """`f(batch)`, a compiled function that draws new random numbers in every call.

    `run(streams, batch)` returns the result for the batch and the advanced random
    streams, a tree of small arrays, from which the next call continues.
    """

    def __init__(self, run: Callable, streams: Any):
        self.run, self.streams, self.first = run, streams, streams

    def __call__(self, batch: Any) -> Any:
        """The result of `run` for a batch."""
        streams = jax.tree.map(_as_free, self.streams, self.first)
        found, after = self.run(streams, batch)
        # If the caller is tracing, the streams are not known outside the trace.
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(after)):
            self.streams = after
        return found


def _as_free(value: Any, first: Any) -> Any:
    """Frees `value` from the devices of the last batch, if it was free at first."""
    if getattr(first, "committed", False) or not getattr(value, "committed", False):
        return value
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return np.asarray(value)
    data = jnp.asarray(np.asarray(jax.random.key_data(value)))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
