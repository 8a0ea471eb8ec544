"""Runs the notebooks when the site is built. A cell that fails is a warning."""

import json
import pathlib

import nbclient
import nbformat
from sphinx.util import logging

logger = logging.getLogger(__name__)


def _execute(app, error) -> None:
    if error is not None or app.builder.format != "html":
        return
    target = pathlib.Path(app.outdir) / "notebooks"
    target.mkdir(exist_ok=True)
    for path in sorted((pathlib.Path(app.srcdir) / "notebooks").glob("*.ipynb")):
        done = target / path.name
        if done.exists() and _sources(done) == _sources(path):
            continue  # As it was run before.
        book = nbformat.read(path, as_version=4)
        for cell in book.cells:
            if "install" in cell.metadata.get("tags", ()):
                cell.metadata["tags"] = ["install", "skip-execution"]
        try:
            nbclient.NotebookClient(book, timeout=300).execute()
        except nbclient.exceptions.CellExecutionError as failure:
            logger.warning("%s: %s", path.name, failure)
            continue
        nbformat.write(book, done)


def _sources(path: pathlib.Path) -> list:
    return [cell["source"] for cell in json.loads(path.read_text())["cells"]]


def setup(app) -> dict:
    """After the pages were written."""
    app.connect("build-finished", _execute)
    return {"parallel_read_safe": True}
