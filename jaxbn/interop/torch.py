"""PyTorch's batch norms: their options, their arrays, and whole state dicts.

torch itself is not imported. Tensors can come straight from a `state_dict`, on any
device that copies to the host; the functions return NumPy arrays.

| | torch | jaxbn |
| --- | --- | --- |
| momentum | weight of the new value, 0.1 | weight of the old one, 0.9 |
| momentum None | plain average | `cumulative()` |
| running variance | unbiased | `unbiased=True` |
| channels | axis 1 | `feature_axes`, by default the last |
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._running_stats import RunningStats, cumulative
from jaxbn.interop import _checkpoint, _checks, _trees, _values
from jaxbn.interop._checkpoint import Arrays, Converted

NAMES = {
    "weight": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "num_batches_tracked": "step",
}
# Keys of batch norms only. (Instance norms with running statistics have all of them.)
MARKS = ("running_mean", "running_var", "num_batches_tracked")


def options(
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    affine: bool = True,
    track_running_stats: bool = True,
    bias: bool = True,
) -> dict[str, Any]:
    """Converts the arguments of `torch.nn.BatchNorm2d` and the like to jaxbn's options.

        momentum(jaxbn) = 1 − momentum(torch)

    Args:
      eps: torch's epsilon.
      momentum: torch's momentum: the weight of the *new* value, or None for a plain
        average.
      affine: Whether there are a weight and a bias.
      track_running_stats: False normalizes by the batch at inference too, which is
        `pseudo_samples=0.0` in jaxbn.
      bias: Whether there is a bias in addition to the weight.

    Returns:
      Options for `jaxbn.layers.standard` and both `BatchNorm` modules. The channels of
      torch are axis 1; to keep them there, add `feature_axes=1` (`axis=1` in a module).

    Raises:
      TypeError: `affine`, `bias` or `track_running_stats` is neither True nor False.
      ValueError: `momentum` is not from 0 to 1, or `eps` is negative or not finite.

    Example:
      >>> import jaxbn
      >>> jaxbn.interop.torch.options(momentum=0.25)["momentum"]
      0.75
      >>> layer = jaxbn.layers.standard(**jaxbn.interop.torch.options(), feature_axes=1)

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """
    _checks.require_flags(
        affine=affine, track_running_stats=track_running_stats, bias=bias
    )
    made: dict[str, Any] = {
        "momentum": cumulative()
        if momentum is None
        else 1 - _checks.require_share("momentum", momentum),
        "epsilon": _checks.require_not_negative("eps", eps),
        "unbiased": True,
        "use_scale": affine,
        "use_bias": affine and bias,
    }
    return made if track_running_stats else made | {"pseudo_samples": 0.0}


def to_jaxbn(
    arrays: Arrays, *, unbiased: bool = True, count: float | None = None
) -> Converted:
    """Converts the arrays of one batch norm to jaxbn's parameters and statistics.

    Args:
      arrays: A dict with `running_mean` and `running_var`, and, if there are any,
        `weight`, `bias` and `num_batches_tracked`: the `state_dict()` of one layer.
      unbiased: Whether the new layer tracks the unbiased variance, like torch. False
        converts to var·(n − 1)/n.
      count: n, the number of values per feature in a training batch; only with
        `unbiased=False`.

    Returns:
      `(params, stats)`, as `init` of `jaxbn.layers.standard(**options(...))` returns
      them, in float32 (or float64, if given as float64 and enabled in JAX).

    Raises:
      TypeError: A value is not an array of numbers.
      ValueError: Keys are missing or unknown, shapes differ, a variance is negative or
        NaN, or `count` is missing or not needed.

    Example:
      >>> import jaxbn, numpy as np
      >>> from_torch = {"running_mean": np.ones(2), "running_var": np.full(2, 4.0)}
      >>> params, stats = jaxbn.interop.torch.to_jaxbn(from_torch)
      >>> print(jaxbn.normalize(np.ones((1, 2)) * 3, stats.mean, stats.var, epsilon=0))
      [[1. 1.]]

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """
    return _to_jaxbn(arrays, "", unbiased, count)


def from_jaxbn(
    params: Mapping[str, Any],
    stats: RunningStats,
    *,
    unbiased: bool = False,
    count: float | None = None,
) -> dict[str, np.ndarray]:
    """Makes arrays for one batch norm of torch: the inverse of `to_jaxbn`.

    Args:
      params: "scale" and "bias", "scale" alone, or neither.
      stats: The running statistics. Their `step` becomes num_batches_tracked, which
        torch needs only for `momentum=None`: if it is 0, the next batch replaces them.
      unbiased: Whether they were tracked with `unbiased=True`. If not, torch needs
        var·n/(n − 1).
      count: n, the number of values per feature in a training batch; only with
        `unbiased=False`.

    Returns:
      A dict of NumPy arrays with torch's keys, for `load_state_dict` after
      `torch.from_numpy`.

    Raises:
      TypeError: `stats` is not a `RunningStats`.
      ValueError: There is a bias without a scale, there are several feature axes, or as
        for `to_jaxbn`.

    Example:
      >>> import jaxbn
      >>> params, stats = jaxbn.layers.standard().init(2)
      >>> sorted(jaxbn.interop.torch.from_jaxbn(params, stats, unbiased=True))
      ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """
    found = _checkpoint.given(params, stats)
    _checks.require_vectors(found, "torch")
    if "bias" in found and "scale" not in found:
        raise ValueError(
            "`params` has 'bias' and no 'scale', which torch's batch norm cannot have. "
            "Add a 'scale' of ones."
        )
    found = _checkpoint.written_variance(
        found, unbiased=unbiased, to_unbiased=True, count=count
    )
    found["step"] = found["step"].astype(np.int64)
    return {
        theirs: np.array(found[ours]) for theirs, ours in NAMES.items() if ours in found
    }


def batch_norms(
    state_dict: Arrays,
    *,
    unbiased: bool = True,
    count: float | Mapping[str, float] | None = None,
) -> dict[str, Converted]:
    """Converts every batch norm in a state dict, recognized by its keys.

    Args:
      state_dict: The state dict of a whole model.
      unbiased: As for `to_jaxbn`.
      count: As for `to_jaxbn`; a dict by prefix if it differs between layers.

    Returns:
      A dict from the prefix of a layer, such as "layer1.0.bn1", to its `(params,
      stats)`, in the order of the state dict. Instance norms with running statistics
      have the same keys, and are found as well. Batch norms without running statistics
      (`track_running_stats=False`) have no such keys, and are not found.

    Raises:
      TypeError: As for `to_jaxbn`.
      ValueError: There is no batch norm, one has missing or unknown keys, or as for
        `to_jaxbn`; errors name the full key.

    Example:
      >>> import jaxbn, numpy as np
      >>> checkpoint = {
      ...     "conv.weight": np.ones((4, 3, 3, 3)),
      ...     "bn.running_mean": np.zeros(4), "bn.running_var": np.ones(4),
      ... }
      >>> list(jaxbn.interop.torch.batch_norms(checkpoint))
      ['bn']

    References:
      https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.state_dict
    """
    what = "a dict from names to tensors"
    _trees.require_dict("state_dict", state_dict, what, "Pass `model.state_dict()`.")
    layers = {
        prefix: arrays
        for prefix, arrays in _trees.by_layer(state_dict, ".").items()
        if any(arrays.get(mark) is not None for mark in MARKS)
    }
    if not layers:
        nested = [key for key, v in state_dict.items() if isinstance(v, Mapping)]
        hint = f" Perhaps it is under one of {nested}." if nested else ""
        raise ValueError(
            f"`state_dict` has no batch norm: none of its {len(state_dict)} keys ends "
            f"in running_mean. Pass the `state_dict()` of a model.{hint}"
        )
    counts = _checks.counts_of(layers, count)
    return {
        prefix: _to_jaxbn(arrays, prefix and f"{prefix}.", unbiased, counts[prefix])
        for prefix, arrays in layers.items()
    }


def frozen_to_jaxbn(arrays: Arrays, *, eps: float = 1e-5) -> Converted:
    """Converts `FrozenBatchNorm2d` of detectron2 or torchvision, for epsilon 0.

        y = weight · (x − running_mean) / √(running_var + eps) + bias

    These libraries have changed whether eps is added, and detectron2 subtracts it from
    old checkpoints, which makes small variances negative. Here, eps becomes part of the
    variance, so nothing is lost. Use `epsilon=0.0` in jaxbn.

    Args:
      arrays: A dict with `weight`, `bias`, `running_mean` and `running_var`.
      eps: The number that the layer adds to the variance: its `eps`, or 0 if the
        library added none (checkpoints of detectron2 before version 3, the first
        versions of torchvision).

    Returns:
      `(params, stats)`, where `stats.var` is running_var + eps.

    Raises:
      TypeError: As for `to_jaxbn`.
      ValueError: As for `to_jaxbn`, or running_var + eps is negative.

    Example:
      >>> import jaxbn, numpy as np
      >>> arrays = {"running_mean": np.zeros(1), "running_var": np.full(1, -0.25)}
      >>> _, stats = jaxbn.interop.torch.frozen_to_jaxbn(arrays, eps=0.25)
      >>> print(stats.var)
      [0.]

    References:
      https://detectron2.readthedocs.io/en/latest/modules/layers.html#detectron2.layers.FrozenBatchNorm2d
    """
    eps = _checks.require_not_negative("eps", eps)
    if isinstance(arrays, Mapping) and arrays.get("running_var") is not None:
        var = _values.leaf("running_var", arrays["running_var"])
        if np.isrealobj(var):
            arrays = {**arrays, "running_var": _with_eps(var, eps)}
    return to_jaxbn(arrays)


def _with_eps(var: np.ndarray, eps: float) -> np.ndarray:
    _checks.require_floating("running_var", var)
    with np.errstate(over="ignore"):
        moved = var + _values.held("eps", np.asarray(eps), var.dtype)
    _values.require_finite("running_var", moved, var)
    if np.any(moved < 0):
        raise ValueError(
            f"`running_var` has {var.min()}, which with `eps`, {eps}, is still below "
            "0. Pass the eps that was subtracted from it."
        )
    return moved


def _to_jaxbn(arrays: Arrays, at: str, unbiased: bool, count: Any) -> Converted:
    found = _checkpoint.read(arrays, NAMES, at)
    _checks.require_features(f"{at}running_mean", found)
    if "bias" in found and "scale" not in found:
        raise ValueError(
            f"Not the arrays of one batch norm: `{at}bias` is there, and "
            f"`{at}weight` is missing."
        )
    found = _checkpoint.read_variance(
        found, f"{at}running_var", unbiased=True, to_unbiased=unbiased, count=count
    )
    return _checkpoint.layer_state(found, NAMES, at)
