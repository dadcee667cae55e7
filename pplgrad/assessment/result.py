"""The result of `assess_fit`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from pplgrad.assessment.calibration import Calibration
from pplgrad.assessment.collapse import Collapse
from pplgrad.assessment.draws import Draws, Values
from pplgrad.assessment.predictive import PredictiveCheck
from pplgrad.assessment.weights import Bracket, Evidence
from pplgrad.engine.description import aligned, html_table

if TYPE_CHECKING:
    from xarray import DataTree

_WIDTH = 80
_SHOWN = 8
"""Rows of one kind in the text, those with the smallest p-values; `to_dict` has all."""


@dataclass(frozen=True)
class Verdict:
    """What a part of an assessment says: "passed", "failed" or "not asked", and why in words."""

    part: str
    status: str
    words: str


@dataclass(frozen=True)
class Assessment:
    r"""Whether a guide fits, the result of `assess_fit`: importance weights, evidence, predictive checks, calibration and collapse.

    `print` shows it as text, a notebook as a table. `passed` is the decision, and `sentence` says it in words.

    Args:
        samples: S, the number of draws of the guide.
        level: the rate of false alarms of the predictive checks and of the calibration, each.
        plates: the plates whose elements have a weight each; () where the whole program has one.
        khat: Pareto's k̂ of each element. −∞: its weights are equal. NaN: they take few values, and the effective size decides.
        khat_limit: min(1 − 1/log₁₀ S, 0.7), above which k̂ is too large for S draws.
        ess: the effective sample size of each element, relative to S: (Σ w)² / (S Σ w²).
        poor: for each element, whether its weights fail.
        evidence: the `Evidence`.
        simulated: a `Bracket` of the evidence of data that the model simulates; None without simulations, or where the model does not draw all
            latents of the guide.
        checks: a `PredictiveCheck` for each number of each observed site, and for each of the user's own.
        checks_p: the p-value of all these checks together, of the one farthest from its replicates.
        calibration: a `Calibration` for each latent site, empty without simulations.
        collapse: a `Collapse` for each latent site.
        verdicts: a `Verdict` for the weights, the predictive checks and the calibration, in this order.

    Shapes:
        `khat`, `ess` and `poor` have the shape of `plates`.

    Example:
        >>> from dataclasses import fields
        >>> [field.name for field in fields(Assessment)][3:7]
        ['khat', 'khat_limit', 'ess', 'poor']

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), sections 3.1 and 3.2.4.
    """

    samples: int
    level: float
    plates: tuple[str, ...]
    khat: np.ndarray
    khat_limit: float
    ess: np.ndarray
    poor: np.ndarray
    evidence: Evidence
    simulated: Bracket | None
    checks: tuple[PredictiveCheck, ...]
    checks_p: float
    calibration: tuple[Calibration, ...]
    collapse: tuple[Collapse, ...]
    verdicts: tuple[Verdict, ...]
    _draws: Draws = field(repr=False)
    _replicates: Values = field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether no part fails."""
        return all(verdict.status != "failed" for verdict in self.verdicts)

    @property
    def sentence(self) -> str:
        """The decision in words."""
        failed = [verdict.words for verdict in self.verdicts if verdict.status == "failed"]
        if failed:
            return f"The fit is poor: {'; '.join(failed)}."
        asked = [verdict.words for verdict in self.verdicts if verdict.status == "passed"]
        return f"No fault of the fit is seen: {'; '.join(asked)}."

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the draws, as plain numbers, strings, lists and dicts."""
        hidden = ("_draws", "_replicates")
        found = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name not in hidden}
        return {"passed": self.passed, "sentence": self.sentence, **found}

    def to_arviz(self) -> DataTree:
        """Return the draws as a `DataTree` for ArviZ: posterior, posterior predictive, log likelihood, observed data, and log densities.

        `sample_stats` holds `log_p`, `log_q` (draws) and `log_weight` (draws, plates). Dimensions have the names of plates.
        """
        from pplgrad.assessment.export import data_tree

        return data_tree(self._draws, self._replicates)

    def tables(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """Return the tables, each with its title, its heads and its rows as text."""
        found: list[tuple[str, list[tuple[str, ...]]]] = [
            ("importance weights", self._weights()),
            ("log evidence (nats)", self._evidence()),
        ]
        if self.checks:
            found.append((_titled("posterior predictive checks", self.checks), self._checks()))
        if self.calibration:
            found.append((_titled("simulation-based calibration", self.calibration), self._calibration()))
        if self.collapse:
            found.append(("collapse: shares of a datum's elements, the same for all data", self._collapse()))
        return found

    def _checks(self) -> list[tuple[str, ...]]:
        rows = [
            (x.name, f"{x.observed:.4g}", f"{x.low:.4g} to {x.high:.4g}", f"{x.p:.2g}") for x in _smallest(self.checks)
        ]
        return [("number", "observed", "95% of replicates", "p"), *rows]

    def _calibration(self) -> list[tuple[str, ...]]:
        rows = [
            (
                x.site,
                x.quantity if x.quantity != "value" or not x.element else f"value [{', '.join(map(str, x.element))}]",
                f"{x.elements:,} x {x.ranks:,}",
                f"{x.p:.2g}",
                x.shape,
            )
            for x in _smallest(self.calibration)
        ]
        return [("site", "worst", "elements x ranks", "p (corrected)", "draws are"), *rows]

    def _collapse(self) -> list[tuple[str, ...]]:
        rows = [
            (x.site, f"{x.elements:,}", *(_share(v) for v in (x.entropy, x.decided, x.undecided, x.prior)))
            for x in self.collapse
        ]
        return [("site", "elements", "entropy/max", "at 0", "at max", "= prior"), *rows]

    def _weights(self) -> list[tuple[str, ...]]:
        known = self.khat[~np.isnan(self.khat)]
        unit = " × ".join(self.plates) or "whole program"
        worst = "few values" if not known.size else f"{known.max():.2f}" if known.max() > -np.inf else "equal weights"
        over = f"{np.count_nonzero(self.khat > 0.7):,} above 0.7, {np.count_nonzero(self.khat > self.khat_limit):,} above {self.khat_limit:.2f}"
        return [
            ("a weight for each", f"{unit} ({self.khat.size:,})"),
            ("worst Pareto k", worst),
            ("elements with k", over),
            ("relative ESS", f"median {np.median(self.ess):.3g}, worst {self.ess.min():.3g}"),
            ("poor elements", f"{np.count_nonzero(self.poor):,} of {self.poor.size:,}"),
        ]

    def _evidence(self) -> list[tuple[str, ...]]:
        found = self.evidence
        upper = f"not known: {found.why_not}" if found.exact is None else f"{found.exact:.3f} (exact, enumerated)"
        rows: list[tuple[str, ...]] = [
            ("ELBO", f"{found.elbo:.3f}"),
            (f"IWAE, {self.samples:,} draws", f"{found.bound:.3f} (lower bound in expectation)"),
            (f"{1 - found.level:.0%} limit below", f"{found.limit:.3f}"),
            ("upper bound", upper),
        ]
        if self.simulated is not None:
            mean, (lower, upper_error, gap) = self.simulated, self.simulated.errors
            ends = f"{mean.lower:.3f} ± {lower:.2g} to {mean.upper:.3f} ± {upper_error:.2g}"
            rows.append((f"of {mean.simulations:,} simulated data sets", f"{ends} (gap {mean.gap:.2g} ± {gap:.1g})"))
        return rows

    def __str__(self) -> str:
        lines = [*_wrapped(self.sentence)]
        for title, table in self.tables():
            lines += ["", title, *(line for row in aligned(table) for line in _wrapped("  " + row, 4))]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{escape(self.sentence)}</b></p>"]
        for title, table in self.tables():
            parts.append(html_table(table, [title], heads=False))
        return "\n".join(parts)


def _smallest(rows: Any) -> list[Any]:
    return sorted(rows, key=lambda x: x.p)[:_SHOWN]


def _titled(title: str, rows: Any) -> str:
    return title if len(rows) <= _SHOWN else f"{title}: {_SHOWN} of {len(rows)}, by p"


def _share(x: float) -> str:
    return "-" if np.isnan(x) else f"{x:.2f}"


def _wrapped(text: str, indent: int = 0) -> list[str]:
    import textwrap

    if len(text) <= _WIDTH:
        return [text]
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * indent, drop_whitespace=True, replace_whitespace=False)


def _plain(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x.tolist()
    if isinstance(x, tuple):
        return [_plain(y) for y in x]
    if hasattr(x, "__dataclass_fields__"):
        return {f.name: _plain(getattr(x, f.name)) for f in fields(x)}
    return x
