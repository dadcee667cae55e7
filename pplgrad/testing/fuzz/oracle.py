"""The exact loss and gradient of a random program, in plain NumPy: every outcome, float64, no host and no trace.

Derivatives are those of the complex step (Squire and Trapp, 1998), which has no truncation error at a step of 1e-30.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from pplgrad.core.objectives import MultiSample, Objective
from pplgrad.testing.fuzz.program import FAMILIES, Program, Site
from pplgrad.testing.fuzz.terms import Plate, Point, Term

STEP = 1e-30
Arrays = dict[str, np.ndarray]


@dataclass
class Enumerated:
    """All outcomes of a program for one subsample.

    `draws` has the values of every latent site; `log_q` the log probability of each outcome; `costs` each signed log density, scaled and
    masked, with its plates and what it is (observed, prior or guide); `tables` the probabilities of each discrete site's categories
    under every outcome, (outcomes, *shape, categories).
    """

    draws: Arrays
    log_q: np.ndarray
    costs: list[tuple[str, tuple[Plate, ...], np.ndarray]]
    tables: Arrays


def values_of(program: Program) -> Arrays:
    """Return every joint value of the discrete sites, (outcomes, *shape), in a fixed order."""
    supports = [range(s.categories or 1) for s in program.discrete for _ in range(math.prod(s.shape))]
    flat = np.array(list(itertools.product(*supports)), dtype=int).reshape(program.outcomes(), len(supports))
    found, start = {}, 0
    for site in program.discrete:
        count = math.prod(site.shape)
        found[site.name] = flat[:, start : start + count].reshape(len(flat), *site.shape)
        start += count
    return found


def subsets(program: Program) -> list[Arrays]:
    """Return the elements that the subsampled plates draw, in every way."""
    plates = [plate for plate in program.plates if plate.subsampled]
    choices = [list(itertools.combinations(range(plate.size), plate.drawn)) for plate in plates]
    return [
        {plate.name: np.array(chosen) for plate, chosen in zip(plates, picked, strict=True)}
        for picked in itertools.product(*choices)
    ]


def coordinates(params: Arrays) -> Arrays:
    """Return a copy of all parameters for each coordinate, which is moved by an imaginary step there; and the plain ones last."""
    total = sum(x.size for x in params.values())
    found, start = {}, 0
    for name, x in params.items():
        moved = np.tile(x.astype(complex).ravel(), (total + 1, 1))
        moved[start + np.arange(x.size), np.arange(x.size)] += 1j * STEP
        found[name] = moved.reshape(total + 1, *x.shape)
        start += x.size
    return found


def split(program: Program, derivative: np.ndarray) -> Arrays:
    """Return a vector of derivatives as a dictionary of arrays like the parameters."""
    found, start = {}, 0
    for name, x in program.params.items():
        found[name] = derivative[start : start + x.size].reshape(x.shape)
        start += x.size
    return found


def enumerate_program(program: Program, subset: Arrays, state: float = 0.0, params: Arrays | None = None) -> Enumerated:
    """Go through guide and model for all outcomes at once."""
    with np.errstate(invalid="ignore"):  # What the guide cannot draw has an infinite density, and is left out.
        return _enumerated(program, subset, state, params)


def _enumerated(program: Program, subset: Arrays, state: float, params: Arrays | None) -> Enumerated:
    point = Point(params or coordinates(program.params), {}, program.dims, subset, state)
    listed = values_of(program)
    log_q: np.ndarray = np.zeros((1, 1))
    costs: list[tuple[str, tuple[Plate, ...], np.ndarray]] = []
    tables: Arrays = {}
    for site in program.guide:
        args = [term.value(point) for term in site.args]
        if site.name in listed:
            x = listed[site.name].astype(complex)
            value = x.reshape(1, len(x), *(1,) * (program.dims - len(site.shape)), *site.shape)
            tables[site.name] = _table(site, args, len(x))
        else:
            value = _held(program, site, args)
        point.draws[site.name] = value
        log_prob = _log_prob(program, site, value, args)
        if site.name in listed:
            log_q = log_q + _over_plates(log_prob)
        costs.append(("guide", site.plates, -_weighed(program, site, log_prob, point)))
    for site in program.model:
        args = [term.value(point) for term in site.args]
        if site.family == "factor":
            log_prob = _spread(program, site, args[0])
        else:
            log_prob = _log_prob(program, site, _seen(program, site, point), args)
        kind = "prior" if site.latent else "observed"
        costs.append((kind, site.plates, _weighed(program, site, log_prob, point)))
    return Enumerated(point.draws, log_q, costs, tables)


def _held(program: Program, site: Site, args: list[np.ndarray]) -> np.ndarray:
    """Return a continuous site's value from its standard noise."""
    noise = program.noise[site.name]
    noise = noise.reshape(1, 1, *(1,) * (program.dims - noise.ndim), *noise.shape)
    if site.family == "uniform":
        return args[0] + (args[1] - args[0]) * noise
    return args[0] + args[1] * noise


