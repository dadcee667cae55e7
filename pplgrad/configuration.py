"""Which estimator a site gets: mappings of names and patterns, their precedence, and the default choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, NamedTuple

from pplgrad.baselines.average import DecayingAverage
from pplgrad.baselines.leave_one_out import LeaveOneOut
from pplgrad.baselines.neural import NeuralBaseline
from pplgrad.core.estimator import Estimator
from pplgrad.core.filtering import FIVO
from pplgrad.core.objectives import MultiSample
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import ConfigurationError, EstimatorError, UnmatchedNameError, listed
from pplgrad.estimators.auto import Auto
from pplgrad.estimators.enumerate import Enumerate
from pplgrad.estimators.local_expectation import LocalExpectation
from pplgrad.estimators.multi_sample import VIMCO
from pplgrad.estimators.reparam import Reparam
from pplgrad.estimators.score import ScoreFunction
from pplgrad.monitoring.watch import Watch, Watcher
from pplgrad.monitoring.without_effect import warn_without_effect


@dataclass
class EstimatorMapping:
    """A mapping from site names and glob patterns to estimators, that remembers which of its keys matched.

    A guide's mapping also holds what watches the run, if anything does.
    """

    estimators: dict[str, Estimator]
    matched: set[str] = field(default_factory=set)
    watcher: Watcher | None = None
    warned: bool = False
    """Whether it was said that an ELBO does not read it."""

    @property
    def tells(self) -> bool:
        """Whether it says anything that an ELBO could read."""
        return bool(self.estimators or self.watcher)

    @classmethod
    def of(cls, estimators: Mapping[str, Estimator] | None, owner: str) -> EstimatorMapping:
        """Check a user's mapping and copy it."""
        if estimators is None:
            return cls({})
        if not isinstance(estimators, Mapping):
            raise ConfigurationError(
                f"{owner} takes a mapping from site names or patterns to estimators, such as "
                f'{{"z": ScoreFunction()}}; got {type(estimators).__name__}.'
            )
        for key, estimator in estimators.items():
            if not isinstance(key, str):
                raise ConfigurationError(f"{owner}: the key {key!r} is not a site name or pattern; use a string.")
            check_estimator(estimator, f"'{key}' in {owner}")
        return cls(dict(estimators))

    def find(self, name: str) -> Estimator | None:
        """Return the estimator for a site: an exact name first, then the patterns in their order."""
        fitting = [key for key in self.estimators if key == name or fnmatchcase(name, key)]
        # Every key that fits counts as matched, also where another one wins.
        self.matched.update(fitting)
        if name in self.estimators:
            return self.estimators[name]
        return self.estimators[fitting[0]] if fitting else None

    def unmatched(self) -> list[str]:
        """Return the keys that have matched no site so far."""
        return [key for key in self.estimators if key not in self.matched]


def check_estimator(estimator: object, where: str) -> None:
    """Refuse what is not an estimator object."""
    if not isinstance(estimator, Estimator):
        hint = f"{estimator.__name__}()" if isinstance(estimator, type) else "ScoreFunction() or Reparam()"
        raise ConfigurationError(f"The estimator at {where} is {estimator!r}, not an estimator; write {hint}.")


_UNWATCHED: ContextVar[bool] = ContextVar("pplgrad_unwatched", default=False)


@contextmanager
def unwatched() -> Iterator[None]:
    """Draw gradients that are not steps of a run: no watch records them."""
    token = _UNWATCHED.set(True)
    try:
        yield
    finally:
        _UNWATCHED.reset(token)


def watcher_of(mappings: Iterable[EstimatorMapping]) -> Watcher | None:
    """Return what watches the run, by the mappings of the guide's wrappers."""
    if _UNWATCHED.get():
        return None
    found = [mapping.watcher for mapping in mappings if mapping.watcher is not None]
    if len(found) > 1:
        raise ConfigurationError(
            "Two wrappers of the guide have a watch; give config_estimators(watch=...) once, with a callback and a folder if "
            "both are wanted."
        )
    return found[0] if found else None


def refuse_unmatched(mapping: EstimatorMapping, latent: Iterable[str], observed: Iterable[str], owner: str) -> None:
    """Raise if a key of the mapping matched no latent site."""
    latent, observed = list(latent), list(observed)
    for key in mapping.unmatched():
        seen = [name for name in observed if name == key or fnmatchcase(name, key)]
        if seen:
            raise EstimatorError(
                f"{owner} names '{key}', but site '{seen[0]}' is observed and has no gradient to estimate; remove "
                f"the entry. The guide's latent sites are: {listed(latent)}."
            )
        raise UnmatchedNameError(owner, key, latent)


