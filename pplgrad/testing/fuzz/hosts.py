"""What both libraries' trials share: programs as cases of the exactness harness, the outcomes that they go through, and errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pplgrad.core.objectives import Objective
from pplgrad.testing.cells import cells
from pplgrad.testing.fuzz.oracle import Arrays, enumerate_program, exact, losses, subsets, values_of
from pplgrad.testing.fuzz.program import Program
from pplgrad.testing.programs import Case

MOST_STEPS = 600
"""How many steps a trial may take at most; one that would need more is skipped."""


class Skipped(Exception):
    """The trial does not apply to the program, or would take too long."""


@dataclass(frozen=True)
class Step:
    """One of the runs that an expectation is made of.

    `draws` has, for each particle, the values of the discrete sites (or uniform numbers for them) and the elements that were drawn;
    `loss` is what the loss must be, where that is known.
    """

    draws: list[Arrays]
    weight: float
    loss: float | None


def case_of(program: Program, model: Any, guide: Any) -> Case:
    """Return a program as a case of the exactness harness."""
    latents = {site.name: (site.shape, site.categories or 1) for site in program.discrete}
    subsamples = {plate.name: (plate.size, plate.drawn) for plate in program.plates if plate.subsampled}
    return Case(f"fuzz{program.seed}", program.params, latents, lambda _: (model, guide), program.noise, subsamples)


def outcome_steps(program: Program, objective: Objective, particles: int, state: float) -> list[Step]:
    """Return every tuple of outcomes of the particles that the guide can draw, with its probability."""
    found: list[Step] = []
    every = subsets(program)
    plain = {name: x[None].astype(complex) for name, x in program.params.items()}
    listed = values_of(program)
    count = program.outcomes()
    if len(every) * count**particles > MOST_STEPS:
        raise Skipped(f"{len(every) * count**particles} outcomes")
    for subset in every:
        run = enumerate_program(program, subset, state, plain)
        probability = np.exp(np.broadcast_to(run.log_q[-1].real, (count,)))
        loss = np.broadcast_to(losses(run, objective)[-1].real, (count,))
        for picked in itertools.product(np.flatnonzero(probability > 0).tolist(), repeat=particles):
            draws = [{name: x[i] for name, x in listed.items()} | subset for i in picked]
            weight = float(np.prod(probability[list(picked)])) / len(every)
            found.append(Step(draws, weight, float(loss[picked[0]]) if particles == 1 else None))
    return found


def cell_steps(program: Program, particles: int, state: float) -> list[Step]:
    """Return every cell of the uniform numbers on which all draws, those of branches too, are constant."""
    found: list[Step] = []
    every = subsets(program)
    plain = {name: x[None].astype(complex) for name, x in program.params.items()}
    for subset in every:
        tables = enumerate_program(program, subset, state, plain).tables
        listed = list(itertools.islice(cells(tables), MOST_STEPS + 1))
        if len(every) * len(listed) ** particles > MOST_STEPS:
            raise Skipped("too many cells")
        for picked in itertools.product(listed, repeat=particles):
            weight = float(np.prod([size for _, size in picked])) / len(every)
            found.append(Step([uniform | subset for uniform, _ in picked], weight, None))
    return found


def exact_gradient(program: Program, objective: Objective, state: float, particles: int) -> Arrays:
    """Return the exact gradient; what is uniformly distributed is integrated over."""
    moved = [site for site in program.guide if site.family == "uniform"]
    if not moved:
        return exact(program, objective, state, particles)[1]
    if len(moved) > 1:
        raise Skipped("two integrals")
    nodes, weights = np.polynomial.legendre.leggauss(32)
    total: Arrays = {name: np.zeros(x.shape) for name, x in program.params.items()}
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        noise = {**program.noise, moved[0].name: np.array(node)}
        found = exact(replace(program, noise=noise), objective, state, particles)[1]
        total = {name: x + weight * found[name] for name, x in total.items()}
    return total


def error_of(found: Arrays, wanted: Arrays) -> float:
    """Return the largest difference between two gradients, in units of the larger of 1 and the gradient; infinite for NaN."""
    size = max([1.0, *(float(np.abs(x).max()) for x in wanted.values() if x.size)])
    worst = [float(np.abs(np.asarray(found[name]) - x).max()) for name, x in wanted.items() if x.size]
    return float("inf") if any(np.isnan(x) for x in worst) else max(worst, default=0.0) / size


def repeated(steps: list[Step], least: int) -> Iterator[Step]:
    """Yield the steps, over and over until there have been some."""
    times = -(-least // max(len(steps), 1))
    for step in steps * times:
        yield replace(step, weight=step.weight / times)
