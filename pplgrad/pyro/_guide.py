"""`config_estimators`: a guide with an estimator at each latent site."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pplgrad.configuration import EstimatorMapping, configured, report_mapping
from pplgrad.core.estimator import Estimator
from pplgrad.monitoring.watch import Watch
from pplgrad.monitoring.without_effect import foreign_elbo, running_methods

Guide = TypeVar("Guide", bound=Callable[..., Any])
"""A wrapped guide is called as the guide is, and has its attributes: to a type checker it is of the guide's type."""


def _training_elbo() -> object:
    """Return Pyro's own ELBO, if one trains the guide that runs: its `loss` alone has no gradient."""
    found = foreign_elbo(running_methods(), ELBO) if torch.is_grad_enabled() else None
    return None if found is None or found[1] == "loss" else found[0]


class EstimatorMessenger(Messenger):
    """Sets `infer["estimator"]` at the latent sites that a mapping names, where it is not set already."""

    def __init__(self, mapping: EstimatorMapping) -> None:
        super().__init__()
        self.mapping = mapping

    def __enter__(self) -> EstimatorMessenger:
        report_mapping(self.mapping, _training_elbo, "TraceGrad_ELBO of pplgrad.pyro")
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg):
            return
        estimator = self.mapping.find(msg["name"])
        if estimator is not None and "estimator" not in msg["infer"]:
            # The dict may be the user's own, shared between calls: never written to.
            msg["infer"] = {**msg["infer"], "estimator": estimator}


class ConfiguredGuide:
    """A guide function with its estimators set; everything but the call is the wrapped guide's."""

    def __init__(self, guide: Callable, mapping: EstimatorMapping) -> None:
        functools.update_wrapper(self, guide, updated=())
        self.__wrapped__ = guide
        self._mapping = mapping

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with EstimatorMessenger(self._mapping):
            return self.__wrapped__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("__wrapped__", "_mapping"):
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __repr__(self) -> str:
        return f"config_estimators({self.__wrapped__!r}, {self._mapping.estimators!r})"


class ConfiguredGuideModule(torch.nn.Module):
    """A guide that is a module (an autoguide, a PyroModule), with its estimators set."""

    def __init__(self, guide: torch.nn.Module, mapping: EstimatorMapping) -> None:
        super().__init__()
        self.guide = guide
        self._mapping = mapping

    @property
    def __wrapped__(self) -> torch.nn.Module:
        return self._modules["guide"]  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with EstimatorMessenger(self._mapping):
            return self.guide(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("_modules", "guide"):
                raise
            return getattr(self.guide, name)


@overload
def config_estimators(guide: Mapping[str, Estimator], *, watch: Watch | None = None) -> Callable[[Guide], Guide]: ...
@overload
def config_estimators(
    guide: None = None, estimators: Mapping[str, Estimator] | None = None, *, watch: Watch | None = None
) -> Callable[[Guide], Guide]: ...
@overload
def config_estimators(
    guide: Guide, estimators: Mapping[str, Estimator] | None = None, *, watch: Watch | None = None
) -> Guide: ...
def config_estimators(guide: Any = None, estimators: Any = None, *, watch: Any = None) -> Any:
    """Return the guide with an estimator for each latent site that `estimators` names.

    Precedence, highest first: `TraceGrad_ELBO(estimators=...)`, the site's `infer={"estimator": ...}`, the inner wrapper, the outer
    wrapper. Within a mapping, an exact name is tried before the patterns, and patterns are tried in their order. Sites without a
    configuration get the default: reparameterization where the sampler allows it, else the score function with a baseline. The wrapper
    estimates nothing itself.

    Args:
        guide: the guide, a callable or a module. Without it, or with the mapping in its place, a decorator is returned.
        estimators: mapping from site names and glob patterns to estimators.
        watch: a `Watch`, which measures the gradient at each site while `TraceGrad_ELBO` trains the guide. Default: None.

    Returns:
        The wrapped guide, or a decorator. Attributes of the wrapped guide stay reachable.

    Shapes:
        Those of the guide, unchanged.

    Raises:
        ConfigurationError: a value is not an estimator, `guide` is not callable, or `watch` is not a `Watch`. The ELBO reports a key that
            matches no site.

    Example:
        >>> from pplgrad import ScoreFunction
        >>> guide = config_estimators(lambda: None, {"z": ScoreFunction()})
        >>> guide() is None
        True

    References:
        The name follows `pyro.infer.config_enumerate`, the corresponding wrapper for enumeration.
    """
    return configured(guide, estimators, watch, _wrapped)


def _wrapped(guide: Callable, mapping: EstimatorMapping) -> Any:
    kind = ConfiguredGuideModule if isinstance(guide, torch.nn.Module) else ConfiguredGuide
    return kind(guide, mapping)  # type: ignore[arg-type]
