"""Blocks of code without the empty line at their end, which doctest needs."""

from docutils import nodes


def _strip(app, doctree) -> None:
    for block in doctree.findall(nodes.literal_block):
        text = block.astext().rstrip()
        block.rawsource = text
        block[:] = [nodes.Text(text)]


def setup(app) -> dict:
    """Once a page was read."""
    app.connect("doctree-read", _strip)
    return {"parallel_read_safe": True}
