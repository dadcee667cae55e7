"""Where a cost depends on a reparameterized draw, and no derivative follows it: the estimate along the draw would be biased.

Provenance knows on which draws a cost depends, and where the program's own code compared a value, detached it or computed without a
gradient. Autograd knows which draws a derivative reaches. A cost that depends on a draw through such code, and whose derivative does
not reach it, jumps or was cut off: the derivative that Reparam takes is zero where that of the expectation is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pplgrad.core.sites import Run
from pplgrad.pyro._compat import backward_functions
from pplgrad.pyro._distributions import family
from pplgrad.pyro._tracing.particle_trace import Traces
from pplgrad.pyro._tracing.provenance import Provenance

# Their derivative is zero wherever there is one.
_FLAT = tuple("Round Floor Ceil Trunc Sign Sgn Heaviside Angle Bernoulli Poisson Normal Binomial Multinomial".split())


def lost_paths(traces: Traces, run: Run, provenance: Provenance) -> dict[str, tuple[str, str]]:
    """Return the sites on which a cost depends without a derivative: the cost's name, and by what the derivative was lost."""
    values = {name: traces.guide.nodes[name]["value"] for name in traces.estimators}
    along = [name for name, x in traces.estimators.items() if not (x.uses_score or x.relaxes)]
    nodes = {name: traces.guide.nodes[name] for name in along}
    nodes.update({name: traces.model.nodes[name] for name in traces.from_prior()})
    values.update({name: node["value"] for name, node in nodes.items()})
    followed = {name: values[name].grad_fn for name in nodes if values[name].grad_fn is not None}
    found: dict[str, tuple[str, str]] = {}
    if not followed:
        return found
    points = {name for name in followed if family(nodes[name]["fn"]) == "Delta"}
    drawn = {name: node for name, node in followed.items() if name not in points}
    names = [name for name, _ in traces.model_sites] + [name for name, _ in traces.guide_sites]
    for cost_name, cost in zip(names, run.costs, strict=True):
        cut = {site: by for site, by in provenance.cuts_of(cost).items() if site in followed}
        if cut:
            reached = _reached(cost, followed)
            for site, by in cut.items():
                if site not in reached:
                    # A point mass stands for the draws that it was computed from, and for none if it has a parameter alone.
                    for name in _reached(values[site], drawn) if site in points else {site}:
                        found.setdefault(name, (cost_name, by))
    return found


def _reached(x: torch.Tensor, draws: Mapping[str, Any]) -> set[str]:
    """Return the draws that the derivative of a tensor reaches."""
    names = {node: name for name, node in draws.items()}
    return {names[node] for node in backward_functions(x, _is_flat) if node in names}


def _is_flat(node: Any) -> bool:
    return node.name().startswith(_FLAT) or bool(getattr(node, "_saved_rounding_mode", None))
