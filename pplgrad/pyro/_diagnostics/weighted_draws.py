"""Draws of a guide with all their densities, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from torch.distributions import Independent as TorchIndependent

from pplgrad.assessment.draws import Draws
from pplgrad.assessment.enumeration import check_support
from pplgrad.assessment.gathering import (
    LatentSite,
    ObservedSite,
    Table,
    gathered,
    is_drawn_alone,
    named_axes,
    refuse_drawn_by_model,
    refuse_masked,
    refuse_moving_mask,
    refuse_other_sites,
    refuse_scaled,
    refuse_subsampled,
    refuse_without_latents,
    shared_support,
)
from pplgrad.assessment.masks import mask_of, same_mask, spread
from pplgrad.core.objectives import IWAE
from pplgrad.core.program import Program
from pplgrad.core.sites import Run
from pplgrad.engine.closed_forms import NoClosedForms
from pplgrad.engine.layout import Layout
from pplgrad.engine.signals import Bounds
from pplgrad.estimators.reparam import Reparam
from pplgrad.estimators.score import ScoreFunction
from pplgrad.pyro._array_ops import OPS
from pplgrad.pyro._distributions import finite_parts, has_path, innermost, is_discrete, unmasked
from pplgrad.pyro._elbo import TraceGrad_ELBO
from pplgrad.pyro._rerun.enumeration import traces_at, with_model
from pplgrad.pyro._tracing.marginal_sites import InComponent, Marginal
from pplgrad.pyro._tracing.particle_trace import Traces, samples_of


@dataclass
class _Rows:
    """What each draw adds."""

    log_weights: list[np.ndarray] = field(default_factory=list)
    log_p: list[float] = field(default_factory=list)
    log_q: list[float] = field(default_factory=list)
    values: dict[str, list[np.ndarray]] = field(default_factory=dict)
    element_log_q: dict[str, list[np.ndarray]] = field(default_factory=dict)
    element_log_p: dict[str, list[np.ndarray]] = field(default_factory=dict)
    observed_log_p: dict[str, list[np.ndarray]] = field(default_factory=dict)


Devices = dict[str, torch.device]
"""Where the value of each latent site is."""


def weighted_draws(program: Program, plates: tuple[str, ...] | None, count: int) -> tuple[Draws, Layout, Devices]:
    """Return draws of the guide, the program's layout and devices; or refuse a program whose weights mean nothing."""
    raw, guide = _looked_at(program)
    objective = IWAE(plates=plates)
    # An estimator with nothing to ask of its site, since no gradient is taken.
    chosen = {name: Reparam() if has_path(site["fn"]) else ScoreFunction() for name, site in guide.items()}
    elbo = TraceGrad_ELBO(count, estimators=chosen, objective=objective)
    elbo._closed = NoClosedForms(objective=objective)
    structure, rows = elbo._structures.find(program), _Rows()
    first: tuple[Layout, dict[str, LatentSite], dict[str, ObservedSite]] | None = None
    for traces, provenance in elbo._runs(program, structure):
        run = elbo._record(traces, provenance, program)
        layout = elbo._laid_out(program, traces, run, provenance, structure)
        if first is None:
            masks = _masks(traces, run)
            refuse_masked(layout, masks)
            latents = {name: _latent_site(name, traces, masks) for name in traces.estimators}
            first = layout, latents, _observed_sites(raw, masks)
        elif layout.weight_plates != first[0].weight_plates:
            refuse_other_sites([plate.name for plate in layout.weight_plates or first[0].weight_plates or ()])
        _refuse_moving_masks(traces, run, masks)
        _note(rows, traces, run, layout, objective)
    assert first is not None
    layout, latents, observed = first
    refuse_other_sites([name for name, x in rows.values.items() if len(x) != count or name not in latents])
    refuse_other_sites([name for name, x in rows.values.items() if any(y.shape != x[0].shape for y in x)])
    summed = tuple(n for n, site in samples_of(raw) if not site["is_observed"] and n not in latents)
    table = Table(
        np.concatenate(rows.log_weights),
        np.array(rows.log_p),
        np.array(rows.log_q),
        *(
            {name: np.stack(x) for name, x in found.items() if len(x) == count}
            for found in (rows.values, rows.element_log_q, rows.element_log_p, rows.observed_log_p)
        ),
    )
    devices = {name: site["value"].device for name, site in guide.items()}
    return gathered(table, layout.weight_plates or (), latents, observed, summed), layout, devices


