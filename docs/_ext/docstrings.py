"""Docstrings, which are written for a terminal, as reStructuredText.

formulas    indented blocks, which would be read as quotations: of fixed width
tables      Markdown's: lists of lists
`code`      between two backquotes, and a link if it is a name; |x| is no substitution
Returns     never split at a colon
(others)    a sentence
"""

import inspect
import itertools
import re

from names import linked


def _translate(app, what, name, obj, options, lines: list[str]) -> None:
    module = getattr(obj, "__module__", None) or ""
    module = ".".join(p for p in module.split(".") if not p.startswith("_"))
    lines[:] = _without_others(_described(lines))
    own = _own_names(obj)
    found: list[str] = []
    for blank, group in itertools.groupby(lines, key=lambda line: not line.strip()):
        block = list(group)
        if blank or any(">>>" in line for line in block):
            found += block
        elif block[0].startswith("    ") and _at_margin(found):
            found += ["", ".. code-block:: text", "", *block]
        elif block[0].startswith("| "):
            found += _list_table(block, module, own)
        else:
            found += _escaped("\n".join(block), module, own).split("\n")
    lines[:] = found


def _own_names(obj) -> set[str]:
    """The names of arguments and fields, which are not links."""
    try:
        return set(inspect.signature(obj).parameters)
    except (TypeError, ValueError):
        return set()


def _at_margin(before: list[str]) -> bool:
    """Whether the last line that is not blank starts at the margin."""
    text = [line for line in before if line.strip()]
    return bool(text) and not text[-1].startswith((" ", ".. "))


def _list_table(block: list[str], module: str, own: set[str]) -> list[str]:
    rows = [line.strip("| ").split(" | ") for line in block if "---" not in line]
    width = max(map(len, rows))
    found = ["", ".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        cells = [
            _escaped(cell.strip(), module, own)
            for cell in [""] * (width - len(row)) + row
        ]
        found.append(f"   * - {cells[0]}".rstrip())
        found += [f"     - {cell}".rstrip() for cell in cells[1:]]
    return [*found, ""]


def _escaped(text: str, module: str, own: set[str]) -> str:
    """The text with code as such, and with bars outside of code as themselves."""

    def code(part: str) -> str:
        return f"``{part}``" if part in own else linked(part, module)

    parts = re.split(r"`([^`]+)`", text)
    return "".join(
        code(part) if i % 2 else part.replace("|", r"\|")
        for i, part in enumerate(parts)
    )


def _described(lines: list[str]) -> list[str]:
    """Returns that are a sentence with a colon, which napoleon takes for a type."""
    found = list(lines)
    for i, line in enumerate(lines[:-1]):
        if line.strip() in ("Returns:", "Yields:"):
            text = lines[i + 1]
            indent = len(text) - len(text.lstrip())
            found[i + 1] = f"{text[:indent]}: {text[indent:]}"
    return found


def _without_others(lines: list[str]) -> list[str]:
    """A sentence in place of an argument or attribute that is called "(others)"."""
    found: list[str] = []
    rest: list[str] = []
    for line in lines:
        if line.strip().startswith("(others):"):
            text = line.strip().removeprefix("(others):").strip()
            rest = ["", f"The others are {text[0].lower()}{text[1:]}"]
        elif rest and line.strip() and not line.startswith(" "):
            found += [*rest, "", line]
            rest = []
        else:
            found.append(line)
    return found + rest


def setup(app) -> dict:
    """Before napoleon, which comes at the usual priority of 500."""
    app.connect("autodoc-process-docstring", _translate, priority=400)
    return {"parallel_read_safe": True}
