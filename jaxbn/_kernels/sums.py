"""The functions of `_sums`, by the CPU kernels of jaxbn-cpu, if it is installed.

Derivatives come from `_sums`, and so does everything if the program is not lowered for
a CPU (`operation`).

The kernels need no center for moments. They give the mean and Σw|x − mean|², and then

    Σwδ = n·(mean − center)      Σw|δ|² = Σw|x − mean|² + n·|mean − center|²
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.typing import DTypeLike

from jaxbn import _axes, _devices, _dtypes, _sums
from jaxbn._devices import spread
from jaxbn._operation import CPU, Bound, Operation

FeatureAxes = tuple[int, ...]
DTYPES = (jnp.float32, jnp.bfloat16)
INTERFACE = 1  # That of the jaxbn-cpu that can be used.
SMALL = 4096  # Elements from which on the kernels compute the backward pass.


class Chosen(NamedTuple):
    """Says to use the kernels; if not `demanded`, XLA computes off the CPU."""

    feature_axes: FeatureAxes
    demanded: bool


class FirstPass(NamedTuple):
    """Sums of `x` before a center is known. With XLA, only the mean is used.

    `rest` is the rounding error of the mean, `squares` is Σw|x − mean|².
    """

    mean: jax.Array
    rest: jax.Array
    squares: jax.Array


def choose(
    implementation: str | None,
    x: jax.Array,
    feature_axes: FeatureAxes,
    weights: jax.Array | None = None,
) -> Chosen | None:
    """The kernels, or None for XLA; raises if they are demanded but unavailable."""
    require_implementation(implementation)
    if implementation == "xla":
        return None
    if implementation is None and _has_nothing_to_sum(x, feature_axes, weights):
        return None
    chosen = Chosen(feature_axes, implementation == "native")
    return _unless(_obstacle(x, feature_axes, weights), chosen)


def for_dtypes(chosen: Chosen | None, *dtypes: DTypeLike) -> Chosen | None:
    """The kernels, if they also support the dtypes of further operands."""
    return chosen and _unless(_unknown_dtype(*dtypes), chosen)


def _unless(obstacle: str | None, chosen: Chosen) -> Chosen | None:
    if obstacle and chosen.demanded:
        raise ValueError(
            f"`implementation` is 'native', but the kernels cannot be used: {obstacle} "
            "Leave it out to have XLA compute where they cannot."
        )
    return None if obstacle else chosen


def require_implementation(implementation: str | None) -> None:
    """Raises for an unknown implementation."""
    if implementation not in (None, "xla", "native"):
        raise ValueError(
            f"`implementation` must be None, 'xla' or 'native', got {implementation!r}."
        )


def unless_for_accelerators(chosen: Chosen) -> Chosen | None:
    """The kernels, if they are demanded or JAX's default device is a CPU.

    Making them exact costs one more collective, even where XLA computes.
    """
    return chosen if chosen.demanded or jax.default_backend() == "cpu" else None


def first_pass(
    x: jax.Array,
    shift: jax.Array | None,
    weights: jax.Array | None,
    chosen: Chosen,
) -> FirstPass:
    """Sums from a first read of `x`. With XLA, a given shift serves as the mean.

    Gradients stop here.
    """
    operands = lax.stop_gradient((x, shift, weights))
    return FirstPass(*_operation(chosen, _xla_first_pass, _first_pass)(*operands))


def central_sums(
    x: jax.Array,
    center: jax.Array,
    known: FirstPass,
    weights: jax.Array | None,
    chosen: Chosen,
) -> tuple[jax.Array, jax.Array]:
    """Σwδ and Σw|δ|² about `center`, which is constant in all derivatives."""
    operands = x, lax.stop_gradient(center), known, weights
    return _operation(chosen, _xla_central_sums, _central_sums)(*operands)


def cotangent_sums(
    dy: jax.Array,
    x: jax.Array,
    mean: jax.Array,
    weights: jax.Array | None,
    chosen: Chosen,
) -> tuple[jax.Array, jax.Array]:
    """Σdy and Σdy·(x − mean); x is the mean where it is masked and not finite."""
    forms = _xla_cotangent_sums, _cotangent_sums
    return _backward(chosen, x, *forms)(dy, x, mean, weights)


def input_cotangent(
    dy: jax.Array,
    x: jax.Array,
    mean: jax.Array,
    k: jax.Array,
    c1: jax.Array,
    c0: jax.Array,
    weights: jax.Array | None,
    chosen: Chosen,
) -> jax.Array:
    """`_sums.input_cotangent` for δ = x − mean, in the dtype of `x`."""
    forms = _xla_input_cotangent, _input_cotangent
    return _backward(chosen, x, *forms)(dy, x, mean, k, c1, c0, weights)[0]


def _operation(chosen: Chosen, xla: Callable, native: Callable) -> Operation:
    general, special = (Bound(form, (chosen.feature_axes,)) for form in (xla, native))
    return Operation(general, special, CPU, chosen.demanded)


def _backward(chosen: Chosen, x, xla: Callable, native: Callable) -> Callable:
    """The operation, or XLA's form alone for a small array: one loop, not two calls."""
    known = all(isinstance(n, int) for n in x.shape)
    if known and x.size < SMALL and not chosen.demanded:
        return Bound(xla, (chosen.feature_axes,))
    return _operation(chosen, xla, native)