def _seen(program: Program, site: Site, point: Point) -> np.ndarray:
    """Return what a site of the model has as its value."""
    if site.data is None:
        return point.draws[site.name]
    x = site.data.reshape((1,) * (program.dims - site.data.ndim) + site.data.shape)
    for plate in site.plates:
        if plate.subsampled:
            x = np.take(x, point.indices[plate.name], plate.dim)
    return x[None, None].astype(complex)


def _spread(program: Program, site: Site, x: np.ndarray) -> np.ndarray:
    """Return a log density spread out over the site's plates."""
    shape = (1,) * (program.dims - len(site.shape)) + site.shape
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, (1, 1, *shape)))


def _log_prob(program: Program, site: Site, value: np.ndarray, args: list[np.ndarray]) -> np.ndarray:
    return _spread(program, site, FAMILIES[site.family](value, *args))


def _weighed(program: Program, site: Site, log_prob: np.ndarray, point: Point) -> np.ndarray:
    """Return a log density masked and scaled."""
    if isinstance(site.mask, Term):
        log_prob = np.where(site.mask.value(point).real > 0.5, log_prob, 0.0)
    elif site.mask is not None:
        plate = site.plates[-1]
        mask = np.array(site.mask)[point.indices.get(plate.name, slice(None))]
        log_prob = np.where(mask.reshape(-1, *(1,) * (-plate.dim - 1)), log_prob, 0.0)
    factor = math.prod(plate.size / plate.drawn for plate in site.plates)
    return log_prob * (factor * (1.0 if site.scale is None else site.scale))


def _over_plates(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:2], -1).sum(-1)


def _table(site: Site, args: list[np.ndarray], outcomes: int) -> np.ndarray:
    """Return the probabilities of a site's categories, with the parameters as they are."""
    plain = [np.asarray(x[-1:]) for x in args]
    every = [FAMILIES[site.family](np.array(float(k)), *plain) for k in range(site.categories or 1)]
    probs = np.exp(np.stack(np.broadcast_arrays(*every), -1).real[0])
    probs = probs.reshape(len(probs), *probs.shape[1 + probs.ndim - 2 - len(site.shape) : -1], probs.shape[-1])
    return np.broadcast_to(probs, (outcomes, *site.shape, probs.shape[-1]))


def exact(program: Program, objective: Objective, state: float = 0.0, particles: int = 1) -> tuple[float, Arrays]:
    """Return the exact loss and its gradient: −E_q[weighted Σ log p − log q], or minus a bound of so many particles."""
    total: np.ndarray = np.zeros(1)
    every = subsets(program)
    for subset in every:
        found = enumerate_program(program, subset, state)
        if isinstance(objective, MultiSample):
            total = total + _bound(found, objective, particles) / len(every)
        else:
            total = total + _expected(found, objective) / len(every)
    return -float(total[-1].real), split(program, -total[:-1].imag / STEP)


def losses(found: Enumerated, objective: Objective) -> np.ndarray:
    """Return the loss of each outcome, (coordinates, outcomes)."""
    weights = objective.weights((), {})
    factors = {"observed": weights.observed, "prior": weights.prior, "guide": weights.guide}
    total: np.ndarray = np.zeros((1, 1))
    for kind, _, cost in found.costs:
        if factors[kind]:
            with np.errstate(invalid="ignore"):
                total = total + factors[kind] * _over_plates(cost)
    return -total


def _possible(found: Enumerated) -> np.ndarray:
    """Return which outcomes the guide can take."""
    return np.broadcast_to(found.log_q.real.max(0) > -np.inf, found.log_q.shape[1:])


def _expected(found: Enumerated, objective: Objective) -> np.ndarray:
    value = -losses(found, objective)
    log_q, value = np.broadcast_arrays(found.log_q, value)
    keep = _possible(found)
    keep = np.broadcast_to(keep, log_q.shape[1:])
    return (np.exp(log_q[:, keep]) * value[:, keep]).sum(1)


def _bound(found: Enumerated, objective: MultiSample, particles: int) -> np.ndarray:
    """Return E[bound] with one weight for the whole program, over every tuple of outcomes."""
    value = -losses(found, objective)
    log_q, value = np.broadcast_arrays(found.log_q, value)
    keep = _possible(found)
    log_q, value = log_q[:, keep], value[:, keep]
    count, total = value.shape[1], np.zeros(len(value), complex)
    power = objective.power
    for picked in itertools.product(range(count), repeat=particles):
        rows = value[:, list(picked)]
        bound = np.log(np.exp(power * rows).mean(1)) / power
        total = total + np.exp(log_q[:, list(picked)].sum(1)) * bound
    return total
