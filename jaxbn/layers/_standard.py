"""The batch norm of Ioffe and Szegedy."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn import _axes, _mesh
from jaxbn._batch_norm import batch_norm
from jaxbn._normalize import normalize
from jaxbn._running_stats import Momentum, RunningStats, init_stats, update
from jaxbn.layers._layer import Layer, require_params, require_static_training


def standard(
    *,
    feature_axes: _axes.Axes = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    use_fast_variance: bool = True,
    unbiased: bool = False,
    axis_name: _mesh.AxisName | None = None,
    axis_index_groups: _mesh.Groups | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    stats_dtype: DTypeLike = jnp.float32,
    derivatives: str = "vjp",
) -> Layer:
    """Batch norm: batch statistics in training, running statistics at inference.

        training:   y, m = batch_norm(x, scale, bias);  state = update(state, m)
        inference:  y = normalize(x, state.mean, state.var, scale, bias)

    Args:
      feature_axes: The axes of `x` that have statistics and parameters of their own.
      momentum: The weight of the old running statistics: a number, an array, or a
        function of the step, as for `update`.
      epsilon: Added to the variance.
      use_scale: Whether `params` has a factor "scale" (γ), at first 1.
      use_bias: Whether `params` has a summand "bias" (β), at first 0.
      use_fast_variance: Pass the running mean as `shift`: one pass over `x`, as exact
        as the running mean is near. False takes two passes and is exact from the start.
      unbiased: Track the variance times n/(n − 1).
      axis_name: Name or names of mapped axes to compute statistics over.
      axis_index_groups: Groups of indices of that axis, each with its own statistics.
      dtype: The output's dtype, by default that of `x`.
      param_dtype: The dtype of the parameters.
      stats_dtype: The dtype of the running mean; complex for complex input.
      derivatives: "vjp" or "jvp", as for `batch_norm`.

    Returns:
      A `Layer`. Its state is a `RunningStats`; its `weights` are those of `moments`,
      and matter in training only.

    Raises:
      TypeError: In `apply`: `training` is not a Python bool, or as `batch_norm`.
      ValueError: In `apply`: `params` has other names than the options say, or as
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
      Ioffe and Szegedy, "Batch Normalization" (2015).
    """

    names = ["scale"] * use_scale + ["bias"] * use_bias

    def init(features):
        state = init_stats(features, dtype=stats_dtype)
        params = {}
        if use_scale:
            params["scale"] = jnp.ones(state.mean.shape, param_dtype)
        if use_bias:
            params["bias"] = jnp.zeros(state.mean.shape, param_dtype)
        return params, state

    def apply(params, state: RunningStats, x, *, training, weights=None):
        require_static_training(training)
        require_params(params, names)
        affine = params.get("scale"), params.get("bias")
        same = {"feature_axes": feature_axes, "epsilon": epsilon, "dtype": dtype}
        if not training:
            return normalize(x, state.mean, state.var, *affine, **same), state
        y, m = batch_norm(
            x,
            *affine,
            **same,
            weights=weights,
            shift=state.mean if use_fast_variance else None,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            derivatives=derivatives,
        )
        return y, update(state, m, momentum=momentum, unbiased=unbiased)

    return Layer(init, apply)