def _xla_first_pass(axes: FeatureAxes, x, shift, weights) -> FirstPass:
    if shift is None:
        n = _sums.total_weight(x, weights, axes)
        shift = _sums.over(_sums.weighted_sum(x, weights, axes), n)
    return FirstPass(shift, *[jnp.zeros_like(shift)] * 2)


def _first_pass(axes: FeatureAxes, x, shift, weights) -> FirstPass:
    out = (spread.VECTOR,) * 3
    return FirstPass(*_over_devices(_local_moments, axes, x, weights, out=out))


def _xla_central_sums(axes: FeatureAxes, x, center, known, weights):
    return _sums.central_sums(x, center, weights, axes)


def _central_sums(axes: FeatureAxes, x, center, known: FirstPass, weights):
    return _about(center, _sums.total_weight(x, weights, axes), known)


def _xla_cotangent_sums(axes: FeatureAxes, dy, x, mean, weights):
    return _sums.cotangent_sums(_dtypes.widen(dy), _delta(axes, x, mean, weights), axes)


def _cotangent_sums(axes: FeatureAxes, dy, x, mean, weights):
    return _over_devices(_local_cotangent_sums, axes, x, weights, dy, mean)


def _xla_input_cotangent(axes: FeatureAxes, dy, x, mean, k, c1, c0, weights):
    dy, delta = _dtypes.widen(dy), _delta(axes, x, mean, weights)
    dx = _sums.input_cotangent(dy, delta, k, c1, c0, weights, axes)
    return (dx.astype(x.dtype),)


def _input_cotangent(axes: FeatureAxes, dy, x, mean, k, c1, c0, weights):
    rest = dy, mean, k, c1, c0
    out = (spread.X,)
    return _over_devices(_local_input_cotangent, axes, x, weights, *rest, out=out)


def _delta(axes: FeatureAxes, x, mean, weights):
    """x − mean, or 0 where x is masked and not finite."""
    x, mean = _dtypes.widen(x), _axes.expand(mean, axes, x.ndim)
    return _sums.finite(x, weights, mean) - mean


def _unknown_dtype(*dtypes: DTypeLike) -> str | None:
    for dtype in dtypes:
        if dtype not in DTYPES:
            known = ", ".join(str(jnp.dtype(dtype)) for dtype in DTYPES)
            return f"they are for {known}, and there is an array of {dtype}."
    return None


