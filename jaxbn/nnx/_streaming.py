"""Streaming batch norm as an nnx module."""

from typing import Any, Unpack

from flax import nnx

from jaxbn import _devices, layers
from jaxbn._flax import fields
from jaxbn.nnx._variant import Common, Variant


class StreamingBatchNorm(Variant):
    """Batch norm by the running statistics also in training, for the smallest batches.

    It computes what `jaxbn.layers.streaming` does. It always has a
    `step`, and a `momentum` that is a number is debiased.

    Args:
      num_features: The number of features; a tuple where `axis` is one.
      axis_index_groups: Groups of indices of `axis_name`.
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate and implementation.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.StreamingBatchNorm(1, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[5.0]]))
      >>> print(layer.mean[...], layer.step[...])
      [5.] 1

    References:
      Chiley et al., "Online Normalization for Training Neural Networks" (2019).
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        axis_index_groups: _devices.Groups | None = None,
        rngs: nnx.Rngs,
        **common: Unpack[Common],
    ):
        _, _, self.axis_index_groups = fields.hashable(None, None, axis_index_groups)
        super().__init__(num_features, rngs=rngs, **common)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.streaming, self, **given)

    def _of_the_step(self) -> tuple:
        return (layers.streaming,)  # Debiasing is: whatever `momentum` is.
