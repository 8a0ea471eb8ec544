"""jaxbn's arithmetic in models that are made of Flax's batch norm."""

import dataclasses
import types
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import flax.linen as nn

from jaxbn import _flax_fields
from jaxbn.linen._batch_norm import BatchNorm

FIELDS = {f.name for f in dataclasses.fields(BatchNorm)} - {"parent", "name"}


def replace_batch_norm(**overrides: Any) -> AbstractContextManager[None]:
    """A context in which every `flax.linen.BatchNorm` computes as jaxbn's.

    Paths, variables and initial values stay those of the model, a third party's
    included. It holds for `init` and `apply`, and inside Flax's and JAX's transforms,
    but only while they trace: a function that `jax.jit` has traced before keeps what it
    has, and one that it traces inside keeps jaxbn's. Where that may happen, make the
    model with `replaced`.

    Args:
      **overrides: Fields of `jaxbn.linen.BatchNorm` that take precedence over those of
        the model's layers: `axis_name="data"`, `use_fast_variance=False`. Layers that
        are jaxbn's already take them as well. Of several contexts, one in the other,
        the inner one counts.

    Returns:
      A context manager.

    Raises:
      TypeError: `overrides` has what is no field. While tracing: a layer is of a
        subclass of Flax's that is not known here, which may compute something else.

    Example:
      >>> import flax.linen as nn, jax, jaxbn, jax.numpy as jnp
      >>> net = nn.BatchNorm(use_running_average=False, momentum=0.5)
      >>> x = jnp.array([[1.0], [jnp.nan]])
      >>> mask = jnp.array([[True], [False]])
      >>> with jaxbn.linen.replace_batch_norm(momentum=0.0):
      ...     variables = net.init(jax.random.key(0), x)
      ...     y, new = net.apply(variables, x, mask=mask, mutable=["batch_stats"])
      >>> print(new["batch_stats"]["mean"])
      [1.]

    References:
      https://flax-linen.readthedocs.io/en/latest/api_reference/flax.linen/module.html#flax.linen.intercept_methods
    """
    return nn.intercept_methods(partial(_intercept, _checked(overrides)))


def replaced(module: nn.Module, **overrides: Any) -> nn.Module:
    """A model in which every `flax.linen.BatchNorm` computes as jaxbn's.

    It wraps a model, and calls it in its place inside `replace_batch_norm`. Being a
    module of its own, it is traced on its own, so that it is safe under `jax.jit`.

    Args:
      module: A model, made outside or inside another module.
      **overrides: As for `replace_batch_norm`.

    Returns:
      A module with the call and the methods of `module`, whose variables are at the
      paths where `module` has them: it takes the same checkpoints.

    Raises:
      TypeError: `module` is no linen module, or as for `replace_batch_norm`.

    Example:
      >>> import flax.linen as nn, jax, jaxbn, jax.numpy as jnp
      >>> net = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
      >>> x = jnp.ones((4, 3))
      >>> variables = net.init(jax.random.key(0), x)
      >>> ours = jaxbn.linen.replaced(net, use_fast_variance=False)
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
    given = tuple(sorted(_checked(overrides).items()))
    return Replaced(Unbound(module) if module.scope is None else module, given)


class Unbound:
    """A module that Flax is not to take for a child of the module that holds it."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unbound) and self.module == other.module

    def __hash__(self) -> int:
        return hash(self.module)

    def __repr__(self) -> str:
        return repr(self.module)


class Replaced(nn.Module):
    """A module that calls another one, in its own scope, by `replace_batch_norm`."""

    module: nn.Module | Unbound
    overrides: tuple[tuple[str, Any], ...]

    def setup(self):
        """Takes the place of the module in the tree of variables.

        `nn.share_scope` would do so for variables, but leave the keys and the paths of
        a child to what is inside the module.
        """
        inner = self.module
        if isinstance(inner, Unbound):
            inner = inner.module.clone(parent=self.scope)
        object.__setattr__(self, "bound", inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module."""
        with replace_batch_norm(**dict(self.overrides)):
            return self.bound(*args, **kwargs)

    def call_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the module."""
        with replace_batch_norm(**dict(self.overrides)):
            return getattr(self.bound, name)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """The methods of the module."""
        inner = vars(self).get("module")
        inner = inner.module if isinstance(inner, Unbound) else inner
        if name.startswith("_") or not callable(getattr(type(inner), name, None)):
            return super().__getattr__(name)

        def method(self, *args: Any, **kwargs: Any) -> Any:
            return self.call_method(name, *args, **kwargs)

        return types.MethodType(method, self)


def _intercept(overrides: Mapping[str, Any], call, args, kwargs, context) -> Any:
    module = context.module
    if context.method_name != "__call__" or not isinstance(module, nn.BatchNorm):
        return call(*args, **kwargs)
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
    """`BatchNorm.__call__`, of which Flax is already inside."""
    return module._run(x, use_running_average, mask)


@contextmanager
def _lent(module: nn.Module, kind: type, overrides: Mapping[str, Any]) -> Iterator:
    """Makes the module one of another class and other fields, for a call.

    It stays the module that Flax has bound to its scope and called.
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
            object.__delattr__(module, name)
        for name, value in kept.items():
            object.__setattr__(module, name, value)
        object.__setattr__(module, "__class__", own)


def _checked(overrides: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(overrides) - FIELDS)
    if unknown:
        raise TypeError(
            f"`overrides` has {unknown}, which are no fields of "
            f"`jaxbn.linen.BatchNorm`. It has {sorted(FIELDS)}."
        )
    lists = ("axis", "axis_name", "axis_index_groups")
    given = _flax_fields.hashable(*(overrides.get(name) for name in lists))
    hashable = {n: v for n, v in zip(lists, given, strict=True) if n in overrides}
    return {**overrides, **hashable}
