"""Reads, checks and writes the arrays of another library's checkpoint.

The state of a layer is `(params, stats)` as in `jaxbn.layers.standard`. A table maps a
library's names of arrays to ours.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._running_stats import RunningStats
from jaxbn.interop import _checks, _trees, _values

Arrays = Mapping[str, Any]
Found = dict[str, Any]
Params = dict[str, jax.Array]
Converted = tuple[Params, RunningStats]


def read(arrays: Arrays, names: Mapping[str, str], at: str = "") -> Found:
    """The arrays by our names, as NumPy arrays. None stands for a missing array."""
    _checks.require_keys(arrays, names, at)
    found = {
        ours: _values.leaf(at + theirs, arrays[theirs])
        for theirs, ours in names.items()
        if arrays.get(theirs) is not None
    }
    _checks.require_layer({ours: at + theirs for theirs, ours in names.items()}, found)
    return found


def given(params: Any, stats: RunningStats, spread: str = "var") -> Found:
    """Checks parameters and statistics; returns them as one dict of NumPy arrays.

    `spread` is the name in errors of the field that the variance was computed from.
    """
    if not isinstance(stats, RunningStats):
        raise TypeError(
            f"`stats` must be a `RunningStats`, got {type(stats).__name__}. Pass what "
            "`jaxbn.layers.standard` has for its state."
        )
    _trees.require_dict("params", params)
    unknown = sorted(set(params) - {"scale", "bias"})
    if unknown:
        raise ValueError(f"`params` may have 'scale' and 'bias', but has {unknown}.")
    keys = {name: f"params[{name!r}]" for name in params}
    keys |= {name: f"stats.{name}" for name in RunningStats._fields}
    keys["var"] = f"stats.{spread}"
    arrays = {**params, **stats._asdict()}
    found = {name: _values.leaf(keys[name], arrays[name]) for name in arrays}
    _checks.require_layer(keys, found)
    return found


def layer_state(found: Found, names: Mapping[str, str], at: str = "") -> Converted:
    """Turns the arrays read into the parameters and statistics of a layer."""
    made = {
        ours: _values.to_device(at + theirs, found[ours])
        for theirs, ours in names.items()
        if ours in found and ours != "step"
    }
    params = {name: made[name] for name in ("scale", "bias") if name in made}
    step = jnp.asarray(found.get("step", 0), jnp.int32)
    return params, RunningStats(made["mean"], made["var"], step)


def read_variance(
    found: Found, key: str, *, unbiased: bool, to_unbiased: bool, count: float | None
) -> Found:
    """Converts the running variance read to the convention wanted in jaxbn.

    `unbiased` is the other library's convention, `to_unbiased` the user's choice.
    """
    _checks.require_conversion(key, unbiased, to_unbiased, count, unbiased)
    return _converted(found, key, to_unbiased, count)


def written_variance(
    found: Found, *, unbiased: bool, to_unbiased: bool, count: float | None
) -> Found:
    """Converts the running variance to write to the other library's convention.

    `unbiased` is the user's statement about jaxbn's, `to_unbiased` the library's.
    """
    key = "stats.var"
    _checks.require_conversion(key, unbiased, to_unbiased, count, to_unbiased)
    return _converted(found, key, to_unbiased, count)


def _converted(found: Found, key: str, to_unbiased: bool, count: float | None) -> Found:
    if count is None:
        return {**found}
    bessel = float(count) / (float(count) - 1)
    var = found["var"]
    with np.errstate(over="ignore"):
        converted = var * bessel if to_unbiased else var / bessel
    _values.require_finite(key, converted, var)
    return {**found, "var": converted}
