"""Proof of estimators: how far the expectation of an estimate is from the gradient of the enumerated objective.

The programs of `PROGRAMS` have finitely many outcomes (continuous sites have their noise held). They are written once for
both libraries, in `pplgrad/testing/programs.py` and `reentering.py`, and are those of this project's own tests.
"""

from __future__ import annotations

import importlib
from typing import Any

from pplgrad.core.estimator import Estimator
from pplgrad.errors import ConfigurationError
from pplgrad.testing.fuzz.generate import random_program
from pplgrad.testing.programs import CASES
from pplgrad.testing.reentering import REENTERED

__all__ = ["PROGRAMS", "gradient_error", "random_program", "z_score"]

PROGRAMS: tuple[str, ...] = (*CASES, *REENTERED)


def gradient_error(
    estimator: Estimator, library: str, program: str = "hierarchy", *, particles: int = 1, vectorized: bool = False
) -> float:
    r"""Return max |E[estimate] − exact gradient| over all coordinates, both enumerated in float64.

    Estimates nothing by chance: the expectation is a sum over all outcomes of the program, of its branches, and of the
    estimator's own finite noise (`Noise.bernoulli`, `Noise.categorical`). An unbiased estimator gives rounding error.

    Shapes: the parameters of the program; `estimator` is used at all of its discrete sites. In the units of the gradient.

    Raises `ConfigurationError` for an unknown library or program, `TypeError` if the estimator draws uniform noise
    (use `z_score`), and whatever the estimator's `check` raises at the program's sites.

    >>> from pplgrad import DisARM
    >>> gradient_error(DisARM(), "numpyro", "single") < 1e-9
    True

    Source: this project's tests (`tests/*/test_branches.py`).
    """
    host, case = _host(library), _case(program)
    with host.isolated():
        return host.gradient_error(case, estimator, particles, vectorized)


def z_score(
    estimator: Estimator,
    library: str,
    program: str = "hierarchy",
    *,
    particles: int = 1,
    vectorized: bool = False,
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    r"""Return the largest |mean estimate − exact gradient| / standard error over all coordinates.

    Estimates by chance, for estimators whose noise is continuous: with an unbiased one it exceeds 4.5 about once in
    150,000 coordinates. A coordinate that does not vary counts by its error times 1e9.

    Shapes: the parameters of the program; `estimator` is used at all of its discrete sites. No unit.

    Raises `ConfigurationError` for an unknown library or program.

    >>> from pplgrad import ARM
    >>> z_score(ARM(), "numpyro", "single", draws=2000) < 4.5
    True

    Source: this project's tests (`tests/*/test_branches.py`).
    """
    host, case = _host(library), _case(program)
    with host.isolated():
        return host.z_score(case, estimator, particles, vectorized, draws, seed)


def _host(library: str) -> Any:
    if library not in ("pyro", "numpyro"):
        raise ConfigurationError(f"library={library!r}: write 'pyro' or 'numpyro'.")
    return importlib.import_module(f"pplgrad.testing.in_{library}")


def _case(program: str) -> Any:
    if program not in PROGRAMS:
        raise ConfigurationError(f"program={program!r}: the programs are {', '.join(PROGRAMS)}.")
    return {**CASES, **REENTERED}[program]
