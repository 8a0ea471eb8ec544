"""`Batch`: what every verb computes from, checked once."""

from typing import NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxbn import _axes, _devices, _dtypes, _kernels, _sums


class Batch(NamedTuple):
    """A checked batch: an array, its weights, and the devices it is split over.

    `kernels` compute the sums; if None, XLA does.
    """

    x: jax.Array
    feature_axes: tuple[int, ...]
    weights: jax.Array | None = None
    axis_name: _devices.AxisName | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    kernels: _kernels.Chosen | None = None

    @property
    def count(self) -> jax.Array:
        """The total weight on this device."""
        count = _sums.total_weight(self.x, self.weights, self.feature_axes)
        if count.size == 1 and _devices.is_spread_further(
            self.x, self.weights, self.axis_name
        ):
            # Features are split, one per device; weights, and thus counts, are not.
            count = count.reshape(())
        return count

    @property
    def total(self) -> jax.Array:
        """The weighted sum on this device, as a constant."""
        x = lax.stop_gradient(self.x)
        return _sums.weighted_sum(x, self.weights, self.feature_axes)

    def all_sum(self, *sums: jax.Array) -> list[jax.Array]:
        """The sums over the devices, named for remat policies."""
        total = _devices.all_sum(sums, self.axis_name, self.axis_index_groups)
        return [checkpoint_name(s, "jaxbn_moments") for s in total]


def checked_batch(
    x: ArrayLike,
    feature_axes: _axes.Axes,
    weights: ArrayLike | None,
    axis_name: _devices.AxisName | None,
    axis_index_groups: _devices.Groups | None,
    implementation: str | None,
) -> Batch:
    """Checks the arguments that users pass, and makes a batch of them."""
    x = _dtypes.inexact_array("x", x)
    axes = _axes.canonical(feature_axes, x.ndim)
    if weights is not None:
        weights = _axes.weights_like(weights, x, _dtypes.accumulation(x.dtype))
    kernels = _kernels.choose(implementation, x, axes, weights)
    axis_name, groups = _devices.hashable(axis_name, axis_index_groups)
    return Batch(x, axes, weights, axis_name, groups, kernels)
