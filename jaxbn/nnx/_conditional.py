"""Conditional batch norm as an nnx module."""

from typing import Any, Unpack

import jax
from flax import nnx
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxbn import _devices, layers
from jaxbn._flax import fields
from jaxbn.nnx._variant import Common, Variant


class ConditionalBatchNorm(Variant):
    """Conditional batch norm: scale and bias that depend on the example.

    It computes what `jaxbn.layers.conditional` does.

    Args:
      num_features: The number of features; a tuple where `axis` is one.
      num_classes: How many classes there are. Give this or `embedding_size`.
      embedding_size: The length of embeddings.
      kernel_init: Initializer of `scale_kernel` and `bias_kernel`, for embeddings.
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
      >>> layer = jaxbn.nnx.ConditionalBatchNorm(3, num_classes=10, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((4, 3)), condition=jnp.array([1, 2, 3, 4]))
      >>> layer.scale.shape
      (10, 3)

    References:
      De Vries et al., "Modulating early visual processing by language" (2017).
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        num_classes: int | None = None,
        embedding_size: int | None = None,
        kernel_init: Initializer = nnx.initializers.zeros,
        use_fast_variance: bool = True,
        unbiased: bool = False,
        axis_index_groups: _devices.Groups | None = None,
        rngs: nnx.Rngs,
        **common: Unpack[Common],
    ):
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.kernel_init = kernel_init
        self.use_fast_variance = use_fast_variance
        self.unbiased = unbiased
        _, _, self.axis_index_groups = fields.hashable(None, None, axis_index_groups)
        super().__init__(num_features, rngs=rngs, **common)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        condition: ArrayLike,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`; `condition` is a class or an embedding for each example."""
        return self._run(x, use_running_average, mask, condition=condition)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.conditional, self, **given)
