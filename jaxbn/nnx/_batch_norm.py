"""`flax.nnx.BatchNorm`, computed by jaxbn."""

from collections.abc import Mapping
from math import prod
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Dtype, Initializer, PromoteDtypeFn
from jax.typing import ArrayLike

from jaxbn import _axes, _compat, _devices, layers
from jaxbn._flax import fields
from jaxbn._running_stats import Momentum, init_stats
from jaxbn.nnx._adapter import COMPLEX, Adapter, stats_dtype


class BatchNorm(Adapter, nnx.BatchNorm):
    """`flax.nnx.BatchNorm` with exact statistics and hand-written derivatives.

    A drop-in replacement for Flax's class, with the same arguments and defaults,
    variables (`nnx.Param`: scale, bias; `nnx.BatchStat`: mean, var), initial values and
    output dtype. It computes the same as `jaxbn.layers.standard`.

        training:   y, m = batch_norm(x, scale, bias);  mean, var = update(..., m)
        inference:  y = normalize(x, mean, var, scale, bias)

    Differences from Flax: statistics over devices weigh every example equally, even
    with masks; a mask may be integers or float weights; NaN under the mask and an empty
    mask do no harm; `dtype` rounds `x`, scale and bias, but neither running nor batch
    statistics; there may be several feature axes. With `axis_name`, the running mean
    must be the same on every device.

    Args:
      num_features: The number of features. If `axis` is a tuple, a tuple of the lengths
        of these axes in ascending order.
      axis: The feature axis or axes of the input.
      momentum: Weight of the old statistics. It can also be a function of the number of
        updates (`jaxbn.debiased(0.99)`, an optax schedule); the layer then has one more
        `nnx.BatchStat`, `step`.
      use_fast_variance: The shift of the sums, as for `jaxbn.moments`. "sample" is
        exact from the first step, but takes one more small all-reduce if the batch is
        split over devices. "running_mean" is more exact the nearer that mean is to the
        mean of the batch. True (Flax's default) chooses "sample" in programs for one
        CPU or GPU without `axis_name`, and "running_mean" otherwise. False takes two
        passes over `x`, the others one ("sample" takes two over a small batch).
      param_dtype: The dtype of scale and bias. If complex, the running mean is too.
      promote_dtype: Called with `(x, mean, var, scale, bias)` and `dtype`, as in Flax;
        the mean and var that it returns are not used.
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
        by `jaxbn.nnx.end_accumulation`. If a layer is called twice in a pass, both
        inputs count as one batch. The variables `batch_moments`, of type `BatchMoments`
        (a kind of `nnx.BatchStat`), hold the pooled moments of the window and the
        statistics at its start.
      (others): As in `flax.nnx.BatchNorm`.

    Raises:
      TypeError: `num_features` are not integers. In a call: `x` is complex and the
        running mean is not.
      ValueError: In a call: `use_running_average` is given neither here nor before, the
        features of `x` do not match `num_features`, or as for `jaxbn.batch_norm`.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
      >>> print(layer.mean[...])
      [ 1. 10.]

    References:
      https://flax.readthedocs.io/en/latest/api_reference/flax.nnx/nn/normalization.html
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        axis: _axes.Axes = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        axis_name: _devices.AxisName | None = None,
        axis_index_groups: _devices.Groups | None = None,
        use_fast_variance: bool | str = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        unbiased: bool = False,
        derivatives: str = "vjp",
        implementation: str | None = None,
        example_weight: ArrayLike = 0.0,
        pseudo_samples: ArrayLike | None = None,
        accumulate: bool = False,
        skip_nonfinite: bool = False,
    ):
        features = _axes.shape(num_features, "num_features")
        axis, axis_name, axis_index_groups = fields.hashable(
            axis, axis_name, axis_index_groups
        )

        newer = {
            "promote_dtype": promote_dtype,
            "bias_metadata": bias_metadata,
            "scale_metadata": scale_metadata,
        }
        taken = _compat.taken(nnx.BatchNorm.__init__, newer)

        def of_features(init: Initializer) -> Initializer:
            return lambda key, _, dtype: init(key, features, dtype)

        super().__init__(
            prod(features),
            use_running_average=use_running_average,
            axis=axis,  # type: ignore  (Flax's own is an int.)
            momentum=momentum,  # type: ignore
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=of_features(bias_init),
            scale_init=of_features(scale_init),
            axis_name=axis_name,  # type: ignore
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,  # type: ignore  (Flax knows no words.)
            rngs=rngs,
            **taken,
        )
        self.promote_dtype = promote_dtype
        if "bias_init" in vars(self):  # Flax 0.12.0 keeps them: equal ones, then.
            self.bias_init, self.scale_init = bias_init, scale_init
        for name, metadata in (("scale", scale_metadata), ("bias", bias_metadata)):
            if f"{name}_metadata" not in taken and getattr(self, name) is not None:
                setattr(self, name, nnx.Param(getattr(self, name)[...], **metadata))
        self.num_features = features if np.ndim(num_features) else features[0]
        self.unbiased = unbiased
        self.derivatives = derivatives
        self.implementation = implementation
        self.skip_nonfinite = skip_nonfinite
        self.example_weight = example_weight
        self.pseudo_samples = pseudo_samples
        self.accumulate = accumulate
        stats = init_stats(features, dtype=stats_dtype(param_dtype))
        self.mean, self.var = nnx.BatchStat(stats.mean), nnx.BatchStat(stats.var)
        self.step = nnx.BatchStat(stats.step) if callable(momentum) else nnx.data(None)
        self._layer()  # Raises for wrong options.
        self._open_window()

    def _layer(self, **given: Any) -> layers.Layer:
        own = {"use_scale": self.scale is not None, "use_bias": self.bias is not None}
        return fields.layer(layers.standard, self, **own, **given)

    def _operands(self, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """x, scale and bias, cast by `promote_dtype`, and the output's dtype."""
        x = fields.like_mean(x, self.mean[...], COMPLEX)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        given = (x, self.mean[...], self.var[...], scale, bias)
        with jax.numpy_dtype_promotion("standard"):  # As Flax's function expects.
            cast_x, _, _, scale, bias = self.promote_dtype(given, dtype=self.dtype)
        dtype = fields.output_dtype(cast_x, scale, bias, dtype=self.dtype)
        # Flax's own function only widens x if `dtype` is None. jaxbn widens x itself,
        # and keeps the original x for the backward pass.
        if self.promote_dtype is promote_dtype and self.dtype is None:
            cast_x = x
        cast_x = fields.like_mean(cast_x, self.mean[...], COMPLEX)
        return cast_x, fields.as_dict(scale=scale, bias=bias), dtype
