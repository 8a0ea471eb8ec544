"""A call that XLA's partitioner cannot see into, run on each device's part of `x`.

Left alone, such a call is given whole arrays: the partitioner gathers them. What is
called here, `f(names, *operands)`, makes arrays like `x` of the part of it that is at
hand, or feature vectors: sums over that part, and over the axes of the mesh that are in
`names`.
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

# What an operand or a result is laid out like: `x`, a feature vector, or weights, which
# are like `x` with feature axes of length 1. The first operand is `x`.
X, VECTOR, WEIGHTS = "x", "vector", "weights"


def is_possible(x: jax.Array) -> bool:
    """Whether parts can be told from here: not if only some axes of a mesh are manual,
    or explicit."""
    return len(_axis_types(x)) < 2


def spread(
    f: Callable, roles: tuple, results: tuple, feature_axes: tuple[int, ...]
) -> Callable:
    """`f((), *operands)` for operands that are spread over devices, in any way.

    `f` must be hashable; `roles` and `results` say what each operand and each result is
    laid out like.
    """
    layout = roles, results, feature_axes

    def call(x, *operands):
        kinds = _axis_types(x)
        if AxisType.Manual in kinds:  # Each device has its part already.
            out = f((), x, *operands)
            return [vary_like(array, x, *operands) for array in out]
        if AxisType.Explicit in kinds:
            return _by_type(f, *layout, x, *operands)
        return _partitioned(f, *layout, x.ndim)(x, *operands)

    return call


def _mesh_of(x: jax.Array):
    """That of its type; of what has none, that of the context."""
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
    """On a mesh of explicit axes, the type of `x` says how it is spread."""
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
    """On a mesh of automatic axes, the partitioner asks once it knows."""

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
    """Which axes go together, for Shardy: "a b, b -> b, b" is channels last."""
    letters = string.ascii_lowercase[:ndim]
    vector = " ".join(letters[axis] for axis in feature_axes)
    ones = (f"one{i}" if i in feature_axes else a for i, a in enumerate(letters))
    spelled = {X: " ".join(letters), VECTOR: vector, WEIGHTS: " ".join(ones)}
    before, after = (", ".join(spelled[r] for r in rs) for rs in (roles, results))
    return f"{before} -> {after}"


def _dividing(operand, mesh) -> tuple:
    """The spec of an operand where it divides the axis: padding would be summed."""
    # Of no mesh, it has no spec: nobody placed it.
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
    """The axes of the mesh that the reduced axes are spread over."""
    reduced = _axes.others(feature_axes, len(spec))
    return tuple(name for axis in reduced for name in as_names(spec[axis]))
