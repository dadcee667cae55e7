"""All estimators with what they declare, for tables and for refusals that name what fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import replace
from inspect import signature

from pplgrad.core.estimator import Estimator
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import PplgradError

_ASKING: ContextVar[bool] = ContextVar("pplgrad_asking_what_fits", default=False)

_KINDS: dict[str, type[Estimator]] = {}

COLUMNS = ("estimator", "sites", "bias", "evaluations", "differentiable costs", "derivatives", "source")


def register(*kinds: type[Estimator]) -> None:
    """Add kinds of estimator, each of which has a default for every argument, to the list of all."""
    _KINDS.update({kind.__name__: kind for kind in kinds})


def every_estimator() -> Iterator[Estimator]:
    """Yield one of each kind of estimator, with its default arguments, in the order of the alphabet."""
    for _, kind in sorted(_KINDS.items()):
        yield kind()


def table() -> list[tuple[str, ...]]:
    """Return a row of words for each estimator, as `COLUMNS` says.

    `evaluations` are those of the program beyond the primary draw, for each site; `derivatives` is the order up to which
    derivatives of the surrogate are right.

    >>> [row[2] for row in table() if row[0].startswith("DisARM(")]
    ['none']
    """
    rows: list[tuple[str, ...]] = []
    for estimator in every_estimator():
        declared = estimator.declaration
        arguments = ", ".join(signature(type(estimator)).parameters)
        rows.append(
            (
                f"{type(estimator).__name__}({arguments})",
                declared.supports,
                "none" if declared.unbiased else "biased",
                str(declared.evaluations),
                "yes" if declared.differentiable_costs else "no",
                "every" if declared.derivatives is None else str(declared.derivatives),
                declared.source,
            )
        )
    return rows


def markdown() -> str:
    """Return the table as Markdown.

    >>> markdown().splitlines()[0].startswith("| estimator | sites |")
    True
    """
    rows = [tuple(f"`{cell}`" if i == 0 else cell for i, cell in enumerate(row)) for row in table()]
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fitting(site: SiteInfo) -> list[str]:
    """Return the estimators that accept a site, the unbiased ones first."""
    found = []
    for estimator in every_estimator():
        if type(estimator).__name__ == "Auto":
            continue
        if accepts(estimator, site):
            found.append(estimator)
    return [f"{type(estimator).__name__}()" for estimator in sorted(found, key=lambda e: not e.declaration.unbiased)]


def recommended(site: SiteInfo) -> list[str]:
    """Return the estimators that the site accepts whatever the program around it.

    Those are unbiased, keep nothing (which in NumPyro only a wrapped guide can), and need no derivative along a discrete value
    (which a program that compares or indexes with it does not have).

    >>> from pplgrad.estimators import SiteInfo
    >>> recommended(SiteInfo("z", "Poisson", False, True, 1))
    ['MeasureValued()', 'ScoreFunction()']
    """
    widest = replace(site, elements=max(site.elements, site.reach))
    found = []
    for estimator in every_estimator():
        declared = estimator.declaration
        if type(estimator).__name__ == "Auto" or not declared.unbiased or estimator.keeps_state:
            continue
        if estimator.enumerates:
            continue  # Whether the sum is small enough, the sites around it decide.
        if declared.differentiable_costs and (estimator.uses_slopes or estimator.reweights_path):
            continue
        if site.higher_order and declared.derivatives is not None:
            continue
        if accepts(estimator, widest):
            found.append(f"{type(estimator).__name__}()")
    return found


def accepts(estimator: Estimator, site: SiteInfo) -> bool:
    """Return whether a site can have an estimator."""
    try:
        estimator.check(site)
    except PplgradError:
        return False
    return True


def remedy(site: SiteInfo, nearest: str | None = None) -> str:
    """Return the end of a refusal: what to use at the site instead, each of which is accepted there; the `nearest` by name first."""
    if _ASKING.get():
        return ""  # One estimator's refusal asks the others, whose refusals must not ask again.
    token = _ASKING.set(True)
    try:
        found = recommended(site)
        near = [e for e in every_estimator() if type(e).__name__ == nearest and accepts(e, site)]
    finally:
        _ASKING.reset(token)
    first = "".join(f"use {nearest}(), or " for _ in near)
    return f"{first}use one that fits there: {', '.join(found)}."
