"""A warning, which fails the build, for every public name that no page documents."""

import importlib
import inspect
import pkgutil

from sphinx.util import logging

import jaxbn

logger = logging.getLogger(__name__)


def public_names() -> set[str]:
    """Of functions and classes of jaxbn, as people write them."""
    modules = ["jaxbn", "jaxbn_cpu"]
    modules += [
        module.name
        for module in pkgutil.walk_packages(jaxbn.__path__, "jaxbn.")
        if not any(part.startswith("_") for part in module.name.split("."))
    ]
    return {name for module in modules for name in _names_of(module)}


def _names_of(module_name: str):
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError:  # jaxbn_cpu, without a compiler
        return
    package = module_name if hasattr(module, "__path__") else None
    for name, value in vars(module).items():
        if name.startswith("_") or not (inspect.isfunction(value) or _is_class(value)):
            continue
        # A package shows what is in it; a module shows what it defines.
        if value.__module__.startswith(package or module_name):
            yield f"{module_name}.{name}"


def _is_class(value) -> bool:
    return inspect.isclass(value)


def _check(app, env) -> None:
    documented = set(env.get_domain("py").objects)
    for name in sorted(public_names() - documented):
        logger.warning("%s is public, and not documented in docs/api", name)


def setup(app) -> dict:
    """After all pages were read."""
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True}
