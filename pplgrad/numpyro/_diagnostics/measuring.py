"""Draws of an ELBO's gradient with other estimators at its sites, and what `Auto(measure=True)` makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from numpyro.infer import SVI, TraceGraph_ELBO
from numpyro.optim import SGD

from pplgrad.configuration import Resolved
from pplgrad.core.estimator import Estimator
from pplgrad.core.program import Program
from pplgrad.core.site_info import SiteInfo
from pplgrad.diagnostics.choosing import WARM_UP, Candidate, Choice, Probe, choose, keep, to_measure
from pplgrad.diagnostics.moments import Draws
from pplgrad.errors import ConfigurationError
from pplgrad.numpyro._diagnostics.gradient_draws import Gradients
from pplgrad.numpyro._guide import config_estimators

Asked = tuple[jax.Array, dict[str, Any], Program]
"""A key, parameters, and a program."""


def described(*args: Any, **kwargs: Any) -> Asked:
    """Return what `describe` is asked of: of a model and a guide, before which a key and parameters may stand."""
    if len(args) > 1 and callable(args[0]) and callable(args[1]):
        return _started(*args, **kwargs)
    try:
        return _given(*args, **kwargs)
    except TypeError:
        raise ConfigurationError(
            "describe takes a model, a guide and the program's arguments: describe(model, guide, *args), or "
            "describe(rng_key, param_map, model, guide, *args)."
        ) from None


def _given(
    rng_key: jax.Array, param_map: dict[str, Any], model: Callable, guide: Callable, *args: Any, **kwargs: Any
) -> Asked:
    return rng_key, param_map, Program(model, guide, args, kwargs)


def _started(model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Asked:
    """Return a program at the parameters that it starts with, the baselines' among them."""
    key, program = jax.random.key(0), Program(model, guide, args, kwargs)
    return key, starting_params(program, key)[0], program


def starting_params(
    program: Program, key: jax.Array, given: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the parameters that a program starts with, those that are given among them, and its mutable state."""
    # `init` does not run the loss, and this one lets discrete sites pass.
    svi = SVI(program.model, program.guide, SGD(0.0), TraceGraph_ELBO())
    start = None if given is None else dict(given)
    state = svi.init(key, *program.args, init_params=start, **program.kwargs)
    return svi.get_params(state), state.mutable_state or {}


def measured(elbo: Any, program: Program, params: Mapping[str, Any] | None, seed: int) -> Choice:
    """Choose for the sites of an ELBO that have an `Auto(measure=True)`, the others as they are, and keep the choice there."""
    _run_traced(elbo, program, params, seed)
    resolved = dict(elbo._resolved)
    offered, seconds = to_measure(resolved, sites_of(elbo, program, params, seed), elbo._stateless)
    choice = choose(draws_with(elbo, program, params, seed, autos=resolved), offered, seconds)
    keep(choice, resolved)
    return choice


def sites_of(elbo: Any, program: Program, params: Mapping[str, Any] | None, seed: int) -> dict[str, SiteInfo]:
    """Return the properties of each site that its estimator receives."""
    probe = Probe()
    _run_traced(elbo.with_estimators({"*": probe}), program, params, seed)
    return probe.seen


def _run_traced(elbo: Any, program: Program, params: Mapping[str, Any] | None, seed: int) -> None:
    """Let an ELBO bind the estimators of the program's sites."""
    plain = Gradients(program, params, seed)
    elbo.describe(
        jax.random.key(seed),
        plain.constrain(plain.params),
        program.model,
        program.guide,
        *program.args,
        **program.kwargs,
    )


def draws_with(
    elbo: Any,
    program: Program,
    params: Mapping[str, Any] | None,
    seed: int,
    warm_up: int = WARM_UP,
    autos: Mapping[str, Resolved] = {},
) -> Candidate:
    """Return what makes draws of the ELBO's gradient with other estimators, which have learned what they learn."""

    def draws_of(estimators: Mapping[str, Estimator]) -> Draws:
        mine = elbo.with_estimators(estimators)
        with _standing_for(autos, estimators):
            # Learned baselines live in a wrapped guide alone.
            wrapped = program._replace(guide=config_estimators(program.guide, estimators))
            host = Gradients(wrapped, params, seed)
            if warm_up and (host.learned or host.mutable):
                host.warm_up(mine, warm_up)
            draws = host.draws(mine, 10)

        def chunks(count: int, seed: int) -> Iterator[np.ndarray]:
            with _standing_for(autos, estimators):
                yield from draws(count, seed)

        return chunks

    return draws_of


@contextmanager
def _standing_for(autos: Mapping[str, Resolved], estimators: Mapping[str, Estimator]) -> Iterator[None]:
    """Let a guide that names an `Auto` register what a candidate learns."""
    found = {name: resolved.measuring for name, resolved in autos.items() if resolved.measuring is not None}
    before = {name: dict(auto.measured) for name, auto in found.items()}
    for name, auto in found.items():
        auto.measured[name] = estimators[name]
    try:
        yield
    finally:
        for name, auto in found.items():
            auto.measured.clear()
            auto.measured.update(before[name])
