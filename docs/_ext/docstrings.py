"""Docstrings of pplgrad as reStructuredText.

They are written as plain text with code in backticks: a star, a bar or an underscore outside of code is itself and no markup. What
stands in backticks and names something public becomes a link to it.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

MODULES = ("pplgrad", "pplgrad.pyro", "pplgrad.numpyro", "pplgrad.lab")


def public(first: str = "pplgrad.pyro") -> dict[str, str]:
    """Return the full name of each public name; of a name that both plug-ins have, that of the `first`."""
    found: dict[str, str] = {}
    for module in sorted(MODULES, key=lambda module: module != first):
        for name in import_module(module).__all__:
            found.setdefault(name, f"{module}.{name}")
    return found


def named(text: str, names: dict[str, str]) -> str | None:
    """Return the full name of what a piece of code is or calls, if that is public."""
    found = re.match(r"(?:pplgrad\.)?(\w+)(\(.*\))?$", text)
    return names.get(found[1]) if found else None


def code(text: str, names: dict[str, str]) -> str:
    """Return what stands in backticks as a link, if it is a public name or a call of one, or as a literal."""
    target = named(text, names)
    return f"``{text}``" if target is None or re.search(r"[<>]", text) else f":py:obj:`{text} <{target}>`"


def plain(text: str) -> str:
    """Return text outside of backticks with what would be markup escaped; some docstrings have escaped it themselves."""
    return re.sub(r"\\?([*|_])|(\\)", lambda found: "\\" + found[0][-1], text)


def converted(lines: list[str], names: dict[str, str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText; doctests stay."""
    found, in_doctest = [], False
    for line, part in _with_code(lines):
        in_doctest = bool(line.strip()) and (in_doctest or line.lstrip().startswith(">>>"))
        if in_doctest:
            found.append(line)
            continue
        pieces = re.split(r"(`[^`]+`)", part)
        found.append("".join(code(p[1:-1], names) if p.startswith("`") and len(p) > 2 else plain(p) for p in pieces))
    return _apart(found)


def _with_code(lines: list[str]) -> list[tuple[str, str]]:
    """Return each line twice: as it is, and with double backticks made single ones."""
    return [(line, re.sub(r"``([^`]+)``", r"`\1`", line)) for line in lines]


def _apart(lines: list[str]) -> list[str]:
    """Put an empty line before a list that follows a line of text."""
    found: list[str] = []
    for line in lines:
        before = found[-1] if found else ""
        item = re.match(r"(\s*)(?:-|\d+\.) ", line)
        if item and before.strip() and not re.match(r"\s*(?:-|\d+\.) ", before):
            indent = len(before) - len(before.lstrip())
            if indent == len(item[1]):
                found.append("")
        found.append(line)
    return found


def on_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert a docstring before napoleon reads its sections."""
    lines[:] = converted(lines, public(first="pplgrad.numpyro" if ".numpyro" in name else "pplgrad.pyro"))


def setup(app: Any) -> dict[str, bool]:
    """Register the conversion."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", on_docstring, priority=100)
    return {"parallel_read_safe": True}
