"""Makes notebooks of pages: `python docs/notebooks.py`, or `--check` that they are new.

A notebook has the text and the code of its page, without prompts and results. Building
the site runs them (`_ext/executed.py`).
"""

import argparse
import json
import pathlib
import posixpath
import re
import sys

DOCS = pathlib.Path(__file__).parent
FOLDER = DOCS / "notebooks"
PAGES = ("start.md", "guides/train_nnx.md", "guides/train_linen.md")
SITE = "https://jaxbn.readthedocs.io/en/latest/"
INSTALL = (
    "%pip install -q 'jaxbn[examples] @ git+https://github.com/jaxbn/jaxbn' flatbuffers"
)


def path_of(page: str) -> pathlib.Path:
    """The notebook of a page."""
    return FOLDER / pathlib.Path(page).with_suffix(".ipynb").name


def notebook(page: str) -> str:
    """The page as a notebook."""
    text = (DOCS / page).read_text()
    text = re.sub(r"^\[Open in Colab\].*\n\n", "", text, flags=re.M)
    title, rest = text.split("\n\n", 1)
    cells = [_markdown(title), _code(INSTALL, tags=["install"])]
    for i, part in enumerate(
        re.split(r"^```python\n(.*?)^```\n", rest, flags=re.S | re.M)
    ):
        if i % 2:
            cells.append(_code(_without_prompts(part)))
        elif part.strip():
            cells.append(_markdown(_with_absolute_links(part.strip(), page)))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {
        "cells": cells,
        "metadata": {"kernelspec": kernel},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": _lines(text)}


def _code(text: str, tags: list[str] | None = None) -> dict:
    metadata = {"tags": tags} if tags else {}
    rest = {"execution_count": None, "outputs": []}
    return {"cell_type": "code", "metadata": metadata, "source": _lines(text), **rest}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _without_prompts(examples: str) -> str:
    """The input of examples: an empty line in place of a result."""
    found = []
    for line in examples.splitlines():
        if line.startswith((">>> ", "... ")):
            found.append(line[4:])
        elif line in (">>>", "...") or not line:
            found.append("")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(found)).strip()


def _with_absolute_links(text: str, page: str) -> str:
    def absolute(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), link[1]))
        return f"]({SITE}{target}.html{link[2] or ''})"

    return re.sub(r"\]\((?!https?:)([\w./-]+)\.md(#[\w-]+)?\)", absolute, text)


def main() -> None:
    """Writes the notebooks, or says which should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    made = {path_of(page): notebook(page) for page in PAGES}
    old = [
        p.name for p, text in made.items() if not p.exists() or p.read_text() != text
    ]
    if check and old:
        sys.exit(f"Not up to date: {', '.join(old)}. Run python docs/notebooks.py")
    FOLDER.mkdir(exist_ok=True)
    for path, text in made.items() if not check else ():
        path.write_text(text)


if __name__ == "__main__":
    main()
