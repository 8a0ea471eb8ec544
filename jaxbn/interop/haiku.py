"""Haiku's batch norms: their options and their arrays.

Haiku itself is not imported. Its statistics are debiased, as with
`momentum=jaxbn.debiased(decay_rate)`, and its arrays keep the reduced axes.

| | Haiku | jaxbn |
| --- | --- | --- |
| decay_rate | weight of the old value, no default | the same, `debiased(decay_rate)` |
| eps | 1e-5 | the same |
| running variance | biased | the same |
| state | `hidden`, `average` = hidden/(1 − decay^counter) | the average, and `step` |
| shapes | (1, 1, 1, C) | (C,) |
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxbn import _axes
from jaxbn._running_stats import RunningStats, debiased
from jaxbn.interop import _checkpoint, _checks, _trees, _values
from jaxbn.interop._checkpoint import Arrays, Converted

NAMES = {"scale": "scale", "offset": "bias"}
AVERAGES = {"mean_ema": "mean", "var_ema": "var"}
FIELDS = ("counter", "hidden", "average")


def options(
    *,
    create_scale: bool,
    create_offset: bool,
    decay_rate: float,
    eps: float = 1e-5,
) -> dict[str, Any]:
    """Converts the arguments of `hk.BatchNorm` to jaxbn's options.

        momentum(jaxbn) = debiased(decay_rate)

    Args:
      create_scale: Whether there is a scale.
      create_offset: Whether there is an offset.
      decay_rate: The weight of the old value.
      eps: Added to the variance.

    Returns:
      Options for `jaxbn.layers.standard` and both `BatchNorm` modules. Haiku's `axis`
      names the *reduced* axes; jaxbn's `feature_axes` are the others.

    Raises:
      TypeError: `create_scale` or `create_offset` is neither True nor False.
      ValueError: `decay_rate` is not in [0, 1), or `eps` is negative or not finite.

    Example:
      >>> import jaxbn
      >>> made = jaxbn.interop.haiku.options(
      ...     create_scale=True, create_offset=True, decay_rate=0.9
      ... )
      >>> layer = jaxbn.layers.standard(**made)

    References:
      https://dm-haiku.readthedocs.io/en/latest/api.html#batchnorm
    """
    _checks.require_flags(create_scale=create_scale, create_offset=create_offset)
    share = _checks.require_share("decay_rate", decay_rate, below_1=True)
    return {
        "momentum": debiased(share),
        "epsilon": _checks.require_not_negative("eps", eps),
        "unbiased": False,
        "use_scale": create_scale,
        "use_bias": create_offset,
    }


def to_jaxbn(
    arrays: Arrays,
    *,
    feature_axes: _axes.Axes = -1,
    unbiased: bool = False,
    count: float | None = None,
) -> Converted:
    """Converts the arrays of one `hk.BatchNorm` to jaxbn's parameters and statistics.

    Args:
      arrays: A dict with `mean_ema` and `var_ema`, which are dicts of Haiku (`counter`,
        `hidden`, `average`), and `scale` and `offset` if there are any. `batch_norms`
        finds them in a model.
      feature_axes: Feature axes of the layer's input; the other axes have length 1 in
        the arrays.
      unbiased: Whether the new layer tracks the unbiased variance. Haiku does not; True
        converts to var·n/(n − 1).
      count: n, the number of values per feature in a training batch; only with
        `unbiased=True`.

    Returns:
      `(params, stats)`, as `init` of `jaxbn.layers.standard(**options(...))` returns
      them. The statistics are Haiku's `average`, in float32 or wider, even if Haiku
      kept them in bfloat16.

    Raises:
      TypeError: A value is not an array of numbers.
      ValueError: Keys are missing or unknown, shapes differ or do not fit
        `feature_axes`, the two counters differ, a variance is negative or NaN, or
        `count` is missing or not needed.

    Example:
      >>> import jaxbn, numpy as np
      >>> half, one = np.full((1, 2), 0.5), np.ones((1, 2))
      >>> ema = {"counter": 1, "hidden": half, "average": one}
      >>> arrays = {"mean_ema": ema, "var_ema": ema}
      >>> params, stats = jaxbn.interop.haiku.to_jaxbn(arrays)
      >>> print(stats.mean, stats.step)
      [1. 1.] 1

    References:
      https://dm-haiku.readthedocs.io/en/latest/api.html#batchnorm
    """
    return _to_jaxbn(arrays, "", feature_axes, unbiased, count)


def from_jaxbn(
    params: Mapping[str, Any],
    stats: RunningStats,
    *,
    ndim: int,
    decay_rate: float,
    feature_axes: _axes.Axes = -1,
    unbiased: bool = False,
    count: float | None = None,
) -> dict[str, Any]:
    """Makes arrays for one `hk.BatchNorm`: the inverse of `to_jaxbn`.

        hidden = average · (1 − decay_rate^counter)

    Args:
      params: "scale", "bias", both or neither.
      stats: The running statistics. Their `step` becomes the counter.
      ndim: The rank of the layer's input, and of the arrays.
      decay_rate: The layer's decay rate.
      feature_axes: Feature axes of the layer's input.
      unbiased: Whether the variance was tracked with `unbiased=True`. If so, Haiku
        needs var·(n − 1)/n.
      count: n, as for `to_jaxbn`; only with `unbiased=True`.

    Returns:
      A dict with `scale`, `offset`, `mean_ema` and `var_ema`, as `to_jaxbn` takes it.
      In the trees of Haiku, they are `params[name]`, `state[f"{name}/~/mean_ema"]` and
      `state[f"{name}/~/var_ema"]`.

    Raises:
      TypeError: `stats` is not a `RunningStats`.
      ValueError: `decay_rate` is not in [0, 1), the step is 0 but the statistics have
        moved, or as for `to_jaxbn`.

    Example:
      >>> import jaxbn
      >>> params, stats = jaxbn.layers.standard().init(2)
      >>> made = jaxbn.interop.haiku.from_jaxbn(params, stats, ndim=4, decay_rate=0.9)
      >>> made["scale"].shape
      (1, 1, 1, 2)

    References:
      https://dm-haiku.readthedocs.io/en/latest/api.html#batchnorm
    """
    decay_rate = _checks.require_share("decay_rate", decay_rate, below_1=True)
    ndim = _checks.require_rank("ndim", ndim)
    found = _checkpoint.given(params, stats)
    _checks.require_step(found, "Haiku")
    found = _checkpoint.written_variance(
        found, unbiased=unbiased, to_unbiased=False, count=count
    )
    axes = _axes.canonical(feature_axes, ndim)
    reduced = _axes.others(axes, ndim)
    if found["mean"].ndim != len(axes):
        raise ValueError(
            f"`feature_axes`, {axes}, are {len(axes)}, but `stats.mean` has shape "
            f"{found['mean'].shape}. Name as many as it has axes."
        )

    def kept(array: np.ndarray) -> np.ndarray:
        return np.array(np.expand_dims(array, reduced))

    share = 1 - decay_rate ** int(found["step"])
    made: dict[str, Any] = {
        theirs: kept(found[ours]) for theirs, ours in NAMES.items() if ours in found
    }
    for theirs, ours in AVERAGES.items():
        average = kept(found[ours])
        hidden = (average * share).astype(average.dtype)
        counter = found["step"].astype(np.int32)
        made[theirs] = {"counter": counter, "hidden": hidden, "average": average}
    return made


def batch_norms(
    params: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    feature_axes: _axes.Axes = -1,
    unbiased: bool = False,
    count: float | Mapping[str, float] | None = None,
) -> dict[str, Converted]:
    """Converts every batch norm in a Haiku model, found in its state.

    Args:
      params: The parameters of `hk.transform_with_state`.
      state: The state that goes with them.
      feature_axes: As for `to_jaxbn`.
      unbiased: As for `to_jaxbn`.
      count: As for `to_jaxbn`; a dict by name if it differs between layers.

    Returns:
      A dict from a module's name, such as "resnet/~/batch_norm", to its `(params,
      stats)`.

    Raises:
      TypeError: As for `to_jaxbn`.
      ValueError: There is no batch norm, or as for `to_jaxbn`; errors name the full
        key.

    Example:
      >>> import jaxbn, numpy as np
      >>> half, one = np.full((1, 2), 0.5), np.ones((1, 2))
      >>> ema = {"counter": 1, "hidden": half, "average": one}
      >>> state = {"net/~/norm/~/mean_ema": ema, "net/~/norm/~/var_ema": ema}
      >>> list(jaxbn.interop.haiku.batch_norms({}, state))
      ['net/~/norm']

    References:
      https://dm-haiku.readthedocs.io/en/latest/api.html#transform-with-state
    """
    hint = "Pass both trees of `hk.transform_with_state`."
    _trees.require_dict("params", params, hint=hint)
    _trees.require_dict("state", state, hint=hint)
    layers: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        name, _, last = key.rpartition("/~/")
        if last in AVERAGES:
            own = _trees.require_dict(f"params[{name!r}]", params.get(name, {}))
            layers.setdefault(name, {**own})[last] = value
    if not layers:
        raise ValueError(
            f"`state` has no batch norm: no key ends in '/~/mean_ema'; got "
            f"{sorted(state)}. Pass the state of `hk.transform_with_state`."
        )
    counts = _checks.counts_of(layers, count)
    return {
        name: _to_jaxbn(arrays, f"{name}/", feature_axes, unbiased, counts[name])
        for name, arrays in layers.items()
    }


def _to_jaxbn(
    arrays: Arrays, at: str, feature_axes: _axes.Axes, unbiased: bool, count: Any
) -> Converted:
    flat = {**_trees.require_dict("arrays", arrays)}
    for ema in AVERAGES:
        fields = flat.pop(ema, None)
        if fields is not None:
            _require_fields(fields, f"{at}{ema}")
            flat[f"{ema}/average"] = fields["average"]
            flat[f"{ema}/counter"] = fields["counter"]
    names = NAMES | {f"{ema}/average": ours for ema, ours in AVERAGES.items()}
    names |= {"mean_ema/counter": "step"}
    other = flat.pop("var_ema/counter", None)
    found = _checkpoint.read(flat, names, at)
    second = _values.leaf(f"{at}var_ema/counter", other)
    _checks.require_count(f"{at}var_ema/counter", second)
    if second != found["step"]:
        raise ValueError(
            f"`{at}mean_ema/counter` is {found['step']}, but `{at}var_ema/counter` "
            f"{other}. jaxbn counts the updates of both in one step."
        )
    axes = _axes.canonical(feature_axes, found["mean"].ndim)
    for name, array in found.items():
        if name != "step":
            found[name] = _without_kept(array, axes, at)
    found = _checkpoint.read_variance(
        found, f"{at}var_ema/average", unbiased=False, to_unbiased=unbiased, count=count
    )
    return _checkpoint.layer_state(found, names, at)


def _require_fields(fields: Any, key: str) -> None:
    what = f"a dict with {list(FIELDS)}"
    present = {
        n for n, v in _trees.require_dict(key, fields, what).items() if v is not None
    }
    if present != set(FIELDS):
        raise ValueError(f"`{key}` must be {what}, got {sorted(present)}.")


def _without_kept(array: np.ndarray, axes: tuple[int, ...], at: str) -> np.ndarray:
    reduced = _axes.others(axes, array.ndim)
    if any(array.shape[axis] != 1 for axis in reduced):
        raise ValueError(
            f"The arrays of `{at or 'arrays'}` have shape {array.shape}: not 1 along "
            f"axes that are no `feature_axes`, {axes}. Name the layer's feature axes; "
            'for `data_format="NCHW"` that is 1.'
        )
    return np.squeeze(array, reduced)
