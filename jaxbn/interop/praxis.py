"""Praxis' and Lingvo's batch norms: their options and their arrays.

Neither is imported. Both keep γ − 1 where others keep γ.

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
from jaxbn.interop import _checkpoint, _checks
from jaxbn.interop._checkpoint import Arrays, Converted

NAMES = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}


def options(*, decay: float = 0.999) -> dict[str, Any]:
    """The arguments of Praxis' `BatchNorm`, as jaxbn's options.

        momentum(jaxbn) = decay

    Args:
      decay: The weight of the old value.

    Returns:
      Options for `jaxbn.layers.standard` and both `BatchNorm` modules. For training
      with `use_moving_avg_in_training` see `jaxbn.layers.streaming`. Paddings, 1 where
      others have a mask of 0, become `weights=1 - paddings`.

    Raises:
      ValueError: `decay` is not from 0 to 1.

    Example:
      >>> import jaxbn
      >>> jaxbn.interop.praxis.options()["epsilon"]
      0.001

    References:
      https://github.com/google/praxis/blob/main/praxis/layers/normalizations.py
    """
    _checks.require_share("decay", decay)
    return {"momentum": decay, "epsilon": 1e-3, "unbiased": False}


def to_jaxbn(
    arrays: Arrays,
    *,
    minus_one: bool = True,
    unbiased: bool = False,
    count: float | None = None,
) -> Converted:
    """The arrays of one batch norm as parameters and statistics of jaxbn.

    Args:
      arrays: A dict with `gamma`, `beta`, `moving_mean` and `moving_variance`.
      minus_one: Whether `gamma` is γ − 1, as everywhere but in Lingvo's layers with
        `gamma_zero_init` or `gamma_one_init`.
      unbiased: Whether the layer that goes on from here tracks the unbiased variance.
        These do not; True takes var·n/(n − 1).
      count: That n, the number of values per feature in a training batch; with
        `unbiased=True` only.

    Returns:
      `(params, stats)`, as `init` of `jaxbn.layers.standard(**options(...))` returns
      them.

    Raises:
      TypeError: A value is no array of numbers.
      ValueError: Keys are missing or not known, shapes differ, a variance is negative
        or NaN, or `count` is missing or not needed.

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
    found = _checkpoint.read(arrays, NAMES)
    if minus_one and "scale" in found:
        found["scale"] = found["scale"] + np.asarray(1, found["scale"].dtype)
    found = _checkpoint.tracked(
        found, "moving_variance", unbiased=False, to_unbiased=unbiased, count=count
    )
    return _checkpoint.layer_state(found)


def from_jaxbn(
    params: Mapping[str, Any],
    stats: RunningStats,
    *,
    minus_one: bool = True,
    unbiased: bool = False,
    count: float | None = None,
) -> dict[str, np.ndarray]:
    """The inverse of `to_jaxbn`: arrays for one batch norm of Praxis or Lingvo.

    Args:
      params: "scale", "bias", both or neither.
      stats: The running statistics.
      minus_one: Whether `gamma` is to be γ − 1.
      unbiased: Whether the variance was tracked with `unbiased=True`. If so, var·(n −
        1)/n is what goes on.
      count: That n; with `unbiased=True` only.

    Returns:
      A dict of NumPy arrays by their names.

    Raises:
      TypeError: `stats` is no `RunningStats`.
      ValueError: There are several feature axes, or as for `to_jaxbn`.

    Example:
      >>> import jaxbn
      >>> params, stats = jaxbn.layers.standard().init(2)
      >>> print(jaxbn.interop.praxis.from_jaxbn(params, stats)["gamma"])
      [0. 0.]

    References:
      https://github.com/google/praxis/blob/main/praxis/layers/normalizations.py
    """
    found = _checkpoint.given(params, stats)
    _checks.require_vectors(found, "Praxis")
    if minus_one and "scale" in found:
        found["scale"] = found["scale"] - np.asarray(1, found["scale"].dtype)
    found = _checkpoint.tracked(
        found, "stats.var", unbiased=unbiased, to_unbiased=False, count=count
    )
    return {
        theirs: np.array(found[ours]) for theirs, ours in NAMES.items() if ours in found
    }
