"""A trial of a random program in Pyro."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO

from pplgrad.core.noise import replaced_noise
from pplgrad.core.objectives import Objective
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.testing.cells import ListedNoise, NoiseRanOut, NoiseShapes, z_of
from pplgrad.testing.fuzz.hosts import (
    Skipped,
    Step,
    case_of,
    cell_steps,
    error_of,
    exact_gradient,
    outcome_steps,
    repeated,
)
from pplgrad.testing.fuzz.oracle import Arrays
from pplgrad.testing.fuzz.program import Program
from pplgrad.testing.fuzz.source import Built, build, state_of
from pplgrad.testing.in_pyro import Drive, Force, fresh, gradient, isolated

__all__ = ["compiled", "exactly", "isolated", "kept", "runs_without", "statistically"]

MOST = 250
"""How many steps a trial may take at most, outcomes of an estimator's own noise counted; one that would need more is skipped."""


def _elbo(
    program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool, **more: Any
) -> Any:
    depth = program.dims if vectorized else float("inf")
    return TraceGrad_ELBO(
        particles, depth, vectorize_particles=vectorized, estimators=estimators, objective=objective, **more
    )


def exactly(program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool) -> float:
    """Return how far the expected gradient of a new ELBO is from the exact one, at both values of the Python state."""
    built = build(program, "pyro")
    branches = any(estimator.uses_branches or estimator.enumerates for estimator in estimators.values())
    worst = 0.0
    for state in (0, 1) if program.reads_state else (0,):
        elbo = _elbo(program, estimators, objective, particles, vectorized)
        over = _over_cells if branches else _over_outcomes
        found = over(program, built, elbo, objective, particles, state)
        worst = max(worst, error_of(found, exact_gradient(program, objective, state, particles)))
    return worst


def _moves_by_itself(program: Program) -> bool:
    """Return whether reading the Python state changes it."""
    kind = state_of(program)
    return kind is not None and kind.each_step


def _step(built: Built, elbo: Any, state: int) -> float:
    built.set_state(state)
    return float(elbo.loss_and_grads(built.model, built.guide, *built.args))


def _over_outcomes(
    program: Program, built: Built, elbo: Any, objective: Objective, particles: int, state: int, anew: bool = True
) -> Arrays:
    """Return E[estimate] over every tuple of outcomes; infinite where a loss is wrong already."""
    case = case_of(program, built.model, built.guide)
    if particles > 1 and not elbo.vectorize_particles and _moves_by_itself(program):
        raise Skipped("particles run Python again, which moves its state on")
    steps = outcome_steps(program, objective, particles, state)
    if len(steps) > MOST:
        raise Skipped("too many outcomes")
    fresh(case)
    total: Arrays = {name: np.zeros(x.shape) for name, x in program.params.items()}
    for step in steps if anew else repeated(steps, 8):
        if anew:
            fresh(case)
        with Force(step.draws, program.noise):
            loss = _step(built, elbo, state)
        found = gradient()
        if step.loss is not None and not abs(loss - step.loss) < 1e-7 * (1 + abs(step.loss)):
            return {name: np.full(x.shape, np.inf) for name, x in total.items()}
        for name in total:
            total[name] += step.weight * found.get(name, 0.0)
    return total


def _over_cells(
    program: Program, built: Built, elbo: Any, objective: Objective, particles: int, state: int, anew: bool = True
) -> Arrays:
    """Return E[estimate] over all draws, those of branches, and the estimators' own finite noise."""
    if particles > 1 and not elbo.vectorize_particles:
        raise Skipped("branches of looped particles")
    if _moves_by_itself(program):
        raise Skipped("branches run Python again, which moves its state on")
    case = case_of(program, built.model, built.guide)
    steps = cell_steps(program, particles, state)

    def run(draws: list[Arrays], noise: Callable) -> Arrays:
        if anew:
            fresh(case)
        with Drive(draws, program.noise), replaced_noise(noise):
            _step(built, elbo, state)
        return gradient()

    fresh(case)
    # A program that mixes rows is found out in one step, which draws noise twice: together, and one by one. Most are in their first step.
    run(steps[0].draws, NoiseShapes().recording)
    try:
        return _sum_of_cells(program, steps, run, anew)
    except NoiseRanOut:
        return _sum_of_cells(program, steps, run, anew)