_RUNNING: ContextVar[list[EstimatorMapping] | None] = ContextVar("pplgrad_running_mappings", default=None)


@contextmanager
def collect_mappings() -> Iterator[list[EstimatorMapping]]:
    """Collect the mappings of all guide wrappers that run inside the context."""
    collected: list[EstimatorMapping] = []
    token = _RUNNING.set(collected)
    try:
        yield collected
    finally:
        _RUNNING.reset(token)


def report_mapping(mapping: EstimatorMapping, other: Callable[[], object], remedy: str) -> None:
    """Tell the ELBO that runs the guide, if one does, that this wrapper's mapping takes part.

    `other` returns an ELBO that trains the guide and reads no mapping, None if there is none; the warning names `remedy`.
    """
    collected = _RUNNING.get()
    if collected is not None:
        if not any(mapping is known for known in collected):
            collected.append(mapping)
    elif mapping.tells and not mapping.warned and (elbo := other()) is not None:
        mapping.warned = True
        warn_without_effect(mapping.estimators, elbo, remedy)


def refuse_unfiltered(name: str, estimator: Any, objective: FIVO) -> None:
    """Refuse what cannot estimate the gradient at a site whose draws decide which particles are resampled."""
    if estimator not in (Reparam(), ScoreFunction()):
        raise EstimatorError(
            f"Site '{name}' has {estimator!r}, but the draws of a particle filter decide which particles go on, and it brings baselines of its "
            f"own; under {objective!r} use ScoreFunction() there, or Reparam() where the distribution allows it."
        )


class Resolved(NamedTuple):
    """A site's estimator, why it has it, and the `Auto(measure=True)` that chooses it, if one does."""

    estimator: Estimator
    reason: str
    measuring: Auto | None = None


def resolve(
    mapping: EstimatorMapping, own: object, site: SiteInfo, stateful: bool, higher_order: bool = False
) -> Resolved:
    """Return a site's estimator and why: the ELBO's mapping first, then the site's own, then the default.

    `Auto` is replaced by its choice, and whatever comes out has checked that it fits the site.
    """
    if own is not None:
        check_estimator(own, f"site '{site.name}' (infer)")
    override = mapping.find(site.name)
    default = default_estimator(site, stateful)
    if own is ASKED_BY_HOST and isinstance(site.objective, MultiSample) and not site.objective.draws_are_constant:
        # A bound of several particles has no joint sum; this is the sum over the site's own values.
        own = LocalExpectation()
    found: Any = override or own or default
    reason = "the ELBO's argument" if override else "named by the guide" if own else "the default"
    measuring = found if isinstance(found, Auto) and found.measure else None
    if isinstance(found, Auto):
        found, why = found.choose(site, default)
        reason = f"Auto: {why}"
    if isinstance(site.objective, MultiSample) and site.objective.draws_are_constant and found != ScoreFunction():
        raise EstimatorError(
            f"Site '{site.name}' names {found!r}, but under {site.objective!r} no gradient goes through a draw and no site has an "
            "estimator; remove it (ScoreFunction() stands for none)."
        )
    if isinstance(site.objective, MultiSample) and site.objective.draws_are_constant:
        reason = f"no estimator: draws are constants under {type(site.objective).__name__}"
    if isinstance(site.objective, FIVO):
        refuse_unfiltered(site.name, found, site.objective)
        if not site.objective.is_unbiased_at(site.is_discrete):
            reason = f"{reason}; biased: {site.objective!r}"
    site = replace(site, higher_order=higher_order)
    found.check(site)
    if higher_order and found.declaration.derivatives is not None:
        raise EstimatorError(
            f"{found!r} at site '{site.name}' is right for first derivatives alone, and the ELBO has higher_order=True; use "
            f"{'Reparam()' if site.has_rsample else 'ScoreFunction()'} there (with a baseline that does not normalise)."
        )
    return Resolved(found, reason, measuring)


def own_estimator(name: str, infer: Mapping[str, Any], has_rsample: bool) -> Any:
    """Return the estimator that a site of the guide asks for by itself; None if it asks for none.

    The hosts' `infer={"enumerate": ...}` asks for the sum over the site's values. It says nothing of a site that is reparameterized, which the hosts'
    `config_enumerate` leaves out too.
    """
    _refuse_misspelt(name, infer)
    if "estimator" in infer:
        return infer["estimator"]
    if not infer.get("enumerate") or has_rsample:
        return None
    if infer.get("num_samples") is not None:
        raise ConfigurationError(
            f"Site '{name}' has infer={{'enumerate': {infer['enumerate']!r}, 'num_samples': {infer['num_samples']}}}; write "
            f"infer={{'estimator': ScoreFunction(samples={infer['num_samples']})}}, which uses each draw in a baseline of the others."
        )
    return ASKED_BY_HOST