def log_joint(program: Program, layout: Layout, draws: Draws, values: dict[str, torch.Tensor]) -> np.ndarray:
    """Return log p of each element of the plates that have weights, at given values of all latents."""
    _, model = traces_at(program, values)
    for name, latent in draws.latents.items():
        check_support(name, latent.support, _support(model.nodes[name]["fn"]))
    return _by_element(layout, model)


def log_weights(program: Program, layout: Layout, drawn: Any) -> np.ndarray:
    """Return log p − log q of each element of the plates that have weights, from a trace of the guide."""
    guide, model = with_model(program, drawn)
    return _by_element(layout, model) - _by_element(layout, guide)


def _by_element(layout: Layout, trace: Any) -> np.ndarray:
    """Return the log density of each element of the plates that have weights."""
    plates = layout.weight_plates or ()
    kept, shape = {plate.dim for plate in plates}, layout.weight_shape
    reading = {cost.name for cost in layout.costs if cost.reads}
    total: Any = torch.zeros(shape)
    for name, node in samples_of(trace):
        if not all(any(f.name == p.name for f in node["cond_indep_stack"] if f.vectorized) for p in plates):
            if name not in reading:
                continue  # No draw changes it, and it has no element: it stands beside the weights.
        x = node["log_prob"]
        for dim in (d for d in range(-x.dim(), 0) if d not in kept):
            x = x.sum(dim, keepdim=True)
        x = x.reshape(x.shape[x.dim() - len(shape) :]) if x.dim() > len(shape) else x
        total = total + x
    return total.detach().cpu().double().numpy()


def _looked_at(program: Program) -> tuple[Any, dict[str, Any]]:
    """Return the trace of the model with a draw of the guide, nothing summed out, and the guide's latent sites; refuse what has no weights."""
    guide = poutine.trace(program.guide).get_trace(*program.args, **program.kwargs)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(*program.args, **program.kwargs)
    drawn = {}
    for trace in (model, guide):
        for name, site in trace.nodes.items():
            if poutine.util.site_is_subsample(site):
                drawn[name] = (len(site["value"]), int(site["fn"].size))
    refuse_subsampled(drawn)
    latents = {name: site for name, site in samples_of(guide) if not site["is_observed"]}
    refuse_without_latents(latents)
    refuse_scaled([name for trace in (model, guide) for name, site in samples_of(trace) if _is_scaled(site)])
    refuse_drawn_by_model([n for n, site in samples_of(model) if is_drawn_alone(site, guide.nodes)])
    model.compute_log_prob()
    return model, latents


def _is_scaled(site: Any) -> bool:
    scale = torch.as_tensor(site["scale"])
    return bool((scale != 1).any())


def _masks(traces: Traces, run: Run) -> dict[tuple[str, str], np.ndarray | None]:
    """Return the mask of each density by side and name, from what of it counts."""
    costs = iter(run.costs)
    masks: dict[tuple[str, str], np.ndarray | None] = {}
    for side, sites in (("model", traces.model_sites), ("guide", traces.guide_sites)):
        for name, site in sites:
            counted = next(costs)[0]
            fn = unmasked(site["fn"])
            bare = counted if isinstance(fn, (Marginal, InComponent)) else fn.log_prob(site["value"])
            masks[side, name] = mask_of(_array(counted), _array(bare))
    return masks


def _refuse_moving_masks(traces: Traces, run: Run, first: dict[tuple[str, str], np.ndarray | None]) -> None:
    """Refuse a mask that is not that of the first draw."""
    sites = [*traces.model_sites, *traces.guide_sites]
    if all(site["mask"] is None and unmasked(site["fn"]) is site["fn"] for _, site in sites):
        return
    for key, mask in _masks(traces, run).items():
        if key in first and not same_mask(mask, first[key]):
            refuse_moving_mask(key[1])


