"""Batch renormalization as an nnx module."""

from typing import Any, Unpack

from flax import nnx

from jaxbn import _devices, layers
from jaxbn._flax import fields
from jaxbn.layers._renorm import Limit
from jaxbn.nnx._variant import Common, Variant


class BatchRenorm(Variant):
    """Batch renormalization: batch norm, corrected towards the running statistics.

    It computes what `jaxbn.layers.renorm` does. Its statistics are
    `mean` and `std`.

    Args:
      num_features: The number of features; a tuple where `axis` is one.
      r_max: The largest factor between the batch's standard deviation and the running
        one, at least 1; or a function of the step.
      d_max: The largest distance of the means in standard deviations; or a function of
        the step.
      use_fast_variance: Pass the running mean as `shift`.
      axis_index_groups: Groups of indices of `axis_name`.
      derivatives: "vjp" or "jvp", as for `jaxbn.batch_norm`.
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate and implementation.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchRenorm(2, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
      >>> print(layer.std[...].round(2))
      [1.   1.09]

    References:
      Ioffe, "Batch Renormalization" (2017).
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        use_fast_variance: bool = True,
        axis_index_groups: _devices.Groups | None = None,
        derivatives: str = "vjp",
        rngs: nnx.Rngs,
        **common: Unpack[Common],
    ):
        self.r_max = r_max
        self.d_max = d_max
        self.use_fast_variance = use_fast_variance
        self.derivatives = derivatives
        _, _, self.axis_index_groups = fields.hashable(None, None, axis_index_groups)
        super().__init__(num_features, rngs=rngs, **common)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.renorm, self, **given)

    def _of_the_step(self) -> tuple:
        return self.momentum, self.r_max, self.d_max
