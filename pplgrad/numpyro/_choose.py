"""`choose_estimators` for NumPyro programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from pplgrad.engine.configuration import Resolved
from pplgrad.estimators.base import Estimator, SiteInfo
from pplgrad.lab.choosing import WARM_UP, Candidate, Choice, Probe, choose, keep, to_measure
from pplgrad.lab.choosing import candidates as fitting
from pplgrad.lab.moments import Draws
from pplgrad.numpyro._elbo import TraceGrad_ELBO
from pplgrad.numpyro._exact import Program
from pplgrad.numpyro._gradients import Gradients
from pplgrad.numpyro._guide import config_estimators
from pplgrad.objectives import ELBO, Objective


def choose_estimators(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    seconds: float = 30.0,
    candidates: Sequence[Estimator] | None = None,
    num_particles: int = 2,
    vectorize_particles: bool | Callable = True,
    objective: Objective = ELBO(),  # noqa: B008
    warm_up: int = WARM_UP,
    seed: int = 0,
    progress: Callable[[str], None] = lambda words: None,
) -> Choice:
    r"""Measure the estimators that fit each site on this program, and return the configuration with the best efficiency.

    Estimates variance × time of a gradient, tr Cov[g] · t, whose inverse is the efficiency of an unbiased estimator, at `params`
    (such as `svi.get_params(state)`; those that the program starts with, if none are given).
    One site after the other is decided, the others at the best so far: all candidates are drawn in turns, and after each round
    the worse half goes (successive halving), until `seconds` are over or the best two are known apart. `candidates` are
    the unbiased estimators to choose from (default: all that fit, and what they learn is learned for `warm_up` steps first).

    Shapes: any program; gradients are those of the unconstrained parameters. The result has `estimators` for
    `config_estimators`, `code` to paste, `confidence` (the probability that nothing that was measured is better) and a table.

    Raises `ConfigurationError` if a candidate is biased, none fits a site, or `seconds` is not above 0.

    >>> import numpyro, numpyro.distributions as dist
    >>> from pplgrad import DisARM, ScoreFunction
    >>> def model():
    ...     numpyro.sample("z", dist.Bernoulli(0.3))
    >>> def guide():
    ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.5)))
    >>> choice = choose_estimators(model, guide, seconds=0.1, candidates=[ScoreFunction(), DisARM()])
    >>> sorted(choice.estimators)
    ['z']

    Source: Karnin, Koren and Somekh (2013), successive halving; Owen (2013), section 8.1, for the efficiency.
    """

    program = Program(model, guide, args, dict(kwargs or {}))
    elbo = TraceGrad_ELBO(num_particles, vectorize_particles, objective=objective)
    offered = fitting(_sites(elbo, program, params, seed), candidates)
    return choose(_draws_of(elbo, program, params, seed, warm_up), offered, seconds, progress)


def measured(elbo: TraceGrad_ELBO, program: Program, params: Mapping[str, Any] | None, seed: int) -> Choice:
    """Choose for the sites of an ELBO that have an `Auto(measure=True)`, the others as they are, and keep the choice there."""
    _looked_at(elbo, program, params, seed)
    resolved = dict(elbo._resolved)
    offered, seconds = to_measure(resolved, _sites(elbo, program, params, seed), elbo._stateless)
    choice = choose(_draws_of(elbo, program, params, seed, autos=resolved), offered, seconds)
    keep(choice, resolved)
    return choice


def _sites(elbo: TraceGrad_ELBO, program: Program, params: Mapping[str, Any] | None, seed: int) -> dict[str, SiteInfo]:
    """Return what an estimator is told of each site."""
    probe = Probe()
    _looked_at(elbo.with_estimators({"*": probe}), program, params, seed)
    return probe.seen


def _looked_at(elbo: TraceGrad_ELBO, program: Program, params: Mapping[str, Any] | None, seed: int) -> None:
    """Let an ELBO bind the estimators of the program's sites."""
    model, guide, args, kwargs = program
    plain = Gradients(model, guide, args, kwargs, params, seed)
    elbo.describe(jax.random.key(seed), plain.constrain(plain.params), model, guide, *args, **kwargs)


def _draws_of(
    elbo: TraceGrad_ELBO,
    program: Program,
    params: Mapping[str, Any] | None,
    seed: int,
    warm_up: int = WARM_UP,
    autos: Mapping[str, Resolved] = {},
) -> Candidate:
    """Return what makes draws of the ELBO's gradient with other estimators, which have learned what they learn."""
    model, guide, args, kwargs = program

    def draws_of(estimators: Mapping[str, Estimator]) -> Draws:
        mine = elbo.with_estimators(estimators)
        with _standing_for(autos, estimators):
            # Learned baselines live in a wrapped guide alone.
            host = Gradients(model, config_estimators(guide, estimators), args, kwargs, params, seed)
            if warm_up and (host.learned or host.mutable):
                host.warm_up(mine, warm_up)
            draws = host.draws(mine, 10)

        def chunks(count: int, seed: int) -> Iterator[np.ndarray]:
            with _standing_for(autos, estimators):
                yield from draws(count, seed)

        return chunks

    return draws_of


@contextmanager
def _standing_for(autos: Mapping[str, Resolved], estimators: Mapping[str, Estimator]) -> Iterator[None]:
    """Let a guide that names an `Auto` register what a candidate learns."""
    found = {name: resolved.measuring for name, resolved in autos.items() if resolved.measuring is not None}
    before = {name: dict(auto.measured) for name, auto in found.items()}
    for name, auto in found.items():
        auto.measured[name] = estimators[name]
    try:
        yield
    finally:
        for name, auto in found.items():
            auto.measured.clear()
            auto.measured.update(before[name])
