"""How Sphinx builds the site.

Its sources are the whole repository, of which it takes what people read: so a relative link between two Markdown files
is one and the same on the site and where the repository is looked at, and one that leads nowhere fails the build.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lightning_gossip  # noqa: E402 - found by the line above

project = "lightning-gossip"
author = "The lightning-gossip developers"
project_copyright = author
version = release = lightning_gossip.__version__

root_doc = "docs/index"
include_patterns = ["docs/**.md", "benchmarks/**.md", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = [".*", "build", "dist", "logs", "runs", "tests", "examples", "lightning_gossip", "*.egg-info"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "docs.mathml"]
html_math_renderer = "mathml"  # nothing is fetched from anywhere when a page is read

myst_enable_extensions = ["dollarmath", "attrs_inline", "colon_fence"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

nitpicky = True
nitpick_ignore_regex = [  # what other packages document: the build asks no network for their names
    ("py:.*", r"(torch|lightning|pytorch_lightning|lightning_fabric|numpy|np|datetime|collections|types)\..*"),
    ("py:.*", r"(typing|typing_extensions|functools|pathlib|os|nn|pl|dist)\..*"),
    ("py:class", r"Accelerator|CheckpointIO|ClusterEnvironment|Precision|Tensor|timedelta"),
    (
        "py:class",
        r"Evaluate|StartMethod|EpochEnds|NonFinite|Peers|Choices",
    ),  # aliases in signatures, as they are written
    ("py:exc", r"PartnerLost|NotFinite|RunStopped|SeatLost|ShardLost"),  # by their bare names; the reference has them
]
suppress_warnings = ["myst.header"]  # the tables that benchmarks write begin with a heading of the second order

html_theme = "furo"
html_title = "lightning-gossip"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_extra_path = ["root"]  # the page at the top, which leads to the first one
html_copy_source = False
html_show_sphinx = False


def setup(app: Any) -> None:
    """Show a diagram of Mermaid as its text, which is how it reads without a script."""
    app.add_lexer("mermaid", TextLexer)
