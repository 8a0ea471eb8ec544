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
from jaxbn.interop import _checkpoint, _checks
from jaxbn.interop._checkpoint import Arrays, Converted

NAMES = {"weight": "scale", "bias": "bias"}
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
      ValueError: `momentum` is not from 0 to 1 (below 1 in mode "batch"), `eps` is
        negative, or `mode` neither of the two.

    Example:
      >>> import jaxbn
      >>> made = jaxbn.interop.equinox.options(momentum=0.9)
      >>> layer = jaxbn.layers.standard(**made, feature_axes=0, axis_name="batch")

    References:
      https://docs.kidger.site/equinox/api/nn/normalisation/#equinox.nn.BatchNorm
    """
    _checks.require_not_negative("eps", eps)
    _checks.require_share("momentum", momentum, below_1=mode == "batch")
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
    present = _present(arrays)
    names = EMA if EMA[1] in present else BATCH
    found = _read(present, names)
    if names == BATCH:
        found |= _debiased(found, momentum, correct)
    elif momentum is not None or correct:
        raise ValueError(
            "`momentum` and `correct` are for mode 'batch'; the arrays are of mode "
            "'ema', which keeps its averages as they are. Leave them out."
        )
    else:
        found["step"] = np.int32(not found["step"])
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
    _checks.require_vectors(found, "Equinox")
    if ("scale" in found) != ("bias" in found):
        raise ValueError(
            f"`params` has {sorted(params)}, but Equinox has both or neither. Add a "
            "'scale' of ones, or a 'bias' of zeros."
        )
    found = _checkpoint.tracked(
        found, "stats.var", unbiased=unbiased, to_unbiased=False, count=count
    )
    _checks.require_step(found, "Equinox")
    made = {
        theirs: np.array(found[ours]) for theirs, ours in NAMES.items() if ours in found
    }
    mean, var = np.array(found["mean"]), np.array(found["var"])
    step = int(found["step"])
    if momentum is None:
        return made | {EMA[0]: step == 0, EMA[1]: (mean, var)}
    _checks.require_share("momentum", momentum, below_1=True)
    # At 0 Equinox divides by 1, and starts from 0 and 1.
    share = 1 - momentum**step if step else 1
    hidden = tuple((v * share).astype(v.dtype) for v in (mean, var))
    return made | {BATCH[0]: step, BATCH[1]: hidden}


def _present(arrays: Any) -> dict[str, Any]:
    if not isinstance(arrays, Mapping):
        raise TypeError(
            f"`arrays` must be a dict by the layer's fields, got "
            f"{type(arrays).__name__}. Take {list(BATCH)} out of the state, by "
            "`state.get(layer.batch_counter)`."
        )
    return {name: v for name, v in arrays.items() if v is not None}


def _read(arrays: Arrays, names: tuple[str, str]) -> dict[str, Any]:
    """Parameters, mean, var and, as `step`, the counter or the flag."""
    missing = sorted(set(names) - set(arrays))
    if missing:
        raise ValueError(
            f"Not the arrays of one batch norm: {missing} missing, got "
            f"{sorted(arrays)}. Expected {list(BATCH)} or {list(EMA)}."
        )
    counter, pair = names
    hidden = arrays[pair]
    if not isinstance(hidden, (tuple, list)) or len(hidden) != 2:
        raise ValueError(
            f"`{pair}` must be a pair (mean, var), as `state.get` returns it, got "
            f"{type(hidden).__name__}."
        )
    parts = {f"{pair}[0]": hidden[0], f"{pair}[1]": hidden[1]}
    rest = {name: v for name, v in arrays.items() if name != pair}
    table = NAMES | {f"{pair}[0]": "mean", f"{pair}[1]": "var", counter: "step"}
    if names == EMA and _checkpoint.leaf(counter, arrays[counter]):
        # The first time is to come: nothing is set, and anything may be in them.
        like = _checkpoint.leaf(f"{pair}[0]", hidden[0])
        fresh = np.zeros_like(like), np.ones_like(like)
        parts = dict(zip(parts, fresh, strict=True))
    return _checkpoint.read(rest | parts, table)


def _debiased(found: Arrays, momentum: float | None, correct: bool) -> dict[str, Any]:
    if momentum is None:
        raise ValueError(
            "`momentum` is needed in mode 'batch': what Equinox keeps is to be divided "
            "by 1 − momentum**batch_counter. Pass that of the layer."
        )
    _checks.require_share("momentum", momentum, below_1=True)
    kept = momentum ** int(found["step"])
    if kept == 1:  # Equinox divides by 1 before the first update.
        return {}
    mean, var = found["mean"], found["var"]
    if correct:
        # Rounding may leave less than nothing of what was 1 at the start.
        var = np.maximum(var - np.asarray(kept, var.dtype), 0)
    share = np.asarray(1 - kept, var.dtype)
    return {"mean": mean / share, "var": var / share}