def _latent_site(name: str, traces: Traces, masks: dict) -> LatentSite:
    site, other = traces.guide.nodes[name], traces.model.nodes.get(name)
    fn, value = site["fn"], site["value"]
    frames = [(f.name, f.dim) for f in site["cond_indep_stack"] if f.vectorized]
    batch = value.dim() - fn.event_dim
    elements = value.dim() - len(_element(fn).event_shape)
    mask = masks["guide", name]
    own, theirs = _support(fn), None if other is None else _support(other["fn"])
    return LatentSite(
        axes=named_axes(value.dim(), batch, frames),
        element_axes=named_axes(elements, batch, frames),
        discrete=is_discrete(fn),
        support=shared_support(own, theirs),
        mask=spread(mask, tuple(value.shape[:elements]), batch),
        auxiliary=other is None,
        point=isinstance(innermost(unmasked(fn)), Delta),
    )


def _observed_sites(raw: Any, masks: dict) -> dict[str, ObservedSite]:
    """Return the observed sites that draw something; `raw` is the model's trace with nothing summed out."""
    found = {}
    for name, site in samples_of(raw):
        fn = unmasked(site["fn"])
        if not site["is_observed"] or isinstance(innermost(fn), (Delta, Unit)):
            continue
        value = torch.as_tensor(site["value"])
        value = torch.broadcast_to(value, torch.broadcast_shapes(value.shape, fn.shape()))
        batch = value.dim() - fn.event_dim
        frames = [(f.name, f.dim) for f in site["cond_indep_stack"] if f.vectorized]
        mask = masks.get(("model", name), mask_of(_array(site["log_prob"]), _array(fn.log_prob(value))))
        mask = spread(mask, tuple(value.shape), batch)
        axes = named_axes(value.dim(), batch, frames)
        found[name] = ObservedSite(_array(value), axes, axes[:batch], is_discrete(fn), _support(fn), mask)
    return found


def _note(rows: _Rows, traces: Traces, run: Run, layout: Layout, objective: IWAE) -> None:
    """Add a draw to the rows."""
    bounds = Bounds(OPS, [(layout, run)], objective)
    rows.log_weights.append(_array(bounds.log_weights(0, run.costs)))
    models = len(traces.model_sites)
    rows.log_p.append(float(sum(x.double().sum() for x in run.costs[:models])))
    rows.log_q.append(float(sum(x.double().sum() for x in run.costs[models:])))
    for (name, site), cost in zip(traces.model_sites, run.costs[:models], strict=True):
        if site["is_observed"] and not isinstance(site["fn"], Marginal):
            rows.observed_log_p.setdefault(name, []).append(_array(cost[0]))
    for name in traces.estimators:
        site, other = traces.guide.nodes[name], traces.model.nodes.get(name)
        log_q = element_density(site["fn"], site["value"])
        rows.values.setdefault(name, []).append(_array(site["value"]))
        rows.element_log_q.setdefault(name, []).append(log_q)
        if other is not None and not isinstance(other["fn"], (Marginal, InComponent)):
            log_p = element_density(other["fn"], site["value"])
            if log_p.shape == log_q.shape:
                rows.element_log_p.setdefault(name, []).append(log_p)


def _element(fn: Any) -> Any:
    """Return the distribution of one element."""
    fn = unmasked(fn)
    while isinstance(fn, TorchIndependent):
        fn = fn.base_dist
    return fn


def element_density(fn: Any, value: torch.Tensor) -> np.ndarray:
    """Return the log density of each independent element of a value, without masks."""
    element = _element(fn)
    shape = value.shape[: value.dim() - len(element.event_shape)]
    return _array(torch.broadcast_to(element.log_prob(value), shape))


def _support(fn: Any) -> np.ndarray | None:
    parts = finite_parts(unmasked(fn))
    return None if parts is None else _array(parts[1])


def _array(x: Any) -> np.ndarray:
    return torch.as_tensor(x).detach().cpu().numpy()
