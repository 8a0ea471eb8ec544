"""How a batch is divided into groups, on one device or over several."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn import _axes, _devices


class GhostGroups(NamedTuple):
    """The groups that a device has examples of.

    Attributes:
      batch: The batch axis, which is split in two.
      sizes: The lengths of the two new axes.
      feature_axes: The group axis and the feature axes, after the split.
      place: The index of the group axis in `feature_axes`.
      axis_name: The mapped axis that each group is summed over, if any.
      axis_index_groups: Which devices share groups, unless all do.
      owners: Devices that together have every group exactly once, in order.
    """

    batch: int
    sizes: tuple[int, int]
    feature_axes: tuple[int, ...]
    place: int
    axis_name: _devices.AxisName | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    owners: tuple[int, ...]

    def split(self, array: jax.Array) -> jax.Array:
        """Splits the examples of `array`, which is aligned with x, into groups."""
        if array.shape[self.batch] == 1 != self.sizes[0] * self.sizes[1]:
            return jnp.expand_dims(array, self.batch)
        return _devices.split_axis(array, self.batch, self.sizes)

    def repeat(self, vector: jax.Array | None, x: jax.Array) -> jax.Array | None:
        """Repeats a feature vector for each group of `x`, which is already split."""
        if vector is None:
            return None
        return _devices.repeat_along(
            vector, self.place, x, self.feature_axes[self.place]
        )


def ghost_groups(
    x: jax.Array,
    feature_axes: tuple[int, ...],
    option: tuple[str, int],
    *,
    strided: bool,
    axis_name: _devices.AxisName | None,
) -> GhostGroups:
    """The groups of a batch; `x` is this device's part of it."""
    batch = _axes.batch_axis(feature_axes, x)
    local, devices = x.shape[batch], _devices.axis_size(axis_name)
    shared = _shared(local, devices, option, strided)
    if shared is None:
        name, value = option
        spread = f" on each of {devices} devices" if devices > 1 else ""
        multiple = "" if isinstance(local, int) else f" Export a batch of `{value}*b`."
        raise ValueError(
            f"`{name}` is {value}, which does not divide the batch of {local} examples"
            f"{spread}. Groups must be whole, and alike on every device: all within "
            f"one, or all of whole devices' examples.{multiple}"
        )
    here, sharers = shared
    group_axis = batch + strided
    own = (axis + (axis > batch) for axis in feature_axes)
    axes = tuple(sorted((group_axis, *own)))
    alone, together = len(sharers) == devices, len(sharers) == 1
    if not alone and not together and not isinstance(axis_name, str):
        raise ValueError(
            f"`{option[0]}` is {option[1]}: groups that take several devices, but not "
            f"all, need a single `axis_name`, got {axis_name!r}."
        )
    return GhostGroups(
        batch=batch,
        sizes=(local // here, here) if strided else (here, local // here),
        feature_axes=axes,
        place=axes.index(group_axis),
        axis_name=None if alone else axis_name,
        axis_index_groups=None if alone or together else sharers,
        owners=tuple(devices[0] for devices in sharers),
    )


def _shared(
    local: int, devices: int, option: tuple[str, int], strided: bool
) -> tuple[int, tuple[tuple[int, ...], ...]] | None:
    """The number of groups on each device, and which devices share their groups.

    None if a group would be incomplete, or the devices would have unequal parts.
    """
    total = local * devices
    name, value = option
    if total % value or total == 0:
        return None
    groups = value if name == "num_groups" else total // value
    each, all_ = tuple((d,) for d in range(devices)), (tuple(range(devices)),)
    size = total // groups
    if strided:
        if local % groups == 0:
            return groups, all_
        if groups % local:
            return None
        kinds = groups // local
        return local, tuple(tuple(range(k, devices, kinds)) for k in range(kinds))
    if local % size == 0:
        return local // size, each
    if size % local:
        return None
    span = size // local
    return 1, tuple(tuple(range(d, d + span)) for d in range(0, devices, span))
