"""Mixtures of running statistics with other moments."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import _dtypes, _sums
from jaxbn._moments import Moments
from jaxbn._running_stats import RunningStats, blended


def mixture(stats: RunningStats, m: Moments, weight: ArrayLike) -> Moments:
    """The moments of a mixture: `weight` of `m`, and the rest of `stats`.

        mean = (1 − a)·stats.mean + a·m.mean
        var  = (1 − a)·stats.var + a·m.var + a·(1 − a)·|m.mean − stats.mean|²

    The weight is a number or a feature vector. Where `m` has no data, the mixture is
    `stats` alone. `m` may be moments per example. Its count does not change.
    """
    features = m.mean.shape[m.mean.ndim - stats.mean.ndim :]
    if features != stats.mean.shape:
        raise ValueError(
            f"`state.mean` has shape {stats.mean.shape}, but the features of `x` have "
            f"the shape {features}. Make the state with `init` for these features."
        )
    _dtypes.require_no_imaginary_loss("state.mean", stats.mean, "x", m.mean.dtype)
    count = jnp.expand_dims(m.count, tuple(range(m.count.ndim, m.mean.ndim)))
    keep = 1 - jnp.asarray(weight, count.dtype)
    keep = _like(keep, m.mean) if keep.ndim else keep
    mean, var = (
        blended(_like(a, b), b, keep, count)
        for a, b in ((stats.mean, m.mean), (stats.var, m.var))
    )
    between = _sums.squared(m.mean - _like(stats.mean, m.mean))
    between = jnp.where(count > 0, keep * (1 - keep) * between, 0)
    return Moments(mean, var + between, m.count)


def _like(vector: jax.Array, vectors: jax.Array) -> jax.Array:
    """A feature vector, with the axes of vectors per example before its own."""
    return jnp.expand_dims(vector, tuple(range(vectors.ndim - vector.ndim)))


def prior_share(pseudo_samples: ArrayLike, samples: ArrayLike) -> jax.Array:
    """N/(N + n): the weight of running statistics as N samples, against n new ones."""
    prior, new = jnp.asarray(pseudo_samples, float), jnp.asarray(samples, float)
    share = prior / jnp.where(prior + new > 0, prior + new, 1)
    return jnp.where(jnp.isinf(prior) | (prior + new == 0), 1.0, share)
