"""Keras' batch norms (Keras 3, and tf.keras before): their options and their arrays.

Keras itself is not imported. Variables come as they are in `layer.weights`, under every
backend; what goes back are NumPy arrays in the order of `layer.set_weights`.

| | Keras | jaxbn |
| --- | --- | --- |
| momentum | weight of the old value, 0.99 | the same |
| epsilon | 1e-3 | 1e-5 |
| running variance | biased; unbiased in the fused kernel of tf.keras 2 | `unbiased` |
| renorm | four arrays more, two momenta | `layers.renorm`, one momentum |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._running_stats import RunningStats
from jaxbn.interop import _checkpoint
from jaxbn.interop._checkpoint import Arrays, Converted, Params
from jaxbn.layers import RenormStats

NAMES = {
    "gamma": "scale",
    "beta": "bias",
    "moving_mean": "mean",
    "moving_variance": "var",
}
RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


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
      are not given.

    Raises:
      ValueError: `momentum` is not from 0 to 1.

    Example:
      >>> import jaxbn
      >>> jaxbn.interop.keras.options()["epsilon"]
      0.001
      >>> layer = jaxbn.layers.standard(**jaxbn.interop.keras.options())

    References:
      https://keras.io/api/layers/normalization_layers/batch_normalization/
    """
    _checkpoint.require_share("momentum", momentum)
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
      fused: Whether the fused kernel of tf.keras 2 tracked the variance, unbiased.
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
    extra = {name: arrays[name] for name in RENORM if name in arrays}
    rest = {name: v for name, v in arrays.items() if name not in extra}
    found = _checkpoint.read(rest, NAMES)
    found = _checkpoint.tracked(
        found,
        "moving_variance",
        unbiased=fused,
        to_unbiased=fused if unbiased is None else unbiased,
        count=count,
    )
    params, stats = _checkpoint.layer_state(found)
    return (params, _renormed(found, extra)) if extra else (params, stats)


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
        mean, std = np.asarray(stats.mean), np.asarray(stats.std)
        renorm = dict(zip(RENORM, (std, mean, std), strict=True))
        # As Keras does: rounding may leave less than epsilon.
        var = jnp.maximum(jnp.square(stats.std) - (epsilon or 0.0), 0)
        stats = RunningStats(stats.mean, var, stats.step)
    found = _checkpoint.given(params, stats)
    _checkpoint.require_vectors(found, "Keras")
    found = _checkpoint.tracked(
        found, "stats.var", unbiased=unbiased, to_unbiased=fused, count=count
    )
    made = {theirs: found[ours] for theirs, ours in NAMES.items() if ours in found}
    return {name: _checkpoint.written(v) for name, v in (made | renorm).items()}


def _by_name(arrays: Arrays | Sequence[Any]) -> dict[str, Any]:
    if isinstance(arrays, Mapping):
        # tf.keras 2 has paths for names: "batch_normalization/gamma:0".
        return {k.rpartition("/")[2].partition(":")[0]: v for k, v in arrays.items()}
    names = [*NAMES, *RENORM]
    orders = {len(o): o for o in (names[2:4], names[:4], names[2:], names)}
    if len(arrays) not in orders:
        raise ValueError(
            f"`arrays` has {len(arrays)} of them, which may be more than one set. Pass "
            "them by their names, `{v.name: v for v in layer.weights}`."
        )
    return dict(zip(orders[len(arrays)], arrays, strict=True))


def _renormed(found: Mapping[str, Any], extra: Mapping[str, Any]) -> RenormStats:
    missing = sorted(set(RENORM) - set(extra))
    if missing:
        raise ValueError(f"Not the arrays of one renorm layer: {missing} missing.")
    given = {name: _checkpoint.leaf(name, extra[name]) for name in RENORM}
    for name, array in given.items():
        if array.shape != found["mean"].shape:
            raise ValueError(
                f"`{name}` has shape {array.shape}, but `moving_mean` "
                f"{found['mean'].shape}: all must be of the same features."
            )
    if not np.all(given["renorm_stddev"] >= 0):
        raise ValueError("`renorm_stddev` is negative or NaN, which no deviation is.")
    same = {"renorm_mean": found["mean"], "renorm_stddev": given["moving_stddev"]}
    for name, moving in same.items():
        if not np.allclose(given[name], moving, rtol=1e-5, atol=1e-6):
            raise ValueError(
                f"`{name}` is not the moving average of the same: Keras kept two, by "
                "`momentum` for inference and `renorm_momentum` for training, where "
                "jaxbn keeps one. For inference, or to go on without renorm, leave out "
                f"{list(RENORM)}."
            )
    mean, std = (jnp.asarray(given[n]) for n in ("renorm_mean", "renorm_stddev"))
    return RenormStats(mean, std, jnp.zeros((), jnp.int32))
