"""Domain-specific batch norm: separate statistics for each kind of example."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn import _axes, _devices
from jaxbn._running_stats import Momentum, RunningStats, init_stats, update
from jaxbn.layers._by_domain import (
    Found,
    found,
    located,
    normalized_by_domain,
)
from jaxbn.layers._domains import domains_of
from jaxbn.layers._fast_variance import chosen
from jaxbn.layers._layer import (
    Affine,
    Layer,
    Norm,
    Params,
    affine,
    compose,
    factory,
    init_affine,
    require_count,
)


@factory
def domain(
    *,
    num_domains: int,
    shared_affine: bool = False,
    feature_axes: _axes.Axes = -1,
    momentum: Momentum = 0.99,
    epsilon: float = 1e-5,
    use_scale: bool = True,
    use_bias: bool = True,
    use_fast_variance: bool | str = True,
    unbiased: bool = False,
    axis_name: _devices.AxisName | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    stats_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
    skip_nonfinite: bool = False,
) -> Layer:
    """Domain-specific batch norm: every domain has its own statistics.

    If example i belongs to domain k:

        training:   y[i] = (x[i] − μ_k) / √(var_k + epsilon) · scale_k + bias_k
                    state_k = update(state_k, (μ_k, var_k))    for domains in the batch
        inference:  the same y, with the running statistics of domain k

    where μ_k and var_k are the moments of the examples of domain k in the batch. One
    pass over `x` serves all domains. Domains can be clean and adversarial examples
    (AdvProp), weakly and strongly augmented examples (split batch norm), or the source
    and target of domain adaptation. Differentiable in every mode, to every order.

    Args:
      num_domains: The number of domains.
      shared_affine: Whether the domains share scale and bias. By default each has its
        own, and the parameters have a leading domain axis.
      feature_axes: As for `standard`, like all options below. The first of the other
        axes is the batch axis.
      momentum: The weight of the old running statistics. A function of the step is
        called with each domain's own step.
      epsilon: Added to the variance.
      use_scale: Whether `params` has a factor "scale".
      use_bias: Whether `params` has an offset "bias".
      use_fast_variance: True and "running_mean" use each domain's running mean as the
        `shift`; False and "sample" take two passes.
      unbiased: Whether to track the variance times n/(n − 1), with each domain's n.
      axis_name: Name or names of mapped axes to compute statistics over.
      dtype: The output's dtype, by default the dtype of `x`.
      param_dtype: The dtype of the parameters.
      stats_dtype: The dtype of the running means; complex for complex input.
      implementation: How the sums of each example are computed, as for `moments`.
      skip_nonfinite: As for `standard`.

    Returns:
      A `Layer`. `apply` also needs `domain_ids`: integers from 0 to `num_domains` − 1,
      one per example, or a scalar for all. An example with any other id belongs to no
      domain, and its output and gradient are NaN, so give padding a valid id and the
      weight 0. The state is a `RunningStats` with a leading domain axis, also for
      `step`. Domains without an example in the batch keep their state.

    Raises:
      TypeError: `num_domains` is not an integer. In `apply`: `domain_ids` are not
        integers.
      ValueError: `num_domains` is below 1. In `apply`: `domain_ids` have the wrong
        shape, or `x` has no batch axis.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.layers.domain(num_domains=2, momentum=0.0)
      >>> params, state = layer.init(1)
      >>> x = jnp.array([[1.0], [10.0], [3.0], [30.0]])
      >>> ids = jnp.array([0, 1, 0, 1])
      >>> y, state = layer.apply(params, state, x, domain_ids=ids, training=True)
      >>> print(y[:, 0].round(3), state.mean[:, 0])
      [-1. -1.  1.  1.] [ 2. 20.]

    References:
      Chang et al., "Domain-Specific Batch Normalization for Unsupervised Domain
      Adaptation" (2019). Xie et al., "Adversarial Examples Improve Image Recognition"
      (2020).
    """
    require_count("num_domains", num_domains)
    names = ["scale"] * use_scale + ["bias"] * use_bias

    def init(features):
        params = init_affine(features, use_scale, use_bias, param_dtype)
        state = init_stats(features, dtype=stats_dtype)

        stacked = functools.partial(
            jax.tree.map, lambda a: jnp.stack([a] * num_domains)
        )
        return params if shared_affine else stacked(params), stacked(state)

    norm = Norm(
        feature_axes,
        epsilon,
        dtype,
        axis_name,
        None,
        implementation,
        use_fast_variance,
        skip_nonfinite,
    )

    def found_about(shift, x, weights, domain_ids) -> Found:
        ids = located(norm, x, domain_ids)
        return found(norm, x, weights, domains_of(ids, num_domains, axis_name), shift)

    def vectors(params: Params, own) -> Affine:
        """Scale and bias: those of all domains, or what `own` takes from a table."""
        return affine(params if shared_affine else jax.tree.map(own, dict(params)))

    def train_found(params, state: RunningStats, x, weights, domain_ids=None):
        # A sample may have nothing of a domain.
        near = chosen(use_fast_variance, state.mean, split=True)
        own = found_about(near, x, weights, domain_ids)
        affine_ = vectors(params, own.domains.of_rows)
        return normalized_by_domain(norm, x, own, affine_, weights), own

    def train(params, state: RunningStats, x, weights, domain_ids=None):
        y, own = train_found(params, state, x, weights, domain_ids)
        return y, own.of_all_domains()

    def infer(params, state: RunningStats, x, weights, domain_ids=None):
        own = functools.partial(_devices.take_rows, index=located(norm, x, domain_ids))
        mean, var = own(state.mean), own(state.var)
        return norm.by_stats(x, mean, var, vectors(params, own), weights)

    def measure(state: RunningStats, x, weights, domain_ids=None):
        return found_about(None, x, weights, domain_ids).of_all_domains()

    move = jax.vmap(functools.partial(update, momentum=momentum, unbiased=unbiased))

    def moved(state: RunningStats, found: Found) -> RunningStats:
        counted = found._replace(moments=norm.counted(found.moments))
        return counted.moved(state, move)

    def composed(norm: Norm, train, update) -> Layer:
        options = {"infer": infer, "measure": measure, "inputs": ("domain_ids",)}
        return compose(init, names, norm, train=train, update=update, **options)

    # `forward` returns moments of all domains, which can be merged. `apply` can do
    # without, and moves no more rows than there may be domains in the batch.
    own = composed(norm._replace(skip_nonfinite=False), train_found, moved)
    return composed(norm, train, move)._replace(apply=own.apply)
