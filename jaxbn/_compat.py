"""All that differs between versions of JAX and Flax, and the version that ends it."""

import contextlib
import contextvars
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.extend import core
from jax.extend.core import primitives

VERSION = jax.__version_info__
Kind = TypeVar("Kind", bound=type)


def varying(array: jax.Array) -> frozenset[str]:
    """The `jax.shard_map` axes along which an array varies, according to its type."""
    aval: Any = jax.typeof(array)
    if VERSION < (0, 10):
        return frozenset(aval.vma)
    return frozenset(aval.manual_axis_type.varying)


def as_varying(array: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Marks the type of `array` as varying along these axes."""
    if VERSION < (0, 8):
        return lax.pvary(array, names)  # type: ignore
    return lax.pcast(array, names, to="varying")


def concatenate(vectors: Sequence[jax.Array]) -> jax.Array:
    """The vectors, one after the other."""
    if VERSION >= (0, 8):
        return jnp.concatenate(vectors)
    # Under `jax.shard_map`, its second derivative fails there.
    size, end, whole = sum(v.size for v in vectors), 0, 0
    for vector in vectors:
        end += vector.size
        zero = jnp.zeros((), vector.dtype)
        whole += lax.pad(vector, zero, [(end - vector.size, size - end, 0)])
    return jnp.asarray(whole)


def split(array: jax.Array, ends: Sequence[int], axis: int) -> list[jax.Array]:
    """The parts of an array that end at `ends` along an axis."""
    if VERSION >= (0, 8):
        return jnp.split(array, list(ends)[:-1], axis)
    # It has no derivative there if a part is unused.
    starts = (0, *ends)
    return [
        lax.slice_in_dim(array, start, end, axis=axis)
        for start, end in zip(starts, ends, strict=False)
    ]


def bound_axes() -> tuple:
    """The names of the mapped axes in scope."""
    try:  # No public function of any version includes the axes of vmap.
        from jax._src.core import get_axis_env

        return tuple(get_axis_env().axis_names())
    except (ImportError, AttributeError):
        return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def jaxprs_in(params: dict[str, Any]) -> Iterator[Any]:
    """The programs among the parameters of an operation."""
    if VERSION >= (0, 10):
        yield from core.jaxprs_in_params(params)
        return
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def is_dropped(variable: Any) -> bool:
    """Whether a program ignores this output of an operation."""
    if VERSION >= (0, 10):
        return isinstance(variable, core.DropVar)
    return type(variable).__name__ == "DropVar"


def is_remat(equation: Any) -> bool:
    """Whether an equation of a program is `jax.checkpoint`."""
    if VERSION >= (0, 8):
        return equation.primitive is primitives.remat_p
    return equation.primitive.name == "remat2"


def unnamed(program: Any, inputs: int, outputs: int) -> Any:
    """What is known of where a program is from, without the names of its variables."""
    if VERSION >= (0, 8):
        return program.debug_info.with_unknown_names()
    none = {"arg_names": ("",) * inputs, "result_paths": ("",) * outputs}
    return program.debug_info._replace(**none)


class _Context:
    """What `jax.make_user_context` makes, for JAX before 0.7.2.

    JAX retraces functions where the metadata of operations differ.
    """

    def __init__(self, default: Any):
        self._variable = contextvars.ContextVar("jaxbn", default=default)

    @property
    def value(self) -> Any:
        return self._variable.get()

    @contextlib.contextmanager
    def __call__(self, value: Any) -> Iterator[None]:
        from jax.experimental.xla_metadata import set_xla_metadata

        token = self._variable.set(value)
        try:
            with set_xla_metadata(jaxbn=repr(value)):
                yield
        finally:
            self._variable.reset(token)


def user_context(default: Any) -> Any:
    """A value for the length of a context; functions are retraced where it differs."""
    return _Context(default) if VERSION < (0, 7, 2) else jax.make_user_context(default)


def exportable(name: str) -> Callable[[Kind], Kind]:
    """Lets `jax.export` serialize functions of a named tuple, under this name."""

    def register(kind: Kind) -> Kind:
        with contextlib.suppress(ValueError):  # A reloaded module registers it again.
            export.register_namedtuple_serialization(kind, serialized_name=name)
        return kind

    return register


def assign(variable: Any, value: jax.Array) -> None:
    """Gives an nnx variable a value whose dtype may be another than it had."""
    if hasattr(variable, "set_value"):
        variable.set_value(value)  # `variable[...] = value` would cast it.
    else:  # Flax before 0.12.1
        variable[...] = value


def require_flax(name: str, *least: int) -> None:
    """Refuses a Flax that is too old for the module `name`."""
    found = importlib.metadata.version("flax")
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < least:
        needed = ".".join(map(str, least))
        raise ImportError(
            f"`{name}` needs flax {needed} or later, got {found}. Install it "
            f"(`pip install -U 'flax>={needed}'`), or use `jaxbn.linen` or "
            "`jaxbn.layers`, which work with this one."
        )


def taken(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function of this version of Flax has (all of 0.12.6 has)."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in known}
