"""The batch norm of Ioffe and Szegedy."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _devices, _dtypes
from jaxbn._moments import Moments
from jaxbn._running_stats import Momentum, RunningStats, blended, update
from jaxbn.layers._layer import Layer, Norm, affine, compose, factory, init_of
from jaxbn.layers._mixture import mixture, prior_share
from jaxbn.layers._per_example import example_moments, positions


@factory
def standard(
    *,
    feature_axes: _axes.Axes = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    use_fast_variance: bool | str = True,
    unbiased: bool = False,
    example_weight: ArrayLike = 0.0,
    pseudo_samples: ArrayLike | None = None,
    axis_name: _devices.AxisName | None = None,
    axis_index_groups: _devices.Groups | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    stats_dtype: DTypeLike = jnp.float32,
    derivatives: str = "vjp",
    implementation: str | None = None,
    skip_nonfinite: bool = False,
) -> Layer:
    """Batch norm: batch statistics in training, running statistics at inference.

        training:   y, m = batch_norm(x, scale, bias);  state = update(state, m)
        inference:  y = normalize(x, state.mean, state.var, scale, bias)

    With an `example_weight` α, inference mixes each example's own moments x̄ and s² into
    the running statistics:

        mean = (1 − α)·state.mean + α·x̄
        var  = (1 − α)·state.var + α·s² + α·(1 − α)·(x̄ − state.mean)²

    With `pseudo_samples` N, inference mixes the moments μ_B and var_B of its batch of n
    examples into the running statistics, for data from a different domain than the
    training data:

        mean = N/(N + n)·state.mean + n/(N + n)·μ_B        likewise for var

    Args:
      feature_axes: The axes of `x` that have their own statistics and parameters.
      momentum: The weight of the old running statistics: a number, an array, or a
        function of the step, as for `update`.
      epsilon: Added to the variance.
      use_scale: Whether `params` has a factor "scale" (γ), initially 1.
      use_bias: Whether `params` has an offset "bias" (β), initially 0.
      use_fast_variance: The `shift` for the moments of the batch, including those for
        `pseudo_samples`. "sample" is exact from the first step, but takes one more
        small all-reduce if the batch is split over devices. "running_mean" is more
        exact the nearer that mean is to the mean of the batch. True chooses "sample" in
        programs for one CPU or GPU without `axis_name`, and "running_mean" otherwise.
        False takes two passes over `x`, the others one ("sample" takes two over a small
        batch).
      unbiased: Whether to track the variance times n/(n − 1).
      example_weight: α, from 0 to 1: a number, or an array with the shape of the
        features. In a training batch of m examples, each example contributes 1/m to the
        statistics that normalize it. An α of about 1/m brings inference close to that,
        which helps networks trained on small batches.
      pseudo_samples: N: at inference, the running statistics count as this many
        examples. A number, or an array with the shape of the features. None ignores the
        batch; 0 normalizes by the batch alone (prediction-time batch norm). The state
        does not change. To adapt the statistics to a whole data set instead, use
        `jaxbn.population.adapt`.
      axis_name: Name or names of mapped axes to compute statistics over.
      axis_index_groups: Groups of indices of that axis, each with its own statistics.
      dtype: The output's dtype, by default the dtype of `x`.
      param_dtype: The dtype of the parameters.
      stats_dtype: The dtype of the running mean; complex for complex input.
      derivatives: "vjp" or "jvp", as for `batch_norm`.
      implementation: How the sums of a batch are computed, as for `moments`.
      skip_nonfinite: Whether features whose batch mean or variance is infinite or NaN
        keep their running statistics, as for `update`. In training, the moments that
        `forward` returns then have count 0 for these features. The output of the layer
        does not change.

    Returns:
      A `Layer`. Its state is a `RunningStats`. `weights` are as for `moments`; they
      affect training, and any moments computed at inference.

    Raises:
      ValueError: `example_weight` is not from 0 to 1, `pseudo_samples` is negative, or
        both are given.
      TypeError: In `apply`: `training` is not a Python bool, or as for `batch_norm`.
      ValueError: In `apply`: the names in `params` do not match the options,
        `example_weight` or `pseudo_samples` is an array of another shape, or as for
        `batch_norm` and `update`.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.layers.standard(momentum=0.5)
      >>> params, state = layer.init(2)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> y, state = layer.apply(params, state, x, training=True)
      >>> y, state = layer.apply(params, state, x, training=False)
      >>> print(state.mean, state.step)
      [ 1. 10.] 1

    References:
      Ioffe and Szegedy, "Batch Normalization" (2015). Singh and Shrivastava, "EvalNorm"
      (2019), and Summers and Dinneen, "Four Things Everyone Should Know to Improve
      Batch Normalization" (2020), for `example_weight`: two names for one formula. Nado
      et al., "Evaluating Prediction-Time Batch Normalization" (2020), and Schneider et
      al., "Improving robustness against common corruptions by covariate shift
      adaptation" (2020), for `pseudo_samples`.
    """
    mixes = _mixes_examples(example_weight, pseudo_samples)
    names = ["scale"] * use_scale + ["bias"] * use_bias

    init = init_of(use_scale, use_bias, param_dtype, stats_dtype)
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

    def train(params, state: RunningStats, x, weights):
        batch = norm.batch(x, weights)
        m = norm.near(state, batch)
        return norm.by_moments(batch, m, affine(params), derivatives), m

    def infer(params, state: RunningStats, x, weights):
        if pseudo_samples is not None:
            _require_per_feature("pseudo_samples", pseudo_samples, state)
            m = adapted(state, x, weights, pseudo_samples)
        elif mixes:
            _require_per_feature("example_weight", example_weight, state)
            axes = _axes.canonical(feature_axes, x.ndim)
            # At most half of the variance is the example's own: the rest outweighs
            # what is lost about a running mean that is far from the example.
            known = _dtypes.known(example_weight)
            small = known is not None and np.all(known <= 0.5)
            shift = state.mean if small else None
            own = example_moments(
                x, axes, weights=weights, shift=shift, implementation=implementation
            )
            m = mixture(state, own, example_weight)
        else:
            return norm.infer(params, state, x, weights)
        return norm.by_stats(x, m.mean, m.var, affine(params), weights)

    def adapted(state: RunningStats, x, weights, prior: ArrayLike) -> Moments:
        m = norm.near(state, norm.batch(x, weights))
        n = m.count / positions(x, _axes.canonical(feature_axes, x.ndim))
        kept = prior_share(prior, n)
        old = lax.stop_gradient(state)
        mean, var = (
            blended(a, b, kept, m.count)
            for a, b in ((old.mean, m.mean), (old.var, m.var))
        )
        return Moments(mean, var, m.count)

    move = functools.partial(update, momentum=momentum, unbiased=unbiased)
    return compose(init, names, norm, train=train, infer=infer, update=move)


def _mixes_examples(
    example_weight: ArrayLike, pseudo_samples: ArrayLike | None
) -> bool:
    """Whether inference mixes in each example's own moments; checks both options."""
    share = _dtypes.numbers("example_weight", example_weight)
    if share is not None and not np.all((share >= 0) & (share <= 1)):
        raise ValueError(
            "`example_weight` is the weight of an example's own moments at inference, "
            f"from 0 to 1, got {example_weight}."
        )
    mixes = share is None or bool(np.any(share != 0))
    if pseudo_samples is None:
        return mixes
    prior = _dtypes.numbers("pseudo_samples", pseudo_samples)
    if mixes or (prior is not None and not np.all(prior >= 0)):
        raise ValueError(
            "`pseudo_samples` must be None or at least 0, and None with an "
            f"`example_weight`, got {pseudo_samples} and {example_weight}."
        )
    return False


def _require_per_feature(name: str, value: Any, state: RunningStats) -> None:
    shape, features = np.shape(value), np.shape(state.mean)
    if shape not in ((), features):
        raise ValueError(
            f"`{name}` has shape {shape}, expected a number or an array of shape "
            f"{features}, one for each feature."
        )
