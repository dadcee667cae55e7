"""`choose_estimators` for Pyro programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pplgrad.engine.configuration import Resolved
from pplgrad.estimators.base import Estimator, SiteInfo
from pplgrad.lab.choosing import WARM_UP, Candidate, Choice, Probe, choose, keep, to_measure
from pplgrad.lab.choosing import candidates as fitting
from pplgrad.lab.moments import Draws
from pplgrad.objectives import ELBO, Objective
from pplgrad.pyro._elbo import TraceGrad_ELBO
from pplgrad.pyro._exact import Program
from pplgrad.pyro._gradients import Gradients


def choose_estimators(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seconds: float = 30.0,
    candidates: Sequence[Estimator] | None = None,
    num_particles: int = 2,
    vectorize_particles: bool = True,
    max_plate_nesting: float = float("inf"),
    objective: Objective = ELBO(),  # noqa: B008
    warm_up: int = WARM_UP,
    seed: int = 0,
    progress: Callable[[str], None] = lambda words: None,
) -> Choice:
    r"""Measure the estimators that fit each site on this program, and return the configuration with the best efficiency.

    Estimates variance × time of a gradient, tr Cov[g] · t, whose inverse is the efficiency of an unbiased estimator, at the parameters as they are.
    One site after the other is decided, the others at the best so far: all candidates are drawn in turns, and after each round
    the worse half goes (successive halving), until `seconds` are over or the best two are known apart. `candidates` are
    the unbiased estimators to choose from (default: all that fit, and what they learn is learned for `warm_up` steps first).

    Shapes: any program; gradients are those of the unconstrained parameters. The result has `estimators` for
    `config_estimators`, `code` to paste, `confidence` (the probability that nothing that was measured is better) and a table. The param
    store, gradients and the generator are left as they were.

    Raises `ConfigurationError` if a candidate is biased, none fits a site, or `seconds` is not above 0.

    >>> import pyro, pyro.distributions as dist, torch
    >>> from pplgrad import DisARM, ScoreFunction
    >>> pyro.clear_param_store()
    >>> def model():
    ...     pyro.sample("z", dist.Bernoulli(0.3))
    >>> def guide():
    ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))
    >>> choice = choose_estimators(model, guide, seconds=0.1, candidates=[ScoreFunction(), DisARM()])
    >>> sorted(choice.estimators)
    ['z']

    Source: Karnin, Koren and Somekh (2013), successive halving; Owen (2013), section 8.1, for the efficiency.
    """

    elbo = TraceGrad_ELBO(
        num_particles, max_plate_nesting, vectorize_particles=vectorize_particles, objective=objective
    )
    with Gradients(model, guide, args, kwargs or {}, seed) as host:
        offered = fitting(_sites(elbo, host.program), candidates)
        return choose(_draws_of(elbo, host, warm_up), offered, seconds, progress)


def measured(elbo: TraceGrad_ELBO, program: Program, resolved: Mapping[str, Resolved]) -> Choice:
    """Choose for the sites of an ELBO that have an `Auto(measure=True)`, the others as they are, and keep the choice there."""
    with Gradients(*program) as host:
        offered, seconds = to_measure(resolved, _sites(elbo, program))
        choice = choose(_draws_of(elbo, host), offered, seconds)
    keep(choice, resolved)
    return choice


def _sites(elbo: TraceGrad_ELBO, program: Program) -> dict[str, SiteInfo]:
    """Return what an estimator is told of each site."""
    model, guide, args, kwargs = program
    probe = Probe()
    elbo.with_estimators({"*": probe}).describe(model, guide, *args, **kwargs)
    return probe.seen


def _draws_of(elbo: TraceGrad_ELBO, host: Gradients, warm_up: int = WARM_UP) -> Candidate:
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
