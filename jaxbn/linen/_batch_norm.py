"""`flax.linen.BatchNorm`, computed by jaxbn."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn import layers
from jaxbn._flax import fields
from jaxbn._running_stats import Momentum
from jaxbn.linen._adapter import Adapter


class BatchNorm(Adapter, nn.BatchNorm):
    """`flax.linen.BatchNorm` with exact statistics and hand-written derivatives.

    A drop-in replacement for Flax's class, with the same fields and defaults,
    collections (`params`: scale, bias; `batch_stats`: mean, var), names, shapes,
    initial values and output dtype. It computes the same as `jaxbn.layers.standard`.

        training:   y, m = batch_norm(x, scale, bias);  batch_stats = update(..., m)
        inference:  y = normalize(x, mean, var, scale, bias)

    If `mutable` names the collection `batch_moments` (`mutable=True` does not), the
    layer records the moments of its input there, in training and at inference. These
    are the moments that update the statistics; or, if `batch_stats` is not mutable,
    exact moments, computed in two passes. See `jaxbn.linen.moments_fn`.

    Differences from Flax: statistics over devices weigh every example equally, even
    with masks; a mask may be float weights; NaN under the mask and an empty mask do no
    harm; statistics keep their dtype, and are never rounded to `dtype`; gradients stop
    at the statistics. With `axis_name`, the running mean must be the same on every
    device.

    Attributes:
      use_fast_variance: The shift of the sums, as for `jaxbn.moments`. "sample" is
        exact from the first step, but takes one more small all-reduce if the batch is
        split over devices. "running_mean" is more exact the nearer that mean is to the
        mean of the batch. True (Flax's default) chooses "sample" in programs for one
        CPU or GPU without `axis_name`, and "running_mean" otherwise. False takes two
        passes over `x`, the others one ("sample" takes two over a small batch).
      force_float32_reductions: False gives the running statistics the dtype
        `param_dtype`. If that is narrow, small steps are lost. Sums are still
        accumulated in float32 or wider.
      momentum: Weight of the old statistics. It can also be a function of the number of
        updates (`jaxbn.debiased(0.99)`, an optax schedule); `batch_stats` then also has
        a `step`.
      unbiased: Whether to track the variance times n/(n − 1).
      derivatives: "vjp" or "jvp", as for `jaxbn.batch_norm`.
      implementation: How the sums of a batch are computed, as for `jaxbn.moments`:
        None, "xla" or "native".
      skip_nonfinite: Whether features whose batch mean or variance is infinite or NaN
        keep their running statistics. Without it, one such batch makes them NaN for
        good.
      example_weight: Weight of each example's own moments at inference: a number, or
        one per feature, as for `jaxbn.layers.standard`.
      pseudo_samples: At inference, the running statistics count as this many examples,
        relative to the batch; None ignores the batch. A number, or one per feature, as
        for `jaxbn.layers.standard`.
      accumulate: Whether several micro-batches, called a window, make a single step of
        the statistics, the same as for all of them in one batch. The window is closed
        by `jaxbn.linen.end_accumulation`. If a layer is called twice in a pass, both
        inputs count as one batch. The collection `batch_moments` holds the pooled
        moments of the window and the statistics at its start. Pass it to every call,
        and make it mutable in training.
      (others): As in `flax.linen.BatchNorm`.

    Raises:
      TypeError: In a call: `x` is complex and the running mean is not, which only
        happens if the statistics were initialized with a real `x`.
      ValueError: In a call: `use_running_average` is given twice or not at all, the
        features of `x` do not match the statistics, `momentum` is a function and
        `batch_stats` has no `step` to continue from, or as for `jaxbn.batch_norm`.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=0.5)
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, new = layer.apply(variables, x, mutable=["batch_stats"])
      >>> print(new["batch_stats"]["mean"])
      [ 1. 10.]

    References:
      https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/layers.html#flax.linen.BatchNorm
    """

    momentum: Momentum = 0.99
    unbiased: bool = False
    derivatives: str = "vjp"
    implementation: str | None = None
    example_weight: ArrayLike = 0.0
    pseudo_samples: ArrayLike | None = None
    accumulate: bool = False
    skip_nonfinite: bool = False

    @nn.nowrap
    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.standard, self, **given)

    @nn.nowrap
    def _stats_dtype(self) -> Any:
        return jnp.float32 if self.force_float32_reductions else self.param_dtype