def _obstacle(x, feature_axes: FeatureAxes, weights) -> str | None:
    """Why the kernels cannot be used, as a sentence."""
    if why := _missing() or _unknown_dtype(x.dtype):
        return why
    first, last = feature_axes[0] if feature_axes else 0, len(feature_axes)
    if feature_axes != tuple(range(first, first + last)):
        return f"the feature axes {feature_axes} are not next to each other."
    if not all(isinstance(n, int) for n in x.shape[first:]):
        return "the features, or axes behind them, have a symbolic length."
    if not all(_axes.lengths(x, feature_axes)):
        return "there are no features."
    if weights is not None and any(weights.shape[axis] > 1 for axis in feature_axes):
        return "the weights vary along the features."
    if any(isinstance(n, int) and n > _sums.INT32_MAX for n in x.shape):
        return "an axis is longer than 2³¹ − 1."
    if not spread.is_possible(x):
        return "the axes of the mesh are of different kinds."
    return None


def _has_nothing_to_sum(x, feature_axes: FeatureAxes, weights) -> bool:
    """Whether each feature has one value, of which XLA makes one loop with the rest.

    With one on each device there is a mean, about which only the kernels are exact.
    """
    reduced = _axes.lengths(x, _axes.others(feature_axes, x.ndim))
    one = all(isinstance(n, int) and n == 1 for n in reduced)
    manual = AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    return one and weights is None and not manual


@functools.cache
def _missing() -> str | None:
    """Why there are no kernels. A library that cannot be used is warned of, once."""
    if importlib.util.find_spec("jaxbn_cpu") is None:
        return "jaxbn-cpu is not installed (`pip install ./native` in a checkout)."
    try:
        library = importlib.import_module("jaxbn_cpu")
    except (ImportError, OSError, AttributeError) as error:
        message = f"jaxbn-cpu is installed, but cannot be loaded: {error}."
    else:
        found = getattr(library, "INTERFACE", 0)
        if found == INTERFACE:
            return None
        change = "Update jaxbn-cpu" if found < INTERFACE else "Update jaxbn"
        message = (
            f"jaxbn-cpu {library.__version__} is for another version of jaxbn "
            f"(interface {found}, expected {INTERFACE}). {change}."
        )
    warnings.warn(f"{message} XLA computes.", stacklevel=2)
    return message


def _over_devices(
    f: Callable, axes: FeatureAxes, x, weights, *rest, out=(spread.VECTOR,) * 2
) -> tuple:
    """Runs one of the functions below on each device's part of `x`."""
    roles = [spread.X if a.ndim == x.ndim else spread.VECTOR for a in rest]
    operands = [x, *rest]
    if weights is not None:
        shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
        operands.append(jnp.broadcast_to(weights, shape).astype(jnp.float32))
        roles.append(spread.WEIGHTS)
    local = Bound(f, (axes,))
    return tuple(spread.spread(local, (spread.X, *roles), out, axes)(*operands))


def _local_moments(axes: FeatureAxes, names, x, weights=None) -> tuple:
    kernel = importlib.import_module("jaxbn_cpu").moments
    mean, *rest = kernel(x, weights, feature_axes=axes)
    if not names:
        return mean, *rest
    n = _sums.total_weight(x, weights, axes)
    total, whole = _devices.all_sum((n * mean, n), names)
    center = _sums.over(total, whole)
    known = FirstPass(mean, *rest)
    first, squares = _devices.all_sum(_about(center, n, known), names)
    return center, _sums.over(first, whole), squares


def _local_cotangent_sums(axes: FeatureAxes, names, x, dy, mean, weights=None) -> tuple:
    kernel = importlib.import_module("jaxbn_cpu").cotangents
    sums = kernel(dy, x, mean, weights, feature_axes=axes)
    return tuple(_devices.all_sum(sums, names) if names else sums)


def _local_input_cotangent(
    axes: FeatureAxes, names, x, dy, mean, k, c1, c0, weights=None
) -> tuple:
    kernel = importlib.import_module("jaxbn_cpu").input_cotangent
    return (kernel(dy, x, mean, k, c1, c0, weights, feature_axes=axes),)


def _about(center, n, known: FirstPass) -> tuple[jax.Array, jax.Array]:
    """Σwδ and Σw|δ|² about another center."""
    offset = (known.mean - center) + known.rest
    return n * offset, known.squares + n * jnp.square(offset)
