"""Tests of estimators: the difference between the expectation of an estimate and the gradient of the enumerated objective.

`gradient_error` computes the expectation exactly, and `z_score` by simulation. `random_program` makes random programs. The programs
named in `PROGRAMS` have finitely many outcomes (the noise of continuous sites is held fixed). They are written once for both libraries,
in `pplgrad/testing/programs.py`, `reentering.py`, `structured.py` and `counting.py` (where the support of counts is cut off), and this project's own tests use them.
"""

from __future__ import annotations

import importlib
from typing import Any

from pplgrad.core.estimator import Estimator
from pplgrad.errors import ConfigurationError
from pplgrad.testing.counting import COUNTING, VECTORS
from pplgrad.testing.fuzz.generate import random_program
from pplgrad.testing.programs import CASES
from pplgrad.testing.reentering import REENTERED
from pplgrad.testing.structured import MATRICES, STRUCTURED

__all__ = ["PROGRAMS", "gradient_error", "random_program", "z_score"]

PROGRAMS: tuple[str, ...] = (*CASES, *REENTERED, *COUNTING, *VECTORS, *STRUCTURED, *MATRICES)


def gradient_error(
    estimator: Estimator, library: str, program: str = "hierarchy", *, particles: int = 1, vectorized: bool = False
) -> float:
    r"""Return max |E[estimate] − exact gradient| over all coordinates, both enumerated in float64.

    Nothing is simulated: the expectation is a sum over all outcomes of the program, of its branches, and of the estimator's own finite
    noise (`Noise.bernoulli`, `Noise.categorical`). An unbiased estimator gives rounding error.

    Args:
        estimator: the estimator, used at all discrete sites of the program.
        library: "pyro" or "numpyro".
        program: a name in `PROGRAMS`. Default: "hierarchy".
        particles: number of particles. Default: 1.
        vectorized: whether particles run at once. Default: False.

    Returns:
        The largest absolute error, in the units of the gradient.

    Shapes:
        The coordinates are those of the program's parameters.

    Raises:
        ConfigurationError: the library or the program is unknown.
        TypeError: the estimator draws uniform noise. Use `z_score`.

        Errors of the estimator's `check` at the program's sites are passed on.

    Example:
        >>> from pplgrad import DisARM
        >>> gradient_error(DisARM(), "numpyro", "single") < 1e-9
        True

    References:
        This project's tests (`tests/*/test_branches.py`).
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

    The mean is simulated, for estimators whose noise is continuous. With an unbiased estimator the score exceeds 4.5 about once in 150,000
    coordinates. A coordinate that does not vary counts by its error times 1e9.

    Args:
        estimator: the estimator, used at all discrete sites of the program.
        library: "pyro" or "numpyro".
        program: a name in `PROGRAMS`. Default: "hierarchy".
        particles: number of particles. Default: 1.
        vectorized: whether particles run at once. Default: False.
        draws: number of draws of the estimate. Default: 10,000.
        seed: seed of the draws. Default: 0.

    Returns:
        The largest score. No unit.

    Shapes:
        The coordinates are those of the program's parameters.

    Raises:
        ConfigurationError: the library or the program is unknown.

    Example:
        >>> from pplgrad import ARM
        >>> z_score(ARM(), "numpyro", "single", draws=2000) < 4.5
        True

    References:
        This project's tests (`tests/*/test_branches.py`).
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
    return {**CASES, **REENTERED, **COUNTING, **VECTORS, **STRUCTURED, **MATRICES}[program]
