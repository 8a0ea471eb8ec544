"""Adapts statistics to a different domain than the training data."""

import functools
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn._moments import Moments, whole_count
from jaxbn._running_stats import update
from jaxbn.layers._mixture import prior_share
from jaxbn.population._trees import (
    State,
    as_state,
    as_stats,
    map_layers,
    require_same_layers,
    without_groups,
)


def adapt(
    stats: Any,
    moments: Any,
    *,
    pseudo_samples: ArrayLike = 0.0,
    samples: ArrayLike | None = None,
) -> Any:
    """Adapts running statistics to the domain in which `moments` were measured.

        mean = N/(N + n)·stats.mean + n/(N + n)·moments.mean        var alike

    with n samples of the new domain; the old statistics count as N samples.

    - AdaBN: N = 0, `moments` collected over the unlabeled data of the new domain.
    - Prediction-time batch norm: N = 0, `moments` of the batch to predict.
    - The mix: N above 0, `moments` of a small batch, or of one image.

    Only statistics change: no labels and no gradients are needed. A layer's moments
    depend on how the layers before it are normalized: in training mode, by the new
    domain alone, which is right for N = 0. For other N, build the model with
    `pseudo_samples=N` (as in `jaxbn.layers.standard`), which mixes layer by layer: its
    inference needs no `adapt`, and moments measured in it are the right ones here.

    Args:
      stats: A tree of the layers' old states: `RunningStats`, as from
        `jaxbn.linen.running_stats` or `jaxbn.nnx.running_stats`, or `RenormStats`,
        whose std is treated as √var. Layers may be stacked, as by `jax.vmap`.
      moments: A tree of `Moments` of the same layers, from `moments_fn`, `collect`, or
        the layers' `forward`.
      pseudo_samples: N, 0 or more; if infinite, the statistics do not change.
      samples: n, the number of examples in `moments`. Needed if N is not 0: a
        convolution's moments count positions, not examples.

    Returns:
      A tree like `stats`, with the same kinds, shapes and dtypes. Entries without
      weight in `moments` keep their values.

    Raises:
      TypeError: A tree has other leaves, or moments are complex and `stats` real.
      ValueError: The trees have different layers or features, `pseudo_samples` or
        `samples` is negative, or `samples` is needed.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> stats = jaxbn.init_stats(1)
      >>> m = jaxbn.moments(jnp.array([[4.0], [8.0]]))
      >>> new = jaxbn.population.adapt(stats, m, pseudo_samples=6, samples=2)
      >>> print(new.mean, new.var)
      [1.5] [1.75]

    References:
      Li et al., "Revisiting Batch Normalization For Practical Domain Adaptation"
      (2016), for AdaBN. Nado et al., "Evaluating Prediction-Time Batch Normalization
      for Robustness under Covariate Shift" (2020). Schneider et al., "Improving
      robustness against common corruptions by covariate shift adaptation" (2020), for
      the mix.
    """
    require_same_layers(stats, moments)
    kept = _kept(pseudo_samples, samples)

    def adapted(old: State, m: Moments) -> State:
        moved = functools.partial(update, momentum=kept)
        for _ in range(np.ndim(old.step)):  # One per axis of layers or domains.
            moved = jax.vmap(moved)
        m = without_groups(m, old)
        new = moved(as_stats(old), m._replace(count=whole_count(m)))
        return as_state(old, new)

    return map_layers(adapted, stats, moments)


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
