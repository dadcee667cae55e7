"""The checks that Pyro's own ELBOs make of a guide and a model while validation is on, by Pyro's own functions.

They run whenever a program's structure is found, and in every evaluation without a gradient. Where a structure is reused they
are left out: all that they look at (names, families, shapes of distributions and values, plates) is in the signature that is
compared at each such step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.util import check_model_guide_match, check_site_shape

from pplgrad.errors import PplgradError, ProgramError, first_line
from pplgrad.pyro._compat import in_vectorized_markov

PARTICLES = "num_particles_vectorized"
"""The name of Pyro's plate of particles."""


class Nesting(Messenger):
    """Stands inside the plate of the particles, and refuses a site whose own plates reach its dimension."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.dim is not None and -frame.dim > self._most:
                raise ProgramError(
                    f"Site '{msg['name']}' stands in plate '{frame.name}' at dimension {frame.dim}, where the particles are, because "
                    f"max_plate_nesting is {self._most} (as it was given, or as the first program that this ELBO ran had it); try "
                    f"increasing max_plate_nesting to {-frame.dim}."
                )


@contextmanager
def broadcasting(most: int, site: str | None = None, looped: bool = True) -> Iterator[None]:
    """Turn what a program raises because particles, or the branches of a site, are rows of a plate into an error that says so.

    Particles may instead be `looped` over, unless they meet in a filter.

    The program's own error is chained to it: it may be another fault.
    """
    try:
        yield
    except PplgradError:
        raise
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
        whose = "the particles" if site is None else f"the branches of site '{site}'"
        if PARTICLES in str(error) and "collide" in str(error):
            raise ProgramError(
                f"A plate of the program stands where {whose} are, because max_plate_nesting is {most} (as it was given, or as the first "
                f"program that this ELBO ran had it); try increasing max_plate_nesting. ({first_line(error)})"
            ) from error
        fault = "" if site is None else f", in {whose}"
        other = ", or use vectorize_particles=False" if looped else ""
        other += "" if site is None else f", or ScoreFunction() at '{site}'"
        raise ProgramError(
            f"The program cannot run under vectorize_particles=True{fault}, which adds a leading dimension to every value; write it so "
            f"that it broadcasts{other}. ({first_line(error)})"
        ) from error


@contextmanager
def at_other_values(site: str, estimator: Any) -> Iterator[None]:
    """Turn what a program raises at another value of a site than was drawn into an error that says so."""
    try:
        yield
    except PplgradError:
        raise
    except (RuntimeError, IndexError, KeyError, ValueError, TypeError, AssertionError) as error:
        raise ProgramError(
            f"The program fails at another value of site '{site}' than was drawn, for which {estimator!r} asks there; let it run at every "
            f"value that the site can take, or use ScoreFunction() there. ({type(error).__name__}: {first_line(error)})"
        ) from error


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn an error of Pyro's own checks into one of pplgrad's, on one line."""
    try:
        yield
    except PplgradError:
        raise
    except ValueError as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        text = "; ".join(lines).replace(":; - ", ": ").replace("; - ", ", or ").rstrip(".")
        raise ProgramError(f"{text[:1].upper()}{text[1:]}.") from error


def check_programs(model: Any, guide: Any, nesting: float) -> None:
    """Check traces of a model and a guide against each other, as `Trace_ELBO` does."""
    if not is_validation_enabled():
        return
    with _one_sentence():
        check_model_guide_match(model, _without_factors(guide), nesting)  # type: ignore[arg-type]


def refuse_vectorized_markov(msg: Any) -> None:
    """Refuse a site in `vectorized_markov`, which computes the density of a step several times and leaves it to the ELBO to count it once."""
    if in_vectorized_markov(msg["infer"]):
        raise ProgramError(
            f"Site '{msg['name']}' stands in vectorized_markov of pyro.contrib.funsor, whose steps overlap, so that densities would be counted "
            "more than once; write the loop with pyro.markov(range(...)): a chain that is summed out takes few operations there too."
        )


def refuse_density_of_hidden_draw(guide: Any, hidden: Callable[[Any], bool]) -> None:
    """Refuse a factor of the guide that stands for the density of a draw which is no site: its score term would be missing.

    `hidden` says whether what a factor adds was computed from random numbers that no site drew.
    """
    for name, site in guide.nodes.items():
        fn = site.get("fn")
        if type(fn).__name__ != "Unit":
            continue
        declared = vars(fn).get("has_rsample")
        if declared is False or (declared is None and hidden(fn.log_factor)):
            raise ProgramError(
                f"The factor '{name}' in the guide is the density of a draw that is no sample site (has_rsample=False, or random numbers of "
                "the guide's own), for which no gradient is estimated; draw it with pyro.sample, from a distribution of your own if need be, "
                "or pass has_rsample=True where the draw is reparameterized."
            )


def _without_factors(guide: Any) -> Any:
    """Return a guide's trace without its factors: their effect on the gradient is known here."""
    factors = [name for name, site in guide.nodes.items() if type(site.get("fn")).__name__ == "Unit"]
    if factors:
        guide = guide.copy()
        for name in factors:
            guide.remove_node(name)
    return guide


def check_shape(site: Any, log_prob: torch.Tensor, nesting: float) -> None:
    """Check the shape of a site's log density against its plates, as `Trace_ELBO` does."""
    with _one_sentence():
        check_site_shape({**site, "log_prob": log_prob}, nesting)  # type: ignore[arg-type]
