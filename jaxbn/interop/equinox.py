"""Equinox' batch norm: its options and its arrays.

Equinox itself is not imported. The arrays of a layer are those of its fields: weight
and bias as they are, the others out of the model's `State`.

| | Equinox | jaxbn |
| --- | --- | --- |
| momentum | weight of the old value, 0.99 | the same |
| eps | 1e-5 | the same |
| running variance | biased | the same |
| `mode="batch"` | hidden/(1 − momentum^counter) | `debiased(momentum)` |
| `mode="ema"` | also normalizes training | `layers.streaming` |
| input | (C, ...), one example in a vmap | `feature_axes=0`, `axis_name` |
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._running_stats import RunningStats, debiased
from jaxbn.interop import _checkpoint
from jaxbn.interop._checkpoint import Arrays, Converted

NAMES = {"weight": "scale", "bias": "bias", "mean": "mean", "var": "var"}
BATCH = ("batch_counter", "batch_state_index")
EMA = ("ema_first_time_index", "ema_state_index")


def options(
    *,
    eps: float = 1e-5,
    channelwise_affine: bool = True,
    momentum: float = 0.99,
    mode: str = "batch",
) -> dict[str, Any]:
    """The arguments of `equinox.nn.BatchNorm`, as jaxbn's options.

        mode "batch": momentum(jaxbn) = debiased(momentum)      "ema": momentum

    Args:
      eps: Added to the variance.
      channelwise_affine: Whether there are weight and bias.
      momentum: The weight of the old value.
      mode: "batch" or "ema". With the second, `jaxbn.layers.standard` moves the
        statistics as Equinox does, but normalizes training by the batch. For training
        by the running statistics pass `momentum` to `jaxbn.layers.streaming`, which
        counts the variance between batches as well.

    Returns:
      Options for `jaxbn.layers.standard` and both `BatchNorm` modules. In Equinox'
      `vmap` add `feature_axes=0` and the `axis_name`.

    Raises:
      ValueError: `momentum` is not from 0 to 1, or `mode` neither of the two.

    Example:
      >>> import jaxbn
      >>> made = jaxbn.interop.equinox.options(momentum=0.9)
      >>> layer = jaxbn.layers.standard(**made, feature_axes=0, axis_name="batch")

    References:
      https://docs.kidger.site/equinox/api/nn/normalisation/#equinox.nn.BatchNorm
    """
    _checkpoint.require_share("momentum", momentum)
    if mode not in ("batch", "ema"):
        raise ValueError(f"`mode` must be 'batch' or 'ema', got {mode!r}.")
    return {
        "momentum": debiased(momentum) if mode == "batch" else momentum,
        "epsilon": eps,
        "unbiased": False,
        "use_scale": channelwise_affine,
        "use_bias": channelwise_affine,
    }


def to_jaxbn(
    arrays: Arrays,
    *,
    momentum: float | None = None,
    correct: bool = False,
    unbiased: bool = False,
    count: float | None = None,
) -> Converted:
    """The arrays of one `equinox.nn.BatchNorm` as parameters and statistics of jaxbn.

    Equinox starts its hidden variance at 1 and divides it by 1 − momentum^counter as if
    it had started at 0, so that at inference the variance is too large by

        momentum^counter / (1 − momentum^counter)

    which is 99 after one step of momentum 0.99, and 0.58 after a hundred. What it
    normalizes with is kept, unless `correct` asks for the truth.

    Args:
      arrays: A dict by the layer's fields: `weight` and `bias` where there are any;
        and `batch_counter` and `batch_state_index`, or `ema_first_time_index` and
        `ema_state_index`, each as `state.get(layer.batch_counter)` has it. Those that
        are None in the layer may be left out.
      momentum: The layer's, in mode "batch", where it is needed, and only there.
      correct: Take Equinox' initial 1 out of the variance (mode "batch" only).
        Inference differs then, for the better.
      unbiased: Whether the layer that goes on from here tracks the unbiased variance.
        Equinox does not; True takes var·n/(n − 1).
      count: That n, the number of values per feature in a training batch; with
        `unbiased=True` only.

    Returns:
      `(params, stats)`, as `init` of `jaxbn.layers.standard(**options(...))` returns
      them. Before the first update the statistics are mean 0 and variance 1.

    Raises:
      TypeError: A value is no array of numbers.
      ValueError: Keys are missing or not known, shapes differ, a variance is negative
        or NaN, `momentum` is missing, not needed or not from 0 to 1, or `count` is
        missing or not needed.

    Example:
      >>> import jaxbn, numpy as np
      >>> hidden = np.array([1.0]), np.array([2.5])
      >>> arrays = {"batch_counter": 1, "batch_state_index": hidden}
      >>> from_equinox = jaxbn.interop.equinox.to_jaxbn
      >>> print(from_equinox(arrays, momentum=0.5)[1].var)
      [5.]
      >>> print(from_equinox(arrays, momentum=0.5, correct=True)[1].var)
      [4.]

    References:
      https://docs.kidger.site/equinox/api/nn/normalisation/#equinox.nn.BatchNorm
    """
    present = {name: v for name, v in arrays.items() if v is not None}
    names = EMA if EMA[1] in present else BATCH
    counter, (mean, var) = _state(present, names)
    rest = {name: v for name, v in present.items() if name not in names}
    found = _checkpoint.read(rest | {"mean": mean, "var": var}, NAMES)
    if names == BATCH:
        found |= _debiased(found, counter, momentum, correct)
    elif momentum is not None or correct:
        raise ValueError(
            "`momentum` and `correct` are for mode 'batch'; the arrays are of mode "
            "'ema', which keeps its averages as they are. Leave them out."
        )
    elif counter:  # The first time is still to come, and the averages are not set.
        found |= {"mean": 0 * found["mean"], "var": 0 * found["var"] + 1}
    found["step"] = np.int32(counter if names == BATCH else not counter)
    found = _checkpoint.tracked(
        found, names[1], unbiased=False, to_unbiased=unbiased, count=count
    )
    return _checkpoint.layer_state(found)


def from_jaxbn(
    params: Mapping[str, Any],
    stats: RunningStats,
    *,
    momentum: float | None,
    unbiased: bool = False,
    count: float | None = None,
) -> dict[str, Any]:
    """The inverse of `to_jaxbn`: arrays for one `equinox.nn.BatchNorm`.

        hidden = average · (1 − momentum^counter)       in mode "batch"

    Args:
      params: "scale" and "bias", or neither.
      stats: The running statistics. Their `step` becomes the counter.
      momentum: The layer's, for mode "batch"; None for mode "ema".
      unbiased: Whether the variance was tracked with `unbiased=True`. If so, Equinox
        needs var·(n − 1)/n.
      count: That n; with `unbiased=True` only.

    Returns:
      A dict by the layer's fields, as `to_jaxbn` takes it: weight and bias for
      `eqx.tree_at`, the others for `state.set(layer.batch_counter, ...)`.

    Raises:
      TypeError: `stats` is no `RunningStats`.
      ValueError: There is one of scale and bias without the other, several feature
        axes, a step 0 with statistics that have moved, or as for `to_jaxbn`.

    Example:
      >>> import jaxbn
      >>> params, stats = jaxbn.layers.standard().init(2)
      >>> sorted(jaxbn.interop.equinox.from_jaxbn(params, stats, momentum=0.9))
      ['batch_counter', 'batch_state_index', 'bias', 'weight']

    References:
      https://docs.kidger.site/equinox/api/nn/normalisation/#equinox.nn.BatchNorm
    """
    found = _checkpoint.given(params, stats)
    _checkpoint.require_vectors(found, "Equinox")
    if ("scale" in found) != ("bias" in found):
        raise ValueError(
            f"`params` has {sorted(params)}, but Equinox has both or neither. Add a "
            "'scale' of ones, or a 'bias' of zeros."
        )
    found = _checkpoint.tracked(
        found, "stats.var", unbiased=unbiased, to_unbiased=False, count=count
    )
    made = {"weight": found.get("scale"), "bias": found.get("bias")}
    made = {name: np.array(v) for name, v in made.items() if v is not None}
    mean, var = (np.array(found[name]) for name in ("mean", "var"))
    if momentum is None:
        return made | {EMA[0]: not found["step"], EMA[1]: (mean, var)}
    _checkpoint.require_share("momentum", momentum)
    _checkpoint.require_step(found, "Equinox")
    step = int(found["step"])
    # At 0 Equinox divides by 1, and starts from 0 and 1.
    share = 1 - momentum**step if step else 1
    hidden = tuple((v * share).astype(v.dtype) for v in (mean, var))
    return made | {BATCH[0]: step, BATCH[1]: hidden}


def _state(arrays: Arrays, names: tuple[str, str]) -> tuple[Any, tuple[Any, Any]]:
    missing = sorted(set(names) - set(arrays))
    if missing:
        raise ValueError(
            f"Not the arrays of one batch norm: {missing} missing, got "
            f"{sorted(arrays)}. Expected {list(BATCH)} or {list(EMA)}."
        )
    counter = _checkpoint.leaf(names[0], np.asarray(arrays[names[0]], int))
    hidden = arrays[names[1]]
    if not isinstance(hidden, (tuple, list)) or len(hidden) != 2 or counter.ndim:
        raise ValueError(
            f"`{names[1]}` must be a pair (mean, var), and `{names[0]}` one number, as "
            "`state.get` returns them."
        )
    return int(counter), (hidden[0], hidden[1])


def _debiased(
    found: Arrays, counter: int, momentum: float | None, correct: bool
) -> dict[str, Any]:
    if momentum is None:
        raise ValueError(
            "`momentum` is needed in mode 'batch': what Equinox keeps is to be divided "
            "by 1 − momentum**batch_counter. Pass that of the layer."
        )
    _checkpoint.require_share("momentum", momentum)
    if counter < 0:
        raise ValueError(f"`batch_counter` must be at least 0, got {counter}.")
    kept = momentum**counter
    if not counter or kept == 1:  # Equinox divides by 1 before the first update.
        return {}
    mean, var = found["mean"], found["var"]
    if correct:
        # Rounding may leave less than nothing of what was 1 at the start.
        var = np.maximum(var - np.asarray(kept, var.dtype), 0)
    share = np.asarray(1 - kept, var.dtype)
    return {"mean": mean / share, "var": var / share}
