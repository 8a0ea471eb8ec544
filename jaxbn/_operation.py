"""Operations in two forms: one for all platforms, and one for certain platforms.

The form is chosen when a program is lowered for a platform. Before that, all of JAX's
transformations use the form for all platforms.

This is a primitive, not `lax.platform_dependent` in a `jax.custom_jvp`: when JAX
differentiates a `scan`, it keeps the body of such a function, but not its rule.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

# The platforms that may have their own form.
CPU, GPUS = ("cpu",), ("cuda", "rocm")
PLATFORMS = (*CPU, *GPUS)


@dataclass(frozen=True)
class Bound:
    """A function with its first, non-array arguments bound; equal by value."""

    # Not a tuple: JAX 0.8.0 keeps weak references to functions among parameters.

    function: Callable
    static: tuple

    def __call__(self, *operands: Any) -> Any:
        """Calls the function."""
        return self.function(*self.static, *operands)


class Operation(NamedTuple):
    """Both forms: functions of the same arrays that return the same tuple of arrays.

    They must be hashable. `demanded` makes lowering for other platforms an error.
    `mapped` says that the special form is plain JAX: `jax.vmap` maps it as well, not
    the general one alone, and it is traced only where it is lowered. `alone` keeps it
    to programs for one device.
    """

    general: Callable
    special: Callable
    platforms: tuple[str, ...]
    demanded: bool = False
    mapped: bool = False
    alone: bool = False

    def __call__(self, *operands: Any) -> tuple:
        """Runs the operation. Operands may be None."""
        leaves, tree = jax.tree.flatten(operands)
        where = tuple(map(jax.typeof, leaves)), jax.sharding.get_abstract_mesh()
        out = _operation.bind(
            *leaves,
            general=_traced(self.general, tree, *where),
            special=self._kept(tree, where),
            platforms=self.platforms,
            demanded=self.demanded,
            mapped=self.mapped,
            alone=self.alone,
        )
        return tuple(out)

    def _kept(self, tree, where: tuple) -> Any:
        if self.mapped:
            return Bound(_with_tree, (self.special, tree))
        # JAX looks for what needs the devices in the program before it is lowered.
        return _traced(self.special, tree, *where)


def _with_tree(form: Callable, tree, *leaves) -> tuple:
    return form(*jax.tree.unflatten(tree, leaves))


# Compiled programs are cached by the identity of these objects and hold them, so they
# live as long as JAX's own caches.
_forms: WeakValueDictionary[tuple, ClosedJaxpr] = WeakValueDictionary()


def _traced(form: Callable, tree, avals: tuple, mesh) -> ClosedJaxpr:
    """The program of a form, the same object for the same arguments."""
    key = form, tree, avals, mesh
    if (known := _forms.get(key)) is not None:
        return known

    function = Bound(_with_tree, (form, tree))
    return _forms.setdefault(key, jax.make_jaxpr(function)(*avals))


def _as_function(form: Callable) -> Callable:
    return jaxpr_as_fun(form) if isinstance(form, ClosedJaxpr) else form


_operation = Primitive("jaxbn_operation")
_operation.multiple_results = True


@_operation.def_impl
def _impl(*leaves, **params):
    return _run(*leaves, **params)


@functools.partial(
    jax.jit,
    static_argnames=("general", "special", "platforms", "demanded", "mapped", "alone"),
)
def _run(*leaves, **params):
    # Not traced under `jax.disable_jit`, nor when `jax_debug_nans` searches for a NaN.
    if not any(isinstance(leaf, Tracer) for leaf in leaves):
        form = params["special" if params["demanded"] else "general"]
        return _as_function(form)(*leaves)
    return _operation.bind(*leaves, **params)


@_operation.def_abstract_eval
def _abstract(*avals, general: ClosedJaxpr, **params):
    return general.out_avals


def _jvp(primals, tangents, general: ClosedJaxpr, **params):
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def along(*values):
        every = list(primals)
        for i, value in zip(moving, values, strict=True):
            every[i] = value
        return jaxpr_as_fun(general)(*every)

    at, directions = ([array[i] for i in moving] for array in (primals, tangents))
    _, out = jax.jvp(along, at, directions)
    return _operation.bind(*primals, general=general, **params), out


def _transpose(cotangents, *leaves, general: ClosedJaxpr, **params):
    linear = [i for i, leaf in enumerate(leaves) if ad.is_undefined_primal(leaf)]

    def along(*values):
        every = list(leaves)
        for i, value in zip(linear, values, strict=True):
            every[i] = value
        return jaxpr_as_fun(general)(*every)

    avals = [leaves[i].aval for i in linear]
    given = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    found = dict(zip(linear, jax.linear_transpose(along, *avals)(given), strict=True))
    return [found.get(i) for i in range(len(leaves))]


def _batch(leaves, axes, general, special, demanded: bool, mapped: bool, **params):
    if demanded:
        raise NotImplementedError(
            "`implementation` is 'native', but the kernels cannot be used under "
            "`jax.vmap`. Leave it out to have XLA compute there."
        )
    general, special = (
        Bound(_mapped, (form, tuple(axes))) for form in (general, special)
    )
    out = Operation(general, special, mapped=True, **params) if mapped else general
    found = out(*leaves)
    return found, [0] * len(found)


def _mapped(form: Callable, axes: tuple, *leaves) -> tuple:
    return tuple(jax.vmap(_as_function(form), axes)(*leaves))


def _lower(
    ctx,
    *leaves,
    platform: str | None,
    general,
    special,
    platforms,
    demanded,
    mapped,
    alone,
):
    # Of a `jax.shard_map`, each device has a program of its own.
    devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
    chosen = platform in platforms and not (alone and devices > 1)
    if demanded and not chosen:
        raise NotImplementedError(
            "`implementation` is 'native', but the program is lowered for another "
            f"platform ({', '.join(ctx.module_context.platforms)}). Leave it out to "
            "have XLA compute there."
        )
    form = _as_function(special if chosen else general)
    return mlir.lower_fun(form, multiple_results=True)(ctx, *leaves)


ad.primitive_jvps[_operation] = _jvp
ad.primitive_transposes[_operation] = _transpose
batching.primitive_batchers[_operation] = _batch
for _platform in (None, *PLATFORMS):
    _rule = functools.partial(_lower, platform=_platform)
    mlir.register_lowering(_operation, _rule, platform=_platform)
