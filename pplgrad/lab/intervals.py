"""Means over seeds with their intervals, and how both are rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95


def mean_and_half_width(values: Sequence[float] | np.ndarray, comparisons: int = 1) -> tuple[float, float]:
    """Return the mean of independent values and half the width of its interval of Student's t, at 95%.

    With `comparisons` intervals at once all hold together at 95% (Bonferroni). One value has no interval (NaN).

    >>> [round(x, 3) for x in mean_and_half_width([1.0, 2.0, 3.0])]
    [2.0, 2.484]
    """
    from scipy.stats import t

    x = np.asarray(values, float)
    x = x[np.isfinite(x)]
    if len(x) < 2:
        return (float(x.mean()) if len(x) else math.nan), math.nan
    quantile = float(t.ppf(1 - (1 - LEVEL) / 2 / comparisons, len(x) - 1))
    return float(x.mean()), quantile * float(x.std(ddof=1)) / math.sqrt(len(x))


def geometric_mean_and_factor(values: Sequence[float] | np.ndarray, comparisons: int = 1) -> tuple[float, float]:
    """Return the geometric mean of positive values, and the factor up to which its interval goes on both sides.

    >>> [round(x, 3) for x in geometric_mean_and_factor([1.0, 1.0])]
    [1.0, 1.0]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        mean, half = mean_and_half_width(np.log(np.asarray(values, float)), comparisons)
    return math.exp(mean) if not math.isnan(mean) else math.nan, math.exp(half) if half < 700 else math.inf


def with_half_width(mean: float, half: float) -> str:
    """Return a mean and half the width of its interval, both cut at the interval's second significant digit.

    >>> with_half_width(-31.4159, 0.2718), with_half_width(0.000123456, 0.0000021), with_half_width(1234.5, 678.9)
    ('-31.42 ± 0.27', '(1.235 ± 0.021)e-4', '1230 ± 680')
    >>> with_half_width(2.0, float("nan")), with_half_width(2.5, 0.0), with_half_width(float("nan"), 1.0)
    ('2', '2.5', '')
    """
    if math.isnan(mean):
        return ""
    if math.isnan(half) or half == 0 or math.isinf(half) or math.isinf(mean):
        return f"{mean:.4g}"
    largest = max(abs(mean), half)
    power = math.floor(math.log10(largest))
    if not -3 <= power < 6:
        return f"({_cut(mean / 10.0**power, half / 10.0**power)})e{power}"
    return _cut(mean, half)


def with_factor(mean: float, factor: float) -> str:
    """Return a geometric mean and the factor of its interval.

    >>> with_factor(0.0123456, 1.234), with_factor(12.0, float("nan"))
    ('0.0123 ×÷ 1.2', '12')
    """
    if math.isnan(mean):
        return ""
    return f"{mean:.3g}" if not math.isfinite(factor) else f"{mean:.3g} ×÷ {factor:.2g}"


def _cut(mean: float, half: float) -> str:
    """Return both with as many decimals as the interval's second significant digit needs."""
    decimals = 1 - math.floor(math.log10(half))
    # Rounding may carry: 0.0996 has its second digit where 0.100 has it.
    decimals = 1 - math.floor(math.log10(round(half, decimals)))
    if decimals >= 0:
        return f"{mean:.{decimals}f} ± {half:.{decimals}f}"
    return f"{round(mean, decimals):.0f} ± {round(half, decimals):.0f}"
