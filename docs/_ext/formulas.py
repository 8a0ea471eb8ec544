"""Formulas as MathML, which browsers render: no script, and nothing from elsewhere."""

from docutils import nodes
from latex2mathml.converter import convert


def _inline(self, node) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _block(self, node) -> None:
    formula = convert(node.astext().strip(), display="block")
    self.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app) -> dict:
    """A renderer for the builder of HTML."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True}
