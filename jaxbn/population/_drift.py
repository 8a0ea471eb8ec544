"""Measures how far data have moved from running statistics."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _devices, _dtypes
from jaxbn._moments import Moments, whole_count
from jaxbn._running_stats import RunningStats
from jaxbn.layers import RenormStats
from jaxbn.population._trees import (
    State,
    as_stats,
    map_layers,
    require_same_layers,
    without_groups,
)


class Drift(NamedTuple):
    """How one layer's data differ from its running statistics, channel by channel.

    Attributes:
      kl: Symmetric Kullback-Leibler divergence, in nats, between normal distributions
        with the two means and variances. Without data, this and the next two fields are
        NaN.
      mean_shift: Difference of the means in running standard deviations, with its sign;
        for complex data, its magnitude.
      var_ratio: The variance of the data divided by the running variance.
      dead: Whether the data are constant, to the precision of the moments.
      non_finite: Whether a mean or variance is infinite or NaN.
      count: The total weight of the data.
      never_updated: Whether all running statistics of the layer have their initial
        values, 0 and 1; a scalar.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> m = jaxbn.moments(jnp.ones((4, 2)))
      >>> found = jaxbn.population.drift(jaxbn.init_stats(2), m)
      >>> print(found.dead, found.never_updated)
      [ True  True] True
    """

    kl: jax.Array
    mean_shift: jax.Array
    var_ratio: jax.Array
    dead: jax.Array
    non_finite: jax.Array
    count: jax.Array
    never_updated: jax.Array


@_dtypes.mixing
def drift(stats: Any, moments: Any, *, epsilon: float = 1e-5) -> Any:
    """Measures how far the data of `moments` have moved from the running statistics.

    Let μ and σ² be the running mean and variance, and m and s² the mean and variance of
    the data. With epsilon added to both variances:

        mean_shift = (m − μ) / σ        var_ratio = s² / σ²
        kl = KL(data ‖ running) + KL(running ‖ data)
           = (s² − σ²)² / (2·s²·σ²) + (m − μ)² · (1/s² + 1/σ²) / 2

    After the normalization at inference, a channel with `mean_shift` d and `var_ratio`
    r has mean d and variance r, instead of 0 and 1.

    Args:
      stats: A tree of the layers' states: `RunningStats`, or `RenormStats`, whose std
        is treated as √var.
      moments: A tree of `Moments` of the same layers, from `moments_fn` or `collect`.
        To monitor a deployed network, measure them at inference.
      epsilon: Added to the variances, as in the layers. The variances of a
        `RenormStats` and of the moments of its layer already include it.

    Returns:
      A tree of `Drift` with arrays of the shape of the features. `drift` is pure, so it
      can be compiled, and logged in training. `summary` makes a table of the result.

    Raises:
      TypeError: A tree has other leaves.
      ValueError: The trees have different layers or features.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> stats = jaxbn.init_stats(1)
      >>> m = jaxbn.moments(jnp.array([[1.0], [5.0]]))
      >>> found = jaxbn.population.drift(stats, m, epsilon=0.0)
      >>> print(found.mean_shift, found.var_ratio, found.kl)
      [3.] [4.] [6.75]

    References:
      https://en.wikipedia.org/wiki/Kullback%E2%80%93Leibler_divergence#Symmetrised_divergence
    """
    require_same_layers(stats, moments)

    def of_layer(old: State, m: Moments) -> Drift:
        # (The variances of renorm include epsilon.)
        own = 0.0 if isinstance(old, RenormStats) else epsilon
        return _drift(as_stats(old), without_groups(m, old), own)

    return map_layers(of_layer, stats, moments)


def _drift(stats: RunningStats, m: Moments, epsilon: float) -> Drift:
    resolution = jnp.finfo(m.var.dtype).eps
    mean, var = (_dtypes.widen(jnp.asarray(v)) for v in stats[:2])
    entries = (mean, var, m.mean, m.var)
    finite = _devices.stack(*map(jnp.isfinite, entries)).all(0)
    var, s2 = var + epsilon, m.var + epsilon
    apart = m.mean - mean
    distance = jnp.square(jnp.abs(apart))
    shift = jnp.abs(apart) if jnp.iscomplexobj(apart) else apart
    count = whole_count(m)
    # Not (s²/σ² + σ²/s²)/2 − 1, which cancels where the two are close.
    kl = ((s2 - var) / s2 * ((s2 - var) / var) + distance / s2 + distance / var) / 2

    def known(value: jax.Array) -> jax.Array:
        return jnp.where(count > 0, value, jnp.nan)

    return Drift(
        kl=known(kl),
        mean_shift=known(shift / jnp.sqrt(var)),
        var_ratio=known(s2 / var),
        dead=(m.var <= jnp.square(resolution * jnp.abs(m.mean))) & (count > 0),
        non_finite=~finite,
        count=count,
        never_updated=jnp.all((stats.mean == 0) & (stats.var == 1)),
    )
