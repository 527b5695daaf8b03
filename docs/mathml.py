"""Formulas as MathML, by docutils' own translator: browsers show it, and no script or font is fetched for it."""

from __future__ import annotations

from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

log = logging.getLogger(__name__)


def setup(app: Any) -> dict[str, bool]:
    """Let Sphinx find the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def inline(translator: Any, node: Any) -> None:
    """Write a formula that stands in a line."""
    write(translator, node, as_block=False)


def block(translator: Any, node: Any) -> None:
    """Write a formula that stands by itself."""
    translator.body.append('<div class="formula">')
    write(translator, node, as_block=True)
    translator.body.append("</div>")


def write(translator: Any, node: Any, as_block: bool) -> None:
    """Write the formula of ``node``, and skip what is in it."""
    try:
        translator.body.append(latex2mathml.tex2mathml(node.astext(), as_block=as_block))
    except MathError as error:
        log.warning("no formula: %s: %s", node.astext(), error, location=node)
    raise SkipNode
