"""What both libraries say of sites that only the model has and that are summed out: which are joined, how they weigh, what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pplgrad.core.objectives import CostWeights
from pplgrad.engine.description import SummedSite
from pplgrad.errors import ConfigurationError, ImpossibleValueError, ProgramError, listed

KINDS = ("samples", "marginals", "map")
"""What there is to know of the posterior of summed sites."""

MOST = 10**8
"""Numbers that one density may have at all values of the summed sites that it reads."""


NEVER = -1e30
"""The log density of what is impossible, where the posterior of summed sites is found: of no weight beside anything possible, and differences of
it are numbers."""


def joined(parts: Iterable[tuple[str, frozenset[str]]]) -> list[tuple[list[str], frozenset[str]]]:
    """Return the components of some sites: those that marks join, with all of their marks, in the order of the first site of each.

    >>> joined([("a", frozenset("x")), ("b", frozenset("y")), ("c", frozenset("xz"))])[0][0]
    ['a', 'c']
    """
    order: list[str] = []
    found: list[tuple[list[str], frozenset[str]]] = []
    for name, marks in parts:
        order.append(name)
        mine = [part for part in found if part[1] & marks]
        names = [other for part in mine for other in part[0]]
        found = [part for part in found if part not in mine]
        found.append(([*names, name], marks.union(*(part[1] for part in mine))))
    ordered = [(sorted(names, key=order.index), marks) for names, marks in found]
    return sorted(ordered, key=lambda part: order.index(part[0][0]))


def short(names: Sequence[str]) -> str:
    """Return some names in words; the first tells them from those of another component."""
    return ", ".join(names if len(names) <= 3 else [names[0], names[1], "...", names[-1]])


def weight(sites: Sequence[Mapping[str, Any]], weights: CostWeights) -> Any:
    """Return the weight in an objective of sites (without those summed out) whose densities are in one sum: it has no two."""
    latent = [site["name"] for site in sites if not site["is_observed"]]
    seen = [site["name"] for site in sites if site["is_observed"]]
    if latent and seen and weights.prior is not weights.observed and weights.prior != weights.observed:
        raise ProgramError(
            f"The density of site '{latent[0]}' and that of the observed site '{seen[0]}' are summed out together, and the objective weighs the "
            "two differently; use an objective that does not (ELBO(), IWAE()), or draw the summed site in the guide."
        )
    return weights.prior if latent else weights.observed


def no_finite_support(name: str, family: str) -> ProgramError:
    """Return the error for a site that is to be summed out and takes infinitely many values, or unknown ones."""
    return ProgramError(
        f"Site '{name}' of the model is to be summed out (infer={{'enumerate': 'parallel'}}), but {family} has no finite support; "
        "draw it in the guide, without 'enumerate'."
    )


def drawn_given_sum(name: str) -> ProgramError:
    """Return the error for a site that the model draws, and not the guide, given a summed one."""
    return ProgramError(
        f"Site '{name}' is drawn in the model alone, given a site that is summed out, so that it has another value for each of that site's; "
        "draw it in the guide."
    )


def sum_over_draws(name: str, num_samples: Any) -> ProgramError:
    """Return the error for a site that is to be summed out over draws, not over its values."""
    return ProgramError(
        f"Site '{name}' of the model has infer={{'num_samples': {num_samples!r}}}, which asks for a sum over draws that is exact "
        "in expectation alone, before its logarithm; leave it out, to sum the site out exactly."
    )


def joint_values(name: str, family: str) -> ProgramError:
    """Return the error for a site that is to be summed out and has several elements in one event."""
    return ProgramError(
        f"Site '{name}' of the model is to be summed out (infer={{'enumerate': 'parallel'}}), but its event ({family}, to_event) has several "
        "elements, whose values would be taken all together; put the elements into a plate, without to_event."
    )


def mixed_values(name: str, summed: str, dim: int) -> ProgramError:
    """Return the error for a density that may mix the values of a summed site."""
    return ProgramError(
        f"Site '{summed}' is summed out, so that it has all its values at once, along dimension {dim}, and the density of site '{name}' may mix "
        "them: the model sums, sorts or reorders along that dimension (z.sum(), say), or does what cannot be followed. Compute with dimensions "
        f"counted from the right and of plates and events alone, or draw '{summed}' in the guide."
    )


def read_after_scan(name: str, summed: str) -> ProgramError:
    """Return the error for a density outside of a scan that reads what the scan hands out of a summed site."""
    return ProgramError(
        f"Site '{name}' reads what a scan hands out of site '{summed}', which is summed out, so that there it has all its values at once; put "
        f"'{name}' into the body of the scan, under handlers.mask(mask=t == T - 1) for the last of T steps, or draw '{summed}' in the guide."
    )


def refuse_unfollowed(sites: Sequence[SummedSite]) -> None:
    """Refuse summed sites in a program whose Python reads values, so that what it computes from them cannot be followed."""
    if sites:
        raise ProgramError(
            f"Site '{sites[0].name}' is summed out, so that it has all its values at once, while Python control flow of the program depends on a "
            f"value, and so it cannot be seen whether the values are kept apart; draw '{sites[0].name}' in the guide, or write the control flow "
            "with jnp.where, cond or scan."
        )


def too_large(name: str, numbers: int, markov: str) -> ProgramError:
    """Return the error for a density with too many numbers at all values of the summed sites that it reads."""
    return ProgramError(
        f"The log density of site '{name}' has {numbers:,} numbers, for all values of the summed sites that it reads, in all plates. "
        f"Draw some of these sites in the guide, with LocalExpectation() or ScoreFunction(), or separate the steps of a chain with {markov}."
    )


def check_posterior(kind: Any, num_samples: Any) -> None:
    """Refuse arguments of `summed_posterior` that say nothing."""
    if kind not in KINDS:
        raise ConfigurationError(f'summed_posterior(kind={kind!r}): write "samples", "marginals" or "map".')
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ConfigurationError(
            f"summed_posterior(num_samples={num_samples!r}): write how many draws of the guide to make, 1 or more."
        )


def nothing_summed() -> ProgramError:
    """Return the error for a program without a summed site, whose posterior is asked for."""
    return ProgramError(
        "summed_posterior() found no site that is summed out; give discrete sites of the model that the guide does not draw "
        "infer={'enumerate': 'parallel'}."
    )


def no_posterior(summed: Sequence[str], others: Sequence[str]) -> ImpossibleValueError:
    """Return the error for summed sites all of whose values are impossible beside the other sites of their component."""
    return ImpossibleValueError(
        f"The sites {listed(list(summed))} have no posterior: the log density of {listed(list(others or summed))} is NaN or infinite at all of "
        "their values; check the parameters and the data there."
    )


def two_scales(first: str, second: str, handler: str) -> ProgramError:
    """Return the error for two sites that are in one sum and are scaled differently."""
    return ProgramError(
        f"The sites '{first}' and '{second}' are summed out together, and have different scales (a subsampled plate around "
        f"one of them, or {handler}), so that their sum has none; put both into the plate, or draw the summed site in the guide."
    )
