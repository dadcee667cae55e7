"""Branches in NumPyro: the program mapped over a branch number, with the same key and one site changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pplgrad.engine.layout import Layout
from pplgrad.engine.noise import Noise
from pplgrad.errors import ProgramError
from pplgrad.numpyro._ops import JaxNoise
from pplgrad.numpyro._program import Arrays, Resolve, run_particle, site_key

Program = tuple[Callable, Callable, tuple, dict]
"""Model, guide, and the arguments of both."""


class NumPyroDraw:
    """`pplgrad.engine.branches.HostDraw`: a site of the guide, with the particles in front."""

    def __init__(self, name: str, arrays: Arrays, event_dim: int) -> None:
        self.name = name
        self.value = jax.lax.stop_gradient(arrays.values[name])
        self.event_dim = event_dim
        self._finite = arrays.finite.get(name)
        self._again = arrays.again.get(name)
        self._parameters = arrays.parameters.get(name)

    def finite(self) -> tuple[jax.Array, jax.Array] | None:
        """Return the log probabilities of all categories and the numbers drawn."""
        return None if self._finite is None else (self._finite.log_probs, self._finite.index)

    def embed(self, index: jax.Array) -> jax.Array:
        """Return the values that category numbers stand for."""
        assert self._finite is not None
        return self._finite.support[0][index]

    def again(self, count: int) -> tuple[jax.Array, jax.Array]:
        """Return the further draws that the primary run made, and their log densities."""
        assert self._again is not None and self._again[0].shape[1] == count
        return self._again

    def parameters(self) -> dict[str, jax.Array] | None:
        """Return the parameters of the site's family, where its draws are independent numbers."""
        return self._parameters


class NumPyroBranches:
    """`pplgrad.engine.branches.BranchHost` for one run of a program."""

    def __init__(
        self,
        program: Program,
        params: Mapping[str, Any],
        keys: Sequence[jax.Array],
        noise: jax.Array,
        arrays: Arrays,
        event_dims: Mapping[str, int],
        layout: Layout,
        resolve: Resolve,
        map_particles: Callable | None,
        traceable: bool,
    ) -> None:
        """`map_particles` maps a function over particles, None for a single one; a program that is not `traceable` runs
        one branch after the other."""
        self._program = program
        self._params = jax.lax.stop_gradient(dict(params))
        self._keys = keys
        self._noise = noise
        self._arrays = arrays
        self._event_dims = event_dims
        self._layout = layout
        self._resolve = resolve
        self._map_particles = map_particles
        self._traceable = traceable

    def draw(self, site: str) -> NumPyroDraw:
        """Return the draw of a site."""
        return NumPyroDraw(site, self._arrays, self._event_dims[site])

    def noise(self, site: str) -> Noise:
        """Return the noise of a site's estimator."""
        return JaxNoise(site_key(self._noise, site))

    def branch_costs(self, values: Mapping[str, jax.Array]) -> dict[str, list[jax.Array]]:
        """Return the costs in all branches."""
        places, start = {}, 0
        for name, alternatives in values.items():
            places[name] = slice(start, start + alternatives.shape[1])
            start += alternatives.shape[1]

        def particle(mine: tuple[jax.Array, dict[str, jax.Array]]) -> list[jax.Array]:
            key, alternatives = mine
            if not self._traceable:
                rows = [self._costs(key, alternatives, places, number) for number in range(start)]
                return [jnp.stack(column) for column in zip(*rows, strict=True)]
            return jax.vmap(lambda number: self._costs(key, alternatives, places, number))(jnp.arange(start))

        if self._map_particles is None:
            found = particle((self._keys[0], {name: x[0] for name, x in values.items()}))
            found = [x[None] for x in found]
        else:
            found = self._map_particles(particle, (jnp.stack(list(self._keys)), dict(values)))
        return {
            name: [x[:, place].reshape(-1, *x.shape[2:]) for x in map(jax.lax.stop_gradient, found)]
            for name, place in places.items()
        }

    def _costs(
        self, key: jax.Array, alternatives: Mapping[str, jax.Array], places: Mapping[str, slice], number: Any
    ) -> list[jax.Array]:
        """Return the costs of one branch of one particle, in the order of the layout."""

        def intervene(name: str, value: jax.Array) -> jax.Array:
            if name not in places:
                return value
            place = places[name]
            inside = (number >= place.start) & (number < place.stop)
            mine = alternatives[name][jnp.clip(number - place.start, 0, place.stop - place.start - 1)]
            return jnp.where(inside, mine.astype(value.dtype), value)

        model, guide, args, kwargs = self._program
        arrays, static = run_particle(key, dict(self._params), model, guide, args, kwargs, self._resolve, intervene)
        for name in {*static.model, *static.guide} ^ {spec.name for spec in self._layout.costs}:
            raise ProgramError(
                f"Site '{name}' exists or not depending on the values of other sites, whose estimator runs the program "
                "at other values; use ScoreFunction() there."
            )
        sides = {1.0: arrays.model_costs, -1.0: arrays.guide_costs}
        return [sides[spec.sign][spec.name] for spec in self._layout.costs]
