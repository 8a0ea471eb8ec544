"""Keras' batch norms (Keras 3, and tf.keras before): their options and their arrays.

Keras itself is not imported. Variables come as they are in `layer.weights`, under every
backend; what goes back are NumPy arrays in the order of `layer.set_weights`.

| | Keras | jaxbn |
| --- | --- | --- |
| momentum | weight of the old value, 0.99 | the same |
| epsilon | 1e-3 | 1e-5 |
| running variance | biased; unbiased in the fused kernel of tf.keras 2 | `unbiased` |
| renorm | three arrays more, two momenta | `layers.renorm`, one momentum |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._running_stats import RunningStats
from jaxbn.interop import _checkpoint, _checks
from jaxbn.interop._checkpoint import Arrays, Converted, Params
from jaxbn.layers import RenormStats

NAMES = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}
RENORM = {
    "moving_stddev": "moving_std",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "std",
}


def options(
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    fused: bool = False,
) -> dict[str, Any]:
    """The arguments of `keras.layers.BatchNormalization`, as jaxbn's options.

        momentum(jaxbn) = momentum(keras)

    Args:
      momentum: The weight of the old value.
      epsilon: Keras' default is 1e-3.
      center: Whether there is a beta.
      scale: Whether there is a gamma.
      fused: Whether it ran in the fused kernel of tf.keras 2, the default there for
        inputs of rank 4, which tracks the unbiased variance. Older
        versions of it took 1.001e-5 for any smaller epsilon.

    Returns:
      Options for `jaxbn.layers.standard` and both `BatchNorm` modules. For
      `renorm=True` leave `unbiased` out, pass the others to `jaxbn.layers.renorm`, and
      rmax and dmax of `renorm_clipping` as `r_max` and `d_max`, `jnp.inf` where they
      are not given. Where rmin is not 1/rmax, no option is equal to it.

    Raises:
      ValueError: `momentum` is not from 0 to 1, or `epsilon` is negative.

    Example:
      >>> import jaxbn
      >>> jaxbn.interop.keras.options()["epsilon"]
      0.001
      >>> layer = jaxbn.layers.standard(**jaxbn.interop.keras.options())

    References:
      https://keras.io/api/layers/normalization_layers/batch_normalization/
    """
    _checks.require_not_negative("epsilon", epsilon)
    _checks.require_share("momentum", momentum)
    return {
        "momentum": momentum,
        "epsilon": epsilon,
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
    """The arrays of one `BatchNormalization` as parameters and statistics of jaxbn.

    Args:
      arrays: A dict by the variables' names, `{v.name: v for v in layer.weights}`, or
        the list of `layer.get_weights()`, if it has both gamma and beta or neither.
      fused: Whether the fused kernel of tf.keras 2 tracked the variance, unbiased. Not
        for renorm, like the two that follow.
      unbiased: Whether the layer that goes on from here tracks the unbiased variance;
        by default it does as the old one did.
      count: The number of values per feature in a training batch, where that differs.

    Returns:
      `(params, stats)` as `init` of `jaxbn.layers.standard` returns them. With the
      arrays of `renorm=True`, as `jaxbn.layers.renorm`: its statistics are Keras'
      renorm_mean and renorm_stddev.

    Raises:
      TypeError: A value is no array of numbers.
      ValueError: Keys are missing or not known, shapes differ, a variance is negative
        or NaN, `count` is missing or not needed, or the two averages of renorm are not
        the same.

    Example:
      >>> import jaxbn, numpy as np
      >>> weights = [np.ones(2), np.zeros(2), np.array([1.0, 2.0]), np.full(2, 4.0)]
      >>> params, stats = jaxbn.interop.keras.to_jaxbn(weights)
      >>> print(params["bias"], stats.mean)
      [0. 0.] [1. 2.]

    References:
      https://keras.io/api/layers/normalization_layers/batch_normalization/
    """
    arrays = _by_name(arrays)
    if any(arrays.get(name) is not None for name in RENORM):
        _require_no_conversion(fused, bool(unbiased), count)
        return _renormed(arrays)
    found = _checkpoint.read(arrays, NAMES)
    found = _checkpoint.tracked(
        found,
        "moving_variance",
        unbiased=fused,
        to_unbiased=fused if unbiased is None else unbiased,
        count=count,
    )
    return _checkpoint.layer_state(found)


def from_jaxbn(
    params: Mapping[str, Any],
    stats: RunningStats | RenormStats,
    *,
    fused: bool = False,
    unbiased: bool = False,
    count: float | None = None,
    epsilon: float | None = None,
) -> dict[str, np.ndarray]:
    """The inverse of `to_jaxbn`: arrays for one `BatchNormalization`.

    Args:
      params: "scale", "bias", both or neither.
      stats: The running statistics; a `RenormStats` makes those of `renorm=True`.
      fused: Whether the fused kernel of tf.keras 2 will go on from here, which needs
        the unbiased variance.
      unbiased: Whether the variance was tracked with `unbiased=True`.
      count: The number of values per feature in a training batch, where these differ.
      epsilon: The layer's, for `RenormStats` alone: Keras keeps the variance without
        it.

    Returns:
      A dict by Keras' names, in the order of `layer.set_weights(list(d.values()))`.

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
    if (epsilon is None) == isinstance(stats, RenormStats):
        raise ValueError(
            f"`epsilon` is for `RenormStats`, whose std includes it, and needed there; "
            f"got {epsilon} with {type(stats).__name__}."
        )
    renorm = {}
    if isinstance(stats, RenormStats):
        _require_no_conversion(fused, unbiased, count)
        std = _checkpoint.leaf("stats.std", stats.std)
        _checks.require_at_least_0("stats.std", std)
        renorm = dict(zip(RENORM, (std, stats.mean, std), strict=True))
        # As Keras does: rounding may leave less than epsilon.
        var = np.maximum(np.square(std) - np.asarray(epsilon, std.dtype), 0)
        stats = RunningStats(stats.mean, jnp.asarray(var), stats.step)
    found = _checkpoint.given(params, stats)
    _checks.require_vectors(found, "Keras")
    found = _checkpoint.tracked(
        found, "stats.var", unbiased=unbiased, to_unbiased=fused, count=count
    )
    made = {theirs: found[ours] for theirs, ours in NAMES.items() if ours in found}
    return {name: np.array(v) for name, v in (made | renorm).items()}


