"""`assess_fit` for NumPyro programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pplgrad.assessment.assessing import Plan, assess
from pplgrad.assessment.result import Assessment
from pplgrad.diagnostics.checking import program_of
from pplgrad.numpyro._diagnostics.assessed_program import AssessedProgram


def assess_fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    params: Mapping[str, Any] | None = None,
    samples: int = 1000,
    plates: tuple[str, ...] | None = None,
    replicates: int = 1000,
    checks: Mapping[str, Callable[[Mapping[str, Any]], float]] | None = None,
    simulations: int = 0,
    dream: Callable[..., tuple[Any, ...]] | None = None,
    refit: Callable[..., Any] | None = None,
    rank_draws: int = 99,
    level: float = 0.01,
    tolerated: float = 0.05,
    outcomes: int = 4096,
    seed: int = 0,
    progress: Callable[[str], None] = lambda words: None,
) -> Assessment:
    r"""Assess whether the guide fits, at the parameters `params`.

    Draws z_s of the guide have the importance weights w_is = p(x_i, z_is) / q(z_is), for each element i of the plates that all latent sites share,
    or one for the whole program. From them come:

    - Pareto's k̂ and the relative effective sample size (Σ_s w)² / (S Σ_s w²) of each element. An element is poor if k̂ exceeds min(1 − 1/log₁₀ S,
      0.7). Where weights take few values (finite latents), no tail can be fitted, and it is poor if the relative effective size is below 0.1.
    - The evidence log p(x): the bound Σ_i log 1/S Σ_s w_is, below it in expectation; a limit below it in at least 1 − `level` of all runs
      (Markov's inequality on 10 independent parts of the draws, which needs no assumption); and the exact evidence where the latents of
      an element have at most `outcomes` values. Otherwise there is no upper bound that is valid at finite S, and none is given: the
      χ-bound (CUBO) is one only inside an expectation within the logarithm.
    - Posterior predictive checks of each observed site: the share of each of few values, else mean and standard deviation (and share of zeros of
      counts), and `checks`.
    - With `simulations`, simulation-based calibration: latents and data are drawn from the model, and the rank of each latent among
      `rank_draws` draws of the guide for these data is uniform if the guide is the posterior. So is the rank of its density log q(z; x), which
      shows a guide that is right only on average over the data. Uniformity: chi-square tests with Bonferroni's correction.
    - With `simulations`, two bounds around the mean log evidence of the simulated data: the latents that made the data are a draw of their exact
      posterior, and among the guide's draws they make the mean weight an upper bound in expectation (Sobolev and Vetrov, 2019, theorem 1).
    - Collapse: elements whose entropy is 0 or maximal, or whose guide is the prior, for all data. It decides nothing: data may say nothing of an element.

    Densities are those of the objective: a site that is summed out counts with its sum, a masked one does not count.

    Args:
        model: the model.
        guide: the guide; it may be wrapped (`config_estimators`). Draws are its own, whatever the estimators.
        args: positional arguments of the program, with all data.
        kwargs: keyword arguments of the program.
        params: the parameters, such as `svi.get_params(state)`. Default: None, those that the program starts with.
        samples: S, the number of draws of the guide, 100 or more. Default: 1000.
        plates: names of the plates whose elements have a weight each, as in `IWAE`. None (the default) takes those that all latent sites
            share, and one weight for the whole program where there are none. `()` asks for one weight.
        replicates: how many data sets the predictive checks draw; 0 for none. Default: 1000.
        checks: checks of your own: functions by name, each from a mapping of observed sites to arrays to one number. Masked arrays where a
            site is masked.
        simulations: number of simulated data sets, 20 or more. Default: 0, no calibration and no such bounds.
        dream: function that is called with a mapping from observed sites to simulated data, and with the program's arguments. It returns the tuple
            of arguments with these data. Not needed where each observed value is itself one of the arguments.
        refit: function that fits the guide to the arguments that it is called with, and returns its parameters, or a tuple of a guide and its
            parameters. Not needed where the guide is amortised: it is then run on the simulated data.
        rank_draws: draws of the guide among which a latent is ranked. Default: 99.
        level: rate of false alarms of the predictive checks and of the calibration, each. Default: 0.01.
        tolerated: share of elements that may be poor. Default: 0.05.
        outcomes: maximal number of values of an element's latents to enumerate. Default: 4096.
        seed: seed of the draws. Default: 0.
        progress: function that is called with the name of each phase.

    Returns:
        The `Assessment`: `passed`, `sentence`, the numbers, and `to_arviz()`. `print` shows it.

    Shapes:
        Numbers of elements have the shape of the plates. Evidence is in nats.

    Assumptions:
        The bound and the limit hold for any guide that proposes every possible value. A guide that leaves a mode out completely has weights
        that do not show it; simulations do.

    Raises:
        ConfigurationError: a number is out of range, the extra `pplgrad[assess]` is missing, or simulated data cannot be handed to the guide.
        ProgramError: a plate is subsampled, a site is scaled, drawn by the model alone, a point mass, or masked in one program alone.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Bernoulli(0.5))
        ...         numpyro.sample("x", dist.Bernoulli(0.2 + 0.6 * z), obs=x)
        >>> def guide(x):
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Bernoulli(0.2 + 0.6 * x))
        >>> found = assess_fit(model, guide, (jnp.array([0, 1, 1]),))
        >>> found.passed, round(found.evidence.exact, 4), round(found.evidence.bound, 4)
        (True, -2.0794, -2.0794)

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), for k̂; Yao, Vehtari, Simpson and Gelman (2018), for k̂ of a guide.
        Burda, Grosse and Salakhutdinov (2016), for the bound; Grosse, Ghahramani and Adams (2015), for limits by Markov's inequality; Sobolev and
        Vetrov (2019), for the bound from above.
        Gelman, Meng and Stern (1996), for predictive checks; Talts et al. (2018) and Modrák et al. (2023), for calibration.
    """
    plan = Plan(
        samples, replicates, simulations, rank_draws, level, tolerated, outcomes, seed, checks or {}, dream, refit
    )
    host = AssessedProgram(program_of("assess_fit", model, guide, args, kwargs), params, plates, seed)
    return assess(host, plan, progress)
