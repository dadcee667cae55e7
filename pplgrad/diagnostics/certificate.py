"""The certificate of `check_gradients`: whether a gradient estimator is unbiased, with the statistics and a verdict in words.

Draws are taken in two halves. The first half selects, for each block of coordinates, three directions in which the bias may lie: the
coordinate with the largest error, the whole error, and the gradient itself. The second half is independent of the first and tests
these directions. Each test is therefore of one number, and Bonferroni's correction counts directions, not coordinates. A block that
seems biased is tested once more on fresh draws before it is called so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from pplgrad.diagnostics.moments import Draws, Moments, squared_norm
from pplgrad.engine.description import aligned, html_table
from pplgrad.errors import ConfigurationError

EVERYTHING = "all parameters"
_LARGEST = 1e5
"""Costs times scores, in nats, up to which it is asked whether an error that cannot be told is rounding: finding out takes runs of the program."""


@dataclass(frozen=True)
class Reference:
    """What draws are compared with: an exact gradient, or the draws of an unbiased estimator.

    Args:
        words: what the reference is, for the reader.
        exact: the exact gradient, a flat vector.
        draws: the draws of an unbiased estimator, where there is no exact gradient.
    """

    words: str
    exact: np.ndarray | None = None
    draws: Draws | None = None


@dataclass(frozen=True)
class BlockCheck:
    """A row of a `GradientCheck`: one parameter's or one site's part of the gradient, in the units of the gradient.

    Args:
        kind: "program", "parameter" or "site".
        name: the name of the parameter or site.
        gradient: norm of the reference gradient.
        bias: estimate of the norm of the bias.
        bias_low: lower end of its interval.
        bias_high: upper end of its interval.
        ratio: mean of the estimate along the gradient, as a multiple of the gradient.
        z: the largest standardised error, to be compared with `critical`.
        critical: critical value of `z`.
        variance: tr Cov[g] over the block.
        signal_to_noise: `gradient` / √`variance`.
        status: "unbiased", "biased", "unknown" or "broken".
        verdict: the same in words.
    """

    kind: str
    name: str
    gradient: float
    bias: float
    bias_low: float
    bias_high: float
    ratio: float
    z: float
    critical: float
    variance: float
    signal_to_noise: float
    status: str
    verdict: str


@dataclass(frozen=True)
class GradientCheck:
    """A certificate of a gradient estimator on one program, the result of `check_gradients`.

    It has a row for the whole gradient, for each parameter and for each site. `print` shows it as a table.

    Args:
        estimator: the ELBO and the estimators that were checked, as text.
        reference: what the draws were compared with, as text.
        draws: number of draws.
        level: the rate at which a correct estimator is called biased, at most.
        rows: a `BlockCheck` for the whole gradient, then for each parameter and for each site.

    Shapes:
        A row holds plain numbers, in the units of the gradient.

    Example:
        >>> def draws(count, seed):
        ...     yield np.random.default_rng(seed).normal(1.0, 0.1, (count, 1))
        >>> numbers = {"count": 1000, "level": 0.01, "tolerance": 0.05, "rounding": 1e-9, "seed": 0}
        >>> exact = Reference("the exact gradient", exact=np.ones(1))
        >>> certify("an estimator", draws, exact, {("parameter", "a"): np.arange(1)}, **numbers).status
        'unbiased'
    """

    estimator: str
    reference: str
    draws: int
    level: float
    rows: tuple[BlockCheck, ...] = field(repr=False)

    @property
    def status(self) -> str:
        """The verdict: "unbiased", "biased", "unknown" (too few draws), or "broken" (draws that are not finite)."""
        states = [row.status for row in self.rows]
        return next((state for state in ("broken", "biased") if state in states), self.rows[0].status)

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        if self.status == self.rows[0].status:
            return self.rows[0].verdict
        worst = max((row for row in self.rows if row.status == self.status), key=lambda row: row.z)
        return f"{worst.verdict} ({worst.kind} '{worst.name}')"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers and strings."""
        rows = [dict(vars(row)) for row in self.rows]
        own = {name: getattr(self, name) for name in ("estimator", "reference", "draws", "level", "status", "verdict")}
        return {**own, "rows": rows}

    def table(self) -> list[tuple[str, ...]]:
        """Return the table's heads and rows as text."""
        head = ("", "name", "|gradient|", "|bias|", "interval", "z", "variance", "signal/noise", "verdict")
        body = [
            (
                row.kind,
                row.name,
                f"{row.gradient:.3g}",
                f"{row.bias:.2g}",
                f"{row.bias_low:.2g} to {row.bias_high:.2g}",
                f"{row.z:.1f}",
                f"{row.variance:.3g}",
                f"{row.signal_to_noise:.2g}",
                row.verdict,
            )
            for row in self.rows
        ]
        return [head, *body]

    def _about(self) -> list[str]:
        about = f"{self.draws:,} draws against {self.reference}; z is compared with {self.rows[0].critical:.1f}"
        return [f"{self.estimator}: {self.verdict}", about]

    def __str__(self) -> str:
        return "\n".join([*self._about(), *aligned(self.table())])

    def _repr_html_(self) -> str:
        return html_table(self.table(), self._about())