def _by_name(arrays: Arrays | Sequence[Any]) -> dict[str, Any]:
    if isinstance(arrays, Mapping):
        # tf.keras 2 has paths for names: "batch_normalization/gamma:0".
        short = [key.rpartition("/")[2].partition(":")[0] for key in arrays]
        if len(set(short)) < len(short):
            raise ValueError(
                f"`arrays` has two of a name: {sorted(arrays)}. Pass the weights of "
                "one layer at a time."
            )
        return dict(zip(short, arrays.values(), strict=True))
    if not isinstance(arrays, Sequence):
        raise TypeError(
            "`arrays` must be a dict or a list of arrays, got "
            f"{type(arrays).__name__}. Pass `{{v.name: v for v in layer.weights}}`."
        )
    names = [*NAMES, *RENORM]
    orders = {len(o): o for o in (names[2:4], names[:4], names[2:], names)}
    if len(arrays) not in orders:
        raise ValueError(
            f"`arrays` has {len(arrays)} of them, which may be more than one set. Pass "
            "them by their names, `{v.name: v for v in layer.weights}`."
        )
    return dict(zip(orders[len(arrays)], arrays, strict=True))


def _renormed(arrays: Arrays) -> tuple[Params, RenormStats]:
    missing = sorted(name for name in RENORM if arrays.get(name) is None)
    if missing:
        raise ValueError(f"Not the arrays of one renorm layer: {missing} missing.")
    found = _checkpoint.read(arrays, NAMES | RENORM)
    for name in ("moving_stddev", "renorm_stddev"):
        _checks.require_at_least_0(name, found[RENORM[name]])
    pairs = {"renorm_mean": "mean", "renorm_stddev": "moving_std"}
    for name, moving in pairs.items():
        if not np.allclose(found[RENORM[name]], found[moving], rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"`{name}` is not the moving average of the same: Keras kept two, by "
                "`momentum` for inference and `renorm_momentum` for training, where "
                "jaxbn keeps one. For inference, or to go on without renorm, leave out "
                f"{list(RENORM)}."
            )
    params, stats = _checkpoint.layer_state(found)
    return params, RenormStats(stats.mean, jnp.asarray(found["std"]), stats.step)


def _require_no_conversion(fused: bool, unbiased: bool, count: Any) -> None:
    if fused or unbiased or count is not None:
        raise ValueError(
            "`fused`, `unbiased` and `count` are not for renorm, whose standard "
            "deviation is that of the biased variance in both libraries."
        )
