"""The exact gradient of an objective, by going through every outcome of a program with finitely many."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

from pplgrad.core.objectives import MultiSample, Objective
from pplgrad.core.program import Program
from pplgrad.diagnostics.checking import TooManyOutcomes
from pplgrad.pyro._distributions import family, finite_parts, unmasked
from pplgrad.pyro._tracing.marginal_sites import against, trace_against, weight_of

Values = dict[str, torch.Tensor]


class Fixed(Messenger):
    """Gives latent sites, and subsampled plates, the values of a mapping."""

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not msg["done"] and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


def latents(trace: Any) -> dict[str, torch.Tensor]:
    """Return the values that were drawn, those of subsampled plates among them."""
    return {
        name: node["value"]
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"]
    }


def traces_at(program: Program, values: Mapping[str, torch.Tensor]) -> tuple[Any, Any]:
    """Return the traces of guide and model at given values, with log densities, without the sites of subsamples."""
    with Fixed(values):
        guide = poutine.trace(program.guide).get_trace(*program.args, **program.kwargs)
        return with_model(program, guide)


def with_model(program: Program, guide: Any) -> tuple[Any, Any]:
    """Return a trace of the guide and the model's with the same draws, with log densities, without the sites of subsamples."""
    model = trace_against(program.model, guide, math.inf, program.args, program.kwargs)
    pruned = [poutine.util.prune_subsample_sites(trace) for trace in (guide, model)]
    for trace in pruned:
        trace.compute_log_prob()
    return pruned[0], pruned[1]


def log_q(guide: Any) -> torch.Tensor:
    """Return the log probability of everything drawn, unscaled and unmasked."""
    nodes = [guide.nodes[name] for name in latents(guide)]
    return sum((unmasked(n["fn"]).log_prob(n["value"]).sum() for n in nodes), torch.zeros(()))


