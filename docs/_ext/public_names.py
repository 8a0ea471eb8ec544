"""Public names: a table of all, and a warning for each that no page documents.

The warning fails the build. The directive `public-names` makes the table.
"""

import importlib
import inspect
import itertools
import pkgutil

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
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


class Names(Directive):
    """Lists all public names by module, as links with a summary."""

    def run(self) -> list:
        """Leaves the tables to autosummary."""
        text: list[str] = []
        by_module = itertools.groupby(
            sorted(public_names(), key=_parts), lambda name: _parts(name)[0]
        )
        for module, names in by_module:
            text += [
                f".. rubric:: {module}",
                "",
                ".. autosummary::",
                "   :nosignatures:",
            ]
            text += ["", *(f"   ~{name}" for name in names), ""]
        node = nodes.Element()
        self.state.nested_parse(StringList(text), self.content_offset, node)
        return node.children


def _parts(name: str) -> tuple[str, str]:
    module, _, own = name.rpartition(".")
    return module, own


def _check(app, env) -> None:
    documented = set(env.get_domain("py").objects)
    for name in sorted(public_names() - documented):
        logger.warning("%s is public, and not documented in docs/api", name)


def setup(app) -> dict:
    """After all pages were read."""
    app.add_directive("public-names", Names)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True}
