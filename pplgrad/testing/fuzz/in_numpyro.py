"""A trial of a random program in NumPyro."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import Trace_ELBO

from pplgrad.core.noise import replaced_noise
from pplgrad.core.objectives import MultiSample, Objective
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.numpyro._compat_jax import as_function
from pplgrad.testing.cells import NumberedNoise, z_of
from pplgrad.testing.fuzz.hosts import Skipped, Step, case_of, cell_steps, error_of, exact_gradient, outcome_steps
from pplgrad.testing.fuzz.oracle import Arrays
from pplgrad.testing.fuzz.program import Program, in_chain
from pplgrad.testing.fuzz.source import Built, build
from pplgrad.testing.in_numpyro import (
    KEY,
    _which_particle,
    _with_noise,
    array,
    inverse_cdf,
    isolated,
    stacked,
    with_fixed_noise,
)

__all__ = ["eagerly", "exactly", "isolated", "runs_without", "statistically", "unfused"]

CAN_FUSE = "fuse" in inspect.signature(TraceGrad_ELBO.__init__).parameters
MOST_ROWS = 60_000


def _elbo(
    program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool, **more: Any
) -> Any:
    return TraceGrad_ELBO(particles, vectorized or particles == 1, estimators=estimators, objective=objective, **more)


def _wrapped(built: Built, estimators: dict) -> Callable:
    """Return the guide, by the wrapper that keeps what estimators learn where some do."""
    if any(estimator.keeps_state for estimator in estimators.values()):
        raise Skipped("an estimator that learns")
    return built.guide


def _parameters(program: Program) -> dict:
    return {name: array(x) for name, x in program.params.items()}


def _forced(program: Program, guide: Callable, draws: dict[str, jax.Array], particles: int, uniform: bool) -> Callable:
    """Make the guide take given values, or the values at given uniform numbers, (particles, ...), at the shapes that it has."""
    which = _which_particle(particles)

    def run(*args: Any) -> Any:
        mine = which()

        def choose(site: Any) -> Any:
            name = site["name"]
            if name not in draws:
                return _with_noise(site, program.noise)
            x = draws[name][mine]
            if site["type"] == "plate":
                return x
            if name == "c":  # The steps of a loop, of which `scan` takes its own.
                return x
            x = x.reshape(site["fn"].batch_shape)
            return inverse_cdf(site["fn"], x) if uniform else x

        with handlers.substitute(substitute_fn=choose):
            return guide(*args)

    return run


def _sharing(model: Callable, draws: dict[str, jax.Array]) -> Callable:
    """Make the model draw the given elements in plates that the guide has not; particles share them."""

    def choose(site: Any) -> Any:
        return draws[site["name"]][0] if site["type"] == "plate" and site["name"] in draws else None

    return handlers.substitute(model, substitute_fn=choose)


def exactly(
    program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool, **more: Any
) -> float:
    """Return how far the expected gradient is from the exact one, at both values of the Python state."""
    built = build(program, "numpyro")
    branches = any(estimator.uses_branches or estimator.enumerates for estimator in estimators.values())
    worst = 0.0
    for state in (0, 1) if program.reads_state else (0,):
        built.set_state(state)
        elbo = _elbo(program, estimators, objective, particles, vectorized, **more)
        if branches:
            found = _over_cells(program, built, elbo, estimators, particles, state)
        else:
            found = _over_outcomes(program, built, elbo, estimators, objective, particles, state)
        worst = max(worst, error_of(found, exact_gradient(program, objective, state, particles)))
    return worst


def unfused(program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool) -> float:
    """Return the error of an ELBO that fuses nothing."""
    if not CAN_FUSE:
        raise Skipped("this version always fuses")
    return exactly(program, estimators, objective, particles, vectorized, fuse=False)


def _rows(steps: list[Step]) -> dict[str, jax.Array]:
    """Return the draws of all steps, (steps, particles, ...)."""
    every = [{n: np.stack([draws[n] for draws in step.draws]) for n in step.draws[0]} for step in steps]
    found = stacked(every)
    loop = sorted(name for name in found if in_chain(name))
    return found | ({"c": jnp.stack([found.pop(name) for name in loop], -1)} if loop else {})


def _over_outcomes(
    program: Program, built: Built, elbo: Any, estimators: dict, objective: Objective, particles: int, state: int
) -> Arrays:
    """Return E[estimate] over every tuple of outcomes; infinite where a loss is wrong already."""
    steps = outcome_steps(program, objective, particles, state)
    guide = _wrapped(built, estimators)

    def loss(params: dict, draws: dict[str, jax.Array]) -> jax.Array:
        run = _forced(program, guide, draws, particles, False)
        return elbo.loss_with_mutable_state(
            jax.random.key(KEY), params, _sharing(built.model, draws), run, *built.args
        )["loss"]

    params = _parameters(program)
    if steps[0].draws[0]:
        value, found = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))(params, _rows(steps))
    else:
        value, found = jax.tree.map(lambda x: x[None], jax.jit(jax.value_and_grad(loss))(params, {}))
    wanted = [np.nan if step.loss is None else step.loss for step in steps]
    if not isinstance(objective, MultiSample) and particles == 1:
        if not np.allclose(value, wanted, rtol=1e-7, atol=1e-7):
            return {name: np.full(x.shape, np.inf) for name, x in program.params.items()}
    weights = np.array([step.weight for step in steps])
    return {name: np.tensordot(weights, np.asarray(found[name]), 1) for name in program.params}


def _held(program: Program, built: Built) -> Any:
    return case_of(program, built.model, built.guide)


def _over_cells(program: Program, built: Built, elbo: Any, estimators: dict, particles: int, state: int) -> Arrays:
    """Return E[estimate] over all draws, those of branches, and the estimators' own finite noise."""
    if program.chain:
        raise Skipped("branches in a loop")
    steps = cell_steps(program, particles, state)
    params, draws, noise = _parameters(program), _rows(steps), NumberedNoise()
    guide = _wrapped(built, estimators)

    def loss(params: dict, draw: dict[str, jax.Array], number: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise.start(number)
        with replaced_noise(noise.make):
            run = _forced(program, guide, draw, particles, True)
            model = _sharing(built.model, draw)
            value = elbo.loss_with_mutable_state(jax.random.key(KEY), params, model, run, *built.args)["loss"]
        return value, jnp.asarray(noise.log_weight)

    def one(params: dict, draw: dict[str, jax.Array], number: jax.Array) -> Any:
        found, log_weight = jax.grad(loss, has_aux=True)(params, draw, number)
        weight = jnp.exp(log_weight)
        # An impossible outcome may have no gradient at all.
        return jax.tree.map(lambda g: jnp.where(weight > 0, weight * g, 0), found)

    first = {name: x[0] for name, x in draws.items()}
    closed, shapes = jax.make_jaxpr(one, return_shape=True)(params, first, jnp.array(0))
    if noise.count * len(steps) > MOST_ROWS:
        raise Skipped("too much noise")
    every = {name: jnp.repeat(x, noise.count, axis=0) for name, x in draws.items()}
    numbers = jnp.tile(jnp.arange(noise.count), len(steps))

    def traced(*row: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shapes), as_function(closed)(*jax.tree.leaves((params, *row))))

    found = jax.jit(jax.vmap(traced))(every, numbers)
    weights = np.repeat([step.weight for step in steps], noise.count)
    return {name: np.tensordot(weights, np.asarray(found[name]), 1) for name in program.params}


