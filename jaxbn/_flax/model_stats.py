"""Reads and writes the running statistics of a model's layers in its variables."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _dtypes
from jaxbn._running_stats import RunningStats

NO_LAYERS = (
    "{} has no running statistics of batch norms. Build the model with those of "
    "`{}`, and pass the variables that its `init` made."
)


def layers_of(tree: Any) -> Iterator[tuple[str, Mapping]]:
    """Yields the path and the dict of mean and variance of every batch norm."""
    for path, layer in paths_of_layers(tree):
        yield "/".join(map(str, path)), layer


def paths_of_layers(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Mapping]]:
    """Yields the same with tuples as paths; skips accumulation windows of nnx."""
    if not isinstance(tree, Mapping):
        return
    arrays = {name for name, part in tree.items() if not isinstance(part, Mapping)}
    if "mean" in arrays and arrays & {"var", "std"}:
        yield path, tree
    for name, part in tree.items():
        if name != "batch_moments":
            yield from paths_of_layers(part, (*path, name))


def as_running_stats(values: Mapping[str, Any]) -> RunningStats:
    """A layer's statistics. A tracked standard deviation is squared."""
    own = {"mean", "var", "std", "step"} & set(values)
    arrays = {name: jnp.asarray(values[name]) for name in own}
    if "std" in arrays:
        arrays["var"] = jnp.square(_dtypes.widen(arrays.pop("std")))
    return RunningStats(**{"step": jnp.zeros((), jnp.int32)} | arrays)


def as_kept(old: Mapping[str, Any], stats: RunningStats) -> dict[str, jax.Array]:
    """The inverse: arrays with the names, shapes and dtypes of the layer's state."""
    new = stats._asdict()
    if "std" in old:
        new["std"] = jnp.sqrt(_dtypes.widen(jnp.asarray(new.pop("var"))))
    # Copies, so that they can be donated while `stats` lives on.
    return {
        name: jnp.array(
            jnp.broadcast_to(value, np.shape(old[name])),
            jnp.asarray(old[name]).dtype,
            copy=True,
        )
        for name, value in new.items()
        if name in old
    }


def with_stats(name: str, old: Mapping[str, Any], stats: Any) -> dict[str, jax.Array]:
    """A layer's arrays with its statistics replaced.

    Steps never go back, so schedules and debiasing continue.
    """
    if not isinstance(stats, RunningStats):
        raise TypeError(
            f"`stats[{name!r}]` is {type(stats).__name__}, expected a `RunningStats`."
        )
    shape = np.shape(old["mean"])
    if np.shape(stats.mean) != shape or np.shape(stats.var) != shape:
        raise ValueError(
            f"`stats[{name!r}]` has features of shape {np.shape(stats.mean)}, but "
            f"the layer has {shape}. Take them from the same model."
        )
    mean, own = jnp.asarray(stats.mean), jnp.asarray(old["mean"])
    _dtypes.require_no_imaginary_loss(f"stats[{name!r}].mean", mean, "mean", own.dtype)
    if "step" in old:
        stats = stats._replace(step=jnp.maximum(jnp.asarray(old["step"]), stats.step))
    return as_kept(old, stats)


def require_same_layers(given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises if layers are missing from the statistics, or unknown to the model."""
    missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or unknown:
        raise ValueError(
            f"`stats` must have the layers of the model. It lacks {missing}, and has "
            f"{unknown}, which the model does not have. To keep the statistics of some "
            "layers, start from `running_stats`: `running_stats(...) | stats`."
        )
