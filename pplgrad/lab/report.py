"""A study as one page that needs nothing beside it: the answer first, then the picture that shows it, then the tables."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pplgrad.lab.answer import answers
from pplgrad.lab.charts import gradient_figures, training_figures
from pplgrad.lab.page_tables import gradient_rows, part_rows, training_rows
from pplgrad.lab.plots import save
from pplgrad.lab.results import failures, read
from pplgrad.lab.summaries import crowded, gradient_table
from pplgrad.lab.tasks import write_atomically


def write_report(out: Path) -> Path:
    """Write report.html, and the pictures as PNG and SVG, from a study's dataset; return the page's path."""
    frame, about = read(out)
    table = gradient_table(frame)
    save(frame, table, out)
    training, gradients = list(training_figures(frame)), list(gradient_figures(frame, table))
    charts = [chart for figure in (*training, *gradients) for chart in figure.charts]
    environment = Environment(loader=PackageLoader("pplgrad.lab"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html").render(
        title=f"Gradient estimators on {Path(about['study']['script']).name}",
        about=about,
        answers=answers(frame),
        command=about["command"],
        crowded=crowded(frame),
        training_figures=training,
        gradient_figures=gradients,
        training=training_rows(frame),
        gradients=gradient_rows(frame, table),
        parts=[(kind, table) for kind in ("site", "parameter") if (table := part_rows(frame, kind)).rows],
        failures=failures(frame).to_dict("records"),
        settings=_flat(about["study"]),
        scripts=_scripts(bool(charts)),
        charts=_embedded(charts),
    )
    path = out / "report.html"
    write_atomically(path, page)
    return path


def _embedded(value: Any) -> Markup:
    """Return JSON for a script of the page, from which no text of a study can get out."""
    text = json.dumps(value, allow_nan=False, default=str)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _scripts(charts: bool) -> dict[str, Markup]:
    """Return the libraries that draw charts and sort tables, as text."""
    import altair
    import vl_convert
    from itables.utils import read_package_file

    found = {"tables": Markup(base64.b64encode(read_package_file("html/dt_bundle.js").encode()).decode())}
    if charts:
        version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
        bundle = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]
        found["charts"] = Markup(bundle.replace("</script", "<\\/script"))
    return found


def _flat(study: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in study.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            rows.append((prefix + name, shown))
    return rows


def command_line(arguments: list[str]) -> str:
    """Return a command as it can be pasted into a shell."""
    return "pplgrad " + " ".join(shlex.quote(argument) for argument in arguments)