def certify(
    estimator: str,
    draws: Draws,
    reference: Reference,
    blocks: Mapping[tuple[str, str], np.ndarray],
    *,
    count: int,
    level: float,
    tolerance: float,
    rounding: float,
    seed: int,
    progress: Callable[[str], None] = lambda words: None,
    unseen_error: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None,
) -> GradientCheck:
    """Return the certificate. `blocks` maps ("parameter" or "site", name) to the numbers of its coordinates.

    A bias below `rounding` times the gradient's norm is taken for rounding. `unseen_error` returns, for a number of draws, what their mean may
    be off by in each coordinate without a trace in their variance: by rounding, where large numbers cancel in every draw, as they do near an
    optimum; and by values so rare that no draw may have met them. It is asked only where something seems biased, or cannot be told.
    """
    check_numbers(count, level, tolerance)
    total = sum(len(indices) > 0 for indices in blocks.values())
    size = max((int(i.max()) + 1 for i in blocks.values() if len(i)), default=0)
    named = {("program", EVERYTHING): np.arange(size), **{key: i for key, i in blocks.items() if len(i)}}
    critical = NormalDist().inv_cdf(1 - level / (2 * 3 * (total + 1)))
    half = count // 2
    progress("first half")
    first = _Half(draws, reference, half, seed, None)
    directions = np.concatenate([_directions(first, indices, size) for indices in named.values()], axis=1)
    progress("second half")
    second = _Half(draws, reference, half, seed + 1, directions)
    norm = np.sqrt(max(squared_norm(first.wanted_batches)[0], 0.0))
    z = second.z(directions, rounding * norm)
    unseen = _Unseen(size, half, rounding, unseen_error)
    if (z > critical).any():
        floor = np.hypot(rounding * norm, unseen.along(directions))
        progress("once more")
        again = _Half(draws, reference, half, seed + 2, directions)
        z = np.minimum(second.z(directions, floor), again.z(directions, floor))
    # A bias is at least as long as what it is along a direction.
    along = np.where(z > critical, np.abs(second.error @ directions), 0.0)
    by_block = zip(named.items(), z.reshape(-1, 3).max(1), along.reshape(-1, 3).max(1), strict=True)
    rows = [
        _row(key, indices, (first, second), worst, seen, critical, norm, level, tolerance, count, unseen)
        for (key, indices), worst, seen in by_block
    ]
    return GradientCheck(estimator, reference.words, count, level, tuple(rows))


