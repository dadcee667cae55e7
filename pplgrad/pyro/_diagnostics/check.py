"""`check_gradients` for Pyro programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.infer import ELBO as HostELBO
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO

from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import ELBO, Objective, Renyi
from pplgrad.diagnostics.certificate import GradientCheck
from pplgrad.diagnostics.checking import Budget, check, chosen_elbo, program_of, refuse_without_expectation
from pplgrad.errors import ConfigurationError
from pplgrad.pyro._diagnostics.gradient_draws import Gradients
from pplgrad.pyro._elbo import TraceGrad_ELBO


def check_gradients(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
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
    r"""Check whether a gradient estimator is unbiased on this program, at the present parameters.

    Estimates the bias b = E[estimate] − ∇ objective for the whole gradient, for each parameter and for each site (the parameters that its
    density reads). Each certificate row has the norm of the bias with an interval, its z-score with Bonferroni's correction over all
    rows, the variance, the signal-to-noise ratio ‖∇‖ / √variance, and a verdict in words.

    An error that rounding may explain (near an optimum large costs cancel), or values so rare that few draws have met them, is not called a bias.

    The param store, gradients and the random generator are left as they were.

    Args:
        model: the model.
        guide: the guide.
        args: positional arguments of the program.
        kwargs: keyword arguments of the program.
        estimators: estimators of the `TraceGrad_ELBO` under check, by site name or glob pattern.
        num_particles: number of particles of that ELBO. Default: 1.
        elbo: any ELBO of Pyro with `loss_and_grads`. Without it, the check takes
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
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pplgrad import ScoreFunction
        >>> pyro.clear_param_store()
        >>> def model():
        ...     pyro.sample("z", dist.Bernoulli(0.3))
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))
        >>> check_gradients(model, guide, estimators={"z": ScoreFunction()}, draws=400, tolerance=0.5).status
        'unbiased'

    References:
        Sample splitting with Bonferroni's correction.
        Hoeffding (1948): the norm of the bias as a U-statistic.
    """
    budget = Budget(draws, level, tolerance, outcomes, seed)
    checked = chosen_elbo(TraceGrad_ELBO, elbo, estimators, num_particles, objective)
    wanted = objective or objective_of(checked)
    with Gradients(program_of("check_gradients", model, guide, args, kwargs), seed) as host:
        if isinstance(checked, TraceGrad_ELBO) and warm_up:
            host.warm_up(checked, warm_up)
        return check(host, checked, wanted, reference, budget, progress, make_elbo=TraceGrad_ELBO)


def objective_of(elbo: Any) -> Objective:
    """Return what an ELBO of the host, or pplgrad's, estimates the gradient of."""
    if isinstance(elbo, TraceGrad_ELBO):
        refuse_without_expectation(elbo.objective)
        return elbo.objective
    if isinstance(elbo, RenyiELBO):
        # Pyro's has one weight for the whole program.
        return Renyi(elbo.alpha, samples=elbo.num_particles, plates=())
    if isinstance(elbo, (Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO)):
        return ELBO()
    raise ConfigurationError(f"What {type(elbo).__name__} estimates is not known; say it: objective=ELBO().")
