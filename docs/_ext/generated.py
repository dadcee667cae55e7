"""Pages that are made from the package before Sphinx reads the sources: one for each estimator, and the API reference.

Nothing in them is copied by hand: the formula, the assumptions and the source stand in the docstrings, the costs in the declarations.
When an estimator wins, `when_it_wins.toml` says.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

from pplgrad import Baseline, Objective, PplgradError
from pplgrad.estimators import Estimator, registry

WORDS = Path(__file__).parent / "when_it_wins.toml"
MODULES = {"pplgrad": "Specifications", "pplgrad.pyro": "Pyro", "pplgrad.numpyro": "NumPyro", "pplgrad.lab": "Studies"}
ROOT = Path(__file__).parents[2]
# Pages of the site that stand elsewhere in the checkout.
MOVED = {"gallery": "examples/README.md", "models": "models/README.md", "contributing": "CONTRIBUTING.md"}
GROUPS = {
    "Estimators": Estimator,
    "Baselines": Baseline,
    "Objectives": Objective,
    "Errors": PplgradError,
}


def moved(text: str, source: str) -> str:
    """Return a page that stands elsewhere in the checkout, with its links as they are from docs/."""
    text = text.replace("../docs/", "").replace("../models/README.md", "models.md")
    text = text.replace("[studies/](../studies)", "`studies/`")  # a folder, which no page can show
    return re.sub(r"\]\((?!http|#|\.\./|models\.md|\w+\.md)([^)]+)\)", rf"](../{Path(source).parent}/\1)", text)


def kinds() -> list[Estimator]:
    """Return one of each kind of estimator."""
    return list(registry.every_estimator())


def summary(thing: Any) -> str:
    """Return the first sentence of a docstring, for a table."""
    first = (inspect.getdoc(thing) or "").partition("\n\n")[0].replace("\n", " ")
    return first.replace("|", "\\|").replace("*", "\\*")


def estimator_page(estimator: Estimator, words: str) -> str:
    """Return an estimator's page as Markdown: when it wins, what it declares, and its docstring."""
    name, declared = type(estimator).__name__, estimator.declaration
    order = "of every order" if declared.derivatives is None else f"up to order {declared.derivatives}"
    runs = "evaluation" if declared.evaluations == 1 else "evaluations"
    rows = {
        "Sites": declared.supports,
        "Bias": "none" if declared.unbiased else "biased",
        "Cost": f"{declared.evaluations} {runs} of the program beyond the draw's own, for each site and step",
        "Derivative of the cost": "needed" if declared.differentiable_costs else "not needed",
        "Derivatives that are right": order,
        "Source": declared.source,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"# {name}\n\n**When it wins.** {words}\n\n| declared | |\n|---|---|\n{table}\n\n"
        f"```{{eval-rst}}\n.. autoclass:: pplgrad.{name}\n```\n"
    )


def grouped(names: list[str], module: Any) -> dict[str, list[str]]:
    """Return the names of a module by what they are; what belongs to no group stands last."""
    found: dict[str, list[str]] = {group: [] for group in GROUPS}
    rest: list[str] = []
    for name in names:
        thing = getattr(module, name)
        group = next((g for g, kind in GROUPS.items() if inspect.isclass(thing) and issubclass(thing, kind)), None)
        (rest if group is None else found[group]).append(name)
    return {group: found for group, found in {**found, "Watching, stopping and results": rest}.items() if found}


def entry(module: str, name: str, own_page: bool) -> str:
    """Return the place where a name is documented, as Markdown."""
    thing = getattr(import_module(module), name)
    if own_page:
        return f"- [`{name}`](../estimators/{name}.md): {summary(thing)}"
    kind = "autoclass" if inspect.isclass(thing) else "autofunction"
    plain = not inspect.isclass(thing) or issubclass(thing, tuple(GROUPS.values()))
    options = "" if plain else "\n   :members:"
    return f"```{{eval-rst}}\n.. {kind}:: {module}.{name}{options}\n```\n"


def api_page(name: str, title: str) -> str:
    """Return a module's page of the reference as Markdown, with every public name of it."""
    module = import_module(name)
    pages = {type(e).__name__ for e in kinds()}
    groups = grouped(list(module.__all__), module) if name == "pplgrad" else {"": list(module.__all__)}
    parts = [f"# {title}: `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :no-members:\n```\n"]
    for group, names in groups.items():
        parts.append(f"## {group}\n" if group else "")
        parts += [entry(name, n, n in pages) for n in names if n in pages]
        parts.append("")
        parts += [entry(name, n, False) for n in names if n not in pages]
    return "\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Return the text of each generated page, by its path below docs/."""
    words = tomllib.loads(WORDS.read_text())
    found = {f"estimators/{type(e).__name__}.md": estimator_page(e, words[type(e).__name__]) for e in kinds()}
    found |= {f"{page}.md": moved((ROOT / source).read_text(), source) for page, source in MOVED.items()}
    return found | {f"api/{name}.md": api_page(name, title) for name, title in MODULES.items()}


def write(app: Any) -> None:
    """Write the pages that have changed, and remove those of estimators that are no more."""
    made = pages()
    for path in {path for folder in ("api", "estimators") for path in (Path(app.srcdir) / folder).glob("*.md")}:
        if path.name != "index.md" and str(path.relative_to(app.srcdir)) not in made:
            path.unlink()
    for path, text in made.items():
        file = Path(app.srcdir) / path
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def setup(app: Any) -> dict[str, bool]:
    """Register the step before Sphinx looks for sources."""
    app.connect("config-inited", lambda app, config: write(app))
    return {"parallel_read_safe": True}
