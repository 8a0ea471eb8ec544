"""Uses jaxbn's batch norm in models that are built with Flax's."""

import dataclasses
import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import flax.linen as nn

from jaxbn import _compat
from jaxbn._flax import fields
from jaxbn.linen._batch_norm import BatchNorm

# Fields that the call sets, or that determine the variables.
FIXED = {"parent", "name", "use_running_average", "use_bias", "use_scale"}
FIXED |= {"param_dtype", "bias_init", "scale_init"}
FIELDS = {f.name for f in dataclasses.fields(BatchNorm)} - FIXED

# The overrides in force, or None. JAX retraces functions when they change.
_overrides = _compat.user_context(None)


def replacing(**overrides: Any) -> "Context":
    """Makes a context in which every `flax.linen.BatchNorm` computes like jaxbn's.

    The model keeps its paths, variables and initial values, and third-party models work
    too. The context applies to `init` and `apply`, under the transforms of Flax and
    JAX, but only while they are traced: a function that `jax.jit` has traced outside is
    traced again inside, and vice versa. Enter other interceptors of
    `nn.intercept_methods` before this context, because interceptors entered inside do
    not see the calls of batch norms.

    Args:
      **overrides: Fields of `jaxbn.linen.BatchNorm` that take precedence over the
        fields of the model's layers: `axis_name="data"`, `use_fast_variance=False`.
        They must be hashable. They also apply to layers that already are
        `jaxbn.linen.BatchNorm`, but not to jaxbn's other layers. In nested contexts,
        the fields of both apply, and the inner ones take precedence.

    Returns:
      A context manager.

    Raises:
      TypeError: `overrides` has an entry that is not a field, is not hashable, or
        cannot change without changing a layer's variables. While tracing: a layer
        belongs to an unknown subclass of Flax's, which may compute something else.

    Example:
      >>> import flax.linen as nn, jax, jaxbn, jax.numpy as jnp
      >>> net = nn.BatchNorm(use_running_average=False, momentum=0.5)
      >>> x = jnp.array([[1.0], [jnp.nan]])
      >>> mask = jnp.array([[True], [False]])
      >>> with jaxbn.linen.replacing(momentum=0.0):
      ...     variables = net.init(jax.random.key(0), x)
      ...     y, new = net.apply(variables, x, mask=mask, mutable=["batch_stats"])
      >>> print(new["batch_stats"]["mean"])
      [1.]

    References:
      https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/module.html#flax.linen.intercept_methods
    """
    return Context(_checked(overrides))


def replace_batch_norm(module: nn.Module, **overrides: Any) -> nn.Module:
    """Wraps a model so that every `flax.linen.BatchNorm` computes like jaxbn's.

    The wrapper calls the model inside `replacing`, so no other code needs to change,
    neither initialization nor `jit` nor calls.

    Args:
      module: A model, made outside or inside another module, but not returned by
        `bind`. If a submodule is also used outside of the model, it is a separate
        module there.
      **overrides: As for `replacing`.

    Returns:
      A module with the call, methods and fields of `module`, and with variables at the
      same paths, so it takes the same checkpoints. Its methods can be called by name
      (`apply(..., method="encode")`), on the module itself, or through the class.

    Raises:
      TypeError: `module` is not a linen module, or as for `replacing`.
      ValueError: `module` is bound to variables.

    Example:
      >>> import flax.linen as nn, jax, jaxbn, jax.numpy as jnp
      >>> net = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
      >>> x = jnp.ones((4, 3))
      >>> variables = net.init(jax.random.key(0), x)
      >>> ours = jaxbn.linen.replace_batch_norm(net, use_fast_variance=False)
      >>> bool(jnp.allclose(ours.apply(variables, x), net.apply(variables, x)))
      True

    References:
      https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/module.html#flax.linen.intercept_methods
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"`module` must be a `flax.linen.Module`, got {type(module).__name__}. For "
            "nnx there is `jaxbn.nnx.replace_batch_norm`."
        )
    given = _checked(overrides)
    made = Replaced(Unbound(module) if module.scope is None else module, given)
    if module.scope is not None and made.scope is None:
        raise ValueError(
            f"`module`, {type(module).__name__}, is bound to variables. Pass the "
            "module itself, and bind what `replace_batch_norm` returns."
        )
    return made


class Context:
    """Puts the interceptor and the overrides in force each time it is entered."""

    def __init__(self, overrides: tuple):
        self.overrides = overrides
        self.entered: list[ExitStack] = []

    def __enter__(self) -> None:
        """Adds its overrides to the overrides in force."""
        merged = dict(_overrides.value or ()) | dict(self.overrides)
        with ExitStack() as stack:
            stack.enter_context(_overrides(tuple(sorted(merged.items()))))
            stack.enter_context(nn.intercept_methods(_intercept))
            self.entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        """Restores the previous overrides."""
        self.entered.pop().__exit__(*error)


class Unbound:
    """Hides a module, so Flax does not make it a child of the module that holds it."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unbound) and self.module == other.module

    def __hash__(self) -> int:
        return hash(self.module)

    def __repr__(self) -> str:
        return repr(self.module)


