"""What is refused of programs whose particles are filtered, in the same words in both libraries."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pplgrad.core.filtering import FIVO
from pplgrad.errors import ConfigurationError, ImpossibleValueError, ProgramError, listed


def refuse_options(objective: FIVO, options: Mapping[str, bool]) -> None:
    """Refuse options of an ELBO that a particle filter does not have: a mapping from what was passed to whether it was."""
    for passed, given in options.items():
        if given:
            raise ConfigurationError(f"{objective!r} does not go with {passed}; drop that, or use IWAE() in its place.")


def no_loop(side: str, objective: FIVO, loop: str) -> ProgramError:
    """Return the error for a program without a loop over time."""
    return ProgramError(
        f"The {side} has no {loop} with a site in it, and {objective!r} resamples its particles between the steps of one; write the "
        f"steps of guide and model as {loop}, or use IWAE(plates=())."
    )


def refuse_lengths(guide: int, model: int, objective: FIVO) -> None:
    """Refuse loops of several lengths."""
    if guide != model:
        raise ProgramError(
            f"The guide's loop over time has {guide} steps and the model's has {model}, and {objective!r} weighs both step by step; give both the "
            "same steps, and mask what a shorter sequence has no data for."
        )


def no_steps(side: str, objective: FIVO) -> ProgramError:
    """Return the error for a loop over time of length 0."""
    return ProgramError(
        f"The {side}'s loop over time has no steps, and {objective!r} weighs particles in each of them; pass data of one step or more."
    )


def refuse_after(side: str, names: Collection[str], objective: FIVO) -> None:
    """Refuse sites that stand after the loop over time."""
    if names:
        raise ProgramError(
            f"Site '{sorted(names)[0]}' of the {side} stands after the loop over time, or in another one, where {objective!r} resamples no "
            "more; draw and observe it before the loop or in one of its steps."
        )


def refuse_subsampled(name: str, size: int, drawn: int, objective: FIVO) -> None:
    """Refuse a plate of a minibatch: the scale of a minibatch inside of a weight gives no bound."""
    if size != drawn:
        raise ProgramError(
            f"Plate '{name}' is subsampled, and {objective!r} weighs the program as a whole; pass the minibatch in as data, with a plate of "
            "its own size."
        )


def refuse_other_steps(guide: Collection[str], model: Collection[str], step: Any, objective: FIVO) -> None:
    """Refuse latent sites that guide and model draw in different steps; `step` says which."""
    apart = sorted(set(guide) ^ set(model))
    if apart:
        has, lacks = ("guide", "model") if apart[0] in guide else ("model", "guide")
        raise ProgramError(
            f"Site '{apart[0]}' of the {has} is drawn {step}, and not there in the {lacks}, so that {objective!r} cannot weigh it; draw it in the "
            f"same step of both. The sites of the {lacks} there: {listed(sorted(model if has == 'guide' else guide))}."
        )


def are_scored(objective: FIVO, estimators: Mapping[str, Any]) -> bool:
    """Return whether the score of any draw is followed."""
    return objective.resampling_gradient != "stop-gradient" and any(x.uses_score for x in estimators.values())


def refuse_held(objective: FIVO, own: Collection[str], estimators: Mapping[str, Any]) -> None:
    """Refuse a guide whose own parameters would get no gradient: no draw has a path, and densities of draws are constants."""
    if objective.resampling_gradient == "stop-gradient" and own and all(x.uses_score for x in estimators.values()):
        raise ConfigurationError(
            f"Parameter {listed(sorted(own))} is the guide's alone, and under {objective!r} it gets a gradient through reparameterized sites "
            "alone, of which there are none; use resampling_gradient='score' or 'drop', or a guide that draws as the model does."
        )


def changed_when_replayed(objective: FIVO) -> ProgramError:
    """Return the error for a program that does not compute the same at the same values."""
    return ProgramError(
        f"Run again at the values of its particles' ancestors, the program has other log densities, and {objective!r} needs the same: it draws random "
        "numbers outside of sample sites (dropout), keeps Python state between runs, or lets one particle read another; draw with pyro.sample, "
        "and keep the particles' dimension apart."
    )


def impossible_bound(steps: Collection[int]) -> ImpossibleValueError:
    """Return the error for a bound that is NaN or infinite."""
    return ImpossibleValueError(
        f"The bound is NaN or infinite in step {min(steps)} (of those counted from 0): no particle has a weight there that is finite and above 0. "
        "Let the guide draw only what the model gives a density, or use more particles."
    )
