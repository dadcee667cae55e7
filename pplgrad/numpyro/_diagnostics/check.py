"""`check_gradients` for NumPyro programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from numpyro.infer import ELBO as HostELBO
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import ELBO, Objective, Renyi
from pplgrad.diagnostics.certificate import GradientCheck
from pplgrad.diagnostics.checking import Budget, check, chosen_elbo, program_of, refuse_without_expectation
from pplgrad.errors import ConfigurationError
from pplgrad.numpyro._diagnostics.gradient_draws import Gradients
from pplgrad.numpyro._elbo import TraceGrad_ELBO
from pplgrad.numpyro._guide import config_estimators


def check_gradients(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    estimators: Mapping[str, Estimator] | None = None,
    num_particles: int | None = None,
    elbo: HostELBO | None = None,
    objective: Objective | None = None,
    reference: str | HostELBO = "auto",
    draws: int = 2000,
    level: float = 0.01,
    tolerance: float = 0.05,
    outcomes: int = 4096,
    warm_up: int = 100,
    seed: int = 0,
    progress: Callable[[str], None] = lambda words: None,
) -> GradientCheck:
    r"""Check whether a gradient estimator is unbiased on this program, at the parameters `params`.

    Estimates the bias b = E[estimate] − ∇ objective for the whole gradient, for each parameter and for each site (the parameters that its
    density reads). Each certificate row has the norm of the bias with an interval, its z-score with Bonferroni's correction over all
    rows, the variance, the signal-to-noise ratio ‖∇‖ / √variance, and a verdict in words.

    An error that rounding may explain (near an optimum large costs cancel), or values so rare that few draws have met them, is not called a bias.

    Args:
        model: the model.
        guide: the guide.
        args: positional arguments of the program.
        kwargs: keyword arguments of the program.
        params: the parameters, such as `svi.get_params(state)`. Default: None, those that the program starts with.
        estimators: estimators of the `TraceGrad_ELBO` under check, by site name or glob pattern.
        num_particles: number of particles of that ELBO. Default: 1.
        elbo: any ELBO of NumPyro. Without it, the check takes
            `TraceGrad_ELBO(num_particles, estimators=estimators, objective=objective)`.
        objective: the objective that the ELBO estimates. Default: that of the ELBO.
        reference: what the estimate is compared with. "auto" (the default) takes the gradient of the enumerated objective where the program
            has at most `outcomes` outcomes, else the score function at every site with as many draws. "enumeration" takes the first or
            raises. "score" takes the second, which shares pplgrad's dependency analysis. "whole" (the score of all sites times the whole
            objective) shares nothing, and needs many more draws. Another ELBO is accepted as well.
        draws: number of draws of the gradient, at least 100. Default: 2000.
        level: a correct estimator is called biased at most at this rate. Default: 0.01.
        tolerance: an estimator is called unbiased if its bias is shown to be less than this part of the gradient's norm. Default: 0.05.
        outcomes: maximal number of outcomes to enumerate. Default: 4096.
        warm_up: number of steps before the check in which the estimator learns what it learns (baselines, control variates), with the
            program's parameters held. Default: 100.
        seed: seed of the draws. Default: 0.
        progress: function that is called with the name of each phase.

    Returns:
        The `GradientCheck`. `print` shows it as a table.

    Shapes:
        Any program. Gradients are those of the unconstrained parameters, in nats.

    Raises:
        ConfigurationError: a number is out of range, the ELBO's objective is not known, or `elbo` is combined with `estimators` or
            `num_particles`. Errors of the ELBO are passed on.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from pplgrad import ScoreFunction
        >>> def model():
        ...     numpyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.5)))
        >>> check_gradients(model, guide, estimators={"z": ScoreFunction()}, draws=400, tolerance=0.5).status
        'unbiased'

    References:
        Sample splitting with Bonferroni's correction.
        Hoeffding (1948): the norm of the bias as a U-statistic.
    """
    budget = Budget(draws, level, tolerance, outcomes, seed)
    checked = chosen_elbo(TraceGrad_ELBO, elbo, estimators, num_particles, objective)
    wanted = objective or objective_of(checked)
    plain = Gradients(program_of("check_gradients", model, guide, args, kwargs), params, seed)
    # Learned baselines live in a wrapped guide alone.
    guide = guide if estimators is None else config_estimators(guide, estimators)
    host = Gradients(program_of("check_gradients", model, guide, args, kwargs), params, seed)
    if isinstance(checked, TraceGrad_ELBO) and warm_up and (host.learned or host.mutable):
        host.warm_up(checked, warm_up)
    # One particle after the other also where a program cannot be traced.
    one_by_one = partial(TraceGrad_ELBO, vectorize_particles=False)
    return check(host, checked, wanted, reference, budget, progress, plain, make_elbo=one_by_one)


def objective_of(elbo: Any) -> Objective:
    """Return what an ELBO of the host, or pplgrad's, estimates the gradient of."""
    if isinstance(elbo, TraceGrad_ELBO):
        refuse_without_expectation(elbo.objective)
        return elbo.objective
    if isinstance(elbo, RenyiELBO):
        return Renyi(elbo.alpha, samples=elbo.num_particles)
    if isinstance(elbo, (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)):
        return ELBO()
    raise ConfigurationError(f"What {type(elbo).__name__} estimates is not known; say it: objective=ELBO().")
