"""A traced particle as a function of its key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from pplgrad.numpyro._array_ops import Views
from pplgrad.numpyro._compat_jax import as_function, has_one_mesh, is_tracing
from pplgrad.numpyro._tracing.particle_trace import ParticleOutputs


class Particle:
    """A function of a key that returns the arrays in which a particle's results are; `unpacked` tells which is where.

    `closed` is the jaxpr of a particle as a function of key and parameters, `shapes` the results' tree. It runs as it stands if it is
    not to be fused, or in nothing that it does several times is there enough to be done together. Where JAX computes at once
    and does not trace, it does too: a loop would be compiled each time.
    """

    def __init__(self, closed: Any, shapes: ParticleOutputs, params: Mapping[str, Any], fuse: bool) -> None:
        self._params = params
        wanted = replace(jax.tree.map(lambda _: True, shapes), probes=jax.tree.map(lambda _: False, shapes.probes))
        self._tree = jax.tree.structure(shapes)
        # Not whether the key is traced: a key in numbers inside `jit` is a program's that is compiled all the same.
        as_it_stands = not fuse or closed.effects or not is_tracing() or not has_one_mesh(closed.jaxpr)
        self._fused = None if as_it_stands else _fused(closed, jax.tree.leaves(wanted))
        self._plain = as_function(closed)

    def __call__(self, key: jax.Array) -> list[jax.Array]:
        arguments = jax.tree.leaves((key, self._params))
        return self._plain(*arguments) if self._fused is None else self._fused(*arguments)

    def unpacked(self, found: list[jax.Array]) -> tuple[ParticleOutputs, Views | None]:
        """Return the results, from what the function returned with the particles in front, and which are rows of one array."""
        leaves, views = (list(found), None) if self._fused is None else self._fused.unpacked(found)
        return replace(jax.tree.unflatten(self._tree, leaves), probes={}), views


def _fused(closed: Any, wanted: list[bool]) -> Any:
    from pplgrad.numpyro._fusion.batched_evaluation import fused  # Nothing else needs the fusion.

    return fused(closed, wanted)