class Replaced(nn.Module):
    """A module that calls another one, in its own scope, inside `replacing`.

    `nn.share_scope` would put the variables of the other one in this scope, but modules
    inside would still have the keys and paths of a child.
    """

    module: nn.Module | Unbound
    overrides: tuple[tuple[str, Any], ...]

    @nn.nowrap
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        return self._call_method("__call__", *args, **kwargs)

    @nn.nowrap
    def _call_method(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        inner = vars(self).get("_inner")
        if inner is None:
            inner = self.module
            if isinstance(inner, Unbound):
                inner = inner.module.clone(parent=self.scope)
            object.__setattr__(self, "_inner", inner)
        with Context(self.overrides):
            return getattr(inner, method)(*args, **kwargs)

    @nn.nowrap
    def _call_wrapped_method(self, fun, args, kwargs):
        """Calls a method of the module's class that got this module as `self`.

        This is how `apply(..., method=Model.encode)` calls it.
        """
        if fun.__name__ == "setup":  # This module's own.
            return super()._call_wrapped_method(fun, args, kwargs)
        return self._call_method(fun.__name__, *args, **kwargs)

    @nn.nowrap
    def __getattr__(self, name: str) -> Any:
        """Methods and fields of the module; for submodules, Flax's own lookup."""
        inner = vars(self).get("module")
        inner = inner.module if isinstance(inner, Unbound) else inner
        value = inspect.getattr_static(inner, name, inner)
        if name.startswith("_") or isinstance(value, nn.Module):
            return super().__getattr__(name)
        if not inspect.isfunction(value) or hasattr(value, "nowrap"):
            return getattr(inner, name)

        def call(self, /, *args: Any, **kwargs: Any) -> Any:
            return self._call_method(name, *args, **kwargs)

        return types.MethodType(call, self)


def _intercept(call, args, kwargs, context) -> Any:
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, nn.BatchNorm):
        return call(*args, **kwargs)
    overrides = dict(_overrides.value)
    if isinstance(module, BatchNorm):
        with _lent(module, type(module), overrides):
            return call(*args, **kwargs)
    if type(module) is not nn.BatchNorm:
        raise TypeError(
            f"{type(module).__qualname__} at {'/'.join(module.path)!r} is a subclass "
            "of `flax.linen.BatchNorm` that may compute something else. Derive it from "
            "`jaxbn.linen.BatchNorm` instead."
        )
    with _lent(module, BatchNorm, overrides):
        return _called(module, *args, **kwargs)


def _called(module: Any, x: Any, use_running_average=None, *, mask=None) -> Any:
    """`BatchNorm.__call__`, when Flax is already inside the call."""
    return module._run(x, use_running_average, mask)


@contextmanager
def _lent(module: nn.Module, kind: type, overrides: Mapping[str, Any]) -> Iterator:
    """Changes the class and fields of the module for the duration of a call.

    It remains the module that Flax has bound to its scope and called.
    """
    kept = {name: vars(module)[name] for name in overrides if name in vars(module)}
    own = type(module)
    object.__setattr__(module, "__class__", kind)
    try:
        for name, value in overrides.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name in overrides:
            vars(module).pop(name, None)
        for name, value in kept.items():
            object.__setattr__(module, name, value)
        object.__setattr__(module, "__class__", own)


def _checked(overrides: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    unknown = sorted(set(overrides) - FIELDS)
    if unknown:
        raise TypeError(
            f"`overrides` has {unknown}, which cannot be changed in the layers of a "
            f"model. These fields of `jaxbn.linen.BatchNorm` can: {sorted(FIELDS)}."
        )
    lists = ("axis", "axis_name", "axis_index_groups")
    hashable = fields.hashable(*(overrides.get(name) for name in lists))
    given = {n: v for n, v in zip(lists, hashable, strict=True) if n in overrides}
    for name, value in (made := {**overrides, **given}).items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"`{name}` must be hashable, got {value!r}: JAX keeps programs by the "
                "overrides they were traced with. Pass a number, or a function of the "
                "step."
            ) from None
    return tuple(sorted(made.items()))
