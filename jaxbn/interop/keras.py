"""Keras' batch norms (Keras 3, and older tf.keras): their options and their arrays.

Keras itself is not imported. Variables can come straight from `layer.weights`, with any
backend; the functions return NumPy arrays in the order of `layer.set_weights`.

| | Keras | jaxbn |
| --- | --- | --- |
| momentum | weight of the old value, 0.99 | the same |
| epsilon | 1e-3 | 1e-5 |
| running variance | biased; unbiased in the fused kernel of tf.keras 2 | `unbiased` |
| renorm | three arrays more, two momenta | `layers.renorm`, one momentum |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbn._running_stats import RunningStats
from jaxbn.interop import _checkpoint, _checks, _trees, _values
from jaxbn.interop import _keras_names as _names
from jaxbn.interop._checkpoint import Arrays, Converted, Params
from jaxbn.interop._keras_names import NAMES, RENORM
from jaxbn.layers import RenormStats


def options(
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    fused: bool = False,
) -> dict[str, Any]:
    """Converts the arguments of `keras.layers.BatchNormalization` to jaxbn's options.

        momentum(jaxbn) = momentum(keras)

    Args:
      momentum: The weight of the old value.
      epsilon: Keras' default is 1e-3.
      center: Whether there is a beta.
      scale: Whether there is a gamma.
      fused: Whether the layer ran in the fused kernel of tf.keras 2, which is the
        default there for inputs of rank 4 and tracks the unbiased variance. Older
        versions of that kernel replaced any smaller epsilon with 1.001e-5.

    Returns:
      Options for `jaxbn.layers.standard` and both `BatchNorm` modules. For
      `renorm=True`, leave out `unbiased`, and pass the others to `jaxbn.layers.renorm`,
      with rmax and dmax of `renorm_clipping` as `r_max` and `d_max` (`jnp.inf` if they
      are not given). If rmin is not 1/rmax, there is no equivalent option.

    Raises:
      TypeError: `center`, `scale` or `fused` is neither True nor False.
      ValueError: `momentum` is not from 0 to 1, or `epsilon` is negative or not finite.

    Example:
      >>> import jaxbn
      >>> jaxbn.interop.keras.options()["epsilon"]
      0.001
      >>> layer = jaxbn.layers.standard(**jaxbn.interop.keras.options())

    References:
      https://keras.io/api/layers/normalization_layers/batch_normalization/
    """
    _checks.require_flags(center=center, scale=scale, fused=fused)
    return {
        "momentum": _checks.require_share("momentum", momentum),
        "epsilon": _checks.require_not_negative("epsilon", epsilon),
        "unbiased": fused,
        "use_scale": scale,
        "use_bias": center,
    }


def to_jaxbn(
    arrays: Arrays | Sequence[Any],
    *,
    fused: bool = False,
    unbiased: bool | None = None,
    count: float | None = None,
) -> Converted | tuple[Params, RenormStats]:
    """Converts the arrays of one `BatchNormalization` to parameters and statistics.

    Args:
      arrays: A dict by the names of the variables,
        `{v.name: v for v in layer.weights}`, by their paths, or by their names in
        TensorFlow (ending in "/EMA", "/ExponentialMovingAverage" or
        "/.ATTRIBUTES/VARIABLE_VALUE"). If there are both gamma and beta or neither,
        also the list from `layer.get_weights()`, or "vars/0", "vars/1", ... of a
        .weights.h5 file, which has the same order.
      fused: Whether the fused kernel of tf.keras 2 tracked the variance, which is then
        unbiased. Not for renorm, like the next two arguments.
      unbiased: Whether the new layer tracks the unbiased variance; by default, if the
        old one did.
      count: The number of values per feature in a training batch; only if the old and
        new variances differ.

    Returns:
      `(params, stats)`, as `init` of `jaxbn.layers.standard` returns them; for
      `renorm=True`, as `init` of `jaxbn.layers.renorm` does, and the statistics are
      renorm_mean and renorm_stddev of Keras.

    Raises:
      TypeError: A value is not an array of numbers.
      ValueError: Keys are missing or unknown, or name both a variable and its average;
        arrays without names are ambiguous; shapes differ; a variance is negative or
        NaN; `count` is missing or not needed; or the two averages of renorm differ.

    Example:
      >>> import jaxbn, numpy as np
      >>> weights = [np.ones(2), np.zeros(2), np.array([1.0, 2.0]), np.full(2, 4.0)]
      >>> params, stats = jaxbn.interop.keras.to_jaxbn(weights)
      >>> print(params["bias"], stats.mean)
      [0. 0.] [1. 2.]

    References:
      https://keras.io/api/layers/normalization_layers/batch_normalization/
    """
    _checks.require_flags(fused=fused)
    if isinstance(arrays, Mapping):
        arrays = _trees.flat("arrays", arrays)
        return _to_jaxbn(arrays, _names.keys_of(arrays), "", fused, unbiased, count)
    if not isinstance(arrays, Sequence) or isinstance(arrays, (str, bytes)):
        raise TypeError(
            "`arrays` must be a dict or a list of arrays, got "
            f"{type(arrays).__name__}. Pass `{_names.BY_NAME}`."
        )
    by_name = _names.named(arrays)
    own = {name: name for name in by_name}
    return _to_jaxbn(by_name, own, "", fused, unbiased, count)


def from_jaxbn(
    params: Mapping[str, Any],
    stats: RunningStats | RenormStats,
    *,
    fused: bool = False,
    unbiased: bool = False,
    count: float | None = None,
    epsilon: float | None = None,
) -> dict[str, np.ndarray]:
    """Makes arrays for one `BatchNormalization`: the inverse of `to_jaxbn`.

    Args:
      params: "scale", "bias", both or neither.
      stats: The running statistics; a `RenormStats` makes arrays for `renorm=True`.
      fused: Whether the arrays are for the fused kernel of tf.keras 2, which needs the
        unbiased variance.
      unbiased: Whether the variance was tracked with `unbiased=True`.
      count: The number of values per feature in a training batch; only if `fused` and
        `unbiased` differ.
      epsilon: The layer's epsilon; only for `RenormStats`, because Keras stores the
        variance without it.

    Returns:
      A dict by the names in Keras, in the order of
      `layer.set_weights(list(d.values()))`.

    Raises:
      TypeError: `stats` is neither of the two.
      ValueError: There are several feature axes, `epsilon` is missing or not needed, or
        as for `to_jaxbn`.

    Example:
      >>> import jaxbn
      >>> params, stats = jaxbn.layers.standard().init(2)
      >>> list(jaxbn.interop.keras.from_jaxbn(params, stats))
      ['gamma', 'beta', 'moving_mean', 'moving_variance']

    References:
      https://keras.io/api/layers/normalization_layers/batch_normalization/
    """
    _checks.require_flags(fused=fused)
    if (epsilon is None) == isinstance(stats, RenormStats):
        raise ValueError(
            f"`epsilon` is for `RenormStats`, whose std includes it, and needed there; "
            f"got {epsilon!r} with {type(stats).__name__}."
        )
    std = None
    if isinstance(stats, RenormStats):
        _require_no_conversion(fused, unbiased, count)
        std = _values.leaf("stats.std", stats.std)
        var: Any = _variance(std, _checks.require_not_negative("epsilon", epsilon))
        stats = RunningStats(stats.mean, var, stats.step)
    spread = "var" if std is None else "std"
    found = _checkpoint.given(params, stats, spread)
    _checks.require_vectors(found, "Keras")
    found = _checkpoint.written_variance(
        found, unbiased=unbiased, to_unbiased=fused, count=count
    )
    made = {theirs: found[ours] for theirs, ours in NAMES.items() if ours in found}
    if std is not None:
        made |= dict(zip(RENORM, (std, found["mean"], std), strict=True))
    return {name: np.array(v) for name, v in made.items()}


def batch_norms(
    weights: Mapping[str, Any],
    *,
    fused: bool = False,
    unbiased: bool | None = None,
    count: float | Mapping[str, float] | None = None,
) -> dict[str, Converted | tuple[Params, RenormStats]]:
    """Converts every batch norm in a Keras model, recognized by its variables.

    Args:
      weights: The weights of a whole model by path,
        `{v.path: v for v in model.weights}`. Or the arrays of a TensorFlow checkpoint
        by name. Or a .weights.h5 file, nested (an `h5py.File(...)`) or by path
        ("layers/norm/vars/0").
      fused: As for `to_jaxbn`.
      unbiased: As for `to_jaxbn`.
      count: As for `to_jaxbn`; a dict by path if it differs between layers.

    Returns:
      A dict from the path of a layer, such as "block/norm", to its `(params, stats)`,
      in the order of `weights`. A .weights.h5 file has no names. There, a batch norm is
      a layer of four vectors of equal length (five or seven with renorm), or a layer
      named "batch_normalization", the default name in Keras. Under other names, batch
      norms without gamma and beta are not found.

    Raises:
      TypeError: As for `to_jaxbn`.
      ValueError: There is no batch norm, or as for `to_jaxbn`; errors name the full
        key.

    Example:
      >>> import jaxbn, numpy as np
      >>> weights = {
      ...     "net/conv/kernel": np.ones((3, 3, 1, 4)),
      ...     "net/bn/moving_mean": np.zeros(4), "net/bn/moving_variance": np.ones(4),
      ... }
      >>> list(jaxbn.interop.keras.batch_norms(weights))
      ['net/bn']

    References:
      https://keras.io/api/models/model_saving_apis/weights_saving_and_loading/
    """
    _checks.require_flags(fused=fused)
    hint = "Pass `{v.path: v for v in model.weights}`."
    flat = _trees.flat("weights", weights, "a dict by path", hint)
    layers = _names.batch_norms(flat)
    if not layers:
        raise ValueError(
            f"`weights` has no batch norm: none of its {len(flat)} keys ends in "
            f"moving_mean, and no layer has four vectors under vars. {hint}"
        )
    counts = _checks.counts_of(layers, count)
    found = {}
    for path, keys in layers.items():
        own = {key: flat[key] for key in keys.values()}
        at = path and f"{path}/"
        found[path] = _to_jaxbn(own, keys, at, fused, unbiased, counts[path])
    return found


def _to_jaxbn(
    arrays: Arrays,
    keys: _names.Keys,
    at: str,
    fused: bool,
    unbiased: bool | None,
    count: Any,
) -> Converted | tuple[Params, RenormStats]:
    known = {name: keys.get(name, at + name) for name in (*NAMES, *RENORM)}
    if any(arrays.get(known[name]) is not None for name in RENORM):
        _require_no_conversion(fused, bool(unbiased), count)
        return _renormed(arrays, known)
    names = {known[name]: ours for name, ours in NAMES.items()}
    found = _checkpoint.read(arrays, names)
    _checks.require_features(known["moving_mean"], found)
    found = _checkpoint.read_variance(
        found,
        known["moving_variance"],
        unbiased=fused,
        to_unbiased=fused if unbiased is None else unbiased,
        count=count,
    )
    return _checkpoint.layer_state(found, names)


def _renormed(arrays: Arrays, known: _names.Keys) -> tuple[Params, RenormStats]:
    missing = sorted(known[name] for name in RENORM if arrays.get(known[name]) is None)
    if missing:
        raise ValueError(f"Not the arrays of one renorm layer: {missing} missing.")
    names = {known[name]: ours for name, ours in (NAMES | RENORM).items()}
    found = _checkpoint.read(arrays, names)
    _checks.require_features(known["moving_mean"], found)
    for name in ("moving_stddev", "renorm_stddev"):
        _checks.require_at_least_0(known[name], found[RENORM[name]])
    pairs = {"renorm_mean": "moving_mean", "renorm_stddev": "moving_stddev"}
    for name, moving in pairs.items():
        two = (found[(NAMES | RENORM)[n]] for n in (name, moving))
        if not np.allclose(*two, rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"`{known[name]}` is not the moving average of the same, "
                f"`{known[moving]}`: Keras kept two, by `momentum` for inference and "
                "`renorm_momentum` for training, where jaxbn keeps one. For inference, "
                "or to go on without renorm, leave out "
                f"{[known[name] for name in RENORM]}."
            )
    params, stats = _checkpoint.layer_state(found, names)
    std = _values.to_device(known["renorm_stddev"], found["std"])
    return params, RenormStats(stats.mean, std, stats.step)


def _variance(std: np.ndarray, epsilon: float) -> np.ndarray:
    """The variance that Keras stores, without epsilon."""
    _checks.require_floating("stats.std", std)
    _checks.require_at_least_0("stats.std", std)
    with np.errstate(over="ignore"):
        squared = np.square(std)
    _values.require_finite("stats.std", squared, std)
    # As in Keras: rounding may leave less than epsilon.
    return np.maximum(
        squared - _values.held("epsilon", np.asarray(epsilon), std.dtype), 0
    )


def _require_no_conversion(fused: bool, unbiased: bool, count: Any) -> None:
    if fused or unbiased or count is not None:
        raise ValueError(
            "`fused`, `unbiased` and `count` are not for renorm, whose standard "
            "deviation is that of the biased variance in both libraries."
        )
