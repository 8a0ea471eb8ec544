"""Batch norm with an activation, whose backward pass keeps only the output."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn import _axes, _devices, _dtypes
from jaxbn._batch_norm import rule_arguments
from jaxbn._rules import rule_operands
from jaxbn._running_stats import Momentum, RunningStats, update
from jaxbn.layers._in_place_rule import Activation, InPlaceOptions, in_place_form
from jaxbn.layers._layer import Layer, Norm, affine, compose, factory, init_of

ACTIVATIONS = ("leaky_relu", "elu", "identity")


@factory
def in_place(
    *,
    activation: str = "leaky_relu",
    negative_slope: float = 0.01,
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
    """Batch norm and an activation φ, keeping only the output for the backward pass.

        z = φ(y)        y = x̂ · (|scale| + epsilon) + bias        x̂ = batch_norm(x)

    The next layer keeps z as its input, so batch norm and activation need no memory of
    their own: the backward pass recovers y = φ⁻¹(z) and
    x̂ = (y − bias) / (|scale| + epsilon). On GPUs, this halves the memory that a
    convolutional network keeps. Only real numbers and reverse mode are supported.

    Do not use it if scales come near 0 (because they start at 0, or weight decay pulls
    them there): x̂ is recovered with the rounding error of z divided by |scale|. In
    bfloat16, the gradient of scale is off by about 1e-2 at |scale| = 0.1, and by 0.4 at
    0.01. Do not use it either if the sign of the scale matters, as it does in most
    trained checkpoints. With ELU, every y below −17 (−6 in bfloat16) has the output −1,
    and the gradient of x is computed as if y were −17.

    The alternative is `jax.checkpoint` with a policy that keeps the outputs of the
    convolutions, and recomputes batch norm and activation:
    `jax.checkpoint_policies.save_only_these_names("conv")`, where the outputs are named
    by `jax.ad_checkpoint.checkpoint_name(y, "conv")`.

    Args:
      activation: "leaky_relu", "elu" or "identity".
      negative_slope: The slope of leaky ReLU below 0; more than 0.
      feature_axes: As for `standard`, like all options below.
      momentum: The weight of the old running statistics.
      epsilon: Added to the variance, and to |scale|.
      use_scale: Whether `params` has a factor "scale".
      use_bias: Whether `params` has an offset "bias".
      use_fast_variance: As for `standard`.
      unbiased: Whether to track the variance times n/(n − 1).
      axis_name: Name or names of mapped axes to compute statistics over.
      axis_index_groups: Groups of indices of that axis.
      dtype: The output's dtype, by default the dtype of `x`.
      param_dtype: The dtype of the parameters.
      stats_dtype: The dtype of the running mean.
      implementation: How the moments of a batch are computed, as for `moments`; XLA
        computes the backward pass.
      skip_nonfinite: As for `standard`.

    Returns:
      A `Layer`. Its state is a `RunningStats`.

    Raises:
      TypeError: In `apply`: `x` or a parameter is complex, or as for `standard`.
      ValueError: `activation` cannot be inverted, or `negative_slope` is not above 0.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.layers.in_place(negative_slope=0.1)
      >>> params, state = layer.init(1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> z, state = layer.apply(params, state, x, training=True)
      >>> print(z[:, 0].round(3))
      [-0.1  1. ]

    References:
      Rota Bulò, Porzi and Kontschieder, "In-Place Activated BatchNorm for Memory-
      Optimized Training of DNNs" (2018).
    """
    phi = _activation(activation, negative_slope)
    init = init_of(use_scale, use_bias, param_dtype, stats_dtype)
    names = ["scale"] * use_scale + ["bias"] * use_bias

    def positive(params):
        """Scale and bias, with the scale made positive."""
        scale, bias = affine(params)
        if scale is not None:
            # Not abs: its derivative at 0 is 0, so a scale of 0 could never change.
            scale = jnp.where(scale < 0, -scale, scale) + epsilon
        return scale, bias

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

    def output_dtype(params, x) -> Any:
        """The output's dtype; raises for complex numbers."""
        for name, array in {"x": x, **params}.items():
            if jnp.iscomplexobj(array):
                raise TypeError(
                    f"`{name}` is complex ({array.dtype}), but `in_place` works on "
                    "real numbers. Use `standard`, or pass real and imaginary parts."
                )
        return _dtypes.output(x.dtype, dtype)

    def train(params, state: RunningStats, x, weights):
        out = output_dtype(params, x)
        batch = norm.batch(x, weights)
        m = norm.near(state, batch)
        rule, *operands = rule_arguments(batch, m, *positive(params), epsilon, out)
        options = InPlaceOptions(rule, phi, x.dtype)
        return in_place_form(options, *rule_operands(*operands)), m

    def infer(params, state: RunningStats, x, weights):
        out = output_dtype(params, x)
        wide = _dtypes.accumulation(x.dtype, out)
        wider = norm._replace(dtype=wide)
        y = wider.by_stats(x, state.mean, state.var, positive(params))
        return phi(y).astype(out)

    move = functools.partial(update, momentum=momentum, unbiased=unbiased)
    return compose(init, names, norm, train=train, infer=infer, update=move)


def _activation(name: str, slope: float) -> Activation:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"`activation` must be one that can be inverted, {', '.join(ACTIVATIONS)}, "
            f"got {name!r}. For others use `standard` and `jax.checkpoint`."
        )
    if not _dtypes.number("negative_slope", slope) > 0:
        raise ValueError(
            f"`negative_slope` must be above 0, got {slope}: with 0, leaky ReLU cannot "
            "be inverted."
        )
    return Activation(name, slope)
