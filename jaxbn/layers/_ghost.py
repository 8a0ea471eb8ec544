"""Ghost batch norm: statistics of small groups within a batch."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxbn import _axes, _devices, _dtypes
from jaxbn._batch import checked_batch
from jaxbn._moments import Moments, merge_moments, moments_about
from jaxbn._running_stats import Momentum, RunningStats, update
from jaxbn.layers._ghost_groups import GhostGroups, ghost_groups
from jaxbn.layers._layer import (
    Layer,
    Norm,
    affine,
    compose,
    factory,
    init_of,
    require_one_count,
)


@factory
def ghost(
    *,
    group_size: int | None = None,
    num_groups: int | None = None,
    strided: bool = False,
    update_per_group: bool = False,
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
    derivatives: str = "vjp",
    implementation: str | None = None,
    skip_nonfinite: bool = False,
) -> Layer:
    """Ghost batch norm: each group of examples is normalized by its own statistics.

        y[group] = batch_norm(x[group], scale, bias)        for every group
        state = update(state, merge_moments(moments of the groups))
        inference:  y = normalize(x, state.mean, state.var, scale, bias)

    Groups are parts of the whole batch, so results do not depend on the number of
    devices. A group on a single device needs no collective, except for the running
    statistics.

    Args:
      group_size: The number of examples per group; must divide the batch. Give this or
        `num_groups`.
      num_groups: The number of groups that the batch, over all devices, is split into.
      strided: False groups neighbors (0 0 0 1 1 1). True alternates between groups
        (0 1 0 1 0 1), like `virtual_batch_size` of tf.keras.
      update_per_group: False updates the running statistics once, with the pooled
        moments of all groups. True updates them with each group in turn, one step of
        `momentum` per group, as in the paper.
      feature_axes: As for `standard`, like all options below. The first of the other
        axes is the batch axis.
      momentum: The weight of the old running statistics.
      epsilon: Added to the variance.
      use_scale: Whether `params` has a factor "scale".
      use_bias: Whether `params` has an offset "bias".
      use_fast_variance: As for `standard`.
      unbiased: Whether to track the variance times n/(n − 1). Here n is the size of the
        whole batch, or, with `update_per_group`, of a group.
      axis_name: Name or names of mapped axes that the batch is split over.
      dtype: The output's dtype, by default the dtype of `x`.
      param_dtype: The dtype of the parameters.
      stats_dtype: The dtype of the running mean; complex for complex input.
      derivatives: "vjp" or "jvp", as for `batch_norm`.
      implementation: How the sums of a batch are computed, as for `moments`.
      skip_nonfinite: As for `standard`.

    Returns:
      A `Layer`. Its state is a `RunningStats`. With `update_per_group`, its `forward`
      returns the moments of each group, stacked.

    Raises:
      TypeError: `group_size` or `num_groups` is not an integer.
      ValueError: Both or neither of them are given, or one is below 1. In `apply`: the
        batch, or each device's part of it, cannot be divided into such groups.

    Example:
      >>> import jaxbn, jax.numpy as jnp
      >>> layer = jaxbn.layers.ghost(group_size=2)
      >>> params, state = layer.init(1)
      >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
      >>> y, state = layer.apply(params, state, x, training=True)
      >>> print(y[:, 0].round(3))
      [-1.  1. -1.  1.]

    References:
      Hoffer, Hubara and Soudry, "Train longer, generalize better" (2017), algorithm 1.
    """
    option = require_one_count(group_size=group_size, num_groups=num_groups)
    init = init_of(use_scale, use_bias, param_dtype, stats_dtype)
    names = ["scale"] * use_scale + ["bias"] * use_bias
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

    def train(params, state: RunningStats, x, weights):
        axes = _axes.canonical(feature_axes, x.ndim)
        groups = ghost_groups(x, axes, option, strided=strided, axis_name=axis_name)
        if weights is not None:
            weights = _axes.weights_like(weights, x, _dtypes.accumulation(x.dtype))
            weights = groups.split(weights)
        split = groups.split(x)
        over = groups.axis_name, groups.axis_index_groups
        axes = groups.feature_axes
        batch = checked_batch(split, axes, weights, *over, implementation)
        near = norm.shift(state)
        shift = jax.tree.map(lambda v: groups.repeat(v, split), near)
        m = moments_about(shift, batch)
        scale, bias = (groups.repeat(v, split) for v in affine(params))
        y = norm.by_moments(batch, m, (scale, bias), derivatives)
        m, over = _of_all_groups(m, groups, axis_name, gather=update_per_group)
        if not update_per_group:
            # A shift saves a collective, but loses digits if it is far from the mean.
            shift = near if isinstance(near, jax.Array) and not batch.kernels else None
            m = merge_moments(m, shift=shift, axis_name=over)
        return _devices.reshape_like(y, x), m

    def move(state: RunningStats, m: Moments):
        if jnp.ndim(m.mean) > jnp.ndim(state.mean):
            return _updated_in_turn(state, m, momentum, unbiased)
        return update(state, m, momentum=momentum, unbiased=unbiased)

    return compose(init, names, norm, train=train, infer=norm.infer, update=move)


def _of_all_groups(
    m: Moments,
    groups: GhostGroups,
    axis_name: _devices.AxisName | None,
    *,
    gather: bool,
) -> tuple[Moments, _devices.AxisName | None]:
    """Moments with a leading group axis, and the mapped axis of groups elsewhere."""
    mean, var = (jnp.moveaxis(v, groups.place, 0) for v in (m.mean, m.var))
    if m.count.ndim == 0:
        count = jnp.broadcast_to(m.count, mean.shape[:1])
    else:
        count = jnp.moveaxis(m.count, groups.place, 0)
    m = Moments(mean, var, count)
    summed = groups.axis_name is not None and groups.axis_index_groups is None
    if axis_name is None or summed:
        return m, None
    if gather:
        m = Moments(*_devices.gather(m, axis_name))
        owners = jnp.asarray(groups.owners)
        return jax.tree.map(lambda a: jnp.concatenate(a[owners]), m), None
    # A group that several devices share is summed once per device.
    copies = _devices.axis_size(axis_name) // len(groups.owners)
    return m._replace(count=count / copies), axis_name


def _updated_in_turn(
    state: RunningStats, m: Moments, momentum: Momentum, unbiased: bool
) -> RunningStats:
    def step(state, m):
        return update(state, m, momentum=momentum, unbiased=unbiased), None

    m = jax.tree.map(_devices.whole_along_first, lax.stop_gradient(m))
    return lax.scan(step, state, m)[0]
