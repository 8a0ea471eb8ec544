"""Praxis' and Lingvo's batch norms: their options and their arrays.

Neither is imported. Both store γ − 1 where other libraries store γ.

| | Praxis, Lingvo | jaxbn |
| --- | --- | --- |
| decay | weight of the old value, 0.999 | `momentum`, 0.99 |
| epsilon | 1e-3, fixed | 1e-5 |
| gamma | γ − 1 | γ |
| running variance | biased | the same |
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._running_stats import RunningStats
from jaxbn.interop import _checkpoint, _checks, _trees
from jaxbn.interop._checkpoint import Arrays, Converted

NAMES = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}
COLLECTIONS = ("params", "non_trainable")
MARKS = ("moving_mean", "moving_variance")


def options(*, decay: float = 0.999) -> dict[str, Any]:
    """Converts the arguments of Praxis' `BatchNorm` to jaxbn's options.

        momentum(jaxbn) = decay

    Args:
      decay: The weight of the old value.

    Returns:
      Options for `jaxbn.layers.standard` and both `BatchNorm` modules. For training
      with `use_moving_avg_in_training`, see `jaxbn.layers.streaming`. Paddings, which
      are 1 where a mask is 0, become `weights=1 - paddings`.

    Raises:
      ValueError: `decay` is not from 0 to 1.

    Example:
      >>> import jaxbn
      >>> jaxbn.interop.praxis.options()["epsilon"]
      0.001

    References:
      https://github.com/google/praxis/blob/main/praxis/layers/normalizations.py
    """
    return {
        "momentum": _checks.require_share("decay", decay),
        "epsilon": 1e-3,
        "unbiased": False,
    }


def to_jaxbn(
    arrays: Arrays,
    *,
    minus_one: bool = True,
    unbiased: bool = False,
    count: float | None = None,
) -> Converted:
    """Converts the arrays of one batch norm to jaxbn's parameters and statistics.

    Args:
      arrays: A dict with `gamma`, `beta`, `moving_mean` and `moving_variance`.
      minus_one: Whether `gamma` is γ − 1, as everywhere except in Lingvo's layers with
        `gamma_zero_init` or `gamma_one_init`.
      unbiased: Whether the new layer tracks the unbiased variance. Praxis and Lingvo do
        not; True converts to var·n/(n − 1).
      count: n, the number of values per feature in a training batch; only with
        `unbiased=True`.

    Returns:
      `(params, stats)`, as `init` of `jaxbn.layers.standard(**options(...))` returns
      them.

    Raises:
      TypeError: A value is not an array of numbers.
      ValueError: Keys are missing or unknown, shapes differ, a variance is negative or
        NaN, or `count` is missing or not needed.

    Example:
      >>> import jaxbn, numpy as np
      >>> zeros = {"gamma": np.zeros(2), "beta": np.zeros(2)}
      >>> stats = {"moving_mean": np.zeros(2), "moving_variance": np.ones(2)}
      >>> params, _ = jaxbn.interop.praxis.to_jaxbn(zeros | stats)
      >>> print(params["scale"])
      [1. 1.]

    References:
      https://github.com/google/praxis/blob/main/praxis/layers/normalizations.py
    """
    return _to_jaxbn(arrays, "", minus_one, unbiased, count)


def from_jaxbn(
    params: Mapping[str, Any],
    stats: RunningStats,
    *,
    minus_one: bool = True,
    unbiased: bool = False,
    count: float | None = None,
) -> dict[str, np.ndarray]:
    """Makes arrays for one batch norm: the inverse of `to_jaxbn`.

    Args:
      params: "scale", "bias", both or neither.
      stats: The running statistics.
      minus_one: Whether to write `gamma` as γ − 1.
      unbiased: Whether the variance was tracked with `unbiased=True`. If so, it is
        converted to var·(n − 1)/n.
      count: n, as for `to_jaxbn`; only with `unbiased=True`.

    Returns:
      A dict of NumPy arrays by name.

    Raises:
      TypeError: `stats` is not a `RunningStats`.
      ValueError: There are several feature axes, or as for `to_jaxbn`.

    Example:
      >>> import jaxbn
      >>> params, stats = jaxbn.layers.standard().init(2)
      >>> print(jaxbn.interop.praxis.from_jaxbn(params, stats)["gamma"])
      [0. 0.]

    References:
      https://github.com/google/praxis/blob/main/praxis/layers/normalizations.py
    """
    _checks.require_flags(minus_one=minus_one)
    found = _checkpoint.given(params, stats)
    _checks.require_vectors(found, "Praxis")
    if minus_one and "scale" in found:
        found["scale"] = found["scale"] - np.asarray(1, found["scale"].dtype)
    found = _checkpoint.written_variance(
        found, unbiased=unbiased, to_unbiased=False, count=count
    )
    return {
        theirs: np.array(found[ours]) for theirs, ours in NAMES.items() if ours in found
    }


def batch_norms(
    variables: Mapping[str, Any],
    *,
    minus_one: bool = True,
    unbiased: bool = False,
    count: float | Mapping[str, float] | None = None,
) -> dict[str, Converted]:
    """Converts every batch norm in a Praxis model, recognized by its moving statistics.

    Args:
      variables: The variables of the model: a nested dict with the collections `params`
        (gamma, beta) and `non_trainable` (moving_mean, moving_variance). Or a dict of
        all four without collections, nested or by path ("block/norm/gamma").
      minus_one: As for `to_jaxbn`.
      unbiased: As for `to_jaxbn`.
      count: As for `to_jaxbn`; a dict by path if it differs between layers.

    Returns:
      A dict from the path of a layer, such as "encoder/bn", to its `(params, stats)`.
      The arrays of layers that are repeated in a scan have one more axis; index it
      before using them.

    Raises:
      TypeError: As for `to_jaxbn`.
      ValueError: There is no batch norm, or as for `to_jaxbn`; errors name the full
        key.

    Example:
      >>> import jaxbn, numpy as np
      >>> params = {"bn": {"gamma": np.zeros(2), "beta": np.zeros(2)}}
      >>> kept = {"bn": {"moving_mean": np.zeros(2), "moving_variance": np.ones(2)}}
      >>> variables = {"params": {"net": params}, "non_trainable": {"net": kept}}
      >>> list(jaxbn.interop.praxis.batch_norms(variables))
      ['net/bn']

    References:
      https://github.com/google/praxis/blob/main/praxis/base_layer.py
    """
    hint = "Pass the variables of the whole model."
    flat = _trees.flat("variables", variables, hint=hint)
    arrays = _without_collections(flat)
    layers = {
        path: own
        for path, own in _trees.by_layer(arrays, "/").items()
        if any(own.get(mark) is not None for mark in MARKS)
    }
    if not layers:
        raise ValueError(
            f"`variables` has no batch norm: none of its {len(flat)} keys ends in "
            f"moving_mean. {hint}"
        )
    for path in layers:
        _trees.require_way("variables", arrays, path)
    counts = _checks.counts_of(layers, count)
    return {
        path: _to_jaxbn(own, path and f"{path}/", minus_one, unbiased, counts[path])
        for path, own in layers.items()
    }


def _without_collections(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of both collections, by their path inside the collection."""
    if not any(key.startswith("non_trainable/") for key in flat):
        return {**flat}
    for collection in COLLECTIONS:
        if collection in flat:
            _trees.require_dict(collection, flat[collection])
    split = ((*key.partition("/"), value) for key, value in flat.items())
    return {path: v for collection, _, path, v in split if collection in COLLECTIONS}


def _to_jaxbn(
    arrays: Arrays, at: str, minus_one: bool, unbiased: bool, count: Any
) -> Converted:
    _checks.require_flags(minus_one=minus_one)
    found = _checkpoint.read(arrays, NAMES, at)
    _checks.require_features(f"{at}moving_mean", found)
    if minus_one and "scale" in found:
        found["scale"] = found["scale"] + np.asarray(1, found["scale"].dtype)
    found = _checkpoint.read_variance(
        found, f"{at}moving_variance", unbiased=False, to_unbiased=unbiased, count=count
    )
    return _checkpoint.layer_state(found, NAMES, at)
