"""Makes layers from the fields of Flax modules, for linen and nnx."""

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import canonicalize_dtype
from jax.core import Tracer
from jax.typing import ArrayLike

from jaxbn import _axes, _devices, _dtypes, layers
from jaxbn.layers._made import signature

LATE_MOMENTUM = (
    "`momentum` became a function of the step after the module was made, so that no "
    "step was counted. Pass it to the constructor."
)


# The options that a module passes to its layer, from fields with the same names.
COMMON = ("momentum", "epsilon", "use_scale", "use_bias", "axis_name", "dtype")
COMMON += ("param_dtype", "implementation", "skip_nonfinite")
OPTIONS: dict[Callable[..., layers.Layer], tuple[str, ...]] = {
    layers.standard: (
        "use_fast_variance",
        "unbiased",
        "axis_index_groups",
        "derivatives",
        "example_weight",
        "pseudo_samples",
    ),
    layers.ghost: (
        "group_size",
        "num_groups",
        "strided",
        "update_per_group",
        "use_fast_variance",
        "unbiased",
        "derivatives",
    ),
    layers.renorm: (
        "r_max",
        "d_max",
        "tracks",
        "warm_up_steps",
        "use_fast_variance",
        "axis_index_groups",
        "derivatives",
    ),
    layers.domain: ("num_domains", "shared_affine", "use_fast_variance", "unbiased"),
    layers.conditional: (
        "num_classes",
        "embedding_size",
        "use_fast_variance",
        "unbiased",
        "axis_index_groups",
    ),
    layers.streaming: ("axis_index_groups",),
    layers.in_place: (
        "activation",
        "negative_slope",
        "use_fast_variance",
        "unbiased",
        "axis_index_groups",
    ),
}
# Options that are not fields of a module, because they depend on the input.
OF_THE_INPUT = {"feature_axes", "stats_dtype"}


def layer(
    make: Callable[..., layers.Layer], module: Any, *, exact: bool = False, **given: Any
):
    """Calls `make` with the module's fields; `given` takes precedence over them.

    `exact` computes statistics in two passes, regardless of the module's fields.
    """
    names = {*COMMON, *OPTIONS[make]}
    if missing := set(signature(make).parameters) - names - OF_THE_INPUT:
        raise TypeError(
            f"`{make.__name__}` has options that no module passes: {sorted(missing)}. "
            "Add them to `OPTIONS`, and to the modules as fields."
        )
    options = {name: getattr(module, name) for name in names - set(given)} | given
    if exact and "use_fast_variance" in options:
        options["use_fast_variance"] = False
    if module.accumulate and getattr(module, "update_per_group", False):
        raise ValueError(
            "`accumulate` makes one step of the statistics for several batches, "
            "`update_per_group` several for one. Choose one of them."
        )
    if options.get("axis_name") is None and "axis_index_groups" in options:
        # Flax ignores groups without an axis, so one switch turns synchronization off.
        options["axis_index_groups"] = None
    try:
        return _made(make, **options)
    except TypeError:  # An option, such as an array, cannot be hashed.
        return make(**options)


# Without it, most of the time of a call outside `jax.jit` goes into making the layer.
@functools.lru_cache(maxsize=4096, typed=True)
def _made(make: Callable[..., layers.Layer], **options: Any) -> layers.Layer:
    return make(**options)


def shapes(layer: layers.Layer, features: int | tuple[int, ...]) -> tuple[dict, Any]:
    """The parameters and the state that a layer makes, as shapes."""
    return _shapes(layer, features, jax.config.jax_enable_x64)  # type: ignore


@functools.lru_cache(maxsize=4096)
def _shapes(layer: layers.Layer, features, wide: bool) -> tuple[dict, Any]:
    return jax.eval_shape(lambda: layer.init(features))


def make_hashable(module: Any) -> None:
    """Turns lists in fields into tuples: a module that is static in `jit` is hashed."""
    module.axis, module.axis_name, groups = hashable(
        module.axis, module.axis_name, getattr(module, "axis_index_groups", None)
    )
    if groups is not None:
        module.axis_index_groups = groups


def hashable(axis, axis_name, axis_index_groups) -> tuple:
    """Returns all three with tuples instead of lists."""
    axis = tuple(axis) if isinstance(axis, Iterable) else axis
    return axis, *_devices.hashable(axis_name, axis_index_groups)


