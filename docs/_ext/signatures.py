"""Signatures with the types that users know, and defaults that can be read."""

import inspect
import types
import typing

import jax
from flax.typing import Dtype, Initializer
from jax.typing import ArrayLike, DTypeLike

from jaxbn import _axes, _devices
from jaxbn._running_stats import Momentum
from jaxbn.layers._renorm import Limit

# Unions that have a name. Equal unions have one name.
NAMES = [
    (DTypeLike | None, "~jax.typing.DTypeLike | None"),
    (DTypeLike, "~jax.typing.DTypeLike"),
    (Dtype | None, "~jax.typing.DTypeLike | None"),
    (Dtype, "~jax.typing.DTypeLike"),
    (Momentum, "~jax.typing.ArrayLike | Callable"),
    (Limit, "~jax.typing.ArrayLike | Callable"),
    (ArrayLike | str | None, "~jax.typing.ArrayLike | str | None"),
    (ArrayLike | None, "~jax.typing.ArrayLike | None"),
    (ArrayLike, "~jax.typing.ArrayLike"),
    (jax.Array | None, "~jax.Array | None"),
    (jax.Array, "~jax.Array"),
    (Initializer, "~jax.nn.initializers.Initializer"),
    (_axes.Axes, "int | tuple[int, ...]"),
    (_devices.AxisName | None, "str | tuple[str, ...] | None"),
    (_devices.AxisName, "str | tuple[str, ...]"),
    (_devices.Groups | None, "Sequence[Sequence[int]] | None"),
]
HIDDEN = ("self", "parent")  # `parent` is a field that linen sets itself.


class _Text:
    """A value that prints as given."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(app, what, name, obj, options, signature, returns):
    own = (getattr(obj, "__module__", None) or "").startswith("jaxbn")
    if what not in ("function", "class", "method") or not own:
        return None
    made = obj.__init__ if what == "class" else obj
    if what == "class" and hasattr(obj, "_fields"):  # A named tuple.
        made = obj.__new__
    try:
        found = inspect.signature(made)
    except (TypeError, ValueError):
        return None
    skipped = (*HIDDEN, "_cls", "cls")
    shown = [_shown(p) for p in found.parameters.values() if p.name not in skipped]
    result = "" if what == "class" else _type(found.return_annotation)
    return str(inspect.Signature(shown)), result


def _shown(parameter: inspect.Parameter) -> inspect.Parameter:
    type_, default = _type(parameter.annotation), parameter.default
    if parameter.kind is parameter.VAR_KEYWORD:
        type_ = ""
    if type_:
        parameter = parameter.replace(annotation=_Text(type_))
    else:
        parameter = parameter.replace(annotation=parameter.empty)
    if default is parameter.empty:
        return parameter
    return parameter.replace(default=_Text(_default(default)))


def _default(value) -> str:
    if isinstance(value, types.MappingProxyType):
        return repr(dict(value))
    if "Sentinel" in type(value).__name__:
        return "None"
    if callable(value):
        return getattr(value, "__name__", repr(value))
    return repr(value)


def _type(annotation) -> str:
    """A type as a reader knows it; empty for what has no short name."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return ""
    for known, name in NAMES:
        if annotation == known:
            return name
    if annotation is None or annotation is type(None):
        return "None"
    if annotation is typing.Any:
        return "Any"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        return " | ".join(filter(None, map(_type, arguments)))
    if arguments and origin is not None and origin.__module__ != "collections.abc":
        return f"{origin.__name__}[{', '.join(map(_argument, arguments))}]"
    found = origin or annotation
    name = getattr(found, "__name__", "")
    return _public(found) if hasattr(found, "_fields") else name


def _argument(argument) -> str:
    return "..." if argument is ... else _type(argument) or "Any"


def _public(kind: type) -> str:
    """Where users find a class, which may be defined elsewhere."""
    package = ".".join(p for p in kind.__module__.split(".") if not p.startswith("_"))
    return f"~{package}.{kind.__name__}"


def setup(app) -> dict:
    """For every object that autodoc documents."""
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True}
