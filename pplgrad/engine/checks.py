"""What is refused in both libraries, in the same words."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any

from pplgrad.core.estimator import Estimator
from pplgrad.core.filtering import FIVO
from pplgrad.core.objectives import MultiSample, Objective
from pplgrad.core.off_policy import OffPolicy
from pplgrad.core.thermodynamic import TVO
from pplgrad.engine.layout import Layout
from pplgrad.errors import ConfigurationError, EstimatorError, ImpossibleValueError, ProgramError, first_line, listed

_OF_MASKED = ", which Pyro drops at a site with obs_mask: give it by config_enumerate around the model"


def refuse_mismatch(
    guide: Mapping[str, Mapping],
    model: Mapping[str, Mapping],
    from_prior: Callable[[Any], bool],
) -> None:
    """Refuse a latent site that only one of guide and model has, and an estimator on an observed guide site.

    A site that only the model has is let through if the model may draw it `from_prior`, as both libraries do.
    Both map names of sample sites (without those of plates) to messages with `is_observed` and `infer`.
    """
    in_guide = [name for name, site in guide.items() if not site["is_observed"]]
    in_model = [name for name, site in model.items() if not site["is_observed"]]
    for name in in_guide:
        if name not in model and not guide[name]["infer"].get("is_auxiliary"):
            raise ProgramError(
                f"Site '{name}' is in the guide but not in the model; add it to the model, or mark it in the guide "
                f"with infer={{'is_auxiliary': True}}. The model's latent sites are: {listed(in_model)}."
            )
    for name in in_model:
        if name not in guide and not from_prior(model[name]):
            raise ProgramError(
                f"Site '{name}' is in the model but not in the guide; draw it in the guide as well, or observe it, or sum it out if it is discrete "
                f"(infer={{'enumerate': 'parallel'}}{_OF_MASKED if name.endswith('_unobserved') else ''}). The guide's latent sites are: {listed(in_guide)}."
            )
    for name, site in guide.items():
        if site["is_observed"] and "estimator" in site["infer"]:
            raise EstimatorError(f"Site '{name}' is observed and has no gradient to estimate; remove its estimator.")


def refuse_model_estimator(site: Mapping[str, Any]) -> None:
    """Refuse an estimator that the model, not the guide, asks for."""
    if "estimator" in site["infer"]:
        what = "observed" if site["is_observed"] else "in the model"
        raise EstimatorError(
            f"Site '{site['name']}' has infer={{'estimator': ...}} but is {what}; estimators belong to the latent "
            "sites of the guide."
        )


def checked_objective(objective: Any, particles: int, higher_order: bool = False) -> Objective:
    """Return an objective, or refuse what is not one, or does not fit the number of particles or the order of derivatives."""
    if not isinstance(objective, Objective):
        hint = f"{objective.__name__}()" if isinstance(objective, type) else "ELBO(kl_weight=0.5) or Expectation()"
        raise ConfigurationError(f"TraceGrad_ELBO(objective={objective!r}): write an objective, such as {hint}.")
    if isinstance(objective, (MultiSample, FIVO)):
        objective.combined(particles)
    if isinstance(objective, FIVO) and higher_order:
        raise ConfigurationError(
            f"{objective!r} estimates first derivatives alone; drop higher_order=True, or use ELBO()."
        )
    if isinstance(objective, MultiSample) and objective.draws_are_constant and higher_order:
        raise ConfigurationError(
            f"{objective!r} takes its draws for constants, so that its second derivatives are those of no expectation; drop "
            "higher_order=True, or use ELBO()."
        )
    return objective


def refuse_drawn_by_model(objective: Objective, names: Collection[str]) -> None:
    """Refuse a site that the model alone draws, under an objective in which the guide gives the density of every draw."""
    if isinstance(objective, (OffPolicy, TVO)) and names:
        raise ProgramError(
            f"Site '{sorted(names)[0]}' is drawn by the model alone, and {objective!r} compares the densities of guide and model at the same "
            "draws; draw it in the guide as well, or observe it."
        )


def refuse_not_proposed(name: str, proposed: Collection[str]) -> None:
    """Refuse a site of the guide that the proposal of the objective has not drawn."""
    if name not in proposed:
        raise ProgramError(
            f"Site '{name}' of the guide is not drawn by the objective's proposal, which has the sites {listed(sorted(proposed))}; draw it "
            "there under the same name."
        )


def refuse_other_shape(name: str, proposed: tuple, wanted: tuple) -> None:
    """Refuse a proposal's value that is not of the shape that the guide draws."""
    if tuple(proposed) != tuple(wanted):
        raise ProgramError(
            f"Site '{name}' has shape {tuple(proposed)} in the objective's proposal and shape {tuple(wanted)} in the guide; draw it in the "
            "same plates and with the same event shape."
        )


