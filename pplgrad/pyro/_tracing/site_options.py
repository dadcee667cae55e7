"""Pyro's own options of a site, `infer={"baseline": ..., "enumerate": ...}`, as estimators and baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar

from pplgrad import configuration
from pplgrad.baselines.average import DecayingAverage
from pplgrad.core.baseline import Baseline, BaselineTerms, Evaluation
from pplgrad.core.estimator import Estimator
from pplgrad.errors import ConfigurationError, listed
from pplgrad.estimators.score import ScoreFunction

KNOWN = ("nn_baseline", "nn_baseline_input", "baseline_value", "use_decaying_avg_baseline", "baseline_beta")
"""The options that `TraceGraph_ELBO` reads in `infer["baseline"]`."""

_BETA = 0.9
"""Pyro's own decay."""


@dataclass(frozen=True)
class SiteBaseline(Baseline):
    """What a site of the guide says itself in each run: `nn_baseline(nn_baseline_input)` or `baseline_value`.

    It learns by least squares, as under `TraceGraph_ELBO`: the parameters are the user's own, and so is their registration.
    """

    option: str
    per_site: ClassVar[bool] = True
    learned: ClassVar[bool] = True
    calls_function: ClassVar[bool] = True

    def evaluate(self, terms: BaselineTerms) -> Evaluation:
        """Return the prediction as a constant, and the squared error."""
        predicted = terms.predict()
        loss = terms.ops.xp.sum((terms.cost - predicted) ** 2)
        return Evaluation(terms.ops.stop_gradient(predicted), loss, {})

    def value(self, infer: Mapping[str, Any]) -> Any:
        """Return the baseline of one run, from the site's options in it."""
        options = infer["baseline"]
        if self.option == "baseline_value":
            return options["baseline_value"]
        return options["nn_baseline"](options["nn_baseline_input"].detach())


def own_estimator(name: str, fn: Any, infer: Mapping[str, Any]) -> Estimator | None:
    """Return the estimator that a site of the guide asks for, by pplgrad's option or by one of Pyro's; None if by none."""
    if infer.get("baseline") and "estimator" not in infer and not fn.has_rsample:
        return ScoreFunction(_baseline(name, infer["baseline"]))
    return configuration.own_estimator(name, infer, fn.has_rsample)


def _baseline(name: str, options: Any) -> Baseline:
    if not isinstance(options, Mapping):
        raise ConfigurationError(f"Site '{name}': infer['baseline'] takes a dict; got {type(options).__name__}.")
    unknown = [key for key in options if key not in KNOWN]
    if unknown:
        raise ConfigurationError(
            f"Site '{name}': infer['baseline'] has the unknown options {listed(unknown)}; the known ones are {listed(KNOWN)}."
        )
    network, value = options.get("nn_baseline") is not None, options.get("baseline_value") is not None
    if network and value:
        raise ConfigurationError(f"Site '{name}': infer['baseline'] has nn_baseline and baseline_value; leave out one.")
    if network and options.get("nn_baseline_input") is None:
        raise ConfigurationError(f"Site '{name}': infer['baseline'] has nn_baseline without nn_baseline_input.")
    parts: list[Baseline] = []
    if options.get("use_decaying_avg_baseline"):
        parts.append(DecayingAverage(options.get("baseline_beta", _BETA), per_element=True))
    if network or value:
        parts.append(SiteBaseline("nn_baseline" if network else "baseline_value"))
    if not parts:
        raise ConfigurationError(
            f"Site '{name}': infer['baseline'] asks for no baseline; give use_decaying_avg_baseline=True, nn_baseline or baseline_value."
        )
    return reduce(add, parts)
