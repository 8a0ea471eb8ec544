"""Docstrings, which are written for a terminal, as reStructuredText.

formulas    indented blocks, which would be read as quotations: of fixed width
tables      Markdown's: lists of lists
`code`      between two backquotes, and |x| outside of it no substitution
"""

import inspect
import itertools
import re


def _translate(app, what, name, obj, options, lines: list[str]) -> None:
    found: list[str] = []
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        block = list(group)
        if blank or any(">>>" in line for line in block):
            found += block
        elif block[0].startswith("    ") and _at_margin(found):
            found += ["", ".. code-block:: text", "", *block]
        elif block[0].startswith("| "):
            found += _list_table(block)
        else:
            found += _escaped("\n".join(block)).split("\n")
    lines[:] = found


def _at_margin(before: list[str]) -> bool:
    """Whether the last line that is not blank starts at the margin."""
    text = [line for line in before if line.strip()]
    return bool(text) and not text[-1].startswith((" ", ".. "))


def _list_table(block: list[str]) -> list[str]:
    rows = [line.strip("| ").split(" | ") for line in block if "---" not in line]
    width = max(map(len, rows))
    found = ["", ".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        cells = [_escaped(cell.strip()) for cell in [""] * (width - len(row)) + row]
        found.append(f"   * - {cells[0]}".rstrip())
        found += [f"     - {cell}".rstrip() for cell in cells[1:]]
    return [*found, ""]


def _escaped(text: str) -> str:
    """The text with code as such, and with bars outside of code as themselves."""
    parts = re.split(r"`([^`]+)`", text)
    return "".join(
        f"``{part}``" if i % 2 else part.replace("|", r"\|")
        for i, part in enumerate(parts)
    )


class _Name:
    """A default value that prints as its name."""

    def __init__(self, value):
        self.name = getattr(value, "__name__", repr(value))

    def __repr__(self) -> str:
        return self.name


def _constructor(app, what, name, obj, options, signature, returns):
    """The arguments of `__init__`, where nnx' metaclass has hidden them."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    _, *parameters = inspect.signature(obj.__init__).parameters.values()
    bare = [p.replace(annotation=p.empty) for p in parameters]
    named = [p.replace(default=_Name(p.default)) if _is_object(p) else p for p in bare]
    return str(inspect.Signature(named)), returns


def _is_object(parameter: inspect.Parameter) -> bool:
    """Whether the default is a function or a class, which print with their address."""
    default = parameter.default
    return callable(default) and default is not parameter.empty


def setup(app) -> dict:
    """Before napoleon, which comes at the usual priority of 500."""
    app.connect("autodoc-process-signature", _constructor)
    app.connect("autodoc-process-docstring", _translate, priority=400)
    return {"parallel_read_safe": True}
