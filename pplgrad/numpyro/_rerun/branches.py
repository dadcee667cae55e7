"""Branches in NumPyro: the program mapped over a branch number, with the same key and one site changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import or_
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pplgrad.core.alternatives import Values
from pplgrad.core.draw import Finite
from pplgrad.core.mixtures import Mixture
from pplgrad.core.noise import Noise
from pplgrad.core.plates import AFTER, BEFORE, SAME
from pplgrad.core.program import Program
from pplgrad.core.sites import Run
from pplgrad.engine.branches import chunks, exists_or_not, with_other_sites
from pplgrad.engine.checks import another_network, refuse_misuse
from pplgrad.engine.closed_forms import Counting
from pplgrad.engine.every_draw import refuse_other_sites
from pplgrad.engine.layout import Layout
from pplgrad.errors import BaselineError, EstimatorError
from pplgrad.numpyro._array_ops import OPS, JaxNoise
from pplgrad.numpyro._baselines import ANEW
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._compat_jax import as_function, reused
from pplgrad.numpyro._distributions import family, is_matrix, is_relaxable, is_reparameterized, values_of
from pplgrad.numpyro._rerun.changed_elements import by_rows, evaluated
from pplgrad.numpyro._tracing.control_flow import FlowMessenger
from pplgrad.numpyro._tracing.handlers import Intervene, Resolve, site_key
from pplgrad.numpyro._tracing.particle_trace import ParticleOutputs, ParticleTrace, run_particle
from pplgrad.numpyro._tracing.relaxation_checks import misused, raise_if_index
from pplgrad.numpyro._tracing.relaxations import extended, is_extended, softened, unchecked


class NumPyroDraw:
    """`pplgrad.engine.branches.HostDraw`: a site of the guide, with the particles in front."""

    def __init__(self, name: str, arrays: ParticleOutputs, event_dim: int) -> None:
        self.name = name
        self.value = jax.lax.stop_gradient(arrays.values[name])
        self.event_dim = event_dim
        self._finite = arrays.finite.get(name)
        self._ranking = arrays.rankings.get(name)
        self.is_vector = self._ranking is not None
        self.is_vector |= self._finite is not None and self.value.ndim > self._finite.index.ndim
        self._again = arrays.again.get(name)
        self._parameters = arrays.parameters.get(name)
        self._counts = arrays.counts.get(name)
        self._throws = arrays.throws.get(name)
        self._mixture = arrays.mixtures.get(name)

    def finite(self) -> Finite | None:
        """Return the numbers drawn, and how probable each was."""
        found = self._finite
        if found is None:
            return None
        odds, uniform = found.odds, found.uniform
        return Finite(
            found.index,
            found.log_probs.shape[-1],
            lambda: found.log_probs,
            None if odds is None else lambda: odds,
            None if uniform is None else lambda: uniform,
        )

    def embed(self, index: jax.Array) -> jax.Array:
        """Return the values that category numbers stand for."""
        assert self._finite is not None
        return values_of(self._finite.support[0], index, self.value, self.is_vector)

    def again(self, count: int) -> tuple[jax.Array, jax.Array]:
        """Return the further draws that the primary run made, and their log densities."""
        assert self._again is not None and self._again[0].shape[1] == count
        return self._again

    def parameters(self) -> dict[str, jax.Array] | None:
        """Return the parameters of the site's family, where its draws are independent numbers."""
        return self._parameters

    def ranking(self) -> jax.Array | None:
        """Return the logits of a ranking."""
        return self._ranking

    def counts(self, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the consecutive counts that the primary run listed, their log probabilities, and that of the draw."""
        assert self._counts is not None and self._counts[1].shape[-1] == count
        return self._counts

    def throws(self) -> jax.Array | None:
        """Return log p of the categories of a Multinomial, or None."""
        return self._throws

    def mixture(self) -> Mixture | None:
        """Return the mixture that the value was drawn from, or None."""
        return self._mixture


class NumPyroBranches:
    """`pplgrad.engine.branches.BranchHost` for one run of a program."""

    def __init__(
        self,
        program: Program,
        params: Mapping[str, Any],
        keys: Sequence[jax.Array],
        noise: jax.Array,
        arrays: ParticleOutputs,
        event_dims: Mapping[str, int],
        layout: Layout,
        resolve: Resolve,
        map_particles: Callable | None,
        traceable: bool,
        learned: Mapping[tuple[str, str], jax.Array],
        counting: Counting,
        at_once: int | None,
        fuse: bool,
        sharding: jax.sharding.Sharding | None = None,
    ) -> None:
        """`map_particles` maps a function over particles, None for a single one; a program that is not `traceable` runs
        one branch after the other, and of others no more than `at_once` of each particle run at once. With `fuse`, what branches that change
        one element each have in common is computed once. A `sharding` splits the branches over devices."""
        self._program = program
        self._differentiated = dict(params)
        self._params = jax.lax.stop_gradient(dict(params))
        self._keys = keys
        self._noise = noise
        self._arrays = arrays
        self._event_dims = event_dims
        self._layout = layout
        self._resolve = resolve
        self._map_particles = map_particles
        self._traceable = traceable
        self._learned = learned
        self._counting = counting
        self._at_once = at_once
        self._fuse = fuse and traceable
        self._sharding = sharding if traceable else None

    @property
    def can_differentiate(self) -> bool:
        """Whether branches can be differentiated: not where Python's control flow depends on a value."""
        return self._traceable

    @property
    def held_at_once(self) -> int | None:
        """None: chunks of branches are computed again where their derivative is taken, and not held."""
        return None

    def draw(self, site: str) -> NumPyroDraw:
        """Return the draw of a site."""
        return NumPyroDraw(site, self._arrays, self._event_dims[site])

    def noise(self, site: str) -> Noise:
        """Return the noise of a site's estimator."""
        return JaxNoise(site_key(self._noise, site))

    def learned(self, site: str, name: str, start: Any) -> jax.Array:
        """Return a number or array among the parameters that the wrapped guide registered."""
        if (site, name) not in self._learned:
            raise BaselineError(
                f"The estimator at site '{site}' learns something ({name}) that NumPyro's SVI keeps, and only a wrapped guide "
                "can register it; write config_estimators(guide, {...}) with this estimator there and initialise SVI "
                "with that guide, or pass learn=False."
            )
        found = self._learned[site, name]
        if jnp.shape(found) != np.shape(start):
            what = next(spec.estimator for spec in self._layout.sites if spec.name == site)
            raise EstimatorError(another_network(what, site, name, jnp.shape(found), np.shape(start), ANEW))
        return found

    def branch_costs(self, values: Mapping[str, Values]) -> dict[str, list[jax.Array]]:
        """Return the costs in all branches."""
        changing = {name: x for name, x in values.items() if self._fuse and x.elements is not None and x.elements.axes}
        rest = {name: x for name, x in values.items() if name not in changing}
        found = self._run_all(rest, None) if rest else {}
        found.update((name, self._of_elements(name, x)) for name, x in changing.items())
        return {name: [jax.lax.stop_gradient(x) for x in costs] for name, costs in found.items()}

    def value_costs(self, values: Mapping[str, Values]) -> dict[str, list[jax.Array]]:
        """Return the costs in all branches, with their gradient."""
        self._refuse_untraced(next(iter(values)))
        return self._run_all(values, None, held=False)

    def differentiated_costs(self, values: Mapping[str, Values]) -> dict[str, list[jax.Array]]:
        """Return the costs in all branches, with their gradient to the parameters."""
        # What a derivative needs of all branches is held, unless they run in chunks.
        one_chunk = self._at_once is None or sum(x.count for x in values.values()) <= self._at_once
        return self._run_all(values, None, held=one_chunk, differentiated=True)

    def soft_costs(self, values: Mapping[str, Values], temperatures: Mapping[str, Any]) -> dict[str, list[jax.Array]]:
        """Return the costs at relaxed values, with their gradient."""
        if not self._traceable:
            raise EstimatorError(
                f"Site '{next(iter(values))}' is to be relaxed, but Python control flow of the program depends on a value; "
                "use ScoreFunction() or LocalExpectation() there."
            )
        return self._run_all(values, temperatures)

    def path_slopes(
        self, run: Run, sites: Sequence[str], weigh: Callable[[list[jax.Array], list[jax.Array]], jax.Array]
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Return the values of sites with their gradient, and the derivative with respect to them of what `weigh` makes."""
        self._refuse_untraced(sites[0])
        values = {name: self._arrays.values[name] for name in sites}

        def shifted(shifts: dict[str, jax.Array]) -> jax.Array:
            if self._map_particles is None:
                found = self._shifted((self._keys[0], {name: x[0] for name, x in shifts.items()}))
                found = jax.tree.map(lambda x: x[None], found)
            else:
                found = self._map_particles(self._shifted, (jnp.stack(list(self._keys)), shifts))
            return weigh(*found)

        slopes = jax.grad(shifted)(jax.tree.map(jnp.zeros_like, values))
        return [(values[name], slopes[name]) for name in sites]

    def _refuse_untraced(self, site: str) -> None:
        """Refuse to differentiate a program at other values of a site, if which of its lines run depends on them."""
        if not self._traceable:
            found = next(spec.estimator for spec in self._layout.sites if spec.name == site)
            raise EstimatorError(
                f"{found!r} at site '{site}' differentiates the program, whose Python control flow depends on a value; "
                f"{found.if_undifferentiable} there."
            )

    def _shifted(self, mine: tuple[jax.Array, dict[str, jax.Array]]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return a particle's costs and scores where draws are moved by shifts."""
        key, shifts = mine

        def intervene(name: str, msg: Any, key: jax.Array, where: FlowMessenger) -> None:
            if name in shifts:
                msg["value"], msg["intermediates"] = msg["value"] + shifts[name], []

        arrays = self._again(key, intervene)[0]
        return self._in_order(arrays), [arrays.scores[site.name] for site in self._layout.sites]

    def _run_all(
        self,
        values: Mapping[str, Values],
        temperatures: Mapping[str, Any] | None,
        held: bool = True,
        differentiated: bool = False,
    ) -> dict[str, list[jax.Array]]:
        """Run all branches; what a derivative needs of a chunk is `held`, or computed again.

        They are `differentiated` along the parameters if that is asked for.
        """
        places, start = {}, 0
        for name, alternatives in values.items():
            places[name] = slice(start, start + alternatives.count)
            start += alternatives.count
        rows = partial(self._rows, values, places, temperatures, differentiated)
        # Relaxed branches are few, and what is differentiated is held in any case.
        at_once = self._at_once if self._traceable and temperatures is None else None
        found = self._in_chunks(rows if held else jax.checkpoint(rows), start, at_once)
        return {name: [x[:, place].reshape(-1, *x.shape[2:]) for x in found] for name, place in places.items()}

    def _in_chunks(self, rows: Callable[[Any], list[jax.Array]], count: int, at_once: int | None) -> list[jax.Array]:
        """Return what a function of the branches' numbers gives for all, (particles, count, *batch), so many at once."""
        parts = chunks(count, at_once)
        if self._sharding is not None:
            # Every device has as many branches: what is missing are copies of the last.
            devices = self._sharding.num_devices
            numbers = np.minimum(np.arange(-(-count // devices) * devices), count - 1)
            split = jax.lax.with_sharding_constraint(jnp.asarray(numbers), self._sharding)
            return [x[:, :count] for x in rows(split)]
        if len(parts) == 1:
            return rows(np.arange(count))
        # Chunks have one size: the last is filled up with copies of the last branch.
        numbers = np.minimum(np.arange(len(parts) * parts[0][1]), count - 1).reshape(len(parts), -1)
        found = jax.lax.map(rows, jnp.asarray(numbers))
        return [jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :count] for x in found]

    def _of_elements(self, name: str, values: Values) -> list[jax.Array]:
        """Return the costs in the branches of a site that change one element each: (particles * count, *batch)."""
        elements = values.elements
        assert elements is not None

        def particle(numbers: Any, mine: tuple[jax.Array, jax.Array, jax.Array]) -> list[jax.Array]:
            key, drawn, others = mine

            def costs(value: jax.Array) -> list[jax.Array]:
                def intervene(site: str, msg: Any, key: jax.Array, where: FlowMessenger) -> None:
                    if site == name:
                        msg["value"] = value.astype(msg["value"].dtype)

                arrays, static = self._again(key, intervene)
                self._refuse_others(static)
                return self._in_order(arrays)

            given = (jax.make_jaxpr(costs)(drawn), drawn, others.astype(drawn.dtype), elements.axes, numbers)
            found = evaluated(*given)
            return by_rows(*given) if found is None else found

        def rows(numbers: Any) -> list[jax.Array]:
            drawn = self._arrays.values[name]
            one = partial(particle, numbers)
            if self._map_particles is None:
                return [x[None] for x in one((self._keys[0], drawn[0], elements.values[0]))]
            return self._map_particles(one, (jnp.stack(list(self._keys)), drawn, elements.values))

        found = self._in_chunks(rows, values.count, self._at_once)
        return [x.reshape(-1, *x.shape[2:]) for x in found]

    def _rows(
        self,
        values: Mapping[str, Values],
        places: Mapping[str, slice],
        temperatures: Mapping[str, Any] | None,
        differentiated: bool,
        numbers: Any,
    ) -> list[jax.Array]:
        """Return the costs in the branches of those numbers: (particles, numbers, *batch)."""
        per_step = {name: x.per_step for name, x in values.items() if x.per_step is not None}
        alternatives = {}
        for name, place in places.items():
            last = place.stop - place.start - 1
            alternatives[name] = values[name].at(jnp.clip(jnp.asarray(numbers) - place.start, 0, last))

        def particle(mine: tuple[jax.Array, dict[str, jax.Array]]) -> list[jax.Array]:
            key, own = mine
            run = partial(self._costs, key, places, temperatures, per_step, differentiated)
            if not self._traceable:
                rows = [run(number, {name: x[i] for name, x in own.items()})[0] for i, number in enumerate(numbers)]
                return [jnp.stack(column) for column in zip(*rows, strict=True)]
            if temperatures is not None:
                seen: set[str] = set()
                first = {name: x[0] for name, x in own.items()}
                try:
                    closed = jax.make_jaxpr(lambda number, own: _noted(run(number, own), seen))(
                        jnp.zeros((), int), first
                    )
                except TypeError as error:
                    raise_if_index(error)
                    raise
                refuse_misuse(self._layout, *misused(closed, seen, [site.name for site in self._layout.sites]))
                # Parameters that come in as arguments, or that the program closes over, are constants like those in `params`.
                constants = [jax.lax.stop_gradient(x) if _is_inexact(x) else x for x in closed.consts]
                branch = as_function(closed, constants)
                return jax.vmap(lambda number, own: branch(number, *jax.tree.leaves(own)))(jnp.asarray(numbers), own)
            return jax.vmap(lambda number, own: run(number, own)[0])(jnp.asarray(numbers), own)

        if self._map_particles is None:
            return [x[None] for x in particle((self._keys[0], {name: x[0] for name, x in alternatives.items()}))]
        return self._map_particles(particle, (jnp.stack(list(self._keys)), alternatives))

    def _costs(
        self,
        key: jax.Array,
        places: Mapping[str, slice],
        temperatures: Mapping[str, Any] | None,
        per_step: Mapping[str, int],
        differentiated: bool,
        number: Any,
        alternatives: Mapping[str, jax.Array],
    ) -> tuple[list[jax.Array], set[str]]:
        """Return the costs of one branch of one particle, in the order of the layout, and the relaxed sites.

        `alternatives` holds the value that each of the sites takes if the branch is its own: one in a loop with `per_step` branches for each step
        takes it at one step.
        """

        def inside(name: str) -> Any:
            return (number >= places[name].start) & (number < places[name].stop)

        def step_of(site: str) -> Any:
            return (number - places[site].start) // per_step[site]

        def at_its_step(name: str, where: FlowMessenger) -> Any:
            return step_of(name) == where.running_step if name in per_step else True

        def follows(name: str, site: str, where: FlowMessenger) -> Any:
            """Return whether this branch is of a site that another one follows, here."""
            here = where.running_step
            if site not in per_step or here is None:
                return inside(site)
            flags, step = self._layout.ancestors[name][site].steps, step_of(site)
            reached = [(here == step, SAME), (here > step, AFTER), (here < step, BEFORE)]
            return inside(site) & reduce(or_, (found for found, flag in reached if flags & flag))

        def intervene(name: str, msg: Any, key: jax.Array, where: FlowMessenger) -> None:
            if temperatures is not None and not is_extended(msg["fn"]):
                self._soften(name, msg, key, temperatures, lambda site: follows(name, site, where))
            if name in places:
                mine = alternatives[name].astype(msg["value"].dtype)
                msg["value"] = jnp.where(inside(name) & at_its_step(name, where), mine, msg["value"])

        arrays, static = self._again(key, intervene, differentiated)
        if temperatures is None and not self._traceable:
            site = next(name for name in places if inside(name))
            if not differentiated:
                return self._in_order_with_others(arrays, site), set()
            refuse_other_sites(self._layout, site, self._others(static))
        self._refuse_others(static)
        return self._in_order(arrays), static.extended

    def _refuse_others(self, static: ParticleTrace) -> None:
        """Refuse a run with other sites than the primary one."""
        for name in self._others(static):
            raise exists_or_not(name, "the values of other sites")

    def _others(self, static: ParticleTrace) -> set[str]:
        """Return the sites that this run alone has, or lacks."""
        return {*static.model, *static.guide} ^ {spec.name for spec in self._layout.costs}

    def _again(
        self, key: jax.Array, intervene: Intervene, differentiated: bool = False
    ) -> tuple[ParticleOutputs, ParticleTrace]:
        """Run a particle again with its own key, without or with the gradient to the parameters."""
        params = dict(self._differentiated if differentiated else self._params)
        return run_particle(reused(key), params, self._program, self._resolve, self._counting, intervene)

    def _in_order(self, arrays: ParticleOutputs) -> list[jax.Array]:
        """Return the costs in the order of the layout."""
        sides = {1.0: arrays.model_costs, -1.0: arrays.guide_costs}
        return [sides[spec.sign][spec.name] for spec in self._layout.costs]

    def _in_order_with_others(self, arrays: ParticleOutputs, site: str) -> list[jax.Array]:
        """Return the costs of a branch of a site that may decide which others exist."""
        sides = ((1.0, arrays.model_costs), (-1.0, arrays.guide_costs))
        found = {(name, sign): x[None] for sign, side in sides for name, x in side.items()}
        primary = {1.0: self._arrays.model_costs, -1.0: self._arrays.guide_costs}
        drawn = [primary[spec.sign][spec.name][:1] for spec in self._layout.costs]
        return [x[0] for x in with_other_sites(OPS, self._layout, site, found, drawn)]

    def _soften(self, name: str, msg: Any, key: jax.Array, temperatures: Mapping[str, Any], follows: Callable) -> None:
        """Extend a discrete site's density to weights, and relax its draw in the branches of sites that it `follows`."""
        fn = msg["fn"]
        leading = [site for site in temperatures if site in self._layout.ancestors.get(name, {})]
        if is_matrix(fn):
            msg["fn"] = unchecked(fn)
        if is_relaxable(fn):
            msg["fn"] = wide = extended(fn)
            hard = msg["value"].astype(unmasked(wide).log_probs.dtype)
            msg["value"] = hard
            for site in leading:
                soft = softened(name, wide, hard, temperatures[site], key)
                msg["value"] = jnp.where(follows(site), soft, msg["value"])
        elif leading and not is_reparameterized(fn):
            raise EstimatorError(
                f"Site '{name}' follows site '{leading[0]}', whose estimator relaxes what follows, and {family(fn)} cannot "
                f"be relaxed; use ScoreFunction() or LocalExpectation() at '{leading[0]}'."
            )


def _is_inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _noted(run: tuple[list[jax.Array], set[str]], seen: set[str]) -> list[jax.Array]:
    """Return the costs of a run, and note its relaxed sites."""
    costs, names = run
    seen.update(names)
    return costs
