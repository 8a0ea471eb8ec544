"""Runs a call that XLA's partitioner cannot see into on each device's part of `x`.

Otherwise the partitioner gathers whole arrays for such a call. The function called
here, `f(names, *operands)`, computes arrays like `x` from the local part of `x`, or
feature vectors: sums over that part and over the mesh axes in `names`.
"""

import functools
import string
from collections.abc import Callable
from math import prod

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxbn import _axes
from jaxbn._devices.names import as_names
from jaxbn._devices.varying import vary_like

# The layouts of operands and results: like `x`, like a feature vector, or like weights,
# which have the layout of `x` with feature axes of length 1. The first operand is `x`.
X, VECTOR, WEIGHTS = "x", "vector", "weights"


def is_possible(x: jax.Array) -> bool:
    """Whether the parts of `x` are known here.

    They are not if only some axes of a mesh are manual or explicit.
    """
    return len(_axis_types(x)) < 2


def spread(
    f: Callable, roles: tuple, results: tuple, feature_axes: tuple[int, ...]
) -> Callable:
    """`f((), *operands)` for operands that are split over devices in any way.

    `f` must be hashable; `roles` and `results` name the layout of each operand and each
    result.
    """
    layout = roles, results, feature_axes

    def call(x, *operands):
        kinds = _axis_types(x)
        if AxisType.Manual in kinds:  # Each device already has its part.
            out = f((), x, *operands)
            return [vary_like(array, x, *operands) for array in out]
        if AxisType.Explicit in kinds:
            return _by_type(f, *layout, x, *operands)
        return _partitioned(f, *layout, x.ndim)(x, *operands)

    return call


def _mesh_of(x: jax.Array):
    """The mesh in the type of `x`, or else the mesh of the context."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def _axis_types(x: jax.Array) -> set[AxisType]:
    around = jax.sharding.get_abstract_mesh()
    return {*around.axis_types, *_mesh_of(x).axis_types}


def _by_type(
    f: Callable,
    roles: tuple,
    results: tuple,
    feature_axes: tuple[int, ...],
    *operands,
):
    """On a mesh with explicit axes, the type of `x` shows how it is split."""
    mesh, spec = _mesh_of(operands[0]), jax.typeof(operands[0]).sharding.spec
    spec = _padded(spec, operands[0].ndim)
    specs = tuple(_spec(spec, role, feature_axes) for role in roles)
    placed = [
        jax.sharding.reshard(operand, NamedSharding(mesh, own))
        for operand, own in zip(operands, specs, strict=True)
    ]
    local = functools.partial(f, _reduced_names(spec, feature_axes))
    out = tuple(_spec(spec, role, feature_axes) for role in results)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out)(*placed)


@functools.cache
def _partitioned(
    f: Callable,
    roles: tuple,
    results: tuple,
    feature_axes: tuple[int, ...],
    ndim: int,
):
    """On a mesh with automatic axes, the partitioner calls back once it knows."""

    def partition(mesh, operands, _):
        spec = _dividing(operands[0], mesh)
        local = functools.partial(f, _reduced_names(spec, feature_axes))

        def places(roles):
            specs = (_spec(spec, role, feature_axes) for role in roles)
            return tuple(NamedSharding(mesh, spec) for spec in specs)

        return mesh, local, places(results), places(roles)

    @custom_partitioning
    def whole(*operands):
        return f((), *operands)

    rule = _rule(roles, results, feature_axes, ndim)
    whole.def_partition(partition, sharding_rule=rule)
    return whole


def _rule(
    roles: tuple, results: tuple, feature_axes: tuple[int, ...], ndim: int
) -> str:
    """Shardy's rule for which axes correspond: "a b, b -> b, b" for channels last."""
    letters = string.ascii_lowercase[:ndim]
    vector = " ".join(letters[axis] for axis in feature_axes)
    ones = (f"one{i}" if i in feature_axes else a for i, a in enumerate(letters))
    spelled = {X: " ".join(letters), VECTOR: vector, WEIGHTS: " ".join(ones)}
    before, after = (", ".join(spelled[r] for r in rs) for rs in (roles, results))
    return f"{before} -> {after}"


def _dividing(operand, mesh) -> tuple:
    """The operand's spec on axes that divide evenly: sums would include any padding."""
    # An operand that was not placed on a mesh has no spec.
    given = getattr(operand.sharding, "spec", ())
    spec = _padded(given, len(operand.shape))
    parts = (prod(mesh.shape[name] for name in as_names(names)) for names in spec)
    return tuple(
        names if size % n == 0 else None
        for names, size, n in zip(spec, operand.shape, parts, strict=True)
    )


def _padded(spec, ndim: int) -> tuple:
    return (*spec, *[None] * (ndim - len(spec)))


def _spec(spec: tuple, role: str, feature_axes: tuple[int, ...]) -> P:
    if role == VECTOR:
        return P(*(spec[axis] for axis in feature_axes))
    if role == WEIGHTS:
        return P(*(None if i in feature_axes else s for i, s in enumerate(spec)))
    return P(*spec)


def _reduced_names(spec: tuple, feature_axes: tuple[int, ...]) -> tuple[str, ...]:
    """The mesh axes that the reduced axes are split over."""
    reduced = _axes.others(feature_axes, len(spec))
    return tuple(name for axis in reduced for name in as_names(spec[axis]))
