"""The variants of batch norm as nnx modules: their own arguments, and their layer."""

from typing import Any, Unpack

import jax
from flax import nnx
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxbn import _devices, layers
from jaxbn._flax import fields
from jaxbn.layers._renorm import Limit
from jaxbn.nnx._adapter import Common, Variant


class GhostBatchNorm(Variant):
    """Ghost batch norm: each group of examples is normalized by its own statistics.

    It computes the same as `jaxbn.layers.ghost`.

    Args:
      num_features: The number of features; a tuple if `axis` is one.
      group_size: The number of examples per group. Give this or `num_groups`.
      num_groups: The number of groups that the batch, over all devices, is split into.
      strided: Whether to alternate between groups, instead of grouping neighbors.
      update_per_group: Whether to update the statistics with each group in turn,
        instead of once with all groups pooled.
      use_fast_variance: As for `jaxbn.layers.standard`.
      unbiased: Whether to track the variance times n/(n − 1).
      derivatives: "vjp" or "jvp", as for `jaxbn.batch_norm`.
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate, implementation and skip_nonfinite.

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
        use_fast_variance: bool | str = True,
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


class BatchRenorm(Variant):
    """Batch renormalization: batch norm, corrected towards the running statistics.

    It computes the same as `jaxbn.layers.renorm`. Its statistics are `mean` and `std`.

    Args:
      num_features: The number of features; a tuple if `axis` is one.
      r_max: The largest ratio between the standard deviation of the batch and the
        running one, in either direction; at least 1. Or a function of the step.
      d_max: The largest distance between the two means, in running standard deviations.
        Or a function of the step.
      tracks: "std" for an average of standard deviations, or "var" for an average of
        variances. With "var", the statistics are `mean`, `var` and `step`.
      warm_up_steps: For this number of updates, the layer is batch norm. If it is above
        0, the statistics include `step`.
      use_fast_variance: As for `jaxbn.layers.standard`.
      axis_index_groups: Groups of indices of `axis_name`.
      derivatives: "vjp" or "jvp", as for `jaxbn.batch_norm`.
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate, implementation and skip_nonfinite.

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
        tracks: str = "std",
        warm_up_steps: int = 0,
        use_fast_variance: bool | str = True,
        axis_index_groups: _devices.Groups | None = None,
        derivatives: str = "vjp",
        rngs: nnx.Rngs,
        **common: Unpack[Common],
    ):
        self.r_max = r_max
        self.d_max = d_max
        self.tracks = tracks
        self.warm_up_steps = warm_up_steps
        self.use_fast_variance = use_fast_variance
        self.derivatives = derivatives
        self.axis_index_groups = axis_index_groups
        super().__init__(num_features, rngs=rngs, **common)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.renorm, self, **given)

    def _keeps_step(self) -> bool:
        limited = any(map(callable, (self.momentum, self.r_max, self.d_max)))
        return limited or self.warm_up_steps > 0 or self.tracks == "var"


class DomainBatchNorm(Variant):
    """Domain-specific batch norm: every domain has its own statistics.

    It computes the same as `jaxbn.layers.domain`; its variables have a leading domain
    axis.

    Args:
      num_features: The number of features; a tuple if `axis` is one.
      num_domains: The number of domains.
      shared_affine: Whether the domains share scale and bias.
      use_fast_variance: True and "running_mean" use each domain's running mean as the
        `shift`; False and "sample" take two passes.
      unbiased: Whether to track the variance times n/(n − 1).
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate, implementation and skip_nonfinite.

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
        use_fast_variance: bool | str = True,
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
        """Normalizes `x`. `domain_ids` are integers, one per example or one for all."""
        return self._run(x, use_running_average, mask, domain_ids=domain_ids)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.domain, self, **given)


class ConditionalBatchNorm(Variant):
    """Conditional batch norm: an example's class or embedding sets its scale and bias.

    It computes the same as `jaxbn.layers.conditional`.

    Args:
      num_features: The number of features; a tuple if `axis` is one.
      num_classes: The number of classes. Give this or `embedding_size`.
      embedding_size: The length of the embeddings.
      kernel_init: Initializer of `scale_kernel` and `bias_kernel`, for embeddings.
      use_fast_variance: As for `jaxbn.layers.standard`.
      unbiased: Whether to track the variance times n/(n − 1).
      axis_index_groups: Groups of indices of `axis_name`.
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate, implementation and skip_nonfinite.

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
        use_fast_variance: bool | str = True,
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
        self.axis_index_groups = axis_index_groups
        super().__init__(num_features, rngs=rngs, **common)

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        condition: ArrayLike,
        mask: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`. `condition` is a class or an embedding for each example."""
        return self._run(x, use_running_average, mask, condition=condition)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.conditional, self, **given)


class StreamingBatchNorm(Variant):
    """Batch norm by running statistics, in training too, for the smallest batches.

    It computes the same as `jaxbn.layers.streaming`. It always has a `step`, and
    debiases a `momentum` that is a number.

    Args:
      num_features: The number of features; a tuple if `axis` is one.
      axis_index_groups: Groups of indices of `axis_name`.
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate, implementation and skip_nonfinite.

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
        self.axis_index_groups = axis_index_groups
        super().__init__(num_features, rngs=rngs, **common)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.streaming, self, **given)

    def _keeps_step(self) -> bool:
        return True  # Debiasing always needs it, even for a constant `momentum`.


class InPlaceBatchNorm(Variant):
    """Batch norm and an activation, keeping only the output for the backward pass.

    It computes the same as `jaxbn.layers.in_place`, which says when not to use it.

    Args:
      num_features: The number of features; a tuple if `axis` is one.
      activation: "leaky_relu", "elu" or "identity".
      negative_slope: The slope of leaky ReLU below 0.
      use_fast_variance: As for `jaxbn.layers.standard`.
      unbiased: Whether to track the variance times n/(n − 1).
      axis_index_groups: Groups of indices of `axis_name`.
      rngs: For the initializers.
      **common: As in `flax.nnx.BatchNorm`: use_running_average, axis, momentum,
        epsilon, dtype, param_dtype, use_bias, use_scale, bias_init, scale_init and
        axis_name; accumulate, implementation and skip_nonfinite.

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
        use_fast_variance: bool | str = True,
        unbiased: bool = False,
        axis_index_groups: _devices.Groups | None = None,
        rngs: nnx.Rngs,
        **common: Unpack[Common],
    ):
        self.activation = activation
        self.negative_slope = negative_slope
        self.use_fast_variance = use_fast_variance
        self.unbiased = unbiased
        self.axis_index_groups = axis_index_groups
        super().__init__(num_features, rngs=rngs, **common)

    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.in_place, self, **given)
