"""Arrays of another library's checkpoint: read and checked, or to be written.

The state of a layer is `(params, stats)` as `jaxbn.layers.standard` has it. What a
library calls its arrays is a table from its names to ours.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn import _dtypes
from jaxbn._running_stats import RunningStats

Arrays = Mapping[str, Any]
Params = dict[str, jax.Array]
Converted = tuple[Params, RunningStats]


def read(arrays: Arrays, names: Mapping[str, str], at: str = "") -> dict[str, Any]:
    """The arrays by our names, as NumPy's. None is an array that is not there."""
    _require_keys(arrays, names, at)
    found = {
        ours: leaf(at + theirs, arrays[theirs])
        for theirs, ours in names.items()
        if arrays.get(theirs) is not None
    }
    _require_layer({ours: at + theirs for theirs, ours in names.items()}, found)
    return found


def given(params: Mapping[str, Any], stats: RunningStats) -> dict[str, Any]:
    """Parameters and statistics of a layer as one dict of NumPy arrays, checked."""
    if not isinstance(stats, RunningStats):
        raise TypeError(
            f"`stats` must be a `RunningStats`, got {type(stats).__name__}. Pass what "
            "`jaxbn.layers.standard` has for its state."
        )
    unknown = sorted(set(params) - {"scale", "bias"})
    if unknown:
        raise ValueError(f"`params` may have 'scale' and 'bias', got also {unknown}.")
    keys = {name: f"params[{name!r}]" for name in params}
    keys |= {name: f"stats.{name}" for name in RunningStats._fields}
    arrays = {**params, **stats._asdict()}
    found = {name: leaf(keys[name], arrays[name]) for name in arrays}
    _require_layer(keys, found)
    return found


def layer_state(found: Mapping[str, Any]) -> Converted:
    """What was read, as the parameters and statistics of a layer."""
    params = {n: jnp.asarray(found[n]) for n in ("scale", "bias") if n in found}
    mean, var = (_dtypes.widen(jnp.asarray(found[n])) for n in ("mean", "var"))
    return params, RunningStats(mean, var, jnp.asarray(found.get("step", 0), jnp.int32))


def tracked(
    found: Mapping[str, Any],
    key: str,
    *,
    unbiased: bool,
    to_unbiased: bool,
    count: float | None,
) -> dict[str, Any]:
    """The same with the running variance of the other convention, if it is another."""
    if unbiased == to_unbiased:
        if count is not None:
            raise ValueError(
                f"`count` is {count}, but `{key}` is taken as it is: both sides track "
                f"the {_kind(unbiased)} variance. Leave it out."
            )
        return {**found}
    if count is None:
        raise ValueError(
            f"`{key}` is of {_kind(unbiased)} variances, and wanted "
            f"{_kind(to_unbiased)}. Pass `count`, the number of values per feature in "
            "a training batch (examples times positions), or, to take the variance as "
            f"it is, `unbiased={not unbiased if key == 'stats.var' else unbiased}`."
        )
    if not count > 1:
        raise ValueError(
            f"`count` must be above 1, got {count}: one value has no unbiased variance."
        )
    bessel = count / (count - 1)
    var = found["var"]
    return {**found, "var": var * bessel if to_unbiased else var / bessel}


def leaf(key: str, value: Any) -> np.ndarray:
    """An array of numbers as NumPy has it."""
    if hasattr(value, "detach"):  # torch's: NumPy takes none that has a gradient,
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # and none in bfloat16.
            value = value.float()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{key}` must be an array with known values, got {value!r}."
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"`{key}` must be an array of numbers, got {value!r}.")
    return array


def written(array: Any) -> np.ndarray:
    """A copy that may be written to, in a dtype that is NumPy's own."""
    array = np.array(array)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def require_vectors(found: Mapping[str, Any], library: str) -> None:
    """Refuses several feature axes, which others have not."""
    if found["mean"].ndim != 1:
        raise ValueError(
            f"`stats.mean` has shape {found['mean'].shape}, but {library} has one "
            "feature axis. Flatten statistics and parameters first."
        )


def require_step(found: Mapping[str, Any], library: str) -> None:
    """Refuses a step 0 of statistics that have moved, which debiasing would forget."""
    moved = np.any(found["mean"] != 0) or np.any(found["var"] != 1)
    if moved and found["step"] == 0:
        raise ValueError(
            f"`stats.step` is 0, but the statistics have moved. {library} divides by "
            "1 − momentum**step: pass the number of updates so far, "
            "`stats._replace(step=...)`; any large one does if it is not known."
        )


def require_share(name: str, value: Any) -> None:
    """Refuses a momentum that is no number from 0 to 1."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not known or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a number from 0 to 1, got {value!r}.")


def _require_keys(arrays: Arrays, names: Mapping[str, str], at: str) -> None:
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"`{at or 'arrays'}` must be a dict of arrays with the keys {list(names)}, "
            f"got {type(arrays).__name__}."
        )
    present = {key for key, value in arrays.items() if value is not None}
    needed = {theirs for theirs, ours in names.items() if ours in ("mean", "var")}
    missing, unknown = sorted(needed - present), sorted(present - set(names), key=str)
    if missing or unknown:
        raise ValueError(
            f"Not the arrays of one batch norm: {[at + k for k in missing]} missing, "
            f"{[f'{at}{k}' for k in unknown]} not known. Expected {list(names)}, of "
            f"which {sorted(needed)} must be there."
        )


def _require_layer(keys: Mapping[str, str], found: Mapping[str, Any]) -> None:
    """Refuses shapes that differ, and what no variance or step can be."""
    shape = found["mean"].shape
    for name, array in found.items():
        if name == "step":
            if array.shape != () or not 0 <= array < 2**31:
                raise ValueError(
                    f"`{keys[name]}` must be a whole number from 0 to 2³¹ − 1, got "
                    f"{array}."
                )
        elif not jnp.issubdtype(array.dtype, jnp.inexact):
            raise TypeError(f"`{keys[name]}` must be floating, got {array.dtype}.")
        elif array.shape != shape:
            raise ValueError(
                f"`{keys[name]}` has shape {array.shape}, but `{keys['mean']}` "
                f"{shape}: all must be of the same features."
            )
    var = np.asarray(found["var"], np.float64)
    if not np.all(var >= 0):
        where = int(np.argmin(np.where(np.isnan(var), -np.inf, var)))
        raise ValueError(
            f"`{keys['var']}` has {var.flat[where]} at feature {where}: a variance is "
            "at least 0. The checkpoint is damaged, or something was subtracted from "
            "it (for detectron2's see `jaxbn.interop.torch.frozen_to_jaxbn`)."
        )


def _kind(unbiased: bool) -> str:
    return "unbiased" if unbiased else "biased"
