"""Posterior predictive checks: a number of the data beside the same number of data that the fitted program draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pplgrad.assessment.draws import Observed, Values
from pplgrad.errors import ConfigurationError

_SHARES = 10
"""Finite sites with as many values at most have a check for each value."""
Check = Callable[[Values], float]


@dataclass(frozen=True)
class PredictiveCheck:
    """A number of the observed data, and where it stands among the same number of replicated data.

    Args:
        name: the site and the number, such as "x: mean", or the name of the user's own.
        observed: the number of the observed data.
        low: the 2.5% quantile of the replicates.
        high: the 97.5% quantile.
        p: the two-sided posterior predictive p-value, 2 min(P(T(x_rep) ≥ T(x)), P(T(x_rep) ≤ T(x))), with the observed data counted among the replicates.
    """

    name: str
    observed: float
    low: float
    high: float
    p: float


def predictive_checks(
    observed: Mapping[str, Observed], replicates: Values, own: Mapping[str, Check]
) -> tuple[tuple[PredictiveCheck, ...], float]:
    """Return the checks of each site, and the user's own, of replicates (count, *value), and one p-value for all of them."""
    found: list[tuple[str, float, np.ndarray]] = []
    for name, site in observed.items():
        if name not in replicates:
            continue
        for what, number in discrepancies(site).items():
            drawn = np.array([number(_kept(site, x)) for x in replicates[name]])
            found.append((f"{name}: {what}", number(_kept(site, site.value)), drawn))
    if own and replicates:
        count = len(next(iter(replicates.values())))
        real = {name: _shown(observed[name], observed[name].value) for name in replicates}
        for name, check in own.items():
            every = ({n: _shown(observed[n], x[i]) for n, x in replicates.items()} for i in range(count))
            drawn = np.array([_number(name, check(one)) for one in every])
            found.append((name, _number(name, check(real)), drawn))
    return tuple(checked(*one) for one in found), joint_p([(x, drawn) for _, x, drawn in found])


def joint_p(found: Sequence[tuple[float, np.ndarray]]) -> float:
    """Return the p-value of the largest distance of a number from its replicates' mean, in their standard deviations, over all checks.

    What the largest distance is without a fault is seen from the replicates themselves, so that checks may depend on each other.
    """
    if not found:
        return 1.0
    rows = np.array([[x, *drawn] for x, drawn in found], float)
    spread = rows.std(1, keepdims=True)
    # Numbers that rounding alone holds apart are equal.
    fixed = spread <= 1e-6 * np.abs(rows).max(1, keepdims=True)
    distances = np.where(fixed, 0.0, np.abs(rows - rows.mean(1, keepdims=True)) / np.where(fixed, 1.0, spread))
    largest = distances.max(0)
    return float(np.mean(largest >= largest[0] * (1 - 1e-9)))


def discrepancies(site: Observed) -> dict[str, Callable[[np.ndarray], float]]:
    """Return what is compared at a site: the share of each of few values, or mean and spread, and the share of zeros of counts."""
    if site.support is not None and len(site.support) <= _SHARES and site.support.ndim == 1:
        return {f"share of {_text(v)}": lambda x, v=v: float(np.mean(x == v)) for v in site.support}  # type: ignore[misc]
    found: dict[str, Callable[[np.ndarray], float]] = {"mean": lambda x: float(np.mean(x, dtype=float))}
    if site.value.size > 1:
        found["spread"] = lambda x: float(np.std(x, dtype=float))
    if site.discrete:
        found["share of 0"] = lambda x: float(np.mean(x == 0))
    return found


def checked(name: str, observed: float, drawn: np.ndarray) -> PredictiveCheck:
    """Return where a number stands among its replicates; numbers that rounding alone holds apart are equal."""
    same = np.abs(drawn - observed) <= 1e-6 * max(abs(observed), float(np.max(np.abs(drawn))))
    above = 1 + np.count_nonzero((drawn > observed) | same)
    below = 1 + np.count_nonzero((drawn < observed) | same)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return PredictiveCheck(name, observed, float(low), float(high), min(1.0, 2 * min(above, below) / (len(drawn) + 1)))


def _kept(site: Observed, x: np.ndarray) -> np.ndarray:
    return x if site.mask is None else x[site.mask]


def _shown(site: Observed, x: np.ndarray) -> np.ndarray:
    return x if site.mask is None else np.ma.MaskedArray(x, ~site.mask)


def _text(value: float) -> str:
    return f"{float(value):g}"


def _number(name: str, found: object) -> float:
    if np.size(found) != 1 or not np.isfinite(np.asarray(found, float)).all():  # type: ignore[arg-type]
        raise ConfigurationError(
            f"checks={{'{name}': ...}} returned {found!r}; a check takes a mapping from observed sites to arrays and returns one finite number."
        )
    return float(np.asarray(found, float).reshape(()))  # type: ignore[arg-type]
