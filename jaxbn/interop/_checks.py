"""Checks of checkpoints and options, with their error messages."""

import operator
import reprlib
from collections.abc import Mapping
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn.interop import _trees


def require_keys(arrays: Any, names: Mapping[str, str], at: str) -> None:
    """Raises if the statistics are missing, or if a key is unknown."""
    what = f"a dict of arrays with the keys {list(names)}"
    _trees.require_dict(at or "arrays", arrays, what)
    present = {key for key, value in arrays.items() if value is not None}
    needed = {theirs for theirs, ours in names.items() if ours in ("mean", "var")}
    missing, unknown = sorted(needed - present), sorted(present - set(names))
    if missing or unknown:
        raise ValueError(
            f"Not the arrays of one batch norm: {[at + k for k in missing]} missing, "
            f"{[f'{at}{k}' for k in unknown]} not known. Expected {list(names)}; "
            f"{sorted(needed)} are required."
        )


def require_layer(keys: Mapping[str, str], found: Mapping[str, np.ndarray]) -> None:
    """Raises for shapes that differ, and for invalid values of statistics."""
    shape = found["mean"].shape
    for name, array in found.items():
        if name == "step":
            require_count(keys[name], array)
            continue
        require_floating(keys[name], array)
        if array.shape != shape:
            raise ValueError(
                f"`{keys[name]}` has shape {array.shape}, but `{keys['mean']}` "
                f"{shape}: all must be of the same features."
            )
    require_at_least_0(keys["var"], found["var"])
    for name, array in found.items():
        if not np.all(np.isfinite(array)):
            of_data = ", or measure the statistics again, by `jaxbn.population`"
            raise ValueError(
                f"`{keys[name]}` has NaN or infinity: the checkpoint is damaged. Take "
                f"an earlier one{of_data if name == 'mean' else ''}."
            )


def require_floating(key: str, array: np.ndarray) -> None:
    """Raises for integers and booleans."""
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        raise TypeError(f"`{key}` must be floating, got {array.dtype}.")


def require_count(key: str, array: np.ndarray) -> None:
    """Raises unless the array is a valid number of updates."""
    whole = array.shape == () and not np.iscomplexobj(array)
    if not whole or not 0 <= array < 2**31 or array % 1 != 0:
        stacked = " Of stacked layers, index the first axis." if array.ndim else ""
        raise ValueError(
            f"`{key}` must be a whole number from 0 to 2³¹ − 1, got "
            f"{reprlib.repr(array.tolist())}.{stacked}"
        )


def require_at_least_0(key: str, array: np.ndarray) -> None:
    """Raises if a variance or deviation is negative, NaN, infinite or complex."""
    if np.iscomplexobj(array):
        raise TypeError(f"`{key}` must be real, got {array.dtype}.")
    bad = ~((array >= 0) & np.isfinite(array))
    if np.any(bad):
        where = int(np.argmax(bad))
        raise ValueError(
            f"`{key}` has {array.flat[where]} at feature {where}, where it must be "
            "finite and at least 0. The checkpoint is damaged, or something was "
            "subtracted (frozen batch norms: `jaxbn.interop.torch.frozen_to_jaxbn`)."
        )


def require_vectors(found: Mapping[str, Any], library: str) -> None:
    """Raises for several feature axes, which other libraries do not have."""
    if found["mean"].ndim != 1:
        raise ValueError(
            f"`stats.mean` has shape {found['mean'].shape}, but {library} has one "
            "feature axis. Flatten statistics and parameters first; of stacked layers, "
            "index the first axis."
        )


def require_features(key: str, found: Mapping[str, Any]) -> None:
    """Raises for scalar statistics, without a feature axis."""
    if found["mean"].ndim == 0:
        raise ValueError(
            f"`{key}` has shape (), expected a value for each feature. Pass arrays of "
            "shape (features,)."
        )


def require_step(found: Mapping[str, Any], library: str) -> None:
    """Raises for step 0 with statistics that have moved: they would be forgotten."""
    moved = np.any(found["mean"] != 0) or np.any(found["var"] != 1)
    if moved and found["step"] == 0:
        raise ValueError(
            f"`stats.step` is 0, but the statistics have moved: {library} would forget "
            "them in its first step. Pass the number of updates so far, "
            "`stats._replace(step=...)`; any large one does if it is not known."
        )


def require_share(name: str, value: Any, *, below_1: bool = False) -> float:
    """The momentum as a Python float; raises unless it is a number from 0 to 1."""
    share = _number(value)
    if not 0 <= share <= 1:
        raise ValueError(
            f"`{name}` must be a number from 0 to 1, got {reprlib.repr(value)}."
        )
    if below_1 and share == 1:
        raise ValueError(
            f"`{name}` must be below 1, got {value!r}: a debiased average of decay 1 "
            "is divided by 0. A plain average is `jaxbn.cumulative()`."
        )
    return share


def require_not_negative(name: str, value: Any) -> float:
    """The epsilon as a Python float; raises if it is below 0 or not finite."""
    number = _number(value)
    if not 0 <= number < np.inf:
        raise ValueError(
            f"`{name}` must be a number of at least 0, got {reprlib.repr(value)}."
        )
    return number


def require_flags(**flags: Any) -> None:
    """Raises unless all flags are True or False."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(
                f"`{name}` must be True or False, got {reprlib.repr(value)}."
            )


def require_rank(name: str, value: Any) -> int:
    """The rank as a Python int; raises if no array has such a rank."""
    try:
        rank = operator.index(value)
    except TypeError:
        rank = 0
    if isinstance(value, bool) or not 1 <= rank <= 64:  # NumPy's limit.
        raise ValueError(
            f"`{name}` must be a whole number from 1 to 64, got {reprlib.repr(value)}."
        )
    return rank


def require_conversion(
    key: str, unbiased: bool, to_unbiased: bool, count: Any, as_it_is: bool
) -> None:
    """Raises if the count is missing, not needed, or not a count."""
    for value in (unbiased, to_unbiased):
        require_flags(unbiased=value)
    if unbiased == to_unbiased:
        if count is not None:
            raise ValueError(
                f"`count` is {reprlib.repr(count)}, but `{key}` is taken as it is: "
                f"both sides track the {_kind(unbiased)} variance. Leave it out."
            )
    elif count is None:
        raise ValueError(
            f"`{key}` is of {_kind(unbiased)} variances, and wanted "
            f"{_kind(to_unbiased)}. Pass `count`, the number of values per feature in "
            "a training batch (examples times positions), or, to take the variance as "
            f"it is, `unbiased={as_it_is}`."
        )
    elif not 1 < _number(count) < np.inf:
        raise ValueError(
            f"`count` must be a number above 1, got {reprlib.repr(count)}: one value "
            "has no unbiased variance."
        )


def counts_of(layers: Mapping[str, Any], count: Any) -> dict[str, Any]:
    """The count of each layer; raises for a dict that names unknown layers."""
    if isinstance(count, Mapping) and set(count) - set(layers):
        others = sorted(set(count) - set(layers), key=str)
        raise ValueError(
            f"`count` has {others}, which are no batch norms here. There are "
            f"{sorted(layers)}."
        )
    by_name = isinstance(count, Mapping)
    return {name: count.get(name) if by_name else count for name in layers}


def _number(value: Any) -> float:
    """A number as a Python float; NaN for anything else."""
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        return np.nan
    try:
        return float(value)
    except OverflowError:
        return np.inf


def _kind(unbiased: bool) -> str:
    return "unbiased" if unbiased else "biased"