def log_q_and_objective(
    program: Program, values: Mapping[str, torch.Tensor], objective: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log probability of the draws, and a weighted sum of log densities."""
    guide, model = traces_at(program, values)
    weights = objective.weights(program.args, program.kwargs)
    drawn = latents(guide)
    total: Any = torch.zeros(())
    for node in model.nodes.values():
        if node["type"] == "sample":
            total = total + weight_of(node, weights) * node["log_prob_sum"]
    for name in drawn:
        total = total - weights.guide * guide.nodes[name]["log_prob_sum"]
    return log_q(guide), total


class _Undecided(Exception):
    """A site whose value has not been chosen: all that it can take, and the log probability of each if log q has it not."""

    def __init__(self, name: str, count: int, values: Iterator[torch.Tensor], log_weight: float) -> None:
        super().__init__(name)
        self.name, self.count, self.values, self.log_weight = name, count, values, log_weight


class _Asking(Fixed):
    """Gives sites the chosen values, and stops the program at the first without one."""

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        subsample = poutine.util.site_is_subsample(msg)
        whole = subsample and msg["fn"].subsample_size in (None, msg["fn"].size)
        if not (msg["is_observed"] or msg["done"] or whole):
            raise _undecided(msg["name"], msg["fn"], subsample)


def _undecided(name: str, fn: Any, subsample: bool) -> _Undecided:
    if subsample:
        size, drawn = fn.size, fn.subsample_size
        # The order counts: a program may treat the places of a minibatch differently.
        count = math.perm(size, drawn)
        return _Undecided(name, count, map(torch.tensor, itertools.permutations(range(size), drawn)), -math.log(count))
    parts = finite_parts(unmasked(fn))
    if parts is None:
        raise TooManyOutcomes(f"site '{name}' ({family(fn)}) has infinitely many values")
    base, support = parts
    shape = fn.batch_shape + fn.event_shape
    elements = shape[: len(shape) - len(base.event_shape)].numel()
    # The number itself may be too large to write down.
    count = len(support) ** elements if elements * math.log2(len(support)) < 60 else 1 << 60
    every = itertools.product(range(len(support)), repeat=elements)
    values = (support[torch.tensor(index, dtype=torch.long)].reshape(shape) for index in every)
    return _Undecided(name, count, values, 0.0)


def outcomes(program: Program, limit: int) -> list[tuple[Values, float]]:
    """Return the values of every outcome, and the log probability of its subsamples; raise `TooManyOutcomes` above the limit.

    A program whose sites depend on its draws is followed down every path.
    """
    open_ends: list[tuple[Values, float]] = [({}, 0.0)]
    found: list[tuple[Values, float]] = []
    while open_ends:
        values, log_weight = open_ends.pop()
        try:
            with torch.no_grad(), _Asking(values):
                trace = poutine.trace(program.guide).get_trace(*program.args, **program.kwargs)
                against(program.model, trace, math.inf)(*program.args, **program.kwargs)
        except _Undecided as site:
            if site.count + len(open_ends) + len(found) > limit:
                raise TooManyOutcomes(f"there are more than {limit:,} outcomes") from None
            weight = log_weight + site.log_weight
            open_ends += [({**values, site.name: value}, weight) for value in site.values]
        else:
            found.append((values, log_weight))
    return found


Flat = Callable[[Any], np.ndarray]


def exact_gradient(
    program: Program, leaves: list[torch.Tensor], flat: Flat, objective: Objective, particles: int, limit: int
) -> np.ndarray:
    """Return the gradient of the enumerated loss as one vector, or raise `TooManyOutcomes`."""
    every = outcomes(program, limit)
    total = np.zeros(sum(leaf.numel() for leaf in leaves))
    if isinstance(objective, MultiSample):
        terms = _bounds(program, objective, every, objective.combined(particles), limit)
    else:
        terms = ((*log_q_and_objective(program, values, objective), weight) for values, weight in every)
    for log_prob, value, log_weight in terms:
        term = -(log_prob + log_weight).exp() * value
        # An impossible outcome counts for nothing, whatever its value.
        if log_prob > -math.inf and term.requires_grad:
            # The graph of an outcome serves several tuples.
            total += flat(torch.autograd.grad(term, leaves, allow_unused=True, retain_graph=True))
    return total


Terms = Iterator[tuple[torch.Tensor, torch.Tensor, float]]


def _bounds(
    program: Program, objective: MultiSample, every: list[tuple[Values, float]], combined: int, limit: int
) -> Terms:
    """Yield log q, the bound and the minibatch's log probability of all tuples of outcomes with the same minibatch."""
    groups: dict[str, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
    weight = {}
    for values, log_weight in every:
        guide, model = traces_at(program, values)
        drawn = latents(guide)
        minibatch = str({name: value.tolist() for name, value in values.items() if name not in drawn})
        logs, scale = _log_weights(guide, model, objective)
        groups.setdefault(minibatch, []).append((log_q(guide), logs, scale))
        weight[minibatch] = log_weight
    if sum(len(group) ** combined for group in groups.values()) > limit:
        raise TooManyOutcomes(f"there are more than {limit:,} outcomes of {combined} particles")
    for minibatch, group in groups.items():
        for picked in itertools.product(group, repeat=combined):
            scale = picked[0][2]
            logs = torch.stack([row[1] for row in picked]) / scale
            bound = scale * ((objective.power * logs).logsumexp(0) - math.log(combined)).sum() / objective.power
            yield sum(row[0] for row in picked), bound, weight[minibatch]  # type: ignore[misc]


def _log_weights(guide: Any, model: Any, objective: MultiSample) -> tuple[torch.Tensor, float]:
    """Return log p − log q of each element of the plates that all latent sites share, and the plates' scale."""
    frames = [{f.name: f for f in guide.nodes[name]["cond_indep_stack"] if f.vectorized} for name in latents(guide)]
    shared = [f for name, f in frames[0].items() if all(name in other for other in frames)] if frames else []
    if objective.plates is not None:
        shared = [f for f in shared if f.name in objective.plates]
    kept = {f.dim for f in shared}
    total: Any = torch.zeros(())
    for trace, sign in ((model, 1.0), (guide, -1.0)):
        for name, node in trace.nodes.items():
            if node["type"] != "sample":
                continue
            x = node["log_prob"]
            if not kept <= {f.dim for f in node["cond_indep_stack"] if f.vectorized}:
                raise TooManyOutcomes(f"site '{name}' stands outside of the plates that have a weight for each element")
            for dim in (d for d in range(-x.dim(), 0) if d not in kept):
                x = x.sum(dim, keepdim=True)
            total = total + sign * x
    return total, math.prod(f.full_size / f.size for f in shared)
