"""Precise batch norm: recomputes running statistics."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn import _devices
from jaxbn._moments import Moments, whole_count
from jaxbn._running_stats import RunningStats, init_stats, update
from jaxbn.population._collect import measured, pool
from jaxbn.population._trees import (
    as_state,
    map_layers,
    require_same_layers,
    require_weight,
    without_groups,
)

ESTIMATORS = ("pooled", "average")
REMEDY = (
    "Run it in `moments_fn`, on batches that reach all of it; to leave as it is what "
    "has no data, use `adapt`."
)


def recalibrate(
    moments_fn: Callable[[Any], Any],
    batches: Iterable[Any],
    *,
    stats: Any = None,
    estimator: str = "pooled",
    unbiased: bool = False,
) -> Any:
    """Recomputes running statistics for the current weights (Precise BN).

        "pooled":   mean and var of all batches together
        "average":  averages of the mean and of the var of each batch

    Running statistics from training cover few batches, and the weights have changed
    since. After training, after averaging weights (EMA, SWA), and after pruning or
    quantizing them, measure the statistics with the final weights, on about 1000 to
    10 000 examples. In the first layer, "pooled" equals the statistics of one batch of
    all the data, whatever the batch sizes. The inputs of later layers are normalized
    batch by batch if `moments_fn` runs the network in training mode.

    Args:
      moments_fn: A function that takes a batch and returns a tree of `Moments`, with
        the same layers for every batch. `jaxbn.linen.moments_fn` and
        `jaxbn.nnx.moments_fn` make one. It may be compiled, and batches may be sharded
        over devices and processes.
      batches: Any iterable of arguments for `moments_fn`; `tqdm(batches)` shows
        progress. Only one batch is in memory at a time.
      stats: A tree of the current states of the layers that `moments_fn` returns. The
        result then has the same types, shapes and dtypes. It is needed for some of
        `jaxbn.layers` (`renorm`, `domain`, stacked layers). For `jaxbn.linen` and
        `jaxbn.nnx`, `load_stats` does the same.
      estimator: "pooled" weighs every example equally, and includes the variance
        between batches. "average" weighs every batch equally, and leaves it out.
      unbiased: Whether to multiply variances by n/(n − 1), where n is the count of all
        the data, or, for "average", of each batch.

    Returns:
      A tree of `RunningStats` like the tree from `moments_fn`; or, with `stats`, a tree
      like that. Each `step` is the number of batches. To put the result into a model,
      use `jaxbn.linen.load_stats` or `jaxbn.nnx.load_stats`.

    Raises:
      TypeError: The result of `moments_fn` has leaves other than `Moments`, `stats` has
        leaves other than states, or `batches` is an array or a dict.
      ValueError: There is no batch, a layer has seen no data, batches have different
        layers, `stats` has other layers or features, or `estimator` is unknown.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[5.0], [7.0], [9.0]])]
      >>> stats = jaxbn.population.recalibrate(jaxbn.moments, batches)
      >>> print(stats.mean, stats.var, stats.step)
      [5.] [8.] 2
      >>> layer = jaxbn.layers.renorm(epsilon=0.0)
      >>> params, state = layer.init(1)
      >>> def measure(x):
      ...     return layer.forward(params, state, x, training=True)[1]
      >>> new = jaxbn.population.recalibrate(measure, batches, stats=state)
      >>> print(new.mean, new.std.round(2), new.step)
      [5.] [2.83] 2

    References:
      Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3. Ioffe and
      Szegedy, "Batch Normalization" (2015), algorithm 2, for the unbiased average.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` must be one of {ESTIMATORS}, got {estimator!r}.")

    def stats_of(m: Moments) -> RunningStats:
        m = m._replace(count=whole_count(m))
        fresh = init_stats(m.mean.shape, dtype=m.mean.dtype)
        like = RunningStats(m.mean, m.var, fresh.step)  # For the sharding.
        fresh = jax.tree.map(_devices.shard_like, fresh, like)
        return update(fresh, m, momentum=0.0, unbiased=unbiased)

    def found(batch: Any) -> Any:
        moments = measured(moments_fn, batch)
        if stats is None:
            return moments
        require_same_layers(stats, moments)
        return map_layers(without_groups, moments, stats)

    def apart(batch: Any) -> tuple[Any, Any]:
        moments = found(batch)
        return map_layers(mean_of, moments), map_layers(var_of, moments)

    def mean_of(m: Moments) -> Moments:
        return _one(stats_of(m).mean, m)

    def var_of(m: Moments) -> Moments:
        return _one(stats_of(m).var, m)

    if estimator == "pooled":
        number, moments = pool(found, batches)
        require_weight(moments, REMEDY)
        new = map_layers(stats_of, moments)
    else:
        number, (means, variances) = pool(apart, batches)
        require_weight(means, REMEDY)
        new = map_layers(_averaged, means, variances)
    new = map_layers(lambda s: s._replace(step=jnp.int32(number)), new)
    return map_layers(as_state, new if stats is None else stats, new)


def _one(statistic: jax.Array, m: Moments) -> Moments:
    """A statistic of a batch as a single sample, or as none if it had no data."""
    weight = (whole_count(m) > 0).astype(m.count.dtype)
    return Moments(statistic, jnp.zeros_like(m.var), weight)


def _averaged(means: Moments, variances: Moments) -> RunningStats:
    return RunningStats(means.mean, variances.mean, jnp.zeros((), jnp.int32))
