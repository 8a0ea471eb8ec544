"""Batch norm by running statistics, in training too."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxbn import _axes, _devices
from jaxbn._moments import Moments
from jaxbn._running_stats import (
    Momentum,
    RunningStats,
    debiased,
    old_weight,
    stepped,
)
from jaxbn.layers._layer import Layer, Norm, affine, compose, factory, init_of
from jaxbn.layers._mixture import mixture


@factory
def streaming(
    *,
    feature_axes: _axes.Axes = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    axis_name: _devices.AxisName | None = None,
    axis_index_groups: _devices.Groups | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    stats_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
    skip_nonfinite: bool = False,
) -> Layer:
    """Batch norm by running statistics, in training too, for the smallest batches.

    The state is the mean and variance of all data so far, including the current batch,
    with less weight on older batches. If k is the momentum of this step, and the batch
    has mean μ_B and variance var_B:

        mean ← k·mean + (1 − k)·μ_B
        var  ← k·var + (1 − k)·var_B + k·(1 − k)·|μ_B − mean|²
        y = (x − mean) / √(var + epsilon) · scale + bias    in training and at inference

    The last term of var is the variance between batches, without which batches of one
    example would have no variance. The average is debiased: from the first step on,
    batch t − j has the weight momentumʲ / Σ momentumʲ, and the initial 0 and 1 have
    none. Gradients pass through the batch's part of mean and var. All features share
    one step count: if weights leave a feature out of the first steps, its average
    includes the initial values. Differentiable in every mode, to every order.

    Args:
      feature_axes: As for `standard`, like all options below except `momentum`.
      momentum: The weight of the old statistics: a number, which is debiased, or a
        function of the step, which is not. `cumulative()` weighs all batches equally.
      epsilon: Added to the variance.
      use_scale: Whether `params` has a factor "scale".
      use_bias: Whether `params` has an offset "bias".
      axis_name: Name or names of mapped axes to compute statistics over.
      axis_index_groups: Groups of indices of that axis.
      dtype: The output's dtype, by default the dtype of `x`.
      param_dtype: The dtype of the parameters.
      stats_dtype: The dtype of the running mean; complex for complex input.
      implementation: How the sums of a batch are computed, as for `moments`.
      skip_nonfinite: As for `standard`.

    Returns:
      A `Layer`. Its state is a `RunningStats`.

    Raises:
      ValueError: `momentum` is not in [0, 1).
      TypeError: `momentum` is an array. In `apply`, as for `standard`.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.layers.streaming(momentum=jaxbn.cumulative())
      >>> params, state = layer.init(1)
      >>> for value in (1.0, 3.0, 5.0):  # one example at a time
      ...     x = jnp.array([[value]])
      ...     y, state = layer.apply(params, state, x, training=True)
      >>> print(state.mean, state.var.round(3))
      [3.] [2.667]

    References:
      Chiley et al., "Online Normalization for Training Neural Networks" (2019). West,
      "Updating mean and variance estimates" (1979). `equinox.nn.BatchNorm(mode="ema")`
      and praxis' `use_moving_avg_in_training`, which leave out the variance between
      batches.
    """
    if not callable(momentum):
        if np.ndim(momentum) or isinstance(momentum, Tracer):
            raise TypeError(
                "`momentum` must be a number or a function of the step, got "
                f"{momentum!r}. Debiasing takes one momentum for all features."
            )
        momentum = debiased(float(momentum))  # type: ignore  (a scalar)
    init = init_of(use_scale, use_bias, param_dtype, stats_dtype)
    names = ["scale"] * use_scale + ["bias"] * use_bias

    norm = Norm(
        feature_axes,
        epsilon,
        dtype,
        axis_name,
        axis_index_groups,
        implementation,
        False,
        skip_nonfinite,
    )

    def mixed(state: RunningStats, m: Moments) -> Moments:
        return mixture(lax.stop_gradient(state), m, 1 - old_weight(state, momentum))

    def train(params, state: RunningStats, x, weights):
        m = norm.exact(state, x, weights)
        mean, var, _ = mixed(state, m)
        return norm.by_stats(x, mean, var, affine(params), weights), m

    def move(state: RunningStats, m: Moments):
        new = lax.stop_gradient(mixed(state, m))
        share = 1 - old_weight(state, momentum)
        return stepped(state, new.mean, new.var, share, m.count)

    return compose(init, names, norm, train=train, infer=norm.infer, update=move)
