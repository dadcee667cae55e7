"""Draws of an ELBO's gradient with other estimators at its sites, and what `Auto(measure=True)` makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pplgrad.configuration import Resolved
from pplgrad.core.estimator import Estimator
from pplgrad.core.program import Program
from pplgrad.core.site_info import SiteInfo
from pplgrad.diagnostics.choosing import WARM_UP, Candidate, Choice, Probe, choose, keep, to_measure
from pplgrad.diagnostics.moments import Draws
from pplgrad.pyro._diagnostics.gradient_draws import Gradients


def measured(elbo: Any, program: Program, resolved: Mapping[str, Resolved]) -> Choice:
    """Choose for the sites of an ELBO that have an `Auto(measure=True)`, the others as they are, and keep the choice there."""
    with Gradients(program) as host:
        offered, seconds = to_measure(resolved, sites_of(elbo, program))
        choice = choose(draws_with(elbo, host), offered, seconds)
    keep(choice, resolved)
    return choice


def sites_of(elbo: Any, program: Program) -> dict[str, SiteInfo]:
    """Return the properties of each site that its estimator receives."""
    model, guide, args, kwargs = program
    probe = Probe()
    elbo.with_estimators({"*": probe}).describe(model, guide, *args, **kwargs)
    return probe.seen


def draws_with(elbo: Any, host: Gradients, warm_up: int = WARM_UP) -> Candidate:
    """Return what makes draws of the ELBO's gradient with other estimators, which have learned what they learn."""

    def draws_of(estimators: Mapping[str, Estimator]) -> Draws:
        mine = elbo.with_estimators(estimators)
        host.recall({})
        if warm_up and any(estimator.keeps_state for estimator in estimators.values()):
            host.warm_up(mine, warm_up)
        learned, draws = host.learned(), host.draws(mine)

        def chunks(count: int, seed: int) -> Iterator[np.ndarray]:
            # Candidates take turns, each with what it has learned itself.
            host.recall(learned)
            yield from draws(count, seed)

        return chunks

    return draws_of
