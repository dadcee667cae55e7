"""`choose_estimators` for NumPyro programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import ELBO, Objective
from pplgrad.diagnostics.checking import program_of
from pplgrad.diagnostics.choosing import WARM_UP, Choice, choose
from pplgrad.diagnostics.choosing import candidates as fitting
from pplgrad.numpyro._diagnostics.measuring import draws_with, sites_of
from pplgrad.numpyro._elbo import TraceGrad_ELBO


def choose_estimators(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
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

    Estimates variance × time of a gradient, tr Cov[g] · t, at the parameters `params`. Its inverse is the efficiency of an unbiased
    estimator. Sites are decided one after the other, with the other sites at the best estimators so far. All candidates are drawn in
    turns, and the worse half is dropped after each round (successive halving), until `seconds` are over or the best two differ significantly.

    Args:
        model: the model.
        guide: the guide.
        args: positional arguments of the program.
        kwargs: keyword arguments of the program.
        params: the parameters, such as `svi.get_params(state)`. Default: None, those that the program starts with.
        seconds: time for the measurements. Default: 30.
        candidates: the unbiased estimators to choose from. Default: None, all that fit.
        num_particles: number of particles of the ELBO. Default: 2.
        vectorize_particles: as in `TraceGrad_ELBO`. Default: True.
        objective: the objective. Default: `ELBO()`.
        warm_up: number of steps in which a candidate learns what it learns, before it is measured. Default: 50.
        seed: seed of the runs that find the program's sites and initial parameters. Default: 0.
        progress: function that is called with each configuration that is measured.

    Returns:
        The `Choice`. It has `estimators` for `config_estimators`, `code` to paste, `confidence` (the probability that nothing that was
        measured is better) and a table.

    Shapes:
        Any program. Gradients are those of the unconstrained parameters.

    Raises:
        ConfigurationError: a candidate is biased, no candidate fits a site, or `seconds` is not above 0.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from pplgrad import DisARM, ScoreFunction
        >>> def model():
        ...     numpyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.5)))
        >>> choice = choose_estimators(model, guide, seconds=0.1, candidates=[ScoreFunction(), DisARM()])
        >>> sorted(choice.estimators)
        ['z']

    References:
        Karnin, Koren and Somekh (2013), successive halving.
        Owen (2013), section 8.1, for the efficiency.
    """

    program = program_of("choose_estimators", model, guide, args, kwargs)
    elbo = TraceGrad_ELBO(num_particles, vectorize_particles, objective=objective)
    offered = fitting(sites_of(elbo, program, params, seed), candidates)
    return choose(draws_with(elbo, program, params, seed, warm_up), offered, seconds, progress)
