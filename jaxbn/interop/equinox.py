"""Equinox's batch norm: its options and its arrays.

Equinox itself is not imported. The arrays of a layer are taken by the names of its
fields: `weight` and `bias` from the layer, the others from the `State` of the model.

| | Equinox | jaxbn |
| --- | --- | --- |
| momentum | weight of the old value, 0.99 | the same |
| eps | 1e-5 | the same |
| running variance | biased | the same |
| `mode="batch"` | hidden/(1 − momentum^counter) | `debiased(momentum)` |
| `mode="ema"` | also normalizes training | `layers.streaming` |
| input | (C, ...), one example in a vmap | `feature_axes=0`, `axis_name` |
"""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn._running_stats import RunningStats, debiased
from jaxbn.interop import _checkpoint, _checks
from jaxbn.interop import _equinox_arrays as _arrays
from jaxbn.interop._checkpoint import Arrays, Converted


def options(
    *,
    eps: float = 1e-5,
    channelwise_affine: bool = True,
    momentum: float = 0.99,
    mode: str = "batch",
) -> dict[str, Any]:
    """Converts the arguments of `equinox.nn.BatchNorm` to jaxbn's options.

        mode "batch": momentum(jaxbn) = debiased(momentum)      "ema": momentum

    Args:
      eps: Added to the variance.
      channelwise_affine: Whether there are a weight and a bias.
      momentum: The weight of the old value.
      mode: "batch" or "ema". With "ema", `jaxbn.layers.standard` updates the statistics
        like Equinox, but normalizes by the batch in training. To normalize by the
        running statistics in training, pass `momentum` to `jaxbn.layers.streaming`,
        which also includes the variance between batches.

    Returns:
      Options for `jaxbn.layers.standard` and both `BatchNorm` modules. Inside `vmap`,
      as in Equinox, add `feature_axes=0` and the `axis_name`.

    Raises:
      TypeError: `channelwise_affine` is neither True nor False.
      ValueError: `momentum` is not from 0 to 1 (below 1 in mode "batch"), `eps` is
        negative or not finite, or `mode` is neither of the two.

    Example:
      >>> import jaxbn
      >>> made = jaxbn.interop.equinox.options(momentum=0.9)
      >>> layer = jaxbn.layers.standard(**made, feature_axes=0, axis_name="batch")

    References:
      https://docs.kidger.site/equinox/api/nn/normalisation/#equinox.nn.BatchNorm
    """
    if not isinstance(mode, str) or mode not in ("batch", "ema"):
        raise ValueError(f"`mode` must be 'batch' or 'ema', got {reprlib.repr(mode)}.")
    _checks.require_flags(channelwise_affine=channelwise_affine)
    batch = mode == "batch"
    share = _checks.require_share("momentum", momentum, below_1=batch)
    return {
        "momentum": debiased(share) if batch else share,
        "epsilon": _checks.require_not_negative("eps", eps),
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
    """Converts the arrays of one `equinox.nn.BatchNorm` to parameters and statistics.

    Equinox starts its hidden variance at 1, but divides it by 1 − momentum^counter as
    if it had started at 0. At inference, the variance is therefore too large by

        momentum^counter / (1 − momentum^counter)

    which is 99 after one step with momentum 0.99, and 0.58 after a hundred. The result
    keeps this error, so that inference is the same as in Equinox, unless `correct` is
    True.

    Args:
      arrays: A dict by the fields of the layer: `weight` and `bias` if it has them; and
        `batch_counter` and `batch_state_index`, or `ema_first_time_index` and
        `ema_state_index`, as returned by `state.get(layer.batch_counter)`. Fields that
        are None in the layer may be left out.
      momentum: The layer's momentum; required in mode "batch", and only allowed there.
      correct: Whether to remove Equinox's initial 1 from the variance (mode "batch"
        only). Inference then differs, for the better.
      unbiased: Whether the new layer tracks the unbiased variance. Equinox does not;
        True converts to var·n/(n − 1).
      count: n, the number of values per feature in a training batch; only with
        `unbiased=True`.

    Returns:
      `(params, stats)`, as `init` of `jaxbn.layers.standard(**options(...))` returns
      them. Before the first update the statistics are mean 0 and variance 1.

    Raises:
      TypeError: A value is not an array of numbers.
      ValueError: Keys are missing or unknown, shapes differ, a variance is negative or
        NaN, `momentum` is missing, not needed or not from 0 to 1, or `count` is missing
        or not needed.

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
    return _to_jaxbn(arrays, "", momentum, correct, unbiased, count)


def from_jaxbn(
    params: Mapping[str, Any],
    stats: RunningStats,
    *,
    momentum: float | None,
    unbiased: bool = False,
    count: float | None = None,
) -> dict[str, Any]:
    """Makes arrays for one `equinox.nn.BatchNorm`: the inverse of `to_jaxbn`.

        hidden = average · (1 − momentum^counter)       in mode "batch"

    Args:
      params: "scale" and "bias", or neither.
      stats: The running statistics. Their `step` becomes the counter.
      momentum: The layer's momentum for mode "batch"; None for mode "ema".
      unbiased: Whether the variance was tracked with `unbiased=True`. If so, Equinox
        needs var·(n − 1)/n.
      count: n, as for `to_jaxbn`; only with `unbiased=True`.

    Returns:
      A dict by the fields of the layer, as `to_jaxbn` takes it: `weight` and `bias` for
      `eqx.tree_at`, the others for `state.set(layer.batch_counter, ...)`.

    Raises:
      TypeError: `stats` is not a `RunningStats`.
      ValueError: Only one of scale and bias is given, there are several feature axes,
        the step is 0 but the statistics have moved, or as for `to_jaxbn`.

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
    found = _checkpoint.written_variance(
        found, unbiased=unbiased, to_unbiased=False, count=count
    )
    _checks.require_step(found, "Equinox")
    made = {
        theirs: np.array(found[ours])
        for theirs, ours in _arrays.NAMES.items()
        if ours in found
    }
    mean, var = np.array(found["mean"]), np.array(found["var"])
    step = int(found["step"])
    if momentum is None:
        return made | dict(zip(_arrays.EMA, (step == 0, (mean, var)), strict=True))
    momentum = _checks.require_share("momentum", momentum, below_1=True)
    # At 0 Equinox divides by 1, and starts from 0 and 1.
    share = 1 - momentum**step if step else 1
    hidden = tuple((v * share).astype(v.dtype) for v in (mean, var))
    return made | dict(zip(_arrays.BATCH, (step, hidden), strict=True))


def batch_norms(
    model: Any,
    state: Any,
    *,
    correct: bool = False,
    unbiased: bool = False,
    count: float | Mapping[str, float] | None = None,
) -> dict[str, Converted]:
    """Converts every batch norm in an Equinox model, recognized by its fields.

    Args:
      model: The model, including its arrays. Modes and momenta are read from its
        layers.
      state: The model's `eqx.nn.State`.
      correct: As for `to_jaxbn`, for layers in mode "batch".
      unbiased: As for `to_jaxbn`.
      count: As for `to_jaxbn`; a dict by path if it differs between layers.

    Returns:
      A dict from the path of a layer, such as "blocks/0/norm", to its `(params,
      stats)`.

    Raises:
      TypeError: `state` is not a state, or as for `to_jaxbn`.
      ValueError: There is no batch norm, the state does not belong to the model, or as
        for `to_jaxbn`; errors name the full path of the field.

    Example:
      >>> import jaxbn, numpy as np
      >>> from types import SimpleNamespace  # in place of Equinox' own, here
      >>> norm = SimpleNamespace(
      ...     weight=None, bias=None, momentum=0.9, mode="ema", batch_counter=None,
      ...     batch_state_index=None, ema_first_time_index=0, ema_state_index=1,
      ... )
      >>> kept = [False, (np.zeros(2), np.ones(2))]
      >>> state = SimpleNamespace(get=kept.__getitem__)
      >>> list(jaxbn.interop.equinox.batch_norms({"block": [norm]}, state))
      ['block/0']

    References:
      https://docs.kidger.site/equinox/api/nn/stateful/
    """
    _checks.require_flags(correct=correct)
    layers = _arrays.layers_of(model)
    if not layers:
        raise ValueError(
            "`model` has no batch norm: no `equinox.nn.BatchNorm` is in it. Pass the "
            "whole model, as `eqx.nn.make_with_state` makes it."
        )
    counts = _checks.counts_of(layers, count)
    found = {}
    for path, layer in layers.items():
        at = path and f"{path}/"
        batch = layer.mode == "batch"
        found[path] = _to_jaxbn(
            _arrays.arrays_of(layer, state, at),
            at,
            layer.momentum if batch else None,
            correct and batch,
            unbiased,
            counts[path],
        )
    return found


def _to_jaxbn(
    arrays: Arrays,
    at: str,
    momentum: float | None,
    correct: bool,
    unbiased: bool,
    count: Any,
) -> Converted:
    _checks.require_flags(correct=correct)
    present, fields = _arrays.fields_of(arrays)
    found = _arrays.read(present, fields, at)
    _checks.require_features(f"{at}{fields[1]}[0]", found)
    if fields == _arrays.BATCH:
        found = _arrays.debiased(found, momentum, correct, at + fields[1])
    elif momentum is not None or correct:
        raise ValueError(
            "`momentum` and `correct` are for mode 'batch'; the arrays are of mode "
            "'ema', which keeps its averages as they are. Leave them out."
        )
    names = _arrays.names_of(fields)
    # The pair's name, because errors about a convention concern both arrays.
    found = _checkpoint.read_variance(
        found, at + fields[1], unbiased=False, to_unbiased=unbiased, count=count
    )
    return _checkpoint.layer_state(found, names, at)
