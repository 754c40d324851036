"""Sphinx: a static site without outside scripts.

Formulas become MathML, which browsers draw by themselves.
"""

import re

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.logging import getLogger

project = "mla_nb"
extensions = ["myst_nb", "sphinx_copybutton"]
html_theme = "furo"
html_title = "mla_nb"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
html_math_renderer = "mathml"


# what docutils does not know, in words that it does
SAME = {"dots": r"\ldots", "iff": r"\Leftrightarrow", "big": ""}


def drawn(block):
    "A formula as MathML; one that cannot be read is a warning"

    def visit(self, node):
        tex = re.sub(
            r"\\(dots|iff|[Bb]ig)(?![a-zA-Z])",
            lambda m: SAME[m[1].lower()],
            node.astext(),
        )
        try:
            self.body.append(tex2mathml(tex, as_block=block))
        except MathError as e:
            getLogger(__name__).warning("formula %r: %s", tex, e, location=node)
        raise nodes.SkipNode

    return visit


def setup(app):
    app.add_html_math_renderer("mathml", (drawn(False), None), (drawn(True), None))