def name_call(cls: type) -> None:
    """Gives a class its own `__call__`, so Python's errors name the class."""
    if "__call__" in vars(cls):
        return
    call = inspect.unwrap(cls.__call__)
    own = types.FunctionType(
        call.__code__, call.__globals__, "__call__", call.__defaults__, call.__closure__
    )
    functools.update_wrapper(own, call)
    del own.__wrapped__
    own.__kwdefaults__ = call.__kwdefaults__
    own.__qualname__ = f"{cls.__qualname__}.__call__"
    cls.__call__ = own


def is_training(use_running_average: Any) -> bool:
    """Returns `not use_running_average`; raises if it is traced."""
    if isinstance(use_running_average, Tracer):
        raise TypeError(
            "`use_running_average` must be a Python bool, got a traced value. It "
            "chooses between two programs: close over it, or mark it static "
            "(`jax.jit(..., static_argnames='use_running_average')`)."
        )
    return not use_running_average


def state(kind: type, values: dict[str, jax.Array], like: Any) -> Any:
    """The layer's state. The step is only stored if an option is a function of it."""
    return kind(**{"step": np.zeros(like.step.shape, np.int32)} | values)


def as_dict(**arrays: jax.Array | None) -> dict[str, jax.Array]:
    """The layer's parameters, without the ones that the module lacks."""
    return {name: value for name, value in arrays.items() if value is not None}


def as_inexact(x: Any) -> jax.Array:
    """Converts `x` to an array, and integers to float32, as in Flax."""
    if isinstance(x, (tuple, list, Mapping)):  # JAX would stack it if possible.
        raise TypeError(
            f"`x` must be an array, got a {type(x).__name__} of {len(x)}. If a batch "
            "has several parts, call the model with one of them."
        )
    x = x if isinstance(x, jax.Array) else jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def output_dtype(*arrays: Any, dtype: Any) -> Any:
    """The output's dtype by Flax's rule, which JAX's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        return canonicalize_dtype(*arrays, dtype=dtype)


def feature_axes(axis: _axes.Axes, ndim: int) -> tuple[int, ...]:
    """Returns `axis` as `feature_axes`; duplicates are allowed, as in Flax."""
    each = axis if isinstance(axis, Iterable) else (axis,)
    return tuple(sorted({_axes.canonical(a, ndim, "axis")[0] for a in each}))


def require_features(
    name: str, mean: jax.Array, expected: Any, x: jax.Array, axes: tuple[int, ...]
) -> None:
    """Raises if the features of `x` do not match the module's statistics."""
    shape = np.shape(mean)  # (Exporters replace JAX's functions with others.)
    if shape != expected.shape:
        leading = len(expected.shape) - len(axes)
        raise ValueError(
            f"`{name}` is for features of shape {shape[leading:]}, but `x` "
            f"of shape {x.shape} has {_axes.lengths(x, axes)} along `axis`, {axes}. "
            "Make the module for these features, or name another `axis`."
        )


def like_mean(x: jax.Array, mean: jax.Array, remedy: str) -> jax.Array:
    """Casts `x` to complex if the running mean is complex; raises for the opposite.

    Statistics keep their dtype, so a real mean would lose the imaginary part.
    """
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(mean):
        raise TypeError(
            f"`x` is complex ({x.dtype}) where the running mean is real "
            f"({mean.dtype}): the imaginary part would be lost. {remedy}"
        )
    if jnp.iscomplexobj(mean) and not jnp.iscomplexobj(x):
        return x.astype(_dtypes.complex_like(x.dtype))
    return x


def require_mask(mask: ArrayLike | None, x: jax.Array) -> None:
    """Raises for a mask with an invalid shape or dtype, or an ambiguous shape."""
    if mask is None:
        return
    shape = np.shape(mask)
    index = ", ".join([":"] * len(shape) + ["None"] * (x.ndim - len(shape)))
    by_example = f"`mask[{index}]`"
    if len(shape) == 1 < x.ndim and shape != (1,):
        raise ValueError(
            f"`mask` has shape {shape}, `x` {x.shape}: NumPy aligns it with the "
            f"last axis. For a number per example, write {by_example}; for one per "
            "entry of the last axis, `mask[None]`."
        )
    ends = shape == x.shape[x.ndim - len(shape) :]
    if len(shape) < x.ndim and shape == x.shape[: len(shape)] and not ends:
        raise ValueError(
            f"`mask` has shape {shape}, like the first axes of `x`, {x.shape}, but "
            f"NumPy aligns the last axes. Write {by_example}."
        )
    _axes.weights_like(mask, x, _dtypes.accumulation(x.dtype), "mask")
