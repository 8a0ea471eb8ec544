"""Batch renormalization: normalizes in training in the same way as at inference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _compat, _devices, _dtypes
from jaxbn._moments import Moments
from jaxbn._running_stats import Momentum, RunningStats, init_stats, update
from jaxbn.layers._layer import (
    Layer,
    Norm,
    Params,
    affine,
    compose,
    factory,
    init_affine,
)

Limit = ArrayLike | Callable[[jax.Array], ArrayLike]


@_compat.exportable("jaxbn.RenormStats")
class RenormStats(NamedTuple):
    """Running mean and standard deviation, the state of `renorm`.

    Attributes:
      mean: Array with the shape of the feature axes.
      std: Real array of the same shape, an average of √(var + epsilon).
      step: int32 scalar, the number of updates in which any feature had weight.

    Example:
      >>> import jaxbn
      >>> _, state = jaxbn.layers.renorm().init(2)
      >>> print(state.mean, state.std, state.step)
      [0. 0.] [1. 1.] 0
    """

    mean: jax.Array
    std: jax.Array
    step: jax.Array


State = RenormStats | RunningStats


@factory
def renorm(
    *,
    r_max: Limit = 3.0,
    d_max: Limit = 5.0,
    tracks: str = "std",
    warm_up_steps: int = 0,
    feature_axes: _axes.Axes = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    use_fast_variance: bool | str = True,
    axis_name: _devices.AxisName | None = None,
    axis_index_groups: _devices.Groups | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    stats_dtype: DTypeLike = jnp.float32,
    derivatives: str = "vjp",
    implementation: str | None = None,
    skip_nonfinite: bool = False,
) -> Layer:
    """Batch renormalization: batch norm, corrected towards the running statistics.

    With the mean μ_B of the batch, σ_B = √(var + epsilon), and the running μ and σ:

        r = clip(σ_B / σ, 1/r_max, r_max)      d = clip((μ_B − μ) / σ, −d_max, d_max)
        training:   y = ((x − μ_B) / σ_B · r + d) · scale + bias
                    μ, σ = momentum·(μ, σ) + (1 − momentum)·(μ_B, σ_B)
        inference:  y = (x − μ) / σ · scale + bias

    With `tracks="var"`, the running statistics are μ and an average v of variances,
    from which σ = √(v + epsilon).

    No gradient passes through r and d. If nothing is clipped, the output in training is
    the output at inference by the statistics before the update, however small the
    batch. With r = 1 and d = 0 (`r_max=1`, `d_max=0`), the layer is batch norm. Early
    in training, the running statistics carry no information. Therefore either start
    from these limits and let them grow, as in the paper, with schedules such as
    `optax.linear_schedule(1.0, 3.0, 35_000, transition_begin=5_000)`, or set
    `warm_up_steps`, as CrossQ does.

    Args:
      r_max: The largest r; the smallest r is 1/r_max. A number of at least 1 (`jnp.inf`
        clips nothing), or a function of the step.
      d_max: The largest |d|: a number of at least 0, or a function of the step.
      tracks: What is averaged. "std": standard deviations √(var + epsilon), as in the
        paper. "var": variances, as in reinforcement learning.
      warm_up_steps: For this number of updates, r = 1 and d = 0. Cannot be combined
        with limits that are functions of the step.
      feature_axes: As for `standard`, like all options below.
      momentum: The weight of the old running statistics.
      epsilon: Added to the variance.
      use_scale: Whether `params` has a factor "scale".
      use_bias: Whether `params` has an offset "bias".
      use_fast_variance: As for `standard`.
      axis_name: Name or names of mapped axes to compute statistics over.
      axis_index_groups: Groups of indices of that axis.
      dtype: The output's dtype, by default the dtype of `x`.
      param_dtype: The dtype of the parameters.
      stats_dtype: The dtype of the running mean; complex for complex input, where the
        magnitude of d is clipped.
      derivatives: "vjp" or "jvp", as for `batch_norm`.
      implementation: How the sums of a batch are computed, as for `moments`.
      skip_nonfinite: As for `standard`.

    Returns:
      A `Layer`. Its state is a `RenormStats`, and the variance of the moments that
      `forward` returns and `update` takes includes epsilon. With `tracks="var"`, the
      state is a `RunningStats`, and epsilon is not included.

    Raises:
      ValueError: `r_max` is below 1, `d_max` is below 0, `tracks` is neither "std" nor
        "var", or `warm_up_steps` is negative or combined with a limit that is a
        function.
      TypeError: A limit is neither a number nor a function, or `warm_up_steps` is not
        an integer. In `apply`, as for `standard`.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.layers.renorm(r_max=jnp.inf, d_max=jnp.inf)
      >>> params, state = layer.init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, _ = layer.apply(params, state, x, training=True)
      >>> print(y[:, 0], layer.apply(params, state, x, training=False)[0][:, 0])
      [1. 3.] [1. 3.]

    References:
      Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
      Batch-Normalized Models" (2017). Bhatt et al., "CrossQ: Batch Normalization in
      Deep Reinforcement Learning for Greater Sample Efficiency and Simplicity" (2024),
      for `tracks="var"` and `warm_up_steps`.
    """
    _require_limit("r_max", r_max, 1)
    _require_limit("d_max", d_max, 0)
    _require_warm_up(tracks, warm_up_steps, r_max, d_max)
    names = ["scale"] * use_scale + ["bias"] * use_bias
    average = AVERAGES[tracks]

    def init(features):
        stats = init_stats(features, dtype=stats_dtype)
        params = init_affine(features, use_scale, use_bias, param_dtype)
        return params, average.kind(*stats)

    norm = Norm(
        feature_axes,
        epsilon,
        dtype,
        axis_name,
        axis_index_groups,
        implementation,
        use_fast_variance,
        skip_nonfinite,
    )

    def correction(state: State, m: Moments) -> tuple[jax.Array, jax.Array]:
        state, m = lax.stop_gradient((state, m))
        most_r, most_d = (_at(limit, state.step) for limit in (r_max, d_max))
        sigma = average.deviation(state, epsilon)
        r = jnp.clip(jnp.sqrt(m.var + epsilon) / sigma, 1 / most_r, most_r)
        d = _clip((m.mean - state.mean) / sigma, most_d)
        if not warm_up_steps:
            return r, d
        over = state.step >= warm_up_steps
        return jnp.where(over, r, 1), jnp.where(over, d, 0)

    def train(params, state: State, x, weights):
        scale, bias = affine(params)
        batch = norm.batch(x, weights)
        m = norm.near(state, batch)
        r, d = correction(state, m)
        corrected = r if scale is None else r * scale, _moved(d, scale, bias)
        y = norm.by_moments(batch, m, corrected, derivatives)
        return y, average.of_batch(m, epsilon)

    def infer(params, state: State, x, weights):
        return average.infer(norm, params, state, x)

    def measure(state, x, weights):
        return average.of_batch(norm.exact(state, x, weights), epsilon)

    def move(state: State, m: Moments):
        return average.moved(state, m, momentum)

    return compose(
        init,
        names,
        norm,
        train=train,
        infer=infer,
        measure=measure,
        update=move,
        kind=average.kind,
    )


class _OfDeviations:
    """Averages √(var + epsilon)."""

    kind = RenormStats

    @staticmethod
    def deviation(state: RenormStats, epsilon: float) -> jax.Array:
        return state.std

    @staticmethod
    def of_batch(m: Moments, epsilon: float) -> Moments:
        """Adds epsilon to var: the state averages √ of this, also after pooling."""
        return m._replace(var=m.var + epsilon)

    @staticmethod
    def moved(state: RenormStats, m: Moments, momentum: Momentum) -> RenormStats:
        # The standard deviation is averaged in place of a variance.
        std = jnp.sqrt(lax.stop_gradient(m.var))
        old, new = RunningStats(*state), m._replace(var=std)
        return RenormStats(*update(old, new, momentum=momentum))

    @staticmethod
    def infer(norm: Norm, params: Params, state: RenormStats, x) -> jax.Array:
        var = jnp.square(_dtypes.widen(state.std, x))
        exact = norm._replace(epsilon=0)
        return exact.by_stats(x, state.mean, var, affine(params))


class _OfVariances:
    """Averages variances."""

    kind = RunningStats

    @staticmethod
    def deviation(state: RunningStats, epsilon: float) -> jax.Array:
        return jnp.sqrt(_dtypes.widen(state.var) + epsilon)

    @staticmethod
    def of_batch(m: Moments, epsilon: float) -> Moments:
        return m

    @staticmethod
    def moved(state: RunningStats, m: Moments, momentum: Momentum) -> RunningStats:
        return update(state, m, momentum=momentum)

    @staticmethod
    def infer(norm: Norm, params: Params, state: RunningStats, x) -> jax.Array:
        return norm.infer(params, state, x, None)


AVERAGES: dict[str, Any] = {"std": _OfDeviations, "var": _OfVariances}


def _require_warm_up(tracks: str, steps: int, *limits: Limit) -> None:
    if tracks not in AVERAGES:
        raise ValueError(f"`tracks` must be 'std' or 'var', got {tracks!r}.")
    if not isinstance(steps, (int, np.integer)) or isinstance(steps, bool):
        raise TypeError(f"`warm_up_steps` must be an integer, got {steps!r}.")
    if steps < 0:
        raise ValueError(f"`warm_up_steps` must be at least 0, got {steps}.")
    if steps and any(map(callable, limits)):
        raise ValueError(
            f"`warm_up_steps` is {steps}, and a limit is a function of the step. Let "
            "this function be 1 (`r_max`) and 0 (`d_max`) in the first steps instead."
        )


def _moved(d, scale, bias) -> jax.Array:
    d = d if scale is None else d * scale
    return d if bias is None else d + bias


def _at(limit: Limit, step: jax.Array) -> jax.Array:
    return jnp.asarray(limit(step) if callable(limit) else limit)


def _clip(d: jax.Array, most: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(d):
        return jnp.clip(d, -most, most)
    size = jnp.abs(d)
    return jnp.where(size > most, d * (most / jnp.where(size > 0, size, 1)), d)


def _require_limit(name: str, limit: Limit, least: float) -> None:
    values = None if callable(limit) else _dtypes.known(limit)
    if values is None:
        return
    if not jnp.issubdtype(values.dtype, jnp.number):
        raise TypeError(
            f"`{name}` must be a number, or a function of the step, got {limit!r}."
        )
    if not np.all(values >= least):
        raise ValueError(
            f"`{name}` must be at least {least}, got {limit}. With r_max=1 and d_max=0 "
            "the layer is batch norm; `jnp.inf` clips nothing."
        )
