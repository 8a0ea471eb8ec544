"""Domain-specific batch norm: separate statistics for each kind of example."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn import _axes, _devices
from jaxbn._moments import Moments, merge_moments
from jaxbn._running_stats import Momentum, RunningStats, init_stats, update
from jaxbn.layers._layer import (
    Layer,
    Norm,
    affine,
    compose,
    factory,
    init_affine,
    require_count,
)
from jaxbn.layers._per_example import example_ids, example_moments


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
    use_fast_variance: bool = True,
    unbiased: bool = False,
    axis_name: _devices.AxisName | None = None,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    stats_dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> Layer:
    """Domain-specific batch norm: every domain has its own statistics.

    With k the domain of example i:

        training:   y[i] = (x[i] − μ_k) / √(var_k + epsilon) · scale_k + bias_k
                    state_k = update(state_k, μ_k and var_k)      for domains present
        inference:  the same with the running statistics of domain k

    where μ_k and var_k are the moments of the batch's examples of domain k. One pass
    over `x` serves all domains. Domains may be clean and adversarial examples
    (AdvProp), weakly and strongly augmented examples (split batch norm), or the domains
    of domain adaptation. Differentiable in every mode, to every order.

    Args:
      num_domains: The number of domains.
      shared_affine: Whether the domains share scale and bias. By default each has its
        own, and the parameters have a leading domain axis.
      feature_axes: As for `standard`, like all options below. The first other axis is
        the batch axis.
      momentum: The weight of the old running statistics. A function of the step gets
        each domain's step.
      epsilon: Added to the variance.
      use_scale: Whether `params` has a factor "scale".
      use_bias: Whether `params` has an offset "bias".
      use_fast_variance: Whether to pass each domain's running mean as `shift`.
      unbiased: Whether to track the variance times n/(n − 1), with each domain's n.
      axis_name: Name or names of mapped axes to compute statistics over.
      dtype: The output's dtype, by default the dtype of `x`.
      param_dtype: The dtype of the parameters.
      stats_dtype: The dtype of the running means; complex for complex input.
      implementation: How the sums of each example are computed, as for `moments`.

    Returns:
      A `Layer`. `apply` also needs `domain_ids`: integers from 0 to `num_domains` − 1,
      one per example, or a scalar for all. An example with any other id counts for no
      domain, and its output and gradient are NaN: give padding a valid id and the
      weight 0. The state is a `RunningStats` with a leading domain axis, also for
      `step`; domains without an example keep their state.

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

        def repeated(tree):
            return jax.tree.map(lambda a: jnp.stack([a] * num_domains), tree)

        return params if shared_affine else repeated(params), repeated(state)

    norm = Norm(
        feature_axes,
        epsilon,
        dtype,
        axis_name,
        None,
        implementation,
        use_fast_variance,
    )

    def located(x, domain_ids) -> tuple[tuple[int, ...], jax.Array]:
        """The feature axes of x, and each example's domain."""
        axes = _axes.canonical(feature_axes, x.ndim)
        return axes, example_ids("domain_ids", domain_ids, x, axes)

    def pooled(state: RunningStats, x, weights, domain_ids, *, fast: bool) -> Moments:
        axes, ids = located(x, domain_ids)
        mean = norm.shift(state) if fast else None
        m = example_moments(
            x,
            axes,
            weights=weights,
            shift=_of_each(mean, ids),
            implementation=implementation,
        )
        return _of_domains(m, ids, num_domains, mean, axis_name)

    def normalized(params, table, x, weights, domain_ids) -> jax.Array:
        """Normalizes each example by its domain's row of moments or statistics."""
        _, ids = located(x, domain_ids)
        vectors = affine(params)
        if not shared_affine:
            vectors = tuple(_of_each(v, ids) for v in vectors)
        mean, var = _of_each(table.mean, ids), _of_each(table.var, ids)
        return norm.by_stats(x, mean, var, vectors, weights)

    def train(params, state: RunningStats, x, weights, domain_ids=None):
        m = pooled(state, x, weights, domain_ids, fast=True)
        return normalized(params, m, x, weights, domain_ids), m

    def infer(params, state: RunningStats, x, weights, domain_ids=None):
        return normalized(params, state, x, weights, domain_ids)

    def measure(state: RunningStats, x, weights, domain_ids=None):
        return pooled(state, x, weights, domain_ids, fast=False)

    move = jax.vmap(functools.partial(update, momentum=momentum, unbiased=unbiased))
    return compose(
        init,
        names,
        norm,
        train=train,
        infer=infer,
        measure=measure,
        update=move,
        inputs=("domain_ids",),
    )


def _of_domains(
    m: Moments,
    ids: jax.Array,
    num_domains: int,
    mean: jax.Array | None,
    axis_name: _devices.AxisName | None,
) -> Moments:
    """Pools moments of examples for each domain, about its running `mean` if any."""
    own = jnp.expand_dims(ids, 1) == jnp.arange(num_domains).reshape(1, -1)
    own = jnp.expand_dims(own, tuple(range(2, m.count.ndim + 1)))

    def repeated(vectors: jax.Array) -> jax.Array:
        """The vectors of each example, once for each domain."""
        first, *rest = vectors.shape
        shape = (first, num_domains, *rest)
        return jnp.broadcast_to(jnp.expand_dims(vectors, 1), shape)

    count = jnp.where(own, jnp.expand_dims(m.count, 1), 0)
    parts = Moments(repeated(m.mean), repeated(m.var), count)
    return merge_moments(parts, shift=mean, axis_name=axis_name)


def _of_each(table: Any, ids: jax.Array) -> Any:
    """One row of `table` per example; None stays None."""
    return table if table is None else _devices.take_rows(table, ids)
