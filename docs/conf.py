"""Settings of the documentation site: `make docs` builds it, with warnings as errors."""

import hashlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project = "pplgrad"
author = "the pplgrad authors"
project_copyright = author

extensions = [
    "docstrings",
    "generated",
    "pages",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
]
exclude_patterns = ["_build", "_ext", "stories/results"]
# Bare backticks in a docstring are code; `docstrings` has made links of those that name something public.
default_role = "code"

html_theme = "furo"
html_title = "pplgrad"
html_static_path = ["_static"]
html_css_files = ["pplgrad.css"]
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shapes", "Assumptions"]

myst_enable_extensions = ["colon_fence", "deflist", "html_image"]
myst_heading_anchors = 4
# The listings of a command line or of a table have no language.
highlight_language = "none"

# Cells run once; later builds take their output from the cache beside the site, unless a cell or an example has changed.
PLAYED = sorted(
    [HERE / "stories" / "story.py", *(f for d in ("examples", "models") for f in (HERE.parent / d).glob("*.py"))]
)
STATE = hashlib.sha256(b"".join(file.read_bytes() for file in PLAYED)).hexdigest()[:12]
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "cells" / STATE)
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
# Progress bars.
nb_output_stderr = "remove"

copybutton_exclude = ".linenos, .gp, .go"
