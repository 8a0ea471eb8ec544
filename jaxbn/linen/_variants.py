"""The variants of batch norm as linen modules: their own fields, and their layer."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from flax.typing import Initializer
from jax.typing import ArrayLike

from jaxbn import _devices, layers
from jaxbn._flax import fields
from jaxbn.layers._renorm import Limit
from jaxbn.linen._adapter import Variant


class GhostBatchNorm(Variant):
    """Ghost batch norm: each group of examples is normalized by its own statistics.

    It computes the same as `jaxbn.layers.ghost`. During initialization, all examples
    form one group, so a batch of any size will do.

    Attributes:
      group_size: The number of examples per group. Give this or `num_groups`.
      num_groups: The number of groups that the batch, over all devices, is split into.
      strided: Whether to alternate between groups, instead of grouping neighbors.
      update_per_group: Whether to update the statistics with each group in turn,
        instead of once with all groups pooled.
      use_fast_variance: As for `jaxbn.layers.standard`.
      unbiased: Whether to track the variance times n/(n − 1).
      derivatives: "vjp" or "jvp", as for `jaxbn.batch_norm`.
      (others): As in `flax.linen.BatchNorm`.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.linen.GhostBatchNorm(False, group_size=2)
      >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
      >>> y, _ = layer.init_with_output(jax.random.key(0), x)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, new = layer.apply(variables, x, mutable=["batch_stats"])
      >>> print(y[:, 0].round(3))
      [-1.  1. -1.  1.]

    References:
      Hoffer, Hubara and Soudry, "Train longer, generalize better" (2017).
    """

    group_size: int | None = None
    num_groups: int | None = None
    strided: bool = False
    update_per_group: bool = False
    use_fast_variance: bool | str = True
    unbiased: bool = False
    derivatives: str = "vjp"

    @nn.nowrap
    def _layer(self, **given: Any) -> layers.Layer:
        if not self.is_initializing():
            return fields.layer(layers.ghost, self, **given)
        given |= {"axis_index_groups": None, "example_weight": 0.0}
        return fields.layer(layers.standard, self, **given, pseudo_samples=None)


class BatchRenorm(Variant):
    """Batch renormalization: batch norm, corrected towards the running statistics.

    It computes the same as `jaxbn.layers.renorm`. `batch_stats` has "mean" and "std",
    and "step" if `momentum`, `r_max` or `d_max` is a function of it.

    Attributes:
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
      (others): As in `flax.linen.BatchNorm`.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.linen.BatchRenorm(False)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((4, 2)))
      >>> sorted(variables["batch_stats"])
      ['mean', 'std']

    References:
      Ioffe, "Batch Renormalization" (2017).
    """

    r_max: Limit = 3.0
    d_max: Limit = 5.0
    tracks: str = "std"
    warm_up_steps: int = 0
    use_fast_variance: bool | str = True
    axis_index_groups: _devices.Groups | None = None
    derivatives: str = "vjp"

    @nn.nowrap
    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.renorm, self, **given)

    @nn.nowrap
    def _keeps_step(self) -> bool:
        limited = any(map(callable, (self.momentum, self.r_max, self.d_max)))
        return limited or self.warm_up_steps > 0 or self.tracks == "var"


class DomainBatchNorm(Variant):
    """Domain-specific batch norm: every domain has its own statistics.

    It computes the same as `jaxbn.layers.domain`; its variables have a leading domain
    axis.

    Attributes:
      num_domains: The number of domains.
      shared_affine: Whether the domains share scale and bias.
      use_fast_variance: True and "running_mean" use each domain's running mean as the
        `shift`; False and "sample" take two passes.
      unbiased: Whether to track the variance times n/(n − 1).
      (others): As in `flax.linen.BatchNorm`.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.linen.DomainBatchNorm(False, num_domains=2)
      >>> x, ids = jnp.array([[1.0], [10.0], [3.0], [30.0]]), jnp.array([0, 1, 0, 1])
      >>> y, _ = layer.init_with_output(jax.random.key(0), x, domain_ids=ids)
      >>> print(y[:, 0].round(3))
      [-1. -1.  1.  1.]

    References:
      Chang et al., "Domain-Specific Batch Normalization" (2019).
    """

    num_domains: int = dataclasses.field(kw_only=True)
    shared_affine: bool = False
    use_fast_variance: bool | str = True
    unbiased: bool = False

    @nn.compact
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

    @nn.nowrap
    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.domain, self, **given)


class ConditionalBatchNorm(Variant):
    """Conditional batch norm: an example's class or embedding sets its scale and bias.

    It computes the same as `jaxbn.layers.conditional`.

    Attributes:
      num_classes: The number of classes. Give this or `embedding_size`.
      embedding_size: The length of the embeddings.
      kernel_init: Initializer of "scale_kernel" and "bias_kernel", for embeddings.
      use_fast_variance: As for `jaxbn.layers.standard`.
      unbiased: Whether to track the variance times n/(n − 1).
      axis_index_groups: Groups of indices of `axis_name`.
      (others): As in `flax.linen.BatchNorm`.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.linen.ConditionalBatchNorm(False, num_classes=10)
      >>> x, label = jnp.ones((4, 3)), jnp.array([1, 2, 3, 4])
      >>> variables = layer.init(jax.random.key(0), x, condition=label)
      >>> variables["params"]["scale"].shape
      (10, 3)

    References:
      De Vries et al., "Modulating early visual processing by language" (2017).
    """

    num_classes: int | None = None
    embedding_size: int | None = None
    kernel_init: Initializer = nn.initializers.zeros
    use_fast_variance: bool | str = True
    unbiased: bool = False
    axis_index_groups: _devices.Groups | None = None

    @nn.compact
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

    @nn.nowrap
    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.conditional, self, **given)


class StreamingBatchNorm(Variant):
    """Batch norm by running statistics, in training too, for the smallest batches.

    It computes the same as `jaxbn.layers.streaming`. `batch_stats` always has a `step`.

    Attributes:
      momentum: The weight of the old statistics: a number, which is debiased, or a
        function of the step.
      axis_index_groups: Groups of indices of `axis_name`.
      (others): As in `flax.linen.BatchNorm`.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.linen.StreamingBatchNorm(False)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 2)))
      >>> sorted(variables["batch_stats"])
      ['mean', 'step', 'var']

    References:
      Chiley et al., "Online Normalization for Training Neural Networks" (2019).
    """

    axis_index_groups: _devices.Groups | None = None

    @nn.nowrap
    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.streaming, self, **given)

    @nn.nowrap
    def _keeps_step(self) -> bool:
        return True  # Debiasing always needs it, even for a constant `momentum`.


class InPlaceBatchNorm(Variant):
    """Batch norm and an activation, keeping only the output for the backward pass.

    It computes the same as `jaxbn.layers.in_place`, which says when not to use it.

    Attributes:
      activation: "leaky_relu", "elu" or "identity".
      negative_slope: The slope of leaky ReLU below 0.
      use_fast_variance: As for `jaxbn.layers.standard`.
      unbiased: Whether to track the variance times n/(n − 1).
      axis_index_groups: Groups of indices of `axis_name`.
      (others): As in `flax.linen.BatchNorm`.

    Example:
      >>> import jax, jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.linen.InPlaceBatchNorm(False, negative_slope=0.1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, _ = layer.init_with_output(jax.random.key(0), x)
      >>> print(y[:, 0].round(3))
      [-0.1  1. ]

    References:
      Rota Bulò, Porzi and Kontschieder, "In-Place Activated BatchNorm" (2018).
    """

    activation: str = "leaky_relu"
    negative_slope: float = 0.01
    use_fast_variance: bool | str = True
    unbiased: bool = False
    axis_index_groups: _devices.Groups | None = None

    @nn.nowrap
    def _layer(self, **given: Any) -> layers.Layer:
        return fields.layer(layers.in_place, self, **given)