def refuse_several_numbers(objective: OffPolicy, shape: tuple) -> None:
    """Refuse a parameter of that shape where an objective learns one number."""
    if tuple(shape) not in ((), (1,)):
        raise ConfigurationError(
            f"{objective!r} learns one number, but the parameter '{objective.parameter}' has shape {tuple(shape)}; name another one: "
            "log_normalizer='log_z'."
        )


def undefined_when_relaxed(name: str, law: str) -> EstimatorError:
    """Return the refusal of a model's distribution that weights in the place of a draw do not fit."""
    return EstimatorError(
        f"Site '{name}' is relaxed in the guide, but its distribution in the model, {law}, is not defined at "
        "relaxed values; use ScoreFunction() or LocalExpectation() there."
    )


def checked_parallel(rows: Any, particles: int) -> int | None:
    """Return how many rows of branches may run at once, or refuse what is no such number; `particles` run at once anyway."""
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise ConfigurationError(
            f"TraceGrad_ELBO(max_parallel={rows!r}): write how many rows (particles × alternatives) may run at once, 1 or more, "
            "or None for all."
        )
    if rows is not None and rows < particles:
        raise ConfigurationError(
            f"TraceGrad_ELBO(max_parallel={rows}): the {particles} particles run at once already, and each branch is a row of every "
            f"particle; write {particles} or more, or vectorize_particles=False."
        )
    return rows


def refuse_misuse(layout: Layout, misused: Mapping[str, str], cut: Mapping[str, str]) -> None:
    """Refuse a program that treats a relaxed value as if it were hard; `misused` and `cut` map sites to operations.

    Relaxed are the sites whose estimators say so, and in branches with slopes also the sites that follow. The derivative of a cost
    along the sites in `cut` is not whole, which some estimators need.
    """
    soft = {site.name for site in layout.sites if site.estimator.relaxes or site.estimator.uses_slopes}
    leading = {site.name for site in layout.sites if site.estimator.uses_slopes}
    for name, operation in misused.items():
        where = _where_relaxed(layout, name, soft, leading)
        if where is not None:
            raise EstimatorError(
                f"Site '{name}' is relaxed, but the program compares, rounds or indexes with its value ({operation}), which has "
                "no gradient and no meaning between two categories; compute with the value itself (z * a + (1 - z) * b, or "
                f"one_hot @ table), or use ScoreFunction() or LocalExpectation() {where}."
            )
    exact = {site.name for site in layout.sites if site.estimator.needs_exact_slopes}
    for name, operation in cut.items():
        where = _where_relaxed(layout, name, exact, exact)
        if where is not None:
            raise EstimatorError(
                f"Site '{name}' is relaxed, but the program cuts the derivative of a cost along its value ({operation}), without which the "
                "estimate is biased; compute with the value itself (a discrete draw has no gradient of its own to be stopped), and what is "
                "continuous with functions that say so (maximum, clamp, leaky_relu, and no comparison); or use ScoreFunction() or "
                f"LocalExpectation() {where}."
            )


def refuse_lost_in_model(names: Collection[str], lost: Mapping[str, tuple[str, str]]) -> None:
    """Refuse a draw of the model's prior on which a cost depends without a derivative; `lost` maps sites to a cost and an operation."""
    for name, (cost, operation) in lost.items():
        if name in names:
            raise ProgramError(
                f"Site '{name}' is drawn in the model alone, and the log density of '{cost}' depends on it only through an operation that has no "
                f"derivative ({operation}), so that the gradient of the prior's parameters would be biased; draw '{name}' in the guide as well, "
                "or compute with functions of its value that are continuous and have a derivative."
            )


