"""Importance weights: effective sample size, Pareto's k, and the evidence that they bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pplgrad.core.objectives import log_sum_exp
from pplgrad.errors import ConfigurationError

BATCHES = 10
"""Independent parts of the draws from which the limit below the evidence is taken."""
EQUAL = 1e-4
"""Log weights that differ by less are equal: in single precision rounding leaves as much."""


def effective_sizes(log_weights: np.ndarray) -> np.ndarray:
    """Return the effective sample size of log weights (draws, elements), relative to the number of draws: (Σ w)² / (S Σ w²).

    >>> effective_sizes(np.log(np.array([[1.0, 1.0], [1.0, 3.0]]))).round(6).tolist()
    [1.0, 0.8]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = log_sum_exp(np, log_weights, 0), log_sum_exp(np, 2 * log_weights, 0)
        found = np.exp(2 * first - second) / len(log_weights)
    return np.where(np.isfinite(found), found, 0.0)


def k_limit(draws: int) -> float:
    """Return the k̂ up to which so many draws give a reliable mean: min(1 − 1/log₁₀ S, 0.7) (Vehtari et al., 2024).

    >>> round(k_limit(100), 2), k_limit(10_000)
    (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(draws), 0.7)


def tail_shapes(log_weights: np.ndarray) -> np.ndarray:
    """Return k̂ of each column of log weights (draws, elements), by Pareto-smoothed importance sampling.

    Equal weights have no tail: −∞. Where the tail holds the same few weights again and again (finite latents), no Pareto distribution fits it: NaN.
    """
    psis = _psis()
    draws, elements = log_weights.shape
    tail = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    found = np.full(elements, -np.inf)
    for i in range(elements):
        own = log_weights[:, i].astype(float)
        if own.max() == own.min() or own.max() - own.min() < EQUAL:
            found[i] = np.nan if np.isneginf(own).all() else -np.inf
            continue
        largest = np.sort(own)[-tail:]
        distinct = 1 + np.count_nonzero(np.diff(largest[np.isfinite(largest)]) > EQUAL)
        # What it takes are log likelihoods, whose negatives are the log weights of leaving one out.
        found[i] = float(psis(-own)[1]) if 2 * distinct > tail else np.nan
    return found


def _psis():  # type: ignore[no-untyped-def]
    try:
        from arviz_stats.base import array_stats
    except ImportError as error:
        raise missing(error) from error
    return array_stats.psislw


def missing(error: ImportError) -> ConfigurationError:
    """Return the error for a package of the extra that is not installed."""
    return ConfigurationError(f"assess_fit needs {error.name}, which is not installed; pip install 'pplgrad[assess]'.")


@dataclass(frozen=True)
class Evidence:
    """The log evidence log p(x), in nats: what is known of it from below, and from above where that is valid.

    Args:
        elbo: the mean log weight, an unbiased estimate of the ELBO.
        bound: the importance-weighted bound, Σ_i log 1/S Σ_s w_is + what no draw changes: a lower bound in expectation.
        elements: the bound of each element of the plates.
        limit: a number that is below the log evidence in at least 1 − `level` of all runs, whatever the tails of the weights.
        level: the rate at which `limit` may fail.
        exact: the log evidence itself, from all values of the latents; None where they are not few and finite. It is also the upper end.
        why_not: why there is no exact evidence, and no upper bound.

    Shapes:
        `elements` has the shape of the plates with a weight for each element.
    """

    elbo: float
    bound: float
    elements: np.ndarray
    limit: float
    level: float
    exact: float | None = None
    why_not: str = ""


def evidence(
    log_weights: np.ndarray, beside: float, level: float, exact: float | None, why_not: str, shape: tuple[int, ...]
) -> Evidence:
    """Return what log weights (draws, elements) say of the evidence."""
    own = mean_weights(log_weights)
    return Evidence(
        elbo=float(log_weights.mean(0).sum()) + beside,
        bound=float(own.sum()) + beside,
        elements=own.reshape(shape),
        limit=limit_below(log_weights, level) + beside,
        level=level,
        exact=exact,
        why_not=why_not,
    )


@dataclass(frozen=True)
class Bracket:
    """The mean log evidence of data sets that the model simulates, between two bounds that hold in expectation, in nats.

    The latents z* that the model drew with the data x are a draw of the exact posterior p(z | x). With weights w_s = p(x, z_s) / q(z_s; x) of S
    draws of the guide, and w* of z*, E Σ_i log 1/S Σ_s w_is ≤ log p(x) ≤ E Σ_i log 1/(S + 1) (w*_i + Σ_s w_is), over elements i. The gap shrinks
    with S, and is 0 at the exact posterior.

    Args:
        lower: the mean of the first over the simulations.
        upper: the mean of the second.
        gap: their difference.
        errors: the standard errors of these three.
        simulations: number of simulated data sets.

    References:
        Grosse, Ghahramani and Adams (2015), for the draw of the exact posterior; Sobolev and Vetrov (2019), theorem 1.
    """

    lower: float
    upper: float
    gap: float
    errors: tuple[float, float, float]
    simulations: int


def ends(draws: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Return both bounds of one simulated data set, from log weights (draws, *elements) and those of the latents that made it.

    >>> ends(np.zeros((4, 2)), np.zeros(2))
    (0.0, 0.0)
    """
    flat = draws.reshape(len(draws), -1)
    every = np.concatenate([flat, truth.reshape(1, -1)])
    return float(mean_weights(flat).sum()), float(mean_weights(every).sum())


def bracket(found: Sequence[tuple[float, float]]) -> Bracket | None:
    """Return the bracket of several data sets; None of none."""
    if not found:
        return None
    rows = np.array(found)
    rows = np.column_stack([rows, rows[:, 1] - rows[:, 0]])
    lower, upper, gap = map(float, rows.mean(0))
    first, second, third = map(float, rows.std(0, ddof=1) / math.sqrt(len(rows)))
    return Bracket(lower, upper, gap, (first, second, third), len(rows))


def mean_weights(log_weights: np.ndarray) -> np.ndarray:
    """Return the log of the mean weight of each element: log weights (draws, elements) become (elements,)."""
    with np.errstate(divide="ignore"):  # An element may have no weight at all.
        return log_sum_exp(np, log_weights, 0) - math.log(len(log_weights))


def limit_below(log_weights: np.ndarray, level: float) -> float:
    """Return a number below the log evidence in at least 1 − `level` of all runs.

    The product of mean weights of a part of the draws is positive with mean p(x), since elements are drawn independently. By Markov's
    inequality it exceeds p(x) by a factor c with probability 1/c at most; that all B independent parts do has probability c^−B. So
    min_b Σ_i log ŵ_ib − log(1/level) / B is such a number.
    """
    parts = np.array_split(log_weights, min(BATCHES, len(log_weights)))
    return min(float(mean_weights(part).sum()) for part in parts) - math.log(1 / level) / len(parts)
