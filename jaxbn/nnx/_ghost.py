"""Ghost batch norm as an nnx module."""

from typing import Any, Unpack

from flax import nnx

from jaxbn import layers
from jaxbn._flax import fields
from jaxbn.nnx._variant import Common, Variant


class GhostBatchNorm(Variant):
    """Ghost batch norm: groups of examples, normalized each by its own statistics.

    It computes what `jaxbn.layers.ghost` does.

    Args:
      num_features: The number of features; a tuple where `axis` is one.
      group_size: How many examples a group has. Give this or `num_groups`.
      num_groups: How many groups the batch, over all devices, is divided into.
      strided: Deal examples out in turn, instead of making groups of neighbours.
      update_per_group: Move the statistics by each group in turn, not by all pooled.
      use_fast_variance: Pass the running mean as `shift`.
      unbiased: Track the variance times n/(n − 1).
      derivatives: "vjp" or "jvp", as for `jaxbn.batch_norm`.
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate and implementation.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.GhostBatchNorm(1, group_size=2, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0], [3.0], [10.0], [30.0]]))
      >>> print(y[:, 0].round(3))
      [-1.  1. -1.  1.]

    References:
      Hoffer, Hubara and Soudry, "Train longer, generalize better" (2017).
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        group_size: int | None = None,
        num_groups: int | None = None,
        strided: bool = False,
        update_per_group: bool = False,
        use_fast_variance: bool = True,
        unbiased: bool = False,
        derivatives: str = "vjp",
        rngs: nnx.Rngs,
        **common: Unpack[Common],
    ):
        self.group_size = group_size
        self.num_groups = num_groups
        self.strided = strided
        self.update_per_group = update_per_group
        self.use_fast_variance = use_fast_variance
        self.unbiased = unbiased
        self.derivatives = derivatives
        super().__init__(num_features, rngs=rngs, **common)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.ghost, self, **given)
