"""`flax.linen.BatchNorm` on jaxbn's verbs."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax.typing import ArrayLike

from jaxbn import _axes, _flax_fields
from jaxbn._running_stats import Momentum, init_stats


class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm` with exact statistics and hand-written derivatives.

    Takes the place of Flax's class by changing one import: same fields and defaults,
    same collections (`params`: scale, bias; `batch_stats`: mean, var), names, shapes,
    initial values and output dtype. It computes what `jaxbn.layers.standard` does.

        training:   y, m = batch_norm(x, scale, bias);  batch_stats = update(..., m)
        inference:  y = normalize(x, mean, var, scale, bias)

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

    def __post_init__(self):
        """Makes the fields hashable."""
        self.axis, self.axis_name, self.axis_index_groups = _flax_fields.hashable(
            self.axis, self.axis_name, self.axis_index_groups
        )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`, and updates the statistics where `batch_stats` is mutable.

        Args:
          x: The input.
          use_running_average: Inference if True, training if False; here or as a field.
          mask: Boolean mask or non-negative weights that broadcast against `x`: which
            positions the statistics are of. Matters in training only.

        Returns:
          An array of the shape of `x`.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        training = _flax_fields.is_training(use_running_average)
        initializing = self.is_initializing()
        given, x = x, _flax_fields.as_inexact(x)
        axes = _flax_fields.feature_axes(self.axis, x.ndim)
        features = _axes.lengths(x, axes)
        mean, var, step = self._stats(features, x.dtype, training)
        _flax_fields.require_features("batch_stats", mean.value.shape, x, axes)
        x = _flax_fields.like_mean(x, mean.value, "Initialize with a complex `x`.")
        if training:
            _flax_fields.require_mask(mask, x)

        scale = bias = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, features, self.param_dtype)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, features, self.param_dtype)
        like = x if jnp.iscomplexobj(x) else given
        alone = {"axis_name": None, "axis_index_groups": None}
        layer = _flax_fields.standard(
            self,
            feature_axes=axes,
            dtype=canonicalize_dtype(like, scale, bias, dtype=self.dtype),
            **(alone if initializing else {}),
        )
        y, new = layer.apply(
            _flax_fields.affine(scale, bias),
            _flax_fields.stats(
                self._widened(mean.value),
                self._widened(var.value),
                step and step.value,
            ),
            x,
            training=training,
            weights=mask,
        )
        if training and not initializing:
            mean.value, var.value = new.mean, new.var
            if step is not None:
                step.value = new.step
        return y

    @nn.nowrap
    def _stats(self, features: tuple[int, ...], x_dtype, training: bool):
        """The variables of `batch_stats`: mean, var, and step or None."""
        dtype = self._stats_dtype()
        if jnp.issubdtype(x_dtype, jnp.complexfloating):
            dtype = jnp.promote_types(dtype, jnp.complex64)

        def initial(name: str) -> Any:
            return getattr(init_stats(features, dtype=dtype), name)

        given = self.has_variable("batch_stats", "mean")
        mean, var = (
            self.variable("batch_stats", name, initial, name)
            for name in ("mean", "var")
        )
        if not callable(self.momentum):
            return mean, var, None
        if given and not self.has_variable("batch_stats", "step"):
            if not training:
                return mean, var, None
            # Starting at 0 would make a debiased average forget the old statistics.
            raise ValueError(
                "`momentum` is a function of the step, but `batch_stats` has a mean "
                "and no `step`: it comes from a module whose momentum was a number. "
                "Add `step`, an int32 scalar, the number of updates so far."
            )
        return mean, var, self.variable("batch_stats", "step", initial, "step")

    @nn.nowrap
    def _stats_dtype(self) -> Any:
        return jnp.float32 if self.force_float32_reductions else self.param_dtype

    @nn.nowrap
    def _widened(self, statistic: ArrayLike) -> jax.Array:
        """A statistic that was restored in a narrower dtype, in the one it has here.

        In bfloat16 a running mean stops where 1 % of a step is below its resolution.
        """
        statistic = jnp.asarray(statistic)
        real = jnp.finfo(self._stats_dtype()).dtype
        return statistic.astype(jnp.promote_types(statistic.dtype, real))
