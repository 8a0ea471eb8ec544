"""`flax.linen.BatchNorm` on jaxbn's verbs."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxbn import layers
from jaxbn._flax import fields
from jaxbn._running_stats import Momentum
from jaxbn.linen._adapter import Adapter


class BatchNorm(Adapter, nn.BatchNorm):
    """`flax.linen.BatchNorm` with exact statistics and hand-written derivatives.

    Takes the place of Flax's class by changing one import: same fields and defaults,
    same collections (`params`: scale, bias; `batch_stats`: mean, var), names, shapes,
    initial values and output dtype. It computes what `jaxbn.layers.standard` does.

        training:   y, m = batch_norm(x, scale, bias);  batch_stats = update(..., m)
        inference:  y = normalize(x, mean, var, scale, bias)

    Where `mutable` names the collection `batch_moments` (`mutable=True` does not), it
    records the moments of its input, in training and at inference: those that the
    statistics move by, or, where these are not mutable and stay, exact ones in two
    passes. See `jaxbn.linen.moments_fn`.

    Where it differs from Flax's: statistics over devices weigh every example alike,
    also under masks; a mask may be float weights; NaN under the mask and an empty mask
    do no harm; statistics keep their dtype, and are never rounded to `dtype`; they are
    data, and gradients stop there. With `axis_name`, the running mean must be the same
    on every device.

    Attributes:
      use_fast_variance: True (Flax's default) passes the running mean as `shift`, which
        reads `x` once and is as exact as the running mean is near. False is exact from
        the first step.
      force_float32_reductions: False gives the running statistics `param_dtype` for
        their own dtype, in which small steps are lost if it is narrow. Sums are
        accumulated in float32 or wider all the same.
      momentum: Weight of the old statistics. May also be a function of the number of
        updates (`jaxbn.debiased(0.99)`, an optax schedule); then `batch_stats` has a
        third leaf, `step`.
      unbiased: Track the variance times n/(n − 1).
      derivatives: "vjp" or "jvp", as for `jaxbn.batch_norm`.
      implementation: What computes the sums of a batch, as for `jaxbn.moments`: None,
        "xla" or "native".
      example_weight: Weight of an example's own moments at inference, as for
        `jaxbn.layers.standard`.
      pseudo_samples: How many examples the running statistics count as at inference,
        beside those of the batch; None leaves the batch out. As for
        `jaxbn.layers.standard`.
      accumulate: Make one step of the statistics for several micro-batches, equal to
        that of all of them in one batch, until `jaxbn.linen.end_accumulation`. A layer
        that is called twice in a pass takes both inputs for one batch. The window's
        pooled moments and the statistics at its start are the collection
        `batch_moments`, which must be passed along, and mutable in training.
      (others): As in `flax.linen.BatchNorm`.

    Raises:
      TypeError: In a call: `x` is complex and the running mean is not, which happens
        only to statistics that were initialized with a real `x`.
      ValueError: In a call: `use_running_average` is given both or neither time, `x`
        has other features than the statistics, `momentum` is a function and
        `batch_stats` has no `step` to go on from, or as for `jaxbn.batch_norm`.

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
    example_weight: float = 0.0
    pseudo_samples: float | None = None
    accumulate: bool = False

    @nn.nowrap
    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.standard, self, **given)

    @nn.nowrap
    def _stats_dtype(self) -> Any:
        return jnp.float32 if self.force_float32_reductions else self.param_dtype
