"""Results as JSON, and as Markdown."""

import json
import pathlib
from collections.abc import Iterable
from typing import Any

from _machine import machine, versions

RESULTS = pathlib.Path(__file__).parent / "results"


def write(path: pathlib.Path, options: dict[str, Any], **found) -> None:
    """Stores what was found, with what on and what with; a case is a line."""
    head = {"machine": machine(), "versions": versions(), "options": options}
    text = ",\n".join(
        f"{json.dumps(k)}: {_lines(v)}" for k, v in (head | found).items()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n{text}\n}}\n")


def _lines(value: Any) -> str:
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    items = (json.dumps(item, ensure_ascii=False) for item in value)
    return "[\n " + ",\n ".join(items) + "\n]"


def read(name: str) -> dict[str, Any] | None:
    """A result that was stored as `results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown(head: Iterable[str], rows: Iterable[Iterable[Any]], left: int = 1) -> str:
    """A table, with so many columns of words and the others of numbers."""
    head = list(head)
    rules = ["---"] * left + ["---:"] * (len(head) - left)
    lines = [head, rules, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shape_text(shape: Iterable[int]) -> str:
    """As people write it."""
    return " × ".join(map(str, shape))


def three_digits(value: float) -> str:
    """The number to three digits, or to the whole, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}"
