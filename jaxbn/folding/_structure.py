"""Programs as values: equal where two programs compute the same in the same way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def structure(program: ClosedJaxpr | Jaxpr) -> tuple:
    """The operations of a program, with numbers for the names of its variables."""
    closed = isinstance(program, ClosedJaxpr)
    jaxpr: Any = program.jaxpr if closed else program
    numbers: dict[Any, int] = {}

    def read(atom: Any) -> Any:
        if isinstance(atom, Literal):
            return _constant(np.asarray(atom.val))
        return numbers.setdefault(atom, len(numbers))

    def made(variable: Any) -> tuple:
        return read(variable), variable.aval.str_short()

    return (
        [made(v) for v in (*jaxpr.constvars, *jaxpr.invars)],
        [
            (
                eqn.primitive.name,
                [read(v) for v in eqn.invars],
                [made(v) for v in eqn.outvars],
                _part(eqn.params),
            )
            for eqn in jaxpr.eqns
        ],
        [read(v) for v in jaxpr.outvars],
        [_constant(c) for c in program.consts] if closed else [],
    )


def _part(value: Any) -> Any:
    """A key for a parameter of an operation, equal for the same meaning."""
    if isinstance(value, (ClosedJaxpr, Jaxpr)):
        return structure(value)
    if isinstance(value, dict):
        return {name: _part(part) for name, part in value.items()}
    if type(value) in (tuple, list):
        return [_part(part) for part in value]
    if isinstance(value, (np.ndarray, jax.Array)):
        return _constant(value)
    # Functions, and JAX's own wrappers of them, are new objects in every trace.
    if callable(value) or hasattr(value, "call_wrapped"):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value


def _constant(value: Any) -> Any:
    """A key, equal for equal constants; a traced one is only equal to itself."""
    if isinstance(value, Tracer):
        return id(value)
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()