def _losses(program: Program, estimators: dict, elbo: Any, moving: bool) -> Callable:
    """Return the loss of a program, of parameters and a key."""
    built = build(program, "numpyro")
    guide = config_estimators(built.guide, {})
    if not moving:
        guide = with_fixed_noise(guide, _held(program, built))
    return lambda params, key: elbo.loss(key, params, built.model, guide, *built.args)


def statistically(
    program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool, draws: int = 10_000
) -> float:
    """Return the largest |z| of the mean gradient, whatever the estimators' noise is."""
    _wrapped(build(program, "numpyro"), estimators)
    moving = any(site.family == "uniform" for site in program.guide)
    if moving and program.noise.keys() - {site.name for site in program.guide if site.family == "uniform"}:
        raise Skipped("two integrals")
    elbo = _elbo(program, estimators, objective, particles, vectorized)
    gradient = jax.grad(_losses(program, estimators, elbo, moving))
    params, keys = _parameters(program), jax.random.split(jax.random.key(0), draws)
    found = jax.jit(lambda p, keys: jax.lax.map(lambda key: gradient(p, key), keys, batch_size=1000))(params, keys)
    wanted = exact_gradient(program, objective, 0, particles)
    return max((z_of(np.asarray(found[name]), x) for name, x in wanted.items() if x.size), default=0.0)


def eagerly(program: Program, estimators: dict, objective: Objective, particles: int, vectorized: bool) -> float:
    """Return how far a step without `jit` is from the same step with it."""
    _wrapped(build(program, "numpyro"), estimators)
    elbo = _elbo(program, estimators, objective, particles, vectorized)
    both = jax.value_and_grad(_losses(program, estimators, elbo, False))
    worst, params = 0.0, _parameters(program)
    for number in range(2):
        key = jax.random.key(number)
        plain, jitted = both(params, key), jax.jit(both)(params, key)
        pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True)
        worst = max([worst, *(error_of({"": np.asarray(a)}, {"": np.asarray(b)}) for a, b in pairs)])
    return worst


def runs_without(program: Program, particles: int, vectorized: bool) -> bool:
    """Return whether the library's own ELBO runs the program with as many particles."""
    built = build(program, "numpyro")
    elbo = Trace_ELBO(particles, vectorize_particles=vectorized)
    try:
        elbo.loss(jax.random.key(0), _parameters(program), built.model, built.guide, *built.args)
    except Exception:  # Whatever it is, the host says that this is no program for it.
        return False
    return True
