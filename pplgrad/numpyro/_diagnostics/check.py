"""`check_gradients` for NumPyro programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from numpyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import ELBO, Objective, Renyi, ReweightedWakeSleep
from pplgrad.core.program import Program
from pplgrad.diagnostics.certificate import GradientCheck
from pplgrad.diagnostics.checking import Budget, check, chosen_elbo
from pplgrad.errors import ConfigurationError
from pplgrad.numpyro._diagnostics.gradient_draws import Gradients
from pplgrad.numpyro._elbo import TraceGrad_ELBO
from pplgrad.numpyro._guide import config_estimators


def check_gradients(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    estimators: Mapping[str, Estimator] | None = None,
    num_particles: int | None = None,
    elbo: Any = None,
    objective: Objective | None = None,
    reference: Any = "auto",
    draws: int = 2000,
    level: float = 0.01,
    tolerance: float = 0.05,
    outcomes: int = 4096,
    warm_up: int = 100,
    seed: int = 0,
    progress: Callable[[str], None] = lambda words: None,
) -> GradientCheck:
    r"""Say whether a gradient estimator is unbiased on this program, at `params` (such as `svi.get_params(state)`).

    Estimates b = E[estimate] − ∇ objective for the whole gradient, each parameter and each site (the parameters that its
    density reads): its norm with an interval, its z-score with Bonferroni's correction over all of them, the
    variance, the signal-to-noise ratio ‖∇‖ / √variance, and a verdict in words. `elbo` is any ELBO of the host; without it
    `TraceGrad_ELBO(num_particles, estimators=estimators, objective=objective)`. Without `params` the program starts with its own.

    The reference is the gradient of the enumerated objective where the program has at most `outcomes` outcomes, else the
    score function at every site, in as many draws (`reference="score"`, which shares pplgrad's dependency analysis;
    "whole" shares nothing, and needs many more draws; or an ELBO of your own). A correct estimator is called
    biased at most at the rate `level`; an estimator is called unbiased if its bias is shown to be less than `tolerance` of the gradient's norm.

    What an estimator learns (baselines, control variates) is learned for `warm_up` steps before, with the program's parameters held.

    Shapes: any program; gradients are those of the unconstrained parameters, in nats.

    Raises `ConfigurationError` for numbers out of range and for an ELBO whose objective is not known, and what the ELBO raises.

    >>> import numpyro, numpyro.distributions as dist
    >>> from pplgrad import ScoreFunction
    >>> def model():
    ...     numpyro.sample("z", dist.Bernoulli(0.3))
    >>> def guide():
    ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.5)))
    >>> check_gradients(model, guide, estimators={"z": ScoreFunction()}, draws=400, tolerance=0.5).status
    'unbiased'

    Source: sample splitting with Bonferroni's correction; the norm of the bias as a U-statistic (Hoeffding, 1948).
    """
    budget = Budget(draws, level, tolerance, outcomes, seed)
    checked = chosen_elbo(TraceGrad_ELBO, elbo, estimators, num_particles, objective)
    wanted = objective or objective_of(checked)
    plain = Gradients(Program(model, guide, args, dict(kwargs or {})), params, seed)
    # Learned baselines live in a wrapped guide alone.
    guide = guide if estimators is None else config_estimators(guide, estimators)
    host = Gradients(Program(model, guide, args, dict(kwargs or {})), params, seed)
    if isinstance(checked, TraceGrad_ELBO) and warm_up and (host.learned or host.mutable):
        host.warm_up(checked, warm_up)
    # One particle after the other also where a program cannot be traced.
    one_by_one = partial(TraceGrad_ELBO, vectorize_particles=False)
    return check(host, checked, wanted, reference, budget, progress, plain, make_elbo=one_by_one)


def objective_of(elbo: Any) -> Objective:
    """Return what an ELBO of the host, or pplgrad's, estimates the gradient of."""
    if isinstance(elbo, TraceGrad_ELBO):
        if isinstance(elbo.objective, ReweightedWakeSleep):
            raise ConfigurationError(
                f"{elbo.objective!r} is not the gradient of one objective, so that nothing can be checked."
            )
        return elbo.objective
    if isinstance(elbo, RenyiELBO):
        return Renyi(elbo.alpha, samples=elbo.num_particles)
    if isinstance(elbo, (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)):
        return ELBO()
    raise ConfigurationError(f"What {type(elbo).__name__} estimates is not known; say it: objective=ELBO().")
