"""Simulation-based calibration: where latents that the model drew stand among the guide's draws for the data that they made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pplgrad.assessment.draws import Values
from pplgrad.assessment.weights import missing

_BINS = 20
_EXPECTED = 5
"""Ranks that a bin has on average, at least."""


@dataclass(frozen=True)
class Calibration:
    """Whether ranks of a latent site's elements are uniform.

    Args:
        site: the latent site.
        quantity: what is ranked: "value", an element of the site's value, or "log q", the guide's density of the site's draw in a datum. The latter
            depends on the data, so that its ranks show a guide that is right only on average over the data.
        element: the numbers of the element with the smallest p-value, along the axes that are no plate with a weight for each element.
        ranks: how many ranks each element has: simulations times elements of those plates.
        elements: how many elements were tested.
        p: the smallest p-value of the elements of this site, times the number of elements of all sites (Bonferroni), at most 1.
        shape: what the ranks of that element look like: "uniform", "too narrow" (draws of the guide vary less than the posterior), "too
            wide", "too low" (draws lie below the latents), or "too high".
    """

    site: str
    quantity: str
    element: tuple[int, ...]
    ranks: int
    elements: int
    p: float
    shape: str


@dataclass(frozen=True)
class Simulation:
    """Latents that the model drew, and draws of the guide for the data that the model drew with them, (draws, *value).

    `truth_log_q` and `draws_log_q` are the guide's log densities of the elements of both, for sites that have them. `truth_log_weights`
    (*plates) and `draws_log_weights` (draws, *plates) are log p − log q of each element of the plates, None where not all latents are in both.
    """

    truth: Values
    draws: Values
    truth_log_q: Values
    draws_log_q: Values
    truth_log_weights: np.ndarray | None = None
    draws_log_weights: np.ndarray | None = None


def ranks_of(truth: np.ndarray, draws: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the rank of each number among its draws, from 0 to their count; among equal ones it is random.

    >>> ranks_of(np.array(2.0), np.array([1.0, 3.0]), np.random.default_rng(0)).tolist()
    1
    """
    ties = np.count_nonzero(draws == truth, 0)
    return np.count_nonzero(draws < truth, 0) + rng.integers(0, ties, endpoint=True)


@dataclass(frozen=True)
class Ranked:
    """A latent site as calibration sees it.

    `pooled` are the axes of its value whose elements are independent and alike, so that their ranks are those of one element, `pooled_log_q` those
    of its densities. `counted` and `counted_log_q` say which elements a mask leaves, None for all.
    """

    pooled: tuple[int, ...]
    pooled_log_q: tuple[int, ...]
    counted: np.ndarray | None = None
    counted_log_q: np.ndarray | None = None

    def log_q(self, densities: np.ndarray, before: int) -> np.ndarray:
        """Return log q of the site in each datum, from those of its elements with `before` axes before them."""
        if self.counted_log_q is not None:
            densities = np.where(self.counted_log_q, densities, 0.0)
        summed = [before + i for i in range(densities.ndim - before) if i not in self.pooled_log_q]
        return densities.sum(tuple(summed))


def calibrations(
    simulations: Iterable[Simulation], sites: Mapping[str, Ranked], seed: int, level: float
) -> tuple[Calibration, ...]:
    """Return the calibration of each site's value, and of its density."""
    rng = np.random.default_rng([seed, 0x5BC])
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    draws = 0
    for one in simulations:
        for name, truth in one.truth.items():
            draws = len(one.draws[name])
            found.setdefault((name, "value"), []).append(ranks_of(truth, one.draws[name], rng))
        for name, densities in one.truth_log_q.items():
            own, others = sites[name].log_q(densities, 0), sites[name].log_q(one.draws_log_q[name], 1)
            # Equal densities that rounding holds apart are ties.
            rounding = 1e-5 * (1 + np.abs(own))
            others = np.where(np.abs(others - own) <= rounding, own, others)
            found.setdefault((name, "log q"), []).append(ranks_of(own, others, rng))
    tables = {}
    for (name, quantity), ranks in found.items():
        site, stacked = sites[name], np.stack(ranks)
        if quantity == "value":
            tables[name, quantity] = _columns(stacked, site.pooled, site.counted)
        else:
            tables[name, quantity] = _columns(stacked, tuple(range(stacked.ndim - 1)), None)
    total = sum(len(columns) for _, columns in tables.values())
    return tuple(_calibration(key, *table, draws, total, level) for key, table in tables.items() if table[1])


def _columns(
    ranks: np.ndarray, pooled: tuple[int, ...], counted: np.ndarray | None
) -> tuple[list[tuple[int, ...]], list[np.ndarray]]:
    """Return the elements of a site and the ranks of each, from ranks (simulations, *value)."""
    shape = ranks.shape[1:]
    own = [i for i in range(len(shape)) if i not in pooled]
    order = [*(1 + i for i in own), 0, *(1 + i for i in pooled)]
    kept = np.broadcast_to(True if counted is None else counted, shape)
    kept = np.broadcast_to(kept, ranks.shape).transpose(order)
    moved = ranks.transpose(order)
    elements = list(np.ndindex(*(shape[i] for i in own)))
    columns = [moved[element][kept[element]] for element in elements]
    return [e for e, x in zip(elements, columns, strict=True) if len(x)], [x for x in columns if len(x)]


def _calibration(
    key: tuple[str, str],
    elements: list[tuple[int, ...]],
    columns: list[np.ndarray],
    draws: int,
    total: int,
    level: float,
) -> Calibration:
    p = [uniformity(x, draws) for x in columns]
    worst = int(np.argmin(p))
    corrected = min(1.0, total * p[worst])
    shape = "uniform" if corrected >= level else _shape(columns[worst], draws)
    return Calibration(*key, elements[worst], len(columns[worst]), len(columns), corrected, shape)


def uniformity(ranks: np.ndarray, draws: int) -> float:
    """Return the p-value of the chi-square test that ranks are uniform on 0 ... `draws`, in bins of the ranks next to each other.

    Bins are as many as have 5 ranks on average, from 2 to 20.
    """
    try:
        from scipy.stats import chi2
    except ImportError as error:
        raise missing(error) from error
    bins = int(np.clip(len(ranks) // _EXPECTED, 2, min(_BINS, draws + 1)))
    edges = np.round(np.linspace(0, draws + 1, bins + 1)).astype(int)
    expected = len(ranks) * np.diff(edges) / (draws + 1)
    seen = np.histogram(ranks, edges - 0.5)[0]
    return float(chi2.sf(((seen - expected) ** 2 / expected).sum(), bins - 1))


def _shape(ranks: np.ndarray, draws: int) -> str:
    """Return in words how ranks differ from uniform ones: in their mean, or in their spread about the middle."""
    u = (ranks + 0.5) / (draws + 1) - 0.5
    shift = u.mean() / np.sqrt(1 / 12 / len(u))
    spread = (np.mean(u**2) - 1 / 12) / np.sqrt(1 / 180 / len(u))
    if abs(shift) > abs(spread):
        return "too low" if shift > 0 else "too high"
    return "too narrow" if spread > 0 else "too wide"
