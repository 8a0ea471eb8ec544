"""Domain-specific batch norm as an nnx module."""

from typing import Any, Unpack

import jax
from flax import nnx
from jax.typing import ArrayLike

from jaxbn import layers
from jaxbn._flax import fields
from jaxbn.nnx._variant import Common, Variant


class DomainBatchNorm(Variant):
    """Domain-specific batch norm: statistics for each of several kinds of examples.

    It computes what `jaxbn.layers.domain` does. Its variables
    have a first axis of domains.

    Args:
      num_features: The number of features; a tuple where `axis` is one.
      num_domains: How many domains there are.
      shared_affine: Whether the domains share scale and bias.
      use_fast_variance: Pass the running mean as `shift`.
      unbiased: Track the variance times n/(n − 1).
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate and implementation.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.DomainBatchNorm(1, num_domains=2, rngs=nnx.Rngs(0))
      >>> x, ids = jnp.array([[1.0], [10.0], [3.0], [30.0]]), jnp.array([0, 1, 0, 1])
      >>> print(layer(x, domain_ids=ids)[:, 0].round(3))
      [-1. -1.  1.  1.]

    References:
      Chang et al., "Domain-Specific Batch Normalization" (2019).
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        num_domains: int,
        shared_affine: bool = False,
        use_fast_variance: bool = True,
        unbiased: bool = False,
        rngs: nnx.Rngs,
        **common: Unpack[Common],
    ):
        self.num_domains = num_domains
        self.shared_affine = shared_affine
        self.use_fast_variance = use_fast_variance
        self.unbiased = unbiased
        super().__init__(num_features, rngs=rngs, **common)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        domain_ids: ArrayLike,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`; `domain_ids` are integers, one per example or one for all."""
        return self._run(x, use_running_average, mask, domain_ids=domain_ids)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.domain, self, **given)
