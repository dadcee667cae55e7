"""A watched step in Pyro: a few more draws of the gradient, and what they show of each site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine

from pplgrad.core.estimator import Estimator
from pplgrad.core.program import Program
from pplgrad.engine.records import Numbers, Record, seen, settings
from pplgrad.engine.surrogate import Estimate
from pplgrad.errors import PplgradError
from pplgrad.monitoring.watch import Watcher
from pplgrad.pyro._array_ops import OPS
from pplgrad.pyro._baselines import is_baseline_param
from pplgrad.pyro._compat import leaves_of
from pplgrad.pyro._distributions import unmasked
from pplgrad.pyro._rerun.enumeration import Fixed, latents
from pplgrad.pyro._tracing.closed_forms import closed_form


def monitor(
    watcher: Watcher, estimated: Callable[[Record], Estimate], program: Program, resolved: Mapping[str, Estimator]
) -> None:
    """Tell the watcher of this step; what training draws next, and its gradients, are as without."""
    leaves: dict[str, torch.Tensor] = {}
    draws: list[dict[str, torch.Tensor]] = []
    records, losses = [], []
    with torch.random.fork_rng():
        torch.manual_seed(watcher.steps)
        for _ in range(watcher.watch.draws):
            one = Record()
            with poutine.trace(param_only=True) as run:
                result = estimated(one)
            mine = _leaves(run.trace)
            leaves |= mine
            draws.append(_gradient(-result.surrogate, mine))
            records.append(one)
            losses.append(-float(result.value))
        fixed = _sites(program)
    sites = {name: node for name, node in fixed.nodes.items() if name in resolved}
    known = ("reads", tuple(sites), tuple(leaves))
    if known not in watcher.known:
        watcher.known[known] = {name: _reads(node, list(leaves.values())) for name, node in sites.items()}
    numbers: dict[str, Numbers] = {}
    for name, node in sites.items():
        learned = {key: x.detach() for key, x in records[0].learned.get(name, {}).items()}
        entropy = {"entropy": _entropy(node)}
        numbers[name] = {**entropy, **settings(resolved[name], program.args, program.kwargs), **learned}
    with torch.no_grad():
        gradients = [torch.stack([draw.get(name, torch.zeros_like(x)) for draw in draws]) for name, x in leaves.items()]
        whole, by_site = seen(OPS.xp, gradients, watcher.known[known], _joined(records), numbers)
    watcher.emit(watcher.steps, {"loss": sum(losses) / len(losses), **whole}, by_site)


def _leaves(trace: Any) -> dict[str, torch.Tensor]:
    """Return the parameters that training moves, without those of baselines and estimators."""
    nodes = {name: node["value"].unconstrained() for name, node in trace.nodes.items() if node["type"] == "param"}
    return {name: leaf for name, leaf in nodes.items() if leaf.requires_grad and not is_baseline_param(name)}


def _gradient(loss: torch.Tensor, leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the gradient of the leaves that have one."""
    if not (loss.requires_grad and leaves):
        return {}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _joined(records: list[Record]) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the signals of the sites that every draw has in the same shape, with the draws in front."""
    result = {}
    for name, parts in records[0].signals.items():
        others = [one.signals.get(name, []) for one in records]
        if all(len(x) == len(parts) and x[0][0].shape == parts[0][0].shape for x in others):
            pairs = [[x[number] for x in others] for number in range(len(parts))]
            result[name] = [(torch.stack([a for a, _ in pair]), torch.stack([b for _, b in pair])) for pair in pairs]
    return result


def _sites(program: Program) -> Any:
    """Return a trace of the guide at drawn values that are constants, so that each density reads its own parameters alone."""
    with torch.no_grad():
        drawn = poutine.trace(program.guide).get_trace(*program.args, **program.kwargs)
    return poutine.trace(Fixed(latents(drawn))(program.guide)).get_trace(*program.args, **program.kwargs)


def _reads(node: Any, leaves: list[torch.Tensor]) -> list[int]:
    """Return the numbers of the leaves that a site's density reads, by its graph."""
    found = {id(leaf) for leaf in leaves_of(unmasked(node["fn"]).log_prob(node["value"]).sum())}
    return [number for number, leaf in enumerate(leaves) if id(leaf) in found]


def _entropy(node: Any) -> torch.Tensor:
    fn = unmasked(node["fn"])
    with torch.no_grad():
        try:
            return -closed_form(node["name"], "entropy", {"fn": fn}, None).mean()
        except PplgradError:
            return -fn.log_prob(node["value"]).mean()
