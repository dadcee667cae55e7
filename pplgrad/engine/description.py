"""What an ELBO does at each latent site, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from inspect import signature
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, NamedTuple, Protocol

from pplgrad.core.array_ops import Ops
from pplgrad.core.baseline import parts_of
from pplgrad.core.estimator import arguments_of
from pplgrad.core.sites import Run
from pplgrad.engine.branches import BranchHost, requested_values
from pplgrad.engine.joint_sums import JointHost, evaluations
from pplgrad.engine.layout import Layout

COLUMNS = ("site", "distribution", "plates", "estimator", "baseline", "evaluations", "reason")


class DescribedHost(BranchHost, JointHost, Protocol):
    """What tells of the draws that estimators run the program at."""


class SummedSite(NamedTuple):
    """A site that only the model has, and that is summed out."""

    name: str
    family: str
    plates: Sequence[str]


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table of text, its columns as wide as what is in them.

    >>> aligned([("a", "site"), ("long", "z")])
    ['a     site', 'long  z']
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]


def html_table(cells: Sequence[Sequence[str]], about: Sequence[str] = (), heads: bool = True) -> str:
    """Return a table of text as HTML, its first row the heads if it has `heads`, below lines of text; notebooks show it.

    >>> html_table([("site",), ("<z>",)], ["two & two"])
    '<p>two &amp; two</p><table><thead><tr><th>site</th></tr></thead><tbody><tr><td>&lt;z&gt;</td></tr></tbody></table>'
    """

    def row(kind: str, texts: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{escape(text)}</{kind}>" for text in texts) + "</tr>"

    lines = "".join(f"<p>{escape(line)}</p>" for line in about)
    head = f"<thead>{row('th', cells[0])}</thead>" if heads else ""
    body = "".join(row("td", texts) for texts in cells[heads:])
    return f"{lines}<table>{head}<tbody>{body}</tbody></table>"


class ShowsSettings:
    """Shows an ELBO by the arguments that differ from their defaults; `_arguments` holds those that are no attributes of it."""

    _arguments: Mapping[str, Any] = {}

    def _shown_arguments(self) -> Iterator[tuple[str, str]]:
        for name, parameter in signature(type(self)).parameters.items():
            value = self._arguments[name] if name in self._arguments else getattr(self, name, parameter.default)
            if value is not parameter.default and value != parameter.default:
                yield name, repr(value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={text}' for name, text in self._shown_arguments())})"

    def _repr_html_(self) -> str:
        return html_table([("argument", "value"), *self._shown_arguments()], [type(self).__name__])


@dataclass(frozen=True)
class Description:
    """A row for each latent site, those of the model alone that are summed out last; `str()` makes a table of them.

    `evaluations` are those of the program for each particle and step, beyond the primary draw.

    >>> print(Description([dict(zip(COLUMNS, "zbpesnr", strict=True))]).rows[0]["site"])
    z
    """

    rows: list[dict[str, Any]]

    def cells(self, columns: Sequence[str] = COLUMNS) -> list[tuple[str, ...]]:
        """Return heads and rows as text."""
        return [tuple(columns), *(tuple(str(row[column]) for column in columns) for row in self.rows)]

    def __str__(self) -> str:
        width = get_terminal_size((120, 24)).columns
        columns = list(COLUMNS)
        # Nothing is cut: what does not fit beside the others stands below.
        while len(columns) > 2 and max(map(len, aligned(self.cells(columns)))) > width:
            columns.pop()
        cells = self.cells(columns)
        rules = tuple("-" * max(map(len, column)) for column in zip(*cells, strict=True))
        head, rule, *body = aligned([cells[0], rules, *cells[1:]])
        lines = [head, rule]
        for line, row in zip(body, self.rows, strict=True):
            below = "; ".join(f"{column}: {row[column]}" for column in COLUMNS[len(columns) :])
            lines += [
                line,
                *wrap(below, width, initial_indent="    ", subsequent_indent="    ", break_long_words=False),
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(self.cells())


def describe(
    ops: Ops,
    layout: Layout,
    run: Run,
    host: DescribedHost,
    families: Mapping[str, str],
    reasons: Mapping[str, str],
    summed: Iterable[SummedSite] = (),
) -> Description:
    """Return what is done at each site of a layout: `families` and `reasons` by site; `summed` are sites that only the model has."""
    requested = requested_values(ops, layout, run, host).values()
    counts = {draw.name: _count(asked) * (1 if steps is None else steps.count) for draw, asked, steps in requested}
    for name, count in evaluations(ops, layout.joint_sums, layout.sites, run, host).items():
        counts[name] = count
    rows = []
    for site in layout.sites:
        plates = ", ".join(plate.name for plate in site.plates if not plate.time) or "none"
        if any(plate.time for plate in site.plates):
            plates = f"{plates}, scan".removeprefix("none, ")
        cells = (
            site.name,
            families[site.name],
            plates,
            brief(site.estimator),
            " + ".join(brief(part) for part in parts_of(site.estimator.baseline)) or "none",
            counts.get(site.name, 0) + site.estimator.reweights_path,
            reasons[site.name],
        )
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    for one in summed:
        plates = ", ".join(one.plates) or "none"
        cells = (one.name, one.family, plates, "summed out", "none", 0, "infer={'enumerate': 'parallel'}")
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return Description(rows)


def brief(specification: Any) -> str:
    """Return a specification with the arguments that differ from their defaults, but for the baseline.

    >>> from pplgrad import LeaveOneOut, ScoreFunction
    >>> brief(ScoreFunction(LeaveOneOut())), brief(ScoreFunction(samples=3))
    ('ScoreFunction()', 'ScoreFunction(samples=3)')
    """
    every = arguments_of(specification)
    given = [(f.name, getattr(specification, f.name), f.default) for f in every if f.name != "baseline"]
    shown = ", ".join(
        f"{name}={value!r}" for name, value, default in given if value is not default and value != default
    )
    return f"{type(specification).__name__}({shown})"


def _count(asked: Any) -> int:
    return asked.count + (0 if asked.weights is None else asked.weights.shape[1])
