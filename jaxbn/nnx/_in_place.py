"""In-place batch norm as an nnx module."""

from typing import Any, Unpack

from flax import nnx

from jaxbn import _devices, layers
from jaxbn._flax import fields
from jaxbn.nnx._variant import Common, Variant


class InPlaceBatchNorm(Variant):
    """Batch norm and an activation, of which the backward pass keeps only the output.

    It computes what `jaxbn.layers.in_place` does. When not to
    use it is said there.

    Args:
      num_features: The number of features; a tuple where `axis` is one.
      activation: "leaky_relu", "elu" or "identity".
      negative_slope: The slope of leaky ReLU below 0.
      use_fast_variance: Pass the running mean as `shift`.
      unbiased: Track the variance times n/(n − 1).
      axis_index_groups: Groups of indices of `axis_name`.
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate and implementation.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.InPlaceBatchNorm(1, negative_slope=0.1, rngs=nnx.Rngs(0))
      >>> print(layer(jnp.array([[1.0], [3.0]]))[:, 0].round(3))
      [-0.1  1. ]

    References:
      Rota Bulò, Porzi and Kontschieder, "In-Place Activated BatchNorm" (2018).
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        use_fast_variance: bool = True,
        unbiased: bool = False,
        axis_index_groups: _devices.Groups | None = None,
        rngs: nnx.Rngs,
        **common: Unpack[Common],
    ):
        self.activation = activation
        self.negative_slope = negative_slope
        self.use_fast_variance = use_fast_variance
        self.unbiased = unbiased
        _, _, self.axis_index_groups = fields.hashable(None, None, axis_index_groups)
        super().__init__(num_features, rngs=rngs, **common)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.in_place, self, **given)
