"""Finds and reads the arrays of Equinox's batch norms, and debiases them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxbn.interop import _checkpoint, _checks, _trees, _values
from jaxbn.interop._checkpoint import Arrays, Found

NAMES = {"weight": "scale", "bias": "bias"}
BATCH = ("batch_counter", "batch_state_index")
EMA = ("ema_first_time_index", "ema_state_index")


def layers_of(model: Any) -> dict[str, Any]:
    """The batch norms of a model, by path."""
    try:
        leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=_is_batch_norm)
    except (TypeError, ValueError) as error:  # Keys without an order.
        raise ValueError(f"`model` must be a tree, as JAX has them: {error}") from error
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): node
        for path, node in leaves
        if _is_batch_norm(node)
    }


def arrays_of(layer: Any, state: Any, at: str) -> dict[str, Any]:
    """The arrays of a layer; running statistics come from the model's state."""
    fields = BATCH if layer.mode == "batch" else EMA
    kept = {name: _in_state(state, getattr(layer, name), at + name) for name in fields}
    return {"weight": layer.weight, "bias": layer.bias, **kept}


def fields_of(arrays: Arrays) -> tuple[dict[str, Any], tuple[str, str]]:
    """The arrays that are present, and the fields of their mode."""
    what = "a dict by the layer's fields"
    hint = f"Take {list(BATCH)} out of the state, by `state.get(layer.batch_counter)`."
    given = _trees.require_dict("arrays", arrays, what, hint)
    present = {name: v for name, v in given.items() if v is not None}
    fields = EMA if EMA[1] in present else BATCH
    missing = sorted(set(fields) - set(present))
    if missing:
        raise ValueError(
            f"Not the arrays of one batch norm: {missing} missing, got "
            f"{sorted(present)}. Expected {list(BATCH)} or {list(EMA)}."
        )
    return present, fields


def names_of(fields: tuple[str, str]) -> dict[str, str]:
    """Maps Equinox's names to ours; its pair is read as two arrays."""
    counter, pair = fields
    return NAMES | {f"{pair}[0]": "mean", f"{pair}[1]": "var", counter: "step"}


def read(arrays: Arrays, fields: tuple[str, str], at: str) -> Found:
    """Parameters, mean, var, and `step`: the counter, or whether there was a step."""
    counter, pair = fields
    hidden = arrays[pair]
    if not isinstance(hidden, (tuple, list)) or len(hidden) != 2:
        raise ValueError(
            f"`{at}{pair}` must be a pair (mean, var), as `state.get` returns it, got "
            f"{type(hidden).__name__}."
        )
    parts = {f"{pair}[0]": hidden[0], f"{pair}[1]": hidden[1]}
    rest = {name: v for name, v in arrays.items() if name != pair}
    if fields == EMA:
        first = _flag(at + counter, arrays[counter])
        rest[counter] = int(not first)
        if first:  # Nothing is set yet, so the arrays may hold anything.
            like = _values.leaf(f"{at}{pair}[0]", hidden[0])
            fresh = np.zeros_like(like), np.ones_like(like)
            parts = dict(zip(parts, fresh, strict=True))
    return _checkpoint.read(rest | parts, names_of(fields), at)


def debiased(found: Found, momentum: float | None, correct: bool, pair: str) -> Found:
    """The statistics that mode "batch" normalizes with, from its hidden values."""
    if momentum is None:
        raise ValueError(
            "`momentum` is needed in mode 'batch': what Equinox keeps is to be divided "
            "by 1 − momentum**batch_counter. Pass that of the layer."
        )
    momentum = _checks.require_share("momentum", momentum, below_1=True)
    kept = momentum ** int(found["step"])
    if kept == 1:  # Equinox divides by 1 before the first update.
        return found
    hidden = [found["mean"], found["var"]]
    if correct:
        # Rounding may make the difference negative.
        hidden[1] = np.maximum(hidden[1] - np.asarray(kept, hidden[1].dtype), 0)
    with np.errstate(over="ignore"):
        mean, var = (v / (1 - kept) for v in hidden)
    for i, average in enumerate((mean, var)):
        _values.require_finite(f"{pair}[{i}]", average, hidden[i])
    return {**found, "mean": mean, "var": var}


def _is_batch_norm(node: Any) -> bool:
    """Recognizes a batch norm by its fields, so subclasses count under any name."""
    return all(hasattr(node, name) for name in (*BATCH, *EMA, "momentum", "mode"))


def _in_state(state: Any, index: Any, key: str) -> Any:
    if isinstance(state, Mapping) or not callable(getattr(state, "get", None)):
        raise TypeError(
            f"`state` must be an `eqx.nn.State`, got {type(state).__name__}. Pass the "
            "second of what `eqx.nn.make_with_state(...)(...)` returns."
        )
    try:
        return state.get(index)
    except Exception as error:  # From another model, or outdated.
        raise ValueError(
            f"`state` has no `{key}`: {error}. Pass the newest state of this model."
        ) from error


def _flag(key: str, value: Any) -> bool:
    flag = _values.leaf(key, value)
    if flag.shape != () or flag not in (0, 1):
        raise ValueError(f"`{key}` must be True or False, got {flag.tolist()!r}.")
    return bool(flag)
