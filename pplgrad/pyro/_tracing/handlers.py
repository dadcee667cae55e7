"""Handlers around guide and model: estimators are bound, draws are made constant, and provenance is followed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import Objective
from pplgrad.core.site_info import SiteInfo
from pplgrad.engine.checks import moving_support, refuse_model_estimator
from pplgrad.estimators.mixtures import MixturePath
from pplgrad.estimators.relaxed import Relaxation
from pplgrad.pyro._array_ops import OPS
from pplgrad.pyro._compat import WithoutFunctions, is_outermost, keep_inverse
from pplgrad.pyro._distributions import (
    categories,
    elements,
    family,
    is_count,
    is_discrete,
    is_matrix,
    is_relaxable,
    moves,
    partly_reparameterized,
    unmasked,
)
from pplgrad.pyro._mixtures import components, mixture
from pplgrad.pyro._recording import is_recording
from pplgrad.pyro._tracing.host_checks import refuse_vectorized_markov
from pplgrad.pyro._tracing.known_densities import draw
from pplgrad.pyro._tracing.marginal_sites import is_marginal
from pplgrad.pyro._tracing.provenance import PlateAxis, Provenance
from pplgrad.pyro._tracing.relaxations import is_extended, relaxed
from pplgrad.pyro._tracing.site_options import own_estimator

# The site's name, its distribution, the estimator that its own `infer` names, and the dimensions of its plates.
Resolve = Callable[[str, Any, Estimator | None, frozenset[int]], Estimator]


class SiteMessenger(Messenger):
    """Sees every site from the outside: binds estimators, makes draws constant, follows provenance.

    It stands outermost, so that what it puts into a message is what the program and the trace get to see.
    """

    def __init__(self, resolve: Resolve | None, provenance: Provenance | None, args: tuple, kwargs: dict) -> None:
        super().__init__()
        self._arguments = args, kwargs
        self.estimators: dict[str, Estimator] = {}
        self.softens = False
        self.escaped: dict[str, int] = {}
        self._resolve = resolve
        self._provenance = provenance

    def _pyro_sample(self, msg: Any) -> None:
        refuse_vectorized_markov(msg)
        if self._provenance is not None:
            self._provenance.drawing = True
            free = not (msg["done"] or msg["is_observed"] or msg["args"] or msg["kwargs"]) and msg["value"] is None
            if free and is_outermost(self):  # Another handler might still give the site a value.
                msg["value"] = draw(msg["fn"])

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._provenance is not None:
            self._provenance.drawing = False
        if site_is_subsample(msg):
            return
        if self._provenance is not None:
            self.escaped[msg["name"]] = self._provenance.escaped
        if msg["is_observed"] or is_marginal(msg):
            return
        if self._resolve is not None:
            estimator = self._bind(msg)
            with WithoutFunctions():
                followed = msg["value"].requires_grad
            if estimator.uses_score and followed:
                msg["value"] = msg["value"].detach()
            if isinstance(estimator, Relaxation):
                msg["value"], msg["fn"] = relaxed(msg["name"], msg["fn"], msg["value"], estimator.at(*self._arguments))
            elif isinstance(estimator, MixturePath):
                msg["value"] = moved(msg["fn"], msg["value"], estimator)
        if self._provenance is not None:
            plates = axes_of(msg["cond_indep_stack"], msg["fn"].event_dim)
            drawn = msg["value"]
            made = self._resolve is None and msg["name"] not in self.estimators
            msg["value"] = self._provenance.tag(msg["name"], drawn, plates, *self._derivatives(msg), made=made)
            keep_inverse(msg["fn"], drawn, msg["value"])

    def _derivatives(self, msg: Any) -> tuple[bool, bool]:
        """Return whether a value may be relaxed, and whether it has a derivative of its own, as far as an estimator asks for one.

        An estimator that relaxes a draw, or takes derivatives along it, does so at its own site and at those that follow.
        """
        fn, estimator = msg["fn"], self.estimators.get(msg["name"])
        if estimator is None or self.softens:
            return is_extended(fn) or is_relaxable(fn) or is_matrix(fn), fn.has_rsample
        return False, (fn.has_rsample or estimator.follows_mixture) and not estimator.uses_score

    def _bind(self, msg: Any) -> Estimator:
        assert self._resolve is not None
        plates = frozenset(frame.dim for frame in msg["cond_indep_stack"] if frame.vectorized)
        own = own_estimator(msg["name"], msg["fn"], msg["infer"])
        estimator = self._resolve(msg["name"], msg["fn"], own, plates)
        self.estimators[msg["name"]] = estimator
        self.softens |= estimator.relaxes or estimator.uses_slopes or estimator.needs_exact_slopes
        # A step that is recorded has run before.
        if estimator.needs_fixed_support and not is_recording() and moves(msg["fn"]):
            fn = unmasked(msg["fn"])
            raise moving_support(msg["name"], family(fn), estimator, fn.has_rsample and not partly_reparameterized(fn))
        return estimator


def moved(fn: Any, value: torch.Tensor, estimator: MixturePath) -> torch.Tensor:
    """Return a mixture's draw with the gradient that an estimator gives it."""
    return estimator.moved(OPS, mixture(fn, value))


def axes_of(frames: Any, events: int) -> list[PlateAxis]:
    """Return the plates of a value, that of the particles among them, and their axes in it."""
    return [PlateAxis(frame.name, frame.dim - events) for frame in frames if frame.vectorized]


class SharedMinibatch(Messenger):
    """Makes later runs draw the elements of a subsampled plate that the first one drew: a weight is that of one data point."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn: dict[str, Any] = {}

    def elements(self) -> list[Any]:
        """Return the tensors that runs so far have drawn."""
        return [value for value in self._drawn.values() if isinstance(value, torch.Tensor)]

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and not msg["done"] and msg["name"] in self._drawn:
            msg["value"], msg["done"] = self._drawn[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._drawn.setdefault(msg["name"], msg["value"])


def site_info(name: str, fn: Any, particles: int, plates: Collection[int], objective: Objective) -> SiteInfo:
    """Return what an estimator needs to know of a site, given the dimensions of its plates."""
    reparameterized = fn.has_rsample and not partly_reparameterized(fn)
    count, conditionals = components(fn) or (None, False)
    return SiteInfo(
        name,
        family(fn),
        reparameterized,
        is_discrete(fn),
        particles,
        categories(fn),
        relaxable=is_relaxable(fn),
        elements=elements(fn, plates),
        objective=objective,
        reach=elements(fn, ()),
        is_count=is_count(fn),
        components=count,
        conditionals=conditionals,
    )


class ModelInferMessenger(Messenger):
    """Stands innermost in the model, where `infer` is still the model's own."""

    def _pyro_sample(self, msg: Any) -> None:
        refuse_model_estimator(msg)
