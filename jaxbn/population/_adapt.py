"""Adapts statistics to a different domain than the training data."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn import _dtypes
from jaxbn._moments import Moments, whole_count
from jaxbn._running_stats import RunningStats, stepped, update
from jaxbn.layers._mixture import mixture, prior_share
from jaxbn.population._trees import (
    STATES,
    State,
    as_state,
    as_stats,
    map_layers,
    named_layers,
    require_same_layers,
    without_groups,
)


def adapt(
    stats: Any,
    moments: Any,
    *,
    pseudo_samples: ArrayLike = 0.0,
    samples: ArrayLike | None = None,
    weight: Any = None,
) -> Any:
    """Adapts running statistics to the domain in which `moments` were measured.

        mean = N/(N + n)·stats.mean + n/(N + n)·moments.mean        likewise for var

    where n is the number of samples of the new domain, and the old statistics count as
    N samples. With a `weight` a, the result is the statistics of a mixture of both
    domains:

        mean = (1 − a)·stats.mean + a·moments.mean
        var  = (1 − a)·stats.var + a·moments.var + a·(1 − a)·|difference of means|²

    - AdaBN: N = 0, `moments` collected over the unlabeled data of the new domain.
    - Prediction-time batch norm: N = 0, `moments` of the batch to predict.
    - Mixed statistics: N above 0, `moments` of a small batch, or of one image.
    - TTN: a `weight` for each feature, large where the domains differ.

    Only statistics change, so no labels and no gradients are needed. The moments of a
    layer depend on how the layers before it normalize. In training mode, they normalize
    by the new domain alone, which is right for N = 0. For other N, build the model with
    `pseudo_samples=N` (see `jaxbn.layers.standard`), which mixes layer by layer. At
    inference, such a model needs no `adapt`; to use `adapt` all the same, measure
    `moments` with it.

    Args:
      stats: A tree of the layers' old states: `RunningStats`, as from
        `jaxbn.linen.running_stats` or `jaxbn.nnx.running_stats`, or `RenormStats`,
        whose std is treated as √var. Layers may be stacked, as by `jax.vmap`.
      moments: A tree of `Moments` of the same layers, from `moments_fn`, `collect`, or
        the layers' `forward`.
      pseudo_samples: N, at least 0. If infinite, the statistics do not change.
      samples: n, the number of examples in `moments`, which is needed if N is not 0.
        (The moments of a convolution count positions, not examples.)
      weight: a, the weight of `moments`, from 0 to 1: a number, an array with the shape
        of the features (if it is the same in all layers), or a tree like `stats` with
        one of these for each layer. Give this, or `pseudo_samples` and `samples`.

    Returns:
      A tree like `stats`, with the same types, shapes and dtypes. Features without
      weight in `moments` keep their statistics.

    Raises:
      TypeError: A tree has other leaves, or moments are complex and `stats` is real.
      ValueError: The trees have different layers or features; `pseudo_samples` or
        `samples` is negative; `samples` is needed; or `weight` is not from 0 to 1, does
        not fit the features, or is given together with one of the other two.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> stats = jaxbn.init_stats(1)
      >>> m = jaxbn.moments(jnp.array([[4.0], [8.0]]))
      >>> new = jaxbn.population.adapt(stats, m, pseudo_samples=6, samples=2)
      >>> print(new.mean, new.var)
      [1.5] [1.75]
      >>> new = jaxbn.population.adapt(stats, m, weight=jnp.array([0.25]))
      >>> print(new.mean, new.var)
      [1.5] [8.5]

    References:
      Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation"
      (2016), for AdaBN. Nado et al., "Evaluating Prediction-Time Batch Normalization
      for Robustness under Covariate Shift" (2020). Schneider et al., "Improving
      robustness against common corruptions by covariate shift adaptation" (2020), for
      mixed statistics. Lim et al., "TTN: A Domain-Shift Aware Batch Normalization in
      Test-Time Adaptation" (2023), for the weights of features.
    """
    require_same_layers(stats, moments)
    if weight is None:
        move = functools.partial(update, momentum=_kept(pseudo_samples, samples))
        return map_layers(functools.partial(_adapted, move), stats, moments)
    if samples is not None or isinstance(pseudo_samples, Tracer) or pseudo_samples != 0:
        raise ValueError(
            "`weight` says how much `moments` count, and so do `pseudo_samples` and "
            "`samples`. Give one of the two."
        )
    weights = _weights_of(weight, stats)
    return map_layers(functools.partial(_adapted, _mixed), stats, moments, weights)


def _adapted(move: Callable, old: State, m: Moments, *vectors: jax.Array) -> State:
    for _ in range(np.ndim(old.step)):  # One per axis of layers or domains.
        move = jax.vmap(move)
    m = without_groups(m, old)
    new = move(as_stats(old), m._replace(count=whole_count(m)), *vectors)
    return as_state(old, new)


def _mixed(stats: RunningStats, m: Moments, weight: jax.Array) -> RunningStats:
    """The statistics of a mixture of the old data and the new."""
    new = mixture(stats, m, weight)
    return stepped(stats, new.mean, new.var, weight, m.count)


def _weights_of(weight: Any, stats: Any) -> Any:
    """The weight of each layer, with the shape of its features."""
    places = map_layers(lambda _: 0, stats)
    alone = len(jax.tree.leaves(weight)) == 1 and jax.tree.leaves(weight)[0] is weight
    each = map_layers(lambda _: weight, stats) if alone else weight
    if jax.tree.structure(each) != jax.tree.structure(places):
        raise ValueError(
            "`weight` must be a number, an array, or a tree with one of these for each "
            f"layer of `stats`, {jax.tree.structure(places)}, got "
            f"{jax.tree.structure(weight)}."
        )
    own = named_layers("stats", stats, *STATES).items()
    found = [
        _weight_of(name, value, state)
        for (name, state), value in zip(own, jax.tree.leaves(each), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(places), found)


def _weight_of(name: str, value: ArrayLike, state: State) -> jax.Array:
    numbers, features = _dtypes.numbers("weight", value), np.shape(state.mean)
    if numbers is not None and not np.all((numbers >= 0) & (numbers <= 1)):
        raise ValueError(
            f"`weight` is that of `moments`, from 0 to 1, got {value} for layer "
            f"{name!r}."
        )
    own = features[np.ndim(state.step) :]
    if np.shape(value) not in ((), own, features):
        raise ValueError(
            f"`weight` of layer {name!r} has shape {np.shape(value)}, expected a "
            f"number or {own}, one for each feature."
        )
    return jnp.broadcast_to(jnp.asarray(value, float), features)


def _kept(pseudo_samples: ArrayLike, samples: ArrayLike | None) -> ArrayLike:
    """N/(N + n), the weight of the old statistics."""
    for name, value in {"pseudo_samples": pseudo_samples, "samples": samples}.items():
        known = value is not None and not isinstance(value, Tracer)
        if known and not (np.ndim(value) == 0 and value >= 0):  # type: ignore
            raise ValueError(f"`{name}` must be a number of at least 0, got {value}.")
    if samples is None:
        if isinstance(pseudo_samples, Tracer) or pseudo_samples != 0:
            raise ValueError(
                "`samples` is needed with `pseudo_samples`: how many examples the "
                "moments are of, such as the size of the batch."
            )
        return 0.0
    return prior_share(pseudo_samples, samples)
