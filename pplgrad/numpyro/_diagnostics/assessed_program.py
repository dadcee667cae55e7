"""A NumPyro program as an assessment asks for it: draws with their densities, replicated data and simulations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.distributions import Delta, Unit

from pplgrad.assessment.assessing import Plan
from pplgrad.assessment.calibration import Simulation
from pplgrad.assessment.draws import Draws, Values
from pplgrad.assessment.enumeration import check_support
from pplgrad.assessment.simulating import Place, places, refuse_factors, refuse_not_simulated, refuse_unread, renewed
from pplgrad.core.program import Program
from pplgrad.errors import ConfigurationError, ProgramError
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._compat_jax import TRACING_ERRORS
from pplgrad.numpyro._diagnostics.measuring import starting_params
from pplgrad.numpyro._diagnostics.weighted_draws import (
    Found,
    element_density,
    log_joint,
    log_weights,
    mapped,
    weighted_draws,
)
from pplgrad.numpyro._distributions import innermost
from pplgrad.numpyro._posterior import summed_posterior
from pplgrad.numpyro._tracing.model_trace import sample_sites

_LOOKS = 3
"""Simulations of which it is seen whether they are the model's, and whether the guide reads them."""


class AssessedProgram:
    """A program at given parameters."""

    def __init__(
        self, program: Program, params: Mapping[str, Any] | None, plates: tuple[str, ...] | None, seed: int
    ) -> None:
        self.program, self._plates = program, plates
        started, mutable = starting_params(program, jax.random.key(seed), params)
        self._params = {**started, **mutable}
        self._keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0xA55E), 3)
        self._found: Found | None = None
        self._log_joint: Callable | None = None

    def draws(self, count: int) -> Draws:
        """Return draws of the guide: a weight for each element of the plates, or one where a latent is shared by them."""
        for plates in (self._plates, ()):
            try:
                self._found = weighted_draws(self.program, self._params, plates, count, self._keys[0])
                return self._found.draws
            except ProgramError:
                if self._plates is not None or plates == ():
                    raise
        raise AssertionError

    def log_joint(self, values: Values) -> np.ndarray:
        """Return log p of each element of the plates at given values of all latents."""
        assert self._found is not None
        given = {name: jnp.asarray(x) for name, x in values.items()}
        plain = partial(log_joint, self.program, self._params, self._found)
        self._log_joint = self._log_joint or jax.jit(plain)
        latents = self._found.draws.latents.items()
        try:
            found, supports = self._log_joint(given)
            if any(supports[name] is None and latent.support is not None for name, latent in latents):
                self._log_joint = plain  # What a site can take may be known in a plain run alone.
                found, supports = plain(given)
        except TRACING_ERRORS:
            self._log_joint = plain
            found, supports = plain(given)
        for name, latent in latents:
            check_support(name, latent.support, None if supports[name] is None else np.asarray(supports[name]))
        return np.asarray(found)

    def replicates(self, draws: Draws, count: int) -> dict[str, np.ndarray]:
        """Return data that the model draws with the guide's latents, and with summed sites from their posterior given these."""
        model, guide, args, kwargs = self.program
        first, second = jax.random.split(self._keys[1])
        values = {name: jnp.asarray(latent.values[:count]) for name, latent in draws.latents.items()}
        if draws.summed:
            found = summed_posterior(first, self._params, model, guide, *args, num_samples=count, draws=True, **kwargs)
            values = {name: x[0] for name, x in found.items()}

        def one(row: tuple[jax.Array, dict]) -> dict[str, jax.Array]:
            trace = self._drawn(row[0], row[1])
            return {name: trace[name]["value"] for name in draws.observed}

        rows = mapped(one, (jax.random.split(second, count), values))
        found = {name: np.asarray(x) for name, x in rows.items()}
        return {name: x for name, x in found.items() if x.shape[1:] == draws.observed[name].value.shape}

    def simulations(self, draws: Draws, plan: Plan) -> Iterator[Simulation]:
        """Yield latents of the model, and draws of the guide for the data that the model drew with them."""
        args, kwargs = self.program.args, self.program.kwargs
        names = [name for name, latent in draws.latents.items() if not latent.auxiliary]
        real = {name: site.value for name, site in draws.observed.items()}
        where = places(args, kwargs, real) if plan.dream is None else None
        keys = jax.random.split(self._keys[2], plan.simulations)
        self._refuse(keys[:_LOOKS], list(real), where, plan)

        with_density = [name for name in names if not draws.latents[name].point]

        assert self._found is not None
        layout = self._found.layout

        def one(key: jax.Array) -> tuple:
            first, second, third = jax.random.split(key, 3)
            drawn = self._drawn(first, {})
            new_args, new_kwargs = self._renewed(drawn, list(real), where, plan)
            guide, params = self.program.guide, self._params
            if plan.refit is not None:
                guide, params = _refitted(plan.refit(*new_args, **new_kwargs), guide, params)

            truth = {name: drawn[name]["value"] for name in names}

            program = self.program._replace(guide=guide, args=new_args, kwargs=new_kwargs)

            def at(key: jax.Array, values: dict) -> tuple[dict, dict, jax.Array | None]:
                seeded = handlers.substitute(handlers.seed(guide, key), data=params)
                trace = handlers.trace(handlers.substitute(seeded, data=values)).get_trace(*new_args, **new_kwargs)
                log_q = {name: element_density(trace[name]["fn"], trace[name]["value"]) for name in with_density}
                found = {name: trace[name]["value"] for name in names}
                return found, log_q, log_weights(program, params, layout, found) if draws.made_by_model else None

            every = jax.random.split(second, plan.rank_draws)
            draw = partial(at, values={})
            found, log_q, weights = _at_once(draw, every) if plan.refit is None else mapped(draw, every)
            _, own_log_q, own_weight = at(third, truth)
            return truth, found, own_log_q, log_q, own_weight, weights

        if plan.refit is None:
            rows = jax.tree.map(np.asarray, mapped(one, keys))
            for i in range(plan.simulations):
                yield Simulation(*jax.tree.map(lambda x: x[i], rows))  # noqa: B023
            return
        for key in keys:
            yield Simulation(*jax.tree.map(np.asarray, one(key)))

    def _drawn(self, key: jax.Array, values: dict) -> dict[str, Any]:
        """Return the trace of the model with data of its own, at given values of latents."""
        model = handlers.substitute(handlers.seed(self.program.model, key), data=self._params)
        free = handlers.uncondition(handlers.substitute(model, data=values))
        return handlers.trace(free).get_trace(*self.program.args, **self.program.kwargs)

    def _renewed(
        self, drawn: dict, names: list[str], where: Mapping[str, Place] | None, plan: Plan
    ) -> tuple[tuple, dict]:
        data = {name: drawn[name]["value"] for name in names}
        return renewed(self.program.args, self.program.kwargs, data, where, plan.dream, _cast)

    def _refuse(self, keys: jax.Array, names: list[str], where: Mapping[str, Place] | None, plan: Plan) -> None:
        """Refuse a model that does not simulate its data, and a guide that does not read them."""
        changes = []
        for key in keys:
            drawn = self._drawn(jax.random.split(key, 3)[0], {})
            observed = {n: s for n, s in sample_sites(drawn).items() if _is_observed(s)}
            refuse_factors([n for n, s in observed.items() if isinstance(innermost(unmasked(s["fn"])), Unit)])
            new_args, new_kwargs = self._renewed(drawn, names, where, plan)
            again = self._at(self.program.model, key, _values(drawn), new_args, new_kwargs)
            same = all(np.array_equal(again[n]["value"], drawn[n]["value"]) for n in names)
            refuse_not_simulated(_log_density(drawn), _log_density(again) if same else float("nan"), names)
            if plan.refit is None:
                args, kwargs = self.program.args, self.program.kwargs
                mine = self._at(self.program.guide, key, {}, args, kwargs)
                other = self._at(self.program.guide, key, _values(mine), new_args, new_kwargs)
                changes.append(_log_density(mine) != _log_density(other))
        if plan.refit is None:
            refuse_unread(changes)

    def _at(self, f: Callable, key: jax.Array, values: dict, args: tuple, kwargs: Mapping) -> dict[str, Any]:
        seeded = handlers.substitute(handlers.seed(f, key), data=self._params)
        return handlers.trace(handlers.substitute(seeded, data=values)).get_trace(*args, **kwargs)


