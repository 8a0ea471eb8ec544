"""Conditional batch norm: scale and bias that depend on the example."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn import _axes, _devices, _dtypes
from jaxbn._running_stats import Momentum, RunningStats, init_stats, update
from jaxbn.layers._layer import (
    Affine,
    Layer,
    Norm,
    Params,
    affine,
    compose,
    factory,
    init_affine,
    require_one_count,
)
from jaxbn.layers._per_example import example_ids


@factory
def conditional(
    *,
    num_classes: int | None = None,
    embedding_size: int | None = None,
    feature_axes: _axes.Axes = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    use_fast_variance: bool | str = True,
    unbiased: bool = False,
    axis_name: _devices.AxisName | None = None,
    axis_index_groups: _devices.Groups | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    stats_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
    skip_nonfinite: bool = False,
) -> Layer:
    """Conditional batch norm: an example's class or embedding sets its scale and bias.

        x̂ = batch_norm(x)            y[i] = x̂[i] · scale[i] + bias[i]
        by class:       scale[i] = params["scale"][c]
        by embedding:   scale[i] = params["scale"] + e @ params["scale_kernel"]

    where the `condition` is c, the class of example i, or e, its embedding; likewise
    for bias. The statistics are those of the whole batch. Initially, scales are 1, and
    biases and kernels 0, so all examples are treated alike. Differentiable in every
    mode, to every order.

    Args:
      num_classes: The number of classes, for a `condition` of integers. Give this or
        `embedding_size`.
      embedding_size: The length of the embeddings, for a `condition` with one embedding
        per example.
      feature_axes: As for `standard`, like all options below. The first of the other
        axes is the batch axis.
      momentum: The weight of the old running statistics.
      epsilon: Added to the variance.
      use_scale: Whether there is a scale.
      use_bias: Whether there is a bias.
      use_fast_variance: As for `standard`.
      unbiased: Whether to track the variance times n/(n − 1).
      axis_name: Name or names of mapped axes to compute statistics over.
      axis_index_groups: Groups of indices of that axis.
      dtype: The output's dtype, by default the dtype of `x`.
      param_dtype: The dtype of the parameters.
      stats_dtype: The dtype of the running mean; complex for complex input.
      implementation: How the sums of a batch are computed, as for `moments`.
      skip_nonfinite: As for `standard`.

    Returns:
      A `Layer`. Its state is a `RunningStats`. `apply` also needs `condition`: for
      classes, integers from 0 to `num_classes` − 1, one per example, or a scalar for
      all; for embeddings, an array of shape (examples, embedding_size). For any other
      class, output and gradient are NaN, so give padding a valid class and the weight
      0.

    Raises:
      TypeError: `num_classes` or `embedding_size` is not an integer. In `apply`: the
        `condition` has the wrong type.
      ValueError: Both or neither of them are given, or one is below 1. In `apply`: the
        `condition` has the wrong shape.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.layers.conditional(num_classes=2)
      >>> params, state = layer.init(1)
      >>> params["bias"] = jnp.array([[0.0], [10.0]])
      >>> x, label = jnp.array([[1.0], [3.0]]), jnp.array([0, 1])
      >>> y, state = layer.apply(params, state, x, condition=label, training=True)
      >>> print(y[:, 0].round(2))
      [-1. 11.]

    References:
      Dumoulin et al., "A Learned Representation for Artistic Style" (2017). De Vries et
      al., "Modulating early visual processing by language" (2017). Brock et al.,
      "Large Scale GAN Training for High Fidelity Natural Image Synthesis" (2019).
    """
    kind, size = require_one_count(
        num_classes=num_classes, embedding_size=embedding_size
    )
    names = ["scale"] * use_scale + ["bias"] * use_bias
    by_class = kind == "num_classes"
    kernels = [] if by_class else [f"{name}_kernel" for name in names]

    def init(features):
        shape = _axes.shape(features)
        own = (size, *shape) if by_class else shape
        params = init_affine(own, use_scale, use_bias, param_dtype)
        for name in kernels:
            params[name] = jnp.zeros((size, *shape), param_dtype)
        return params, init_stats(features, dtype=stats_dtype)

    def of_each(params: Params, condition, x) -> Affine:
        """Scale and bias of each example."""
        axes = _axes.canonical(feature_axes, x.ndim)
        if by_class:
            ids = example_ids("condition", condition, x, axes)
            rows = {name: _devices.take_rows(params[name], ids) for name in names}
        else:
            e = _embeddings(condition, x, axes, size)
            rows = {
                name: jnp.expand_dims(params[name], 0)
                + jnp.tensordot(e, params[f"{name}_kernel"], 1)
                for name in names
            }
        return affine(rows)

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

    def train(params, state: RunningStats, x, weights, condition=None):
        batch = norm.batch(x, weights)
        m = norm.near(state, batch)
        # "jvp" supports every mode, even without scale and bias.
        return norm.by_moments(batch, m, of_each(params, condition, x), "jvp"), m

    def infer(params, state: RunningStats, x, weights, condition=None):
        return norm.by_stats(x, state.mean, state.var, of_each(params, condition, x))

    move = functools.partial(update, momentum=momentum, unbiased=unbiased)
    return compose(
        init,
        names + kernels,
        norm,
        train=train,
        infer=infer,
        update=move,
        inputs=("condition",),
    )


def _embeddings(condition, x, axes, size: int) -> jax.Array:
    e = _dtypes.inexact_array("condition", condition)
    expected = x.shape[_axes.batch_axis(axes, x)], size
    if e.shape != expected:
        raise ValueError(
            f"`condition` has shape {e.shape}, expected {expected}: an embedding of "
            f"length `embedding_size` for each example of `x` (shape {x.shape})."
        )
    return e
