"""`TraceGrad_ELBO` for Pyro."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.elbo import ELBOModule
from pyro.infer.util import is_validation_enabled
from pyro.util import check_if_enumerated

from pplgrad.engine.configuration import (
    EstimatorMapping,
    check_estimator,
    collect_mappings,
    default_estimator,
    refuse_unmatched,
)
from pplgrad.engine.layout import Layout
from pplgrad.engine.program import Run
from pplgrad.engine.surrogate import Estimate, estimate
from pplgrad.errors import ImpossibleValueError, ProgramError
from pplgrad.estimators.base import Estimator, SiteInfo
from pplgrad.pyro._baselines import Networks, PyroBaselines, store_states
from pplgrad.pyro._ops import OPS, attach
from pplgrad.pyro._program import Recorded, Traces, record, run_traces
from pplgrad.pyro._provenance import Provenance


class TraceGrad_ELBO(Trace_ELBO):
    r"""The evidence lower bound, with a gradient estimator for each latent site of the guide.

    Estimates ∇ E_q[Σ log p − Σ log q]. Each cost (a log density, scaled and masked) is charged to the sites that
    it depends on, found by provenance; the score of a site is neither scaled nor masked; costs are reduced to the
    site's plates.

    `estimators` maps names and glob patterns to estimators and goes before what the guide says; the other arguments
    are those of `pyro.infer.ELBO`. Shapes: any plates; with `vectorize_particles=True` particles run in a plate
    to the left of all others. The loss is in nats.

    Raises `ConfigurationError`, `EstimatorError` and `BaselineError` where a specification does not fit,
    `ProgramError` where guide and model do not match, `ImpossibleValueError` where a cost is NaN or infinite; the
    message names the site, and neither the param store nor the optimizer has changed.

    >>> from pplgrad import LeaveOneOut, ScoreFunction
    >>> elbo = TraceGrad_ELBO(num_particles=4, estimators={"z": ScoreFunction(LeaveOneOut())})
    >>> elbo.num_particles
    4

    Source: Schulman, Heess, Weber and Abbeel (2015), theorem 1; Ranganath, Gerrish and Blei (2014).
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
        *,
        estimators: Mapping[str, Estimator] | None = None,
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            max_iarange_nesting=max_iarange_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            ignore_jit_warnings=ignore_jit_warnings,
            jit_options=jit_options,
            retain_graph=retain_graph,
            tail_adaptive_beta=tail_adaptive_beta,
        )
        self._mapping = EstimatorMapping.of(estimators, "TraceGrad_ELBO(estimators=...)")
        self._networks = Networks()

    def __call__(self, model: torch.nn.Module, guide: torch.nn.Module) -> ELBOModule:
        """Return a module that computes the loss, whose parameters include those of learned baselines."""
        return TraceGradModule(model, guide, self)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the negative evidence lower bound in nats, without a gradient."""
        total = 0.0
        with torch.no_grad():
            for traces in self._runs(model, guide, args, kwargs, follow=False)[0]:
                run = self._record(traces, None).run
                signs = self._signs(traces)
                total += sum(sign * float(cost.sum()) for sign, cost in zip(signs, run.costs, strict=True))
                _check_costs(total, traces, run)
        return -total / self.num_particles

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return the loss, and add its gradient estimate to the parameters' gradients."""
        result = self._estimate(model, guide, args, kwargs)
        surrogate = _surrogate_loss(result)
        if surrogate.requires_grad:
            surrogate.backward(retain_graph=self.retain_graph)
        store_states(result.states)
        return -float(result.value)

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss as a tensor whose gradient is the estimate."""
        result = self._estimate(model, guide, args, kwargs)
        store_states(result.states)
        return attach(-result.value, _surrogate_loss(result))

    def diagnose(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> None:
        """Run one step without changing anything, and raise the error that names the site if something is wrong."""
        self._estimate(model, guide, args, kwargs)

    def _estimate(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Estimate:
        """Run the program and return the objective's value, surrogate and new states; nothing is changed yet."""
        traced, provenances = self._runs(model, guide, args, kwargs, follow=True)
        recorded = [self._record(traces, provenance) for traces, provenance in zip(traced, provenances, strict=True)]
        for traces, one in zip(traced, recorded, strict=True):
            _check_costs(float(sum(c.detach().sum() for c in one.run.costs)), traces, one.run)
        runs = [(Layout.build(one.sites, one.costs), one.run) for one in recorded]
        return estimate(OPS, runs, self._host(runs, recorded, traced, provenances, args, kwargs))

    def _runs(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, follow: bool
    ) -> tuple[list[Traces], list[Provenance | None]]:
        """Run all particles, and check that every key of every mapping names a latent site."""
        vectorized = self.vectorize_particles and self.num_particles > 1
        if self.vectorize_particles:
            if self.max_plate_nesting == math.inf:
                self._guess_max_plate_nesting(model, guide, args, kwargs)
            model, guide = self._vectorized_num_particles(model), self._vectorized_guide(guide)
        traced: list[Traces] = []
        provenances: list[Provenance | None] = []
        with collect_mappings() as mappings:
            for _ in range(1 if vectorized else self.num_particles):
                provenance = Provenance() if follow else None
                try:
                    traces = run_traces(model, guide, args, kwargs, self.num_particles, self._resolve, provenance)
                except (ValueError, RuntimeError, IndexError) as error:
                    if vectorized and not isinstance(error, _OWN_ERRORS):
                        raise ProgramError(
                            "The program cannot run under vectorize_particles=True, which adds a leading dimension to "
                            f"every value; write it so that it broadcasts, or use vectorize_particles=False. ({error})"
                        ) from error
                    raise
                traced.append(traces)
                provenances.append(provenance)
        self._check_mappings(mappings, traced, provenances)
        if is_validation_enabled():
            for traces in traced:
                check_if_enumerated(traces.guide)
        return traced, provenances

    def _vectorized_guide(self, guide: Callable) -> Callable:
        return self._vectorized_num_particles(guide)

    def _resolve(self, site: SiteInfo, own: Estimator | None) -> Estimator:
        """Choose a site's estimator: the ELBO's mapping, the site's own or the guide wrapper's, the default."""
        chosen = self._mapping.find(site.name)
        if chosen is None and own is not None:
            check_estimator(own, f"site '{site.name}' (infer)")
            chosen = own
        if chosen is None:
            chosen = default_estimator(site, stateful=True)
        chosen.check(site)
        return chosen

    def _check_mappings(
        self, mappings: list[EstimatorMapping], traced: list[Traces], provenances: list[Provenance | None]
    ) -> None:
        if any(provenance is not None and provenance.escaped for provenance in provenances):
            return  # The sites of this program depend on its draws: a name may be absent this time.
        latent = dict.fromkeys(name for traces in traced for name in traces.estimators)
        observed = dict.fromkeys(
            name
            for traces in traced
            for trace in (traces.guide, traces.model)
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and site["is_observed"]
        )
        refuse_unmatched(self._mapping, latent, observed, "TraceGrad_ELBO(estimators=...)")
        for mapping in mappings:
            refuse_unmatched(mapping, latent, observed, "config_estimators")

    def _record(self, traces: Traces, provenance: Provenance | None) -> Recorded:
        vectorized = self.vectorize_particles and self.num_particles > 1
        depth = int(self.max_plate_nesting) if vectorized else 0
        return record(traces, self.num_particles if vectorized else 1, vectorized, depth, provenance)

    @staticmethod
    def _signs(traces: Traces) -> list[float]:
        def count(trace: Any) -> int:
            return sum(site["type"] == "sample" for site in trace.nodes.values())

        return [1.0] * count(traces.model) + [-1.0] * count(traces.guide)

    def _host(
        self,
        runs: list[tuple[Layout, Run]],
        recorded: list[Recorded],
        traced: list[Traces],
        provenances: list[Provenance | None],
        args: tuple,
        kwargs: dict,
    ) -> PyroBaselines:
        vectorized = len(runs) == 1 and self.num_particles > 1
        sites, ancestors, values = {}, {}, {}
        for (layout, _), one, traces in zip(runs, recorded, traced, strict=True):
            ancestors.update(layout.ancestors)
            for spec in one.sites:
                sites[spec.name] = spec
                node = traces.guide.nodes[spec.name]
                value = node["value"] if vectorized else node["value"][None]
                values.setdefault(spec.name, ([], node["fn"].event_dim))[0].append(value)
        joined = {
            name: (parts[0] if len(parts) == 1 else torch.cat(parts), event_dim)
            for name, (parts, event_dim) in values.items()
            if len({tuple(part.shape[1:]) for part in parts}) == 1
        }
        return PyroBaselines(
            self._networks,
            sites,
            ancestors,
            joined,
            traced[0].indices if len(traced) == 1 else {},
            args,
            kwargs,
            recorded[0].run.costs[0].detach(),
            provenances[0] if len(provenances) == 1 else None,
        )


_OWN_ERRORS: tuple[type[Exception], ...] = ()


def _surrogate_loss(result: Estimate) -> torch.Tensor:
    loss = -result.surrogate
    return loss if result.baseline_loss is None else loss + result.baseline_loss


def _check_costs(total: float, traces: Traces, run: Run) -> None:
    """Raise an error that names the first site whose cost is NaN or infinite."""
    if math.isfinite(total):
        return
    names = [
        (name, side)
        for side, trace in (("model", traces.model), ("guide", traces.guide))
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
    ]
    for (name, side), cost in zip(names, run.costs, strict=True):
        if not torch.isfinite(cost).all():
            kind = "NaN" if torch.isnan(cost).any() else "infinite"
            raise ImpossibleValueError(
                f"The log density of site '{name}' in the {side} is {kind}: its value is impossible under its "
                "distribution, or a parameter has diverged; check the distribution's parameters and support there."
            )


class TraceGradModule(ELBOModule):
    """`ELBOModule` that also holds the networks of learned baselines, once the loss has been computed."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().forward(*args, **kwargs)
        for (site, key), network in self.elbo._networks.modules.items():
            self.add_module(f"baseline_{site}_{key}".replace(".", "_"), network)
        return loss