def _at_once(draw: Callable, keys: jax.Array) -> tuple:
    """Return the draws of all keys at once; one after the other where model or guide cannot be traced."""
    try:
        return jax.vmap(draw)(keys)
    except TRACING_ERRORS:
        return mapped(draw, keys)


def _is_observed(site: Any) -> bool:
    """Return whether a site is observed, or was before its data were taken off."""
    return site["is_observed"] or "was_observed" in site["infer"]


def _values(trace: dict) -> dict[str, Any]:
    """Return what was drawn, but for point masses, which are computed again."""
    return {
        name: site["value"]
        for name, site in sample_sites(trace).items()
        if not _is_observed(site) and not isinstance(innermost(unmasked(site["fn"])), Delta)
    }


def _log_density(trace: dict) -> float:
    return sum(float(jnp.sum(site["fn"].log_prob(site["value"]))) for site in sample_sites(trace).values())


def _cast(drawn: jax.Array, like: Any) -> jax.Array:
    return jnp.asarray(drawn, like.dtype) if hasattr(like, "dtype") else drawn


def _refitted(found: Any, guide: Callable, params: dict) -> tuple[Callable, dict]:
    """Return the guide and the parameters that `refit` gave: parameters, or a guide with parameters."""
    if isinstance(found, tuple) and len(found) == 2 and callable(found[0]):
        guide, found = found
    if not isinstance(found, Mapping):
        raise ConfigurationError(
            f"refit= returned {type(found).__name__}; it returns the fitted parameters, such as svi.get_params(state), or a guide with its "
            "parameters."
        )
    return guide, {**params, **found}