def refuse_lost(estimators: Mapping[str, Estimator], lost: Mapping[str, tuple[str, str]]) -> None:
    """Refuse a reparameterized draw on which a cost depends without a derivative; `lost` maps sites to a cost and an operation."""
    for name, (cost, operation) in lost.items():
        estimator = estimators.get(name)
        if estimator is not None and not (estimator.uses_score or estimator.relaxes):
            raise EstimatorError(
                f"{estimator!r} at site '{name}' takes the derivative along the draw, but the log density of '{cost}' depends on it only through "
                f"an operation that has none ({operation}), so that the estimate would be biased; use ScoreFunction() at '{name}', or compute "
                "with functions of its value that are continuous and have a derivative."
            )


def _where_relaxed(layout: Layout, name: str, soft: set[str], leading: set[str]) -> str | None:
    """Return at which site the estimator is to change, where a site is relaxed: its own, or one of those that it follows."""
    above = sorted(leading.intersection(layout.ancestors.get(name, {})))
    return "there" if name in soft else f"at site '{above[0]}'" if above else None


def impossible_cost(name: str, side: str, is_nan: bool, estimator: Estimator | None = None) -> ImpossibleValueError:
    """Return the error for a cost of the model or the guide (`side`) that is NaN or infinite; the estimator is that of the site."""
    if is_nan and side == "guide" and estimator is not None and estimator.if_nan:
        return ImpossibleValueError(f"The log density of site '{name}' in the guide is NaN. {estimator.if_nan}")
    return ImpossibleValueError(
        f"The log density of site '{name}' in the {side} is {'NaN' if is_nan else 'infinite'}: its value is impossible "
        "under its distribution, or a parameter has diverged; check the distribution's parameters and support there."
    )


_HOSTS = frozenset(
    {"torch", "pyro", "jax", "jaxlib", "numpyro", "numpy", "pplgrad", *sys.stdlib_module_names} - {"__main__"}
)


def is_about_the_value(error: Exception) -> bool:
    """Return whether a density's error is the host's own about the value: its check of the support, or of shapes.

    What the user's own code raises on the way may be about anything.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if frames and frames[-1].f_code.co_name == "_validate_sample":
        return True
    return all(frame.f_globals.get("__name__", "__main__").partition(".")[0] in _HOSTS for frame in frames)


def impossible_branch(name: str) -> ImpossibleValueError:
    """Return the error for an estimate that is NaN or infinite where the loss is not."""
    return ImpossibleValueError(
        f"The estimate at site '{name}' is NaN or infinite although the loss is finite: at another value that the guide can draw "
        "there a log density of the program is NaN or infinite; give that value probability 0 in the guide as well (a logit of "
        "-inf), or mend the density."
    )


def impossible_log_prob(name: str, fn: Any, error: Exception) -> ImpossibleValueError:
    """Return the error for a log density that cannot be computed; the first line of the host's says what is wrong."""
    return ImpossibleValueError(
        f"The log density at site '{name}' ({type(fn).__name__}) cannot be computed, because its value is outside the "
        f"distribution's support or has another shape: {first_line(error)}"
    )


def moving_support(name: str, distribution: str, estimator: Estimator, has_rsample: bool) -> EstimatorError:
    """Return the error for a site whose support moves with a parameter, under an estimator that takes it for fixed."""
    remedy = (
        "use Reparam() there (and ELBO() or IWAE() in the place of an objective that takes draws for constants, such as TVO()), or "
        if has_rsample
        else ""
    )
    return EstimatorError(
        f"{estimator!r} at site '{name}' ({distribution}) needs a support that stays where it is, but its bounds are computed from a "
        f"parameter, or from a draw that carries gradient, and then E[∇ log q] is not zero: {remedy}draw from a distribution with "
        "constant bounds and move its value afterwards (such as low + (high - low) * u)."
    )


def another_network(what: Any, site: str, name: str, found: Any, wanted: Any, remedy: str) -> str:
    """Return the sentence for something learned of another shape: another estimator or baseline has kept its own there."""
    return (
        f"{what!r} at site '{site}' learns '{name}' of shape {tuple(wanted)}, but what is kept under this name has shape {tuple(found)}, "
        f"from another estimator, baseline or size of network at a site of this name: {remedy}."
    )