def _sum_of_cells(program: Program, steps: list[Step], run: Callable, anew: bool) -> Arrays:
    """Return the sum over steps and outcomes of noise of what `run` gives, weighted by their probability."""
    total: Arrays = {name: np.zeros(x.shape) for name, x in program.params.items()}
    shapes = NoiseShapes()
    run(steps[0].draws, shapes.recording)
    outcomes = list(shapes.outcomes()) if len(shapes.calls) < 12 else []
    if not outcomes or len(outcomes) * len(steps) > MOST:
        raise Skipped("too much noise")
    for step in steps if anew else repeated(steps, 8):
        for outcome in outcomes:
            listed = ListedNoise(outcome)
            found = run(step.draws, listed.make)
            weight = step.weight * float(np.exp(float(listed.log_weight)))
            for name in total if weight > 0 else ():
                total[name] += weight * found.get(name, 0.0)
    return total


def kept(program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool) -> float:
    """Return the largest error of one ELBO that is kept while the Python state changes, over several changes."""
    if not program.reads_state:
        raise Skipped("no Python state")
    if any(estimator.keeps_state for estimator in estimators.values()):
        raise Skipped("an estimator that learns")
    built = build(program, "pyro")
    elbo = _elbo(program, estimators, objective, particles, vectorized)
    branches = any(estimator.uses_branches or estimator.enumerates for estimator in estimators.values())
    over = _over_cells if branches else _over_outcomes
    worst = 0.0
    for state in (0, 1, 0):
        found = over(program, built, elbo, objective, particles, state, False)
        worst = max(worst, error_of(found, exact_gradient(program, objective, state, particles)))
    return worst


def _sample(
    program: Program, built: Built, elbo: Any, draws: int, state: int, seed: int = 0, moving: bool = False
) -> Arrays:
    """Return the gradients of so many steps, (steps, *shape)."""
    case = case_of(program, built.model, built.guide)
    fresh(case)
    torch.manual_seed(seed)
    rows: dict[str, list] = {name: [] for name in program.params}
    if not moving and program.noise:
        # Around the guide, because a compiled step runs under no handler; around all if the particles are in a plate.
        inside = not elbo.vectorize_particles
        built = replace(built, guide=Drive([], program.noise)(built.guide)) if inside else built
    with Drive([], {} if moving else program.noise) if elbo.vectorize_particles else nullcontext():
        for _ in range(draws):
            _step(built, elbo, state)
            found = gradient()
            for name, x in program.params.items():
                rows[name].append(found.get(name, np.zeros(x.shape)))
    return {name: np.stack(found) for name, found in rows.items()}


def _z(rows: Arrays, wanted: Arrays) -> float:
    return max((z_of(rows[name], x) for name, x in wanted.items() if x.size), default=0.0)


def statistically(
    program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool, draws: int = 800
) -> float:
    """Return the largest |z| of the mean gradient of a new ELBO, whatever the estimators' noise is."""
    built = build(program, "pyro")
    elbo = _elbo(program, estimators, objective, particles, vectorized)
    moving = any(site.family == "uniform" for site in program.guide)
    if moving and program.noise.keys() - {site.name for site in program.guide if site.family == "uniform"}:
        raise Skipped("two integrals")
    rows = _sample(program, built, elbo, draws, 0, moving=moving)
    return _z(rows, exact_gradient(program, objective, 0, particles))


def compiled(program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool) -> float:
    """Return the largest |z| of a compiled ELBO that is kept while the Python state changes."""
    if any(estimator.keeps_state for estimator in estimators.values()):
        raise Skipped("an estimator that learns")
    if any(site.family == "uniform" for site in program.guide):
        raise Skipped("noise that cannot be held")
    built = build(program, "pyro")
    elbo = _elbo(program, estimators, objective, particles, vectorized, compile={"backend": "eager"})
    worst = 0.0
    for state in (0, 1) if program.reads_state else (0,):
        rows = _sample(program, built, elbo, 200, state)
        worst = max(worst, _z(rows, exact_gradient(program, objective, state, particles)))
    return worst


def runs_without(program: Program, particles: int, vectorized: bool) -> bool:
    """Return whether the library's own ELBO runs the program with as many particles."""
    built = build(program, "pyro")
    fresh(case_of(program, built.model, built.guide))
    depth = program.dims if vectorized else float("inf")
    try:
        Trace_ELBO(particles, depth, vectorize_particles=vectorized).loss_and_grads(
            built.model, built.guide, *built.args
        )
    except Exception:  # Whatever it is, the host says that this is no program for it.
        return False
    finally:
        pyro.clear_param_store()
    return True
