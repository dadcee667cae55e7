"""`choose_estimators` for NumPyro programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from pplgrad.estimators.base import Estimator
from pplgrad.lab.choosing import Choice, Probe, choose
from pplgrad.lab.choosing import candidates as fitting
from pplgrad.lab.moments import Draws
from pplgrad.numpyro._elbo import TraceGrad_ELBO
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
    warm_up: int = 50,
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

    given = kwargs or {}

    def made(estimators: Mapping[str, Estimator]) -> TraceGrad_ELBO:
        return TraceGrad_ELBO(num_particles, vectorize_particles, estimators=estimators, objective=objective)

    plain, probe = Gradients(model, guide, args, given, params, seed), Probe()
    made({"*": probe}).describe(jax.random.key(seed), plain.constrain(plain.params), model, guide, *args, **given)

    def draws_of(estimators: Mapping[str, Estimator]) -> Draws:
        elbo = made(estimators)
        # Learned baselines live in a wrapped guide alone.
        host = Gradients(model, config_estimators(guide, estimators), args, given, params, seed)
        if warm_up and (host.learned or host.mutable):
            host.warm_up(elbo, warm_up)
        return host.draws(elbo, 10)

    return choose(draws_of, fitting(probe.seen, candidates), seconds, progress)  # type: ignore[attr-defined]
