"""The works in Storchastic 0.3.7, in an environment of its own: it changes torch for the whole process when it is imported.

`make storchastic` makes that environment, in which `python -m benchmarks.in_storchastic` compares its gradient with the hand-written
one on the same draws. Its plates take means, which are multiplied out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import storch
import torch
from storch.method import ScoreFunction
from torch.distributions import Bernoulli
from torch.nn.functional import softplus

from benchmarks import by_hand_torch as by_hand
from benchmarks.works import Arrays, Work, arrays, start

Tensors = dict[str, torch.Tensor]


def step(work: Work, data: Arrays, seed: int) -> Callable[[], float]:
    """Return one step of Adam."""
    params, fixed = _leaves(work, data, seed, torch.float32), by_hand.tensors(data)
    optimizer = torch.optim.Adam(list(params.values()), lr=1e-6, fused=True)

    def once() -> float:
        optimizer.zero_grad()
        _add_costs(work, params, fixed)
        loss = storch.backward()
        optimizer.step()
        return loss.item()

    return once


def largest_difference(work: Work, seed: int = 0) -> float:
    """Return by how much a gradient differs from the hand-written one on the same draws and random data, in float64."""
    rng = np.random.default_rng(seed)
    images = (rng.random((50, 64)) < 0.5).astype(float)
    data = {"x": images[: work.batch], "train": images} if work.kind == "sbn" else arrays(work, seed)
    fixed = by_hand.tensors(data, torch.float64)
    params, same = (_leaves(work, data, seed, torch.float64) for _ in range(2))
    drawn = _add_costs(work, params, fixed)
    draws = {name: z._tensor if work.particles > 1 else z._tensor[None] for name, z in drawn.items()}
    if work.kind == "plate":
        draws = {name: z.transpose(-1, -2) for name, z in draws.items()}
    storch.backward()
    by_hand.estimate(work, same, fixed, draws)[1].backward()
    return max(float((params[name].grad - same[name].grad).abs().max()) for name in params)


def _leaves(work: Work, data: Arrays, seed: int, dtype: torch.dtype) -> Tensors:
    params = by_hand.tensors(start(work, data, seed), dtype)
    return {name: leaf.requires_grad_() for name, leaf in params.items()}


def _add_costs(work: Work, params: Tensors, data: Tensors) -> dict[str, Any]:
    """Sample, and register the costs; return the samples by site."""
    return {"sbn": _sbn, "plate": _plate}.get(work.kind, _chain)(work, params, data)


def _draw(name: str, logits: Any, count: int) -> Any:
    return ScoreFunction(name, n_samples=count)(Bernoulli(logits=logits))


def _log_bernoulli(logits: Any, value: Any) -> Any:
    return value * logits - softplus(logits)


def _sbn(work: Work, p: Tensors, data: Tensors) -> dict[str, Any]:
    def layer(name: str, h: Any) -> Any:
        return h @ p[f"{name}_w0"] + p[f"{name}_b0"]

    x = storch.denote_independent(data["x"], 0, "data")
    h, before, found = storch.denote_independent(data["centred"], 0, "data"), x, {}
    for i in range(1, work.layers + 1):
        logits = layer(f"encode{i}", h)
        z = found[f"z{i}"] = _draw(f"z{i}", logits, work.particles if i == 1 else 1)
        h = 2.0 * z - 1.0
        cost = _log_bernoulli(layer(f"decode{i - 1}", h), before).sum(-1) - _log_bernoulli(logits, z).sum(-1).detach()
        if i == work.layers:
            cost = cost + _log_bernoulli(p["prior"], z).sum(-1)
        storch.add_cost(-len(data["x"]) * cost, f"cost{i}")
        before = z
    return found


def _chain(work: Work, params: Tensors, data: Tensors) -> dict[str, Any]:
    p, q = params["p"], params["q"]
    found: dict[str, Any] = {}
    z: Any = 0.0
    for t in range(work.size):
        logits, prior = q[0] + q[1] * z, p[0] + p[1] * z
        z = found[f"z{t}"] = _draw(f"z{t}", logits, work.particles if t == 0 else 1)
        log_x = -0.5 * (data["x"][t] - p[2] * z) ** 2 - 0.5 * math.log(2.0 * math.pi)
        storch.add_cost(-(_log_bernoulli(prior, z) + log_x - _log_bernoulli(logits, z).detach()), f"cost{t}")
    return found


def _plate(work: Work, params: Tensors, data: Tensors) -> dict[str, Any]:
    p = {name: storch.denote_independent(leaf, 0, "latents") for name, leaf in params.items()}
    x = storch.denote_independent(storch.denote_independent(data["x"], 0, "data"), 1, "latents")
    logits = p["intercept"] + p["slope"] * x
    z = _draw("z", logits, work.particles)
    log_x = -0.5 * (x - p["mean"] * z) ** 2 - 0.5 * math.log(2.0 * math.pi)
    cost = _log_bernoulli(p["prior"], z) + log_x - _log_bernoulli(logits, z).detach()
    storch.add_cost(-data["x"].numel() * cost, "cost")
    return {"z": z}


if __name__ == "__main__":
    # Plates of powers of two: Storchastic keeps a plate's weight in float32.
    for checked in (
        Work("sbn", 5, particles=2, batch=4),
        Work("sbn", 5, layers=2, batch=4),
        Work("chain", 4),
        Work("chain", 4, particles=2),
        Work("plate", 4, batch=4),
    ):
        print(f"{checked.name}: {largest_difference(checked):.1e}")