def check_numbers(count: int, level: float, tolerance: float) -> None:
    """Refuse numbers with which nothing can be certified."""
    if not isinstance(count, int) or count < 100:
        raise ConfigurationError(f"draws={count!r}: a check needs 100 draws or more.")
    if not 0 < level < 1:
        raise ConfigurationError(f"level={level!r}: the rate of false alarms is between 0 and 1, such as 0.01.")
    if not tolerance > 0:
        raise ConfigurationError(f"tolerance={tolerance!r}: give a positive part of the gradient's norm, such as 0.05.")


class _Unseen:
    """What a mean of draws may be off by in each coordinate that their variance does not show; found when it is first asked for."""

    def __init__(
        self, size: int, draws: int, rounding: float, find: Callable[[int], tuple[np.ndarray, np.ndarray]] | None
    ) -> None:
        self._size, self._draws, self._find = size, draws, find
        self._most = _LARGEST * rounding**2

    @cached_property
    def _errors(self) -> np.ndarray:
        """The error by rounding and that by rare values, a row each."""
        found = np.zeros((2, self._size)) if self._find is None else np.array(self._find(self._draws), float)
        return np.where(np.isfinite(found), found, 0.0)

    def along(self, directions: np.ndarray) -> np.ndarray:
        """Return the largest error along each direction."""
        return self._errors.sum(0) @ np.abs(directions)

    def rounding(self, indices: np.ndarray, error: float) -> float:
        """Return the norm of the rounding errors of some coordinates; 0 where an error is far too large to be one."""
        return float(np.linalg.norm(self._errors[0, indices])) if error < self._most else 0.0


class _Half:
    """One half of the draws, and of the reference's."""

    def __init__(
        self, draws: Draws, reference: Reference, count: int, seed: int, directions: np.ndarray | None
    ) -> None:
        self.found = Moments(draws(count, 2 * seed), count, directions)
        self.wanted: Moments | None = None
        if reference.exact is None:
            assert reference.draws is not None
            self.wanted = Moments(reference.draws(count, 2 * seed + 1), count, directions)
        self.exact = reference.exact if self.wanted is None else self.wanted.mean

    @property
    def error(self) -> np.ndarray:
        assert self.exact is not None
        return self.found.mean - self.exact

    @property
    def squared_error(self) -> np.ndarray:
        return self.found.squared_error + (0.0 if self.wanted is None else self.wanted.squared_error)

    @property
    def wanted_batches(self) -> np.ndarray:
        assert self.exact is not None
        return np.tile(self.exact, (2, 1)) if self.wanted is None else self.wanted.batches

    def error_batches(self) -> np.ndarray:
        """Return independent copies of the error, a row a batch."""
        if self.wanted is None:
            return self.found.batches - self.exact
        n = min(len(self.found.batches), len(self.wanted.batches))
        return self.found.batches[:n] - self.wanted.batches[:n]

    def z(self, directions: np.ndarray, floor: float | np.ndarray) -> np.ndarray:
        """Return |error| / standard error along each direction; `floor` is a part of the error that is no bias."""
        variance = np.broadcast_to(np.asarray(floor, float) ** 2, directions.shape[1]).copy()
        for moments in (self.found, self.wanted):
            if moments is not None and moments.projections is not None:
                variance += moments.projections.var(0, ddof=1) / moments.count
        return np.abs(self.error @ directions) / np.sqrt(np.maximum(variance, 1e-300))


def _directions(half: _Half, indices: np.ndarray, size: int) -> np.ndarray:
    """Return three unit vectors within a block: its worst coordinate, its whole error, its gradient."""
    error, spread = half.error[indices], np.sqrt(half.squared_error[indices])
    assert half.exact is not None
    inside = np.zeros((len(indices), 3))
    inside[np.argmax(np.abs(error) / np.maximum(spread, 1e-12 * (1 + np.abs(error)))), 0] = 1.0
    inside[:, 1], inside[:, 2] = error, half.exact[indices]
    result = np.zeros((size, 3))
    norms = np.linalg.norm(inside, axis=0)
    result[indices] = inside / np.where(norms > 0, norms, 1.0)
    return result


