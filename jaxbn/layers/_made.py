"""How a layer was made, which determines its equality and its repr."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jaxbn import _axes, _dtypes, _kernels
from jaxbn._batch_norm import require_derivatives
from jaxbn._normalize import checked_epsilon
from jaxbn._running_stats import require_bool, require_momentum
from jaxbn.layers._fast_variance import require_fast_variance

signature = functools.cache(inspect.signature)
REQUIRE = {
    "momentum": require_momentum,
    "epsilon": checked_epsilon,
    "derivatives": require_derivatives,
    "implementation": _kernels.require_implementation,
    "feature_axes": lambda axes: _axes.integers(axes, "feature_axes"),
    "use_fast_variance": require_fast_variance,
    "dtype": lambda dtype: dtype is None or _dtypes.checked("dtype", dtype),
    "param_dtype": functools.partial(_dtypes.checked, "param_dtype"),
    "stats_dtype": functools.partial(_dtypes.checked, "stats_dtype"),
}


class Made:
    """The function that made a layer, and its options.

    Equal by value, even if options are arrays. Unpickling makes it again.
    """

    def __init__(self, make: Callable[..., Any], options: dict[str, Any]):
        self.make = make
        self.options = {name: _frozen(value) for name, value in options.items()}
        for name, value in options.items():
            REQUIRE.get(name, _require_bool(make, name))(value)
        self.functions = inspect.unwrap(make)(**self.options)
        for name, function in self.functions._asdict().items():
            function.__qualname__ = f"{make.__name__}.{name}"  # For error messages.

    @functools.cached_property
    def _key(self) -> tuple:
        all_ = signature(self.make).bind(**self.options)
        all_.apply_defaults()
        return self.make, tuple(
            _comparable(*option) for option in all_.arguments.items()
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Made) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self):
        return Made, (self.make, self.options)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{self.make.__name__}({given})"


@dataclasses.dataclass(frozen=True, repr=False)
class Function:
    """One of a layer's functions, equal for layers with equal options."""

    made: Made
    __name__: str

    @_dtypes.mixing
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable:
        return getattr(self.made.functions, self.__name__)

    def __repr__(self) -> str:
        return f"{self.made!r}.{self.__name__}"


def _require_bool(make: Callable[..., Any], name: str) -> Callable[[Any], None]:
    """A check that raises for non-boolean values of options with a boolean default."""

    def require(value: Any) -> None:
        default = signature(make).parameters[name].default
        if isinstance(default, bool):
            require_bool(name, value)

    return require


def _frozen(value: Any) -> Any:
    """Protects `value` from later changes: lists become tuples, arrays are copied."""
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return tuple(map(_frozen, value))
    if isinstance(value, np.bool_):
        return bool(value)
    return np.array(value) if isinstance(value, np.ndarray) else value


def _comparable(name: str, value: Any) -> Any:
    """A hashable key that is equal for options with the same meaning."""
    if name.endswith("dtype") and value is not None:
        return np.dtype(value)
    if isinstance(value, tuple):
        return tuple(_comparable("", v) for v in value)
    if isinstance(value, (np.ndarray, jax.Array)) and not isinstance(value, Tracer):
        array = np.asarray(value)
        return array.dtype, array.shape, array.tobytes()
    try:
        hash(value)
    except TypeError:
        return id(value)  # The options hold it, so no other value has this id.
    return type(value), value
