"""The program run again at joint values of several sites, with the gradient of everything in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pplgrad.core.array_ops import bounded, is_possible
from pplgrad.engine.branches import chunks
from pplgrad.engine.joint_sums import JointRows, Request, another_number, places_of
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._distributions import finite_draw, values_of
from pplgrad.numpyro._rerun.branches import NumPyroBranches
from pplgrad.numpyro._tracing.control_flow import FlowMessenger

_Key = tuple[int, str]
"""A site of a sum, by the sum's number and the site's name."""


class NumPyroReruns(NumPyroBranches):
    """`pplgrad.engine.surrogate.Rerun` for one run of a program: its branches, and rows of joint values."""

    def joint_rows(self, requests: Sequence[Request]) -> list[JointRows]:
        """Run the program at the joint values of each sum."""
        places = places_of(requests)
        count = places[-1][1]
        parts = chunks(count, self._at_once if self._traceable else None)
        if len(parts) == 1:
            costs, scores = self._joint(requests, places, np.arange(count))
        else:
            # Chunks have one size: the last is filled up with copies of the last row.
            numbers = np.minimum(np.arange(len(parts) * parts[0][1]), count - 1).reshape(len(parts), -1)
            found = jax.lax.map(lambda some: self._joint(requests, places, some), jnp.asarray(numbers))
            costs, scores = jax.tree.map(
                lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :count], found
            )
        return [
            JointRows(
                [x[:, first:last] for x in costs], {name: scores[number, name][:, first:last] for name in request}
            )
            for number, (request, (first, last)) in enumerate(zip(requests, places, strict=True))
        ]

    def _joint(
        self, requests: Sequence[Request], places: Sequence[tuple[int, int]], numbers: Any
    ) -> tuple[list[jax.Array], dict[_Key, jax.Array]]:
        """Return the costs in the rows of those numbers, and log q of the sites of each sum: (particles, numbers, *batch)."""
        wanted: dict[_Key, jax.Array] = {}
        for number, (request, (first, last)) in enumerate(zip(requests, places, strict=True)):
            own = jnp.clip(jnp.asarray(numbers) - first, 0, last - first - 1)
            wanted.update({(number, name): values.at(own) for name, values in request.items()})

        def particle(mine: tuple[jax.Array, dict[_Key, jax.Array]]) -> tuple[list[jax.Array], dict[_Key, jax.Array]]:
            key, own = mine

            def row(number: Any, values: Mapping[_Key, jax.Array]) -> tuple[list[jax.Array], dict[_Key, jax.Array]]:
                return self._at_joint_values(key, places, number, values)

            if self._traceable:
                return jax.vmap(row)(jnp.asarray(numbers), own)
            rows = [row(number, {name: x[i] for name, x in own.items()}) for i, number in enumerate(numbers)]
            return jax.tree.map(lambda *column: jnp.stack(column), *rows)

        if self._map_particles is None:
            found = particle((self._keys[0], jax.tree.map(lambda x: x[0], wanted)))
            return jax.tree.map(lambda x: x[None], found)
        return self._map_particles(particle, (jnp.stack(list(self._keys)), wanted))

    def _at_joint_values(
        self, key: jax.Array, places: Sequence[tuple[int, int]], number: Any, wanted: Mapping[_Key, jax.Array]
    ) -> tuple[list[jax.Array], dict[_Key, jax.Array]]:
        """Run one row of one particle: the costs in the order of the layout, and log q of the sites of each sum.

        `wanted` holds the category numbers that a site takes if the row is of that sum. An impossible value keeps what was drawn, so that
        the program never runs at it; `bounded` makes its probability 0.
        """
        scores: dict[_Key, jax.Array] = {}

        def intervene(name: str, msg: Any, key: jax.Array, where: FlowMessenger) -> None:
            mine = [other for other in wanted if other[1] == name]
            if not mine:
                return
            fn, drawn = unmasked(msg["fn"]), msg["value"]
            known, found = self._arrays.finite[name], finite_draw(fn, drawn)
            if found is None or found.log_probs.shape[-1] != known.log_probs.shape[-1]:
                raise another_number(name)
            log_probs, is_vector = bounded(jnp, found.log_probs), drawn.ndim > found.index.ndim
            for other in mine:
                numbers = wanted[other]
                log_q = jnp.take_along_axis(log_probs, numbers[..., None], axis=-1)[..., 0]
                value = values_of(found.support, numbers, drawn, is_vector)
                first, last = places[other[0]]
                here = (number >= first) & (number < last) & is_possible(jnp, log_q)
                msg["value"] = jnp.where(
                    here[..., None] if is_vector else here, value.astype(drawn.dtype), msg["value"]
                )
                batch = drawn.ndim - fn.event_dim
                scores[other] = jnp.sum(log_q, axis=tuple(range(batch, log_q.ndim)))

        arrays, static = self._again(key, intervene, differentiated=True)
        self._refuse_others(static)
        return self._in_order(arrays), scores
