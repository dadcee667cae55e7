"""The sleep phase of wake-sleep in Pyro: the guide at latents and data that the model drew."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine

from pplgrad.core.objectives import ReweightedWakeSleep
from pplgrad.core.program import Program
from pplgrad.pyro._tracing.particle_trace import cost_of


def sleep_phase(objective: ReweightedWakeSleep, program: Program) -> torch.Tensor | float:
    """Return (1 − insomnia) times the mean log q of the model's draws, with its gradient to the guide's parameters."""
    model, guide, args, kwargs = program
    total: Any = 0.0
    assert objective.dream is not None
    for _ in range(objective.dreams):
        with torch.no_grad():
            drawn = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
        data = {
            name: node["value"].detach()
            for name, node in drawn.nodes.items()
            if node["type"] == "sample" and node["infer"].get("was_observed")
        }
        dreamt = objective.dream(data, *args, **kwargs)
        trace = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(*dreamt)
        for name, node in trace.nodes.items():
            if node["type"] == "sample" and name in drawn.nodes and not node["is_observed"]:
                if type(node["fn"]).__name__ != "_Subsample":
                    total = total + cost_of(name, node).sum()
    return (1 - objective.insomnia) * total / objective.dreams
