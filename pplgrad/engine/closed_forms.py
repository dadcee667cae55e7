"""Divergences and entropies in closed form: which sites have one, and when that loses nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import ELBO, CostWeights, MultiSample, Objective
from pplgrad.core.plates import Read
from pplgrad.core.sites import CostSpec
from pplgrad.errors import ConfigurationError, EstimatorError, ProgramError, listed

KINDS = ("kl", "entropy")


@dataclass
class ClosedForms:
    """A mapping from site names and glob patterns to "kl" or "entropy", that remembers which of its keys matched."""

    kinds: dict[str, str] = field(default_factory=dict)
    matched: set[str] = field(default_factory=set)
    objective: Objective = field(default_factory=ELBO)

    @classmethod
    def of(cls, kinds: Mapping[str, str] | None, objective: Objective) -> ClosedForms:
        """Check a user's mapping and copy it."""
        if kinds is None:
            return cls(objective=objective)
        if not isinstance(kinds, Mapping):
            raise ConfigurationError(
                'TraceGrad_ELBO(closed_form=...) takes a mapping from site names or patterns to "kl" or "entropy"; got '
                f"{type(kinds).__name__}."
            )
        for key, kind in kinds.items():
            _check_kind(kind, f"'{key}' in TraceGrad_ELBO(closed_form=...)")
        return cls(dict(kinds), objective=objective)

    def find(self, name: str, own: Any, estimator: Estimator, in_model: bool, weights: CostWeights) -> str | None:
        """Return what a site has in closed form: by the ELBO's mapping, else by its own `infer`; or refuse it."""
        fitting = [key for key in self.kinds if key == name or fnmatchcase(name, key)]
        self.matched.update(fitting)
        kind = self.kinds.get(name, self.kinds[fitting[0]] if fitting else own)
        if kind is None:
            return None
        _check_kind(kind, f"site '{name}' (infer)")
        if isinstance(self.objective, MultiSample):
            raise EstimatorError(
                f"The '{kind}' of site '{name}' in closed form has no meaning under {self.objective!r}, whose weights are made of "
                "the densities themselves; drop one of the two."
            )
        if estimator.sticking_the_landing:
            raise EstimatorError(
                f"Site '{name}' has {estimator!r}, which follows the density of the draw, and its '{kind}' in closed form, which has "
                "no draw; choose one of the two."
            )
        if kind == "kl" and not in_model:
            raise EstimatorError(
                f"Site '{name}' is not in the model, so that it has no divergence; use 'entropy' there."
            )
        if kind == "kl" and not (weights.prior is weights.guide or _equal(weights.prior, weights.guide)):
            raise EstimatorError(
                f"The objective weighs the densities of site '{name}' differently in guide and model, so that they are no "
                "divergence; use 'entropy' there."
            )
        return kind

    def refuse_unmatched(self, latent: Sequence[str]) -> None:
        """Raise if a key matched no latent site."""
        for key in self.kinds:
            if key not in self.matched:
                raise ConfigurationError(
                    f"TraceGrad_ELBO(closed_form=...) names '{key}', which matches no latent site of the guide; the sites are: "
                    f"{listed(latent)}."
                )


@dataclass(frozen=True)
class Counting:
    """How the sites of a program count in the objective: the weights of their log densities, and what is in closed form."""

    weights: CostWeights
    closed: ClosedForms = field(default_factory=ClosedForms)


def _check_kind(kind: Any, where: str) -> None:
    if kind not in KINDS:
        raise ConfigurationError(f'The closed form at {where} is {kind!r}; write "kl" or "entropy".')


def _equal(first: Any, second: Any) -> bool:
    return isinstance(first, (int, float)) and isinstance(second, (int, float)) and first == second


def refuse_lossy(costs: Sequence[CostSpec], depends: Sequence[Mapping[str, Read]]) -> None:
    """Refuse a divergence that depends on the site's own draw, through a site that follows it in the guide.

    A cost that is said to read its own site's draw directly stands for one of which nothing is known.
    """
    for cost, reads in zip(costs, depends, strict=True):
        if cost.closed and cost.name in reads and cost.name not in cost.reads:
            later = next(name for name in cost.reads)
            raise ProgramError(
                f"The divergence of site '{cost.name}' has no closed form: the model draws the site given '{later}', which follows "
                "it in the guide; drop it from closed_form, or use 'entropy' there."
            )


def no_closed_form(name: str, kind: str, laws: Sequence[str], why: str) -> EstimatorError:
    """Return the error for a closed form that the host does not know."""
    what = f"divergence of {laws[0]} from {laws[-1]}" if kind == "kl" else f"entropy of {laws[0]}"
    return EstimatorError(f"The {what} at site '{name}' has no closed form here ({why}); drop it from closed_form.")


class NoClosedForms(ClosedForms):
    """Closed forms of none: for whoever wants the densities themselves, whatever a site's `infer` says."""

    def find(self, name: str, own: Any, estimator: Estimator, in_model: bool, weights: CostWeights) -> str | None:
        """Return None."""
        return None
