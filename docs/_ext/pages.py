"""What a page becomes before it is shown: code that names something public is a link, and the tutorial is a notebook."""

from __future__ import annotations

import re
from typing import Any

from docstrings import named, public
from docutils import nodes
from sphinx import addnodes

HEADER = """---
file_format: mystnb
kernelspec:
  name: python3
---

"""
DOWNLOAD = "{{nb-download}}`This page as a notebook <{name}.ipynb>`, with its output.\n"


def notebook(text: str) -> str:
    """Return a page of Python blocks, each followed by what it prints, as a notebook that prints it itself."""
    cells = re.sub(r"```python\n", "```{code-cell} ipython3\n", text)
    return HEADER + re.sub(r"\n```text\n.*?```\n", "", cells, flags=re.DOTALL)


def on_source(app: Any, name: str, source: list[str]) -> None:
    """Make the tutorial a notebook; it stays a plain page in the checkout, whose numbers a test compares with those of a run."""
    if name == "tutorial":
        source[0] = notebook(source[0])
    if source[0].startswith("---\nfile_format: mystnb"):
        title = re.search(r"^# .*\n", source[0], re.MULTILINE)
        assert title is not None
        link = DOWNLOAD.format(name=name.rpartition("/")[2])
        source[0] = source[0][: title.end()] + "\n" + link + source[0][title.end() :]


def on_page(app: Any, tree: nodes.document) -> None:
    """Make links of the code in a page's text that names something public; headings and links stay what they are."""
    plugin = "pplgrad.numpyro" if "numpyro" in app.env.docname else "pplgrad.pyro"
    names = {name: full for name, full in public(first=plugin).items() if full.startswith((f"pplgrad.{name}", plugin))}
    # The first column of a table of names from another library has that library's names.
    foreign = app.env.docname.startswith("migrating/")
    for literal in list(tree.findall(nodes.literal)):
        target = named(literal.astext(), names)
        inside = (nodes.title, nodes.reference, addnodes.pending_xref, addnodes.desc_signature)
        parent = literal.parent
        while parent is not None and not isinstance(parent, inside):
            if foreign and isinstance(parent, nodes.entry) and parent.parent.index(parent) == 0:
                break
            parent = parent.parent
        if target is None or parent is not None:
            continue
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refdoc=app.env.docname, refwarn=True
        )
        literal.replace_self(link)
        link += literal


def setup(app: Any) -> dict[str, bool]:
    """Register both steps."""
    app.connect("source-read", on_source)
    app.connect("doctree-read", on_page)
    return {"parallel_read_safe": True}
