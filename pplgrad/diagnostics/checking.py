"""`check_gradients`, for either library: what is asked, what it is compared with, and the certificate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pplgrad.baselines.leave_one_out import LeaveOneOut
from pplgrad.core.estimator import Estimator
from pplgrad.core.filtering import FIVO
from pplgrad.core.objectives import MultiSample, Objective
from pplgrad.core.program import Program
from pplgrad.diagnostics.certificate import GradientCheck, Reference, certify, check_numbers
from pplgrad.diagnostics.moments import Draws
from pplgrad.errors import ConfigurationError, ProgramError
from pplgrad.estimators.score import ScoreFunction

REFERENCES = ("auto", "enumeration", "score", "whole")
UNITS = 4
"""The rounding error of a number that is left where others cancel, in units of the last place of those."""
RARE = 10
"""A value that so many draws, or fewer, are expected to meet: the others say nothing of it, and their scatter is too small by its part."""
NO_PARAMETERS = (
    "The program has no parameters, and so no gradient; register some with `param` in the model or the guide."
)


class TooManyOutcomes(ProgramError):
    """The outcomes of a program cannot be gone through, for a reason that the message gives."""


class Host(Protocol):
    """What a plug-in tells of a program: the gradient of an ELBO as a flat vector, and what its coordinates are."""

    @property
    def blocks(self) -> Mapping[str, np.ndarray]:
        """The numbers of each parameter's coordinates."""

    @property
    def rounding(self) -> float:
        """The part of a gradient's norm that rounding may take."""

    def sites(self) -> Mapping[str, np.ndarray]:
        """Return, for each latent site, the coordinates that its density reads."""

    def unseen_error(self, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each coordinate, what a mean of so many draws may be off by without a trace in their variance: rounding, rare values."""

    def draws(self, elbo: Any) -> Draws:
        """Return draws of an ELBO's gradient."""

    def whole_score(self, objective: Objective) -> Draws:
        """Return draws of the plainest unbiased gradient, which shares no code with the estimators."""

    def exact_gradient(self, objective: Objective, particles: int, limit: int) -> np.ndarray:
        """Return the gradient of the enumerated loss, or raise `TooManyOutcomes`."""


@dataclass(frozen=True)
class Budget:
    """How much is spent on a check, and what it calls unbiased."""

    draws: int = 2000
    level: float = 0.01
    tolerance: float = 0.05
    outcomes: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self.draws, self.level, self.tolerance)


def program_of(name: str, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Program:
    """Return a program with its arguments, as `check_gradients` and `choose_estimators` take them in both libraries."""
    if not isinstance(args, (tuple, list)):
        raise ConfigurationError(
            f"{name}(model, guide, args) takes a tuple of the program's arguments; got {type(args).__name__}; write (x,) for one "
            "argument x."
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ConfigurationError(
            f"{name}(model, guide, args, kwargs) takes the program's keyword arguments as a mapping; got {type(kwargs).__name__}."
        )
    return Program(model, guide, tuple(args), dict(kwargs or {}))


def check(
    host: Host,
    elbo: Any,
    objective: Objective,
    reference: Any,
    budget: Budget,
    progress: Callable[[str], None] = lambda words: None,
    plain: Host | None = None,
    *,
    make_elbo: Callable[..., Any],
) -> GradientCheck:
    """Return the certificate of an ELBO on a program; `plain` is the program without the estimators under check.

    `make_elbo(num_particles, estimators=, objective=)` makes the plug-in's ELBO.
    """
    particles = int(getattr(elbo, "num_particles", 1))
    wanted = reference_of(plain or host, objective, particles, reference, budget.outcomes, make_elbo)
    blocks = {("parameter", name): indices for name, indices in host.blocks.items()}
    blocks |= {("site", name): indices for name, indices in host.sites().items()}
    return certify(
        described(elbo),
        host.draws(elbo),
        wanted,
        blocks,
        count=budget.draws,
        level=budget.level,
        tolerance=budget.tolerance,
        rounding=host.rounding,
        seed=budget.seed,
        progress=progress,
        unseen_error=(plain or host).unseen_error,
    )


def reference_of(
    host: Host, objective: Objective, particles: int, reference: Any, limit: int, make_elbo: Callable[..., Any]
) -> Reference:
    """Return what draws are compared with: by enumeration if that is possible, else by an unbiased estimator."""
    refuse_without_expectation(objective)
    if not isinstance(reference, str):
        return Reference(f"the mean of {described(reference)}", draws=host.draws(reference))
    if reference not in REFERENCES:
        raise ConfigurationError(f"reference={reference!r}: write one of {', '.join(REFERENCES)}, or pass an ELBO.")
    if reference in ("auto", "enumeration"):
        try:
            exact = host.exact_gradient(objective, particles, limit)
            return Reference("the gradient of the enumerated objective", exact=exact)
        except TooManyOutcomes as reason:
            if reference == "enumeration":
                raise TooManyOutcomes(
                    f"The gradient cannot be enumerated: {reason}; pass smaller arguments, a higher outcomes=, or "
                    "reference='score'."
                ) from None
    if reference == "whole":
        if isinstance(objective, MultiSample):
            raise ConfigurationError(
                f"reference='whole' estimates sums of costs, and {objective!r} combines particles; use reference='score'."
            )
        return Reference("the score of all sites times the whole objective", draws=host.whole_score(objective))
    count, estimators = trusted(objective, particles, 4)
    elbo = make_elbo(count, estimators=estimators, objective=objective)
    return Reference("the score function at every site", draws=host.draws(elbo))


def refuse_without_expectation(objective: Objective) -> None:
    """Refuse an objective whose gradient is that of no expectation over the guide's draws."""
    if isinstance(objective, FIVO):
        raise ConfigurationError(
            f"{objective!r} resamples its particles, for which there is no reference, so that nothing can be checked; check the program under "
            "IWAE(plates=())."
        )
    if isinstance(objective, MultiSample) and objective.draws_are_constant:
        raise ConfigurationError(
            f"{objective!r} takes its draws for constants and is not the gradient of one objective over the guide's draws, so that "
            "nothing can be checked."
        )


def trusted(objective: Objective, particles: int, averaged: int) -> tuple[int, dict[str, Estimator]]:
    """Return the particles and the unbiased estimators of a reference; `averaged` particles where they are no part of the objective."""
    if isinstance(objective, MultiSample):
        return particles, {"*": ScoreFunction(samples=4)}
    return averaged, {"*": ScoreFunction(LeaveOneOut())}


def chosen_elbo(
    make: Callable[..., Any],
    elbo: Any,
    estimators: Mapping[str, Estimator] | None,
    num_particles: int | None,
    objective: Objective | None,
) -> Any:
    """Return the ELBO under check: the one that is given, or pplgrad's with the estimators and the objective."""
    if elbo is None:
        return make(
            num_particles or 1, estimators=estimators, **({} if objective is None else {"objective": objective})
        )
    if estimators is not None or num_particles is not None:
        raise ConfigurationError(
            "check_gradients takes either elbo, or estimators and num_particles for TraceGrad_ELBO; pass one of the two."
        )
    return elbo


def described(elbo: Any) -> str:
    """Return an ELBO's name with its estimators."""
    mapping = getattr(getattr(elbo, "_mapping", None), "estimators", None)
    particles = int(getattr(elbo, "num_particles", 1))
    parts = [str(particles)] if particles > 1 else []
    if mapping:
        parts.append("{" + ", ".join(f"{name!r}: {estimator!r}" for name, estimator in mapping.items()) + "}")
    return f"{type(elbo).__name__}({', '.join(parts)})"
