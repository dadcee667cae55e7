"""Train a model script in Pyro."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam

from pplgrad import ScoreFunction
from pplgrad.lab.script import Script
from pplgrad.lab.study import Batches, Progress, RunConfig, evaluation_steps, total_variance
from pplgrad.lab.words import estimator
from pplgrad.pyro import TraceGrad_ELBO, config_estimators, split_optimizer


def train(config: RunConfig, script: Script, progress: Progress) -> dict[str, Any]:
    """Train one run; return its curves, gradient variance and time per step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(config.seed)
    batches = Batches(config, script)
    model, guide = script.program("pyro", config.options, batches.train, config.seed)
    chosen = estimator(config.estimator, script.baseline_inputs)
    guide = config_estimators(guide, dict.fromkeys(script.discrete, chosen))
    vectorized = config.particles > 1
    fixed = {which: torch.from_numpy(batches.fixed(which)) for which in ("train", "test")}
    nesting = _plate_nesting(model, guide, fixed["train"][: batches.size])
    elbo = TraceGrad_ELBO(config.particles, vectorize_particles=vectorized, max_plate_nesting=nesting)
    optimizer = split_optimizer(Adam({"lr": config.learning_rate}), Adam({"lr": config.baseline_learning_rate}))
    svi = SVI(model, guide, optimizer, elbo)
    # A relaxation has an objective of its own; what is compared is the bound at hard draws.
    hard = dict.fromkeys(script.discrete, ScoreFunction())
    evaluate = TraceGrad_ELBO(10, vectorize_particles=True, max_plate_nesting=nesting, estimators=hard)

    def objective(which: str) -> float:
        # Evaluation draws from a stream of its own, so that it does not move the training's.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(config.seed + 1)
            return -evaluate.loss(model, guide, fixed[which]) / len(fixed[which])

    curve: dict[str, list] = {"step": [], "train": [], "test": [], "seconds": []}
    seconds: list[float] = []
    stops = set(evaluation_steps(config.steps, config.points))
    for step in range(config.steps + 1):
        if step in stops:
            point = {"step": step, "train": objective("train"), "test": objective("test"), "seconds": sum(seconds)}
            for name, value in point.items():
                curve[name].append(value)
        if step < config.steps:
            batch = torch.from_numpy(batches.next())
            start = time.perf_counter()
            svi.step(batch)
            seconds.append(time.perf_counter() - start)
            progress(1)
    return {
        "curve": curve,
        "gradient_variance": _gradient_variance(elbo, model, guide, torch.from_numpy(batches.next()), config),
        "milliseconds_per_step": 1e3 * float(np.median(seconds[3:] or seconds)),
    }


def _plate_nesting(model: Any, guide: Any, batch: torch.Tensor) -> int:
    """Return how many plate dimensions a program uses; the ELBO's own guess is the same and logs a line each time."""
    drawn = poutine.trace(guide).get_trace(batch)
    run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(batch)
    sites = [*drawn.nodes.values(), *run.nodes.values()]
    return max(
        (-f.dim for s in sites if s["type"] == "sample" for f in s["cond_indep_stack"] if f.vectorized), default=0
    )


def _gradient_variance(elbo: Any, model: Any, guide: Any, batch: torch.Tensor, config: RunConfig) -> float:
    """Return the trace of the covariance of the guide's gradient of the loss per datum, at the final parameters."""
    names = poutine.trace(guide).get_trace(batch).param_nodes
    store = pyro.get_param_store()
    params = [store[name].unconstrained() for name in names]  # type: ignore[attr-defined]
    draws = []
    for _ in range(config.gradient_draws):
        for _, param in store.named_parameters():
            param.grad = None
        elbo.loss_and_grads(model, guide, batch)
        # A parameter that the guide registers and does not use has no gradient.
        gradient = [torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in params]
        draws.append(torch.cat(gradient).numpy().astype(float) / len(batch))
    return total_variance(np.stack(draws))
