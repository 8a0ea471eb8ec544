"""Names in docstrings that link to what they name."""

import functools
import re

from public_names import public_names

# Where a short name is looked for first, after the module that it is used in.
ORDER = ("jaxbn", "jaxbn.layers", "jaxbn.population", "jaxbn.folding", "jaxbn.linen")
# Other projects, whose names resolve where their inventories can be fetched.
OTHERS = re.compile(r"(jax|jnp|flax|optax|numpy|lax)\.[\w.]+")
ALIASES = {"jnp.": "jax.numpy.", "lax.": "jax.lax."}


def linked(code: str, module: str) -> str:
    """Code in a docstring of a module, as a link if it is a name that is known."""
    name = code.removesuffix("()")
    target = _target(name, module)
    return f"``{code}``" if target is None else f":py:obj:`{code} <{target}>`"


def _target(name: str, module: str) -> str | None:
    if not re.fullmatch(r"[\w.]+", name):
        return None
    for prefix in (module, *ORDER):
        if f"{prefix}.{name}" in _all():
            return f"{prefix}.{name}"
    if name in _all():
        return name
    if OTHERS.fullmatch(name):
        for short, full in ALIASES.items():
            if name.startswith(short):
                return full + name.removeprefix(short)
        return name
    return None


@functools.cache
def _all() -> set[str]:
    return public_names()
