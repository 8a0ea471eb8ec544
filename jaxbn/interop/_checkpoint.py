"""Arrays of another library's checkpoint: read and checked, or to be written.

The state of a layer is `(params, stats)` as `jaxbn.layers.standard` has it. What a
library calls its arrays is a table from its names to ours.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._running_stats import RunningStats
from jaxbn.interop import _checks

Arrays = Mapping[str, Any]
Found = dict[str, Any]
Params = dict[str, jax.Array]
Converted = tuple[Params, RunningStats]


def read(arrays: Arrays, names: Mapping[str, str], at: str = "") -> Found:
    """The arrays by our names, as NumPy's. None is an array that is not there."""
    _checks.require_keys(arrays, names, at)
    found = {
        ours: leaf(at + theirs, arrays[theirs])
        for theirs, ours in names.items()
        if arrays.get(theirs) is not None
    }
    _checks.require_layer({ours: at + theirs for theirs, ours in names.items()}, found)
    return found


def given(params: Any, stats: RunningStats) -> Found:
    """Parameters and statistics of a layer as one dict of NumPy arrays, checked."""
    if not isinstance(stats, RunningStats):
        raise TypeError(
            f"`stats` must be a `RunningStats`, got {type(stats).__name__}. Pass what "
            "`jaxbn.layers.standard` has for its state."
        )
    if not isinstance(params, Mapping):
        raise TypeError(f"`params` must be a dict, got {type(params).__name__}.")
    unknown = sorted(set(params) - {"scale", "bias"})
    if unknown:
        raise ValueError(f"`params` may have 'scale' and 'bias', got also {unknown}.")
    keys = {name: f"params[{name!r}]" for name in params}
    keys |= {name: f"stats.{name}" for name in RunningStats._fields}
    arrays = {**params, **stats._asdict()}
    found = {name: leaf(keys[name], arrays[name]) for name in arrays}
    _checks.require_layer(keys, found)
    return found


def layer_state(found: Found) -> Converted:
    """What was read, as the parameters and statistics of a layer."""
    params = {n: jnp.asarray(found[n]) for n in ("scale", "bias") if n in found}
    mean, var = jnp.asarray(found["mean"]), jnp.asarray(found["var"])
    return params, RunningStats(mean, var, jnp.asarray(found.get("step", 0), jnp.int32))


def tracked(
    found: Found,
    key: str,
    *,
    unbiased: bool,
    to_unbiased: bool,
    count: float | None,
) -> Found:
    """The same with the running variance of the other convention, if it is another.

    From jaxbn, `unbiased` is what the user says; to it, `to_unbiased`.
    """
    as_it_is = to_unbiased if key == "stats.var" else unbiased
    _checks.require_conversion(key, unbiased, to_unbiased, count, as_it_is)
    if count is None:
        return {**found}
    bessel = count / (count - 1)
    var = found["var"]
    return {**found, "var": var * bessel if to_unbiased else var / bessel}


def leaf(key: str, value: Any) -> np.ndarray:
    """An array of numbers as NumPy has it, in float32 where it was narrower."""
    try:
        if hasattr(value, "unbox"):  # Flax's, with metadata around it.
            value = value.unbox()
        if hasattr(value, "detach"):  # torch's: NumPy takes none that has a gradient,
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # and none in bfloat16.
                value = value.float()
        array = np.asarray(value)
    except Exception as error:
        # Another library's own: of a meta tensor, of an array that was deleted.
        raise TypeError(
            f"`{key}` must be an array with known values, got {type(value).__name__}: "
            f"{error}"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.number) and array.dtype != np.bool_:
        raise TypeError(f"`{key}` must be an array of numbers, got {value!r}.")
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(np.float32) if narrow else array
