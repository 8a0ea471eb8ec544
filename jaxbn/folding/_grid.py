"""Which positions kernels of convolutions read, and a kernel that reads all of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.folding._product import Product


class Grid(NamedTuple):
    """The positions that a kernel reads along each spatial axis.

    For output position p these are stride·p − low + dilation·j, for j below size. Past
    the end of the input it reads `high` zeros.
    """

    size: tuple[int, ...]
    dilation: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]


def grid_of(layer: Product) -> Grid:
    """The grid of a convolution; without axes for a matrix product."""
    axes = axes_of(layer)
    if not axes:
        return Grid((), (), (), ())
    size = tuple(layer.kernel.shape[axis] for axis in axes)
    low, high = zip(*layer.op.params["padding"], strict=True)
    return Grid(size, tuple(layer.op.params["rhs_dilation"]), low, high)


def params_of(grid: Grid, layer: Product) -> dict[str, Any]:
    """The inverse: the parameters of a convolution that reads these positions."""
    if layer.kind == "product":
        return {}
    padding = tuple(zip(grid.low, grid.high, strict=True))
    return {"padding": padding, "rhs_dilation": grid.dilation}


def axes_of(layer: Product) -> tuple[int, ...]:
    """The spatial axes of the kernel."""
    if layer.kind == "product":
        return ()
    return tuple(layer.op.params["dimension_numbers"].rhs_spec[2:])


def unit_grid(like: Grid) -> Grid:
    """The grid of a convolution that returns its input."""
    ones, zeros = (1,) * len(like.size), (0,) * len(like.size)
    return Grid(ones, ones, zeros, zeros)


def common_grid(grids: Sequence[Grid]) -> Grid | None:
    """The smallest grid that has the positions of all, if one dilation fits them."""
    axes = [_common(axis) for axis in zip(*(zip(*g, strict=True) for g in grids))]  # noqa: B905
    if any(axis is None for axis in axes):
        return None
    return Grid(*zip(*axes, strict=True)) if axes else grids[0]  # type: ignore


def _common(grids: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The same along one axis."""
    # A kernel of length 1 fits every dilation.
    dilations = {dilation for size, dilation, *_ in grids if size > 1} or {1}
    step = min(dilations)
    lowest = max(low for _, _, low, _ in grids)
    ends = [(size - 1) * dilation - low for size, dilation, low, _ in grids]
    offsets = [lowest - low for _, _, low, _ in grids]
    if len(dilations) > 1 or any(offset % step for offset in offsets):
        return None
    last = max(ends)
    high = grids[0][3] + last - ends[0]
    return (last + lowest) // step + 1, step, lowest, high


def placed(kernel: jax.Array, own: Grid, grid: Grid, axes: Sequence[int]) -> jax.Array:
    """A kernel with its own grid along `axes`, put into a larger one, among zeros."""
    widths = [(0, 0)] * kernel.ndim
    for i, axis in enumerate(axes):
        before = (grid.low[i] - own.low[i]) // grid.dilation[i]
        widths[axis] = before, grid.size[i] - own.size[i] - before
    return jnp.pad(kernel, widths)


def unit_kernel(shape: Sequence[int], into: int, out: int) -> np.ndarray:
    """The kernel of length 1 that returns its input, with an axis of each kind.

    With groups, the inputs of a group are numbered from 0.
    """
    i, o = np.arange(shape[into]), np.arange(shape[out])
    unit = (o[None] % shape[into] == i[:, None]).astype(np.float64)
    own = [1] * len(shape)
    own[into], own[out] = shape[into], shape[out]
    return (unit if into < out else unit.T).reshape(own)
