"""Sphinx: a static site that loads nothing from elsewhere.

KaTeX draws the formulas in the browser; its script and fonts are in static/katex. The
page itself holds each formula as MathML, for readers without scripts and for search.
"""

import re
from html import escape

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.logging import getLogger

project = "mla_nb"
extensions = ["myst_nb", "sphinx_copybutton"]
html_theme = "furo"
html_title = "mla_nb"
html_static_path = ["_static"]
html_css_files = ["katex/katex.min.css", "site.css"]
html_js_files = [
    ("katex/katex.min.js", {"defer": "defer"}),
    ("site.js", {"defer": "defer"}),
]
html_show_sourcelink = html_copy_source = False
html_show_sphinx = html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_code_prompt_hide = "Hide this code"
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]
html_math_renderer = "katex"


# what docutils does not know, in words that it does
SAME = {"dots": r"\ldots", "iff": r"\Leftrightarrow", "big": ""}


def drawn(block):
    "A formula as MathML that carries its TeX; one that cannot be read is a warning"
    tag = "div" if block else "span"

    def visit(self, node):
        tex = node.astext()
        known = re.sub(
            r"\\(dots|iff|[Bb]ig)(?![a-zA-Z])", lambda m: SAME[m[1].lower()], tex
        )
        try:
            math = tex2mathml(known, as_block=block)
            self.body.append(
                f'<{tag} class="formula" data-tex="{escape(tex)}">{math}</{tag}>'
            )
        except MathError as e:
            getLogger(__name__).warning("formula %r: %s", tex, e, location=node)
        raise nodes.SkipNode

    return visit


def setup(app):
    app.add_html_math_renderer("katex", (drawn(False), None), (drawn(True), None))