def _row(
    key: tuple[str, str],
    indices: np.ndarray,
    halves: tuple[_Half, _Half],
    z: float,
    along: float,
    critical: float,
    norm: float,
    level: float,
    tolerance: float,
    count: int,
    unseen: _Unseen,
) -> BlockCheck:
    """Return what was found of a block."""
    errors = np.concatenate([half.error_batches()[:, indices] for half in halves])
    wanted = np.concatenate([half.wanted_batches[:, indices] for half in halves])
    squared, spread = squared_norm(errors)
    bias = max(squared, along**2)
    gradient = np.sqrt(max(squared_norm(wanted)[0], 0.0))
    reach = NormalDist().inv_cdf(1 - level)
    high = np.sqrt(bias + reach * spread)
    low = np.sqrt(max(bias - reach * spread, 0.0))
    variance = float(np.mean([half.found.variance[indices].sum() for half in halves]))
    mean = np.mean([half.found.mean[indices] for half in halves], axis=0)
    exact = np.mean([half.wanted_batches.mean(0)[indices] for half in halves], axis=0)
    ratio = float(mean @ exact / (exact @ exact)) if gradient > 0 else float("nan")
    broken = sum(half.found.broken for half in halves)
    status, verdict = _verdict(z, critical, bias**0.5, high, gradient, norm, ratio, tolerance, count, broken)
    rounding = critical * unseen.rounding(indices, high) if status == "unknown" else 0.0
    if high <= rounding:
        # More draws would not help: nothing else is left of the gradient.
        status, verdict = "unbiased", f"unbiased to within {high:.2g}, where rounding may make {rounding:.2g}"
    return BlockCheck(
        kind=key[0],
        name=key[1],
        gradient=float(gradient),
        bias=float(bias**0.5),
        bias_low=float(low if z > critical else 0.0),
        bias_high=float(high),
        ratio=ratio,
        z=float(z),
        critical=critical,
        variance=variance,
        signal_to_noise=float(gradient / np.sqrt(variance)) if variance > 0 else float("inf"),
        status=status,
        verdict=verdict,
    )


def _verdict(
    z: float,
    critical: float,
    bias: float,
    high: float,
    gradient: float,
    norm: float,
    ratio: float,
    tolerance: float,
    count: int,
    broken: int,
) -> tuple[str, str]:
    """Return a word for programs and a sentence for readers."""
    if broken:
        return "broken", f"broken: {broken:,} of {count:,} draws are NaN or infinite"
    scale = max(gradient, 0.1 * norm)
    if z > critical:
        if scale == 0:
            return "biased", f"biased: off by {bias:.2g} where the gradient is 0 (z = {z:.1f})"
        along = abs(ratio - 1) * gradient
        much = f"biased: off by {_percent(bias / scale)} of the gradient's norm"
        if gradient > 0 and along > 0.9 * bias:
            much += f", {ratio:.3g} times the gradient"
        return "biased", f"{much} (z = {z:.1f})"
    if scale == 0:
        return "unbiased", f"unbiased to within {high:.2g}, where the gradient is 0"
    if high <= tolerance * scale:
        return "unbiased", f"unbiased to within {_percent(high / scale)} of the gradient's norm"
    needed = count * (high / (tolerance * scale)) ** 2
    return "unknown", f"cannot tell with this budget: needs about {_rounded(needed):,} draws"


def _percent(part: float) -> str:
    """Return a part in percent, with two digits.

    >>> _percent(0.00345), _percent(0.4849), _percent(2.0)
    ('0.34%', '48%', '200%')
    """
    return f"{100 * part:.0f}%" if part >= 0.1 else f"{100 * part:.2g}%"


def _rounded(number: float) -> int:
    """Return a number rounded up to two digits.

    >>> _rounded(12_345.0), _rounded(1e30)
    (13000, 1000000000000000)
    """
    number = min(number, 1e15)
    unit = 10 ** max(int(np.log10(max(number, 1.0))) - 1, 0)
    return int(np.ceil(number / unit) * unit)