def refuse_pyros_baseline(name: str, infer: Mapping[str, Any]) -> None:
    """Refuse Pyro's option of a site where the program is NumPyro's, which has none of this name."""
    if infer.get("baseline") and "estimator" not in infer:
        raise ConfigurationError(
            f"Site '{name}' has infer={{'baseline': ...}}, an option of Pyro's; write infer={{'estimator': ScoreFunction(...)}} with "
            "DecayingAverage(), NeuralBaseline() or FunctionBaseline(f)."
        )


_OPTIONS = ("estimator", "closed_form", "enumerate", "num_samples", "baseline", "is_auxiliary", "kl")
"""The options of a site that change the gradient, by pplgrad or by one of the hosts."""


def _refuse_misspelt(name: str, infer: Mapping[str, Any]) -> None:
    """Refuse an option that nothing reads and that is nearly one that changes the gradient; others are the user's own notes."""
    for key in infer:
        meant = _meant(str(key))
        if meant is not None:
            raise ConfigurationError(
                f"Site '{name}' has infer={{{key!r}: ...}}, which nothing reads; did you mean {meant!r}?"
            )


@lru_cache(maxsize=1024)  # Asked at every site in every step.
def _meant(key: str) -> str | None:
    """Return the option that a key is nearly; None for an option, and for what is none of them."""
    close = [] if key in _OPTIONS else get_close_matches(key, _OPTIONS, 1, 0.8)
    return close[0] if close else None


ASKED_BY_HOST = Enumerate()
"""What stands for the hosts' `infer={"enumerate": ...}`; known by its identity."""


def default_estimator(site: SiteInfo, stateful: bool) -> Estimator:
    """Return what an unconfigured site gets.

    Reparameterization where the sampler allows it; else the score function, with leave-one-out over several
    particles (or `VIMCO` where the objective combines them), or with one particle a decaying average and a network on top of it (`stateful=False`: no baseline,
    where nothing can keep its state).
    """
    if isinstance(site.objective, MultiSample) and site.objective.draws_are_constant:
        return ScoreFunction()
    if site.has_rsample:
        return Reparam()
    if isinstance(site.objective, FIVO):
        return ScoreFunction()
    if site.combined > 1:
        return VIMCO()
    if site.particles > 1 and not site.combined:
        return ScoreFunction(LeaveOneOut())
    return DEFAULT_STATEFUL if stateful else ScoreFunction()


DEFAULT_STATEFUL = ScoreFunction(DecayingAverage(0.9) + NeuralBaseline())


def configured(guide: Any, estimators: Any, watch: Any, wrap: Callable[[Callable, EstimatorMapping], Any]) -> Any:
    """Return a wrapped guide, or a decorator if no guide is given: what both libraries' `config_estimators` do."""
    if watch is not None and not isinstance(watch, Watch):
        raise ConfigurationError(f"config_estimators(watch=...) takes a Watch, such as Watch(print); got {watch!r}.")

    def mapped(given: Any) -> EstimatorMapping:
        mapping = EstimatorMapping.of(given, "config_estimators")
        return mapping if watch is None else replace(mapping, watcher=Watcher(watch))

    def wrapped(given: Any, mapping: EstimatorMapping) -> Any:
        if not callable(given):
            raise ConfigurationError(f"config_estimators takes a guide, a callable; got {type(given).__name__}.")
        return wrap(given, mapping)

    if isinstance(guide, Mapping) and estimators is not None:
        raise ConfigurationError(
            "config_estimators got the mapping before the guide; the guide goes first: write config_estimators(guide, {...})."
            if callable(estimators)
            else "config_estimators got two mappings and no guide; write config_estimators(guide, {...})."
            if isinstance(estimators, Mapping)
            else f"config_estimators got a mapping in the guide's place, and {type(estimators).__name__} as estimators; write "
            "config_estimators(guide, {...})."
        )
    if guide is None or isinstance(guide, Mapping):
        mapping = mapped(guide if guide is not None else estimators)
        return lambda function: wrapped(function, mapping)
    return wrapped(guide, mapped(estimators))
