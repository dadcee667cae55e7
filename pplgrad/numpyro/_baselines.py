"""Where learned baselines live in NumPyro: parameters and mutable state that the wrapped guide registers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pplgrad.baselines.neural import NeuralBaseline
from pplgrad.core.baseline import Baseline, parts_of
from pplgrad.core.plates import Plate, Read
from pplgrad.core.program import Program
from pplgrad.core.shapes import plate_shape
from pplgrad.core.sites import SiteSpec
from pplgrad.engine.baseline_outputs import known_shape
from pplgrad.engine.checks import another_network
from pplgrad.engine.upstream import UpstreamSites, call_with_sites, default_inputs, with_numbers
from pplgrad.errors import BaselineError
from pplgrad.numpyro._array_ops import OPS
from pplgrad.numpyro._networks import Network, network

MARK = "$pplgrad."
ANEW = "begin with svi.init of this guide, or leave what was learned there out of init_params"
"""What to do about what is kept for a site and does not fit."""


def is_baseline_param(name: str) -> bool:
    """Return whether a parameter or mutable site belongs to a learned baseline.

    Args:
        name: the name of a parameter or of a mutable site.

    Returns:
        True if the name contains "$pplgrad.".

    Example:
        >>> is_baseline_param("z$pplgrad.0"), is_baseline_param("z_loc")
        (True, False)
    """
    return MARK in name


def network_inputs(
    baseline: NeuralBaseline,
    plates: tuple[Plate, ...],
    indices: Mapping[str, jax.Array],
    args: tuple,
    kwargs: Mapping[str, Any],
    sites: Any,
    dtype: Any,
) -> jax.Array:
    """Return what a baseline's network gets of the program, of shape (*batch, features), as a constant."""
    if baseline.inputs is None:
        arrays = [jnp.asarray(a) for a in (*args, *kwargs.values()) if _is_numbers(a)]
        found = default_inputs(OPS, plates, indices, arrays)
        if found is None:
            found = jnp.zeros((*(1 for _ in plate_shape(plates)), 0))
        found = jax.lax.stop_gradient(found).astype(dtype)
        return jnp.where(jnp.isfinite(found), found, 0.0)  # Missing values of the data carry no information.
    raw = call_with_sites(baseline.inputs, args, kwargs, sites)
    parts = [jax.lax.stop_gradient(jnp.asarray(a, dtype)) for a in (raw if isinstance(raw, (tuple, list)) else [raw])]
    if len(parts) == 1:
        return parts[0]
    lead = jnp.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return jnp.concatenate([jnp.broadcast_to(part, (*lead, part.shape[-1])) for part in parts], -1)


def _is_numbers(x: Any) -> bool:
    """Return whether an argument is an array of numbers, and no keys of random numbers or sparse array."""
    return isinstance(x, (jax.Array, np.ndarray)) and (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool)


def aligned_values(values: Mapping[str, tuple[jax.Array, int]], plates: tuple[Plate, ...]) -> dict[str, jax.Array]:
    """Return the sites' values, (particles, *batch, *event), with as many batch dimensions as the plates have."""
    depth = len(plate_shape(plates))
    result = {}
    for name, (value, event_dim) in values.items():
        batch = tuple(value.shape[1 : value.ndim - event_dim])
        batch = (1,) * (depth - len(batch)) + batch
        event = value.shape[value.ndim - event_dim :]
        result[name] = jax.lax.stop_gradient(value).reshape(value.shape[0], *batch, *event)
    return result


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a network's parameters by path, without those that hold no number."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves if leaf.size}


class NumPyroBaselines:
    """`pplgrad.core.estimator.BaselineHost` for one evaluation of the objective."""

    def __init__(
        self,
        sites: Mapping[str, SiteSpec],
        ancestors: Mapping[str, Mapping[str, Read]],
        values: Mapping[str, tuple[jax.Array, int]],
        indices: Mapping[str, jax.Array],
        program: Program,
        params: Mapping[tuple[str, str], Any],
        states: Mapping[tuple[str, str], Any],
        dtype: Any,
    ) -> None:
        self._sites = sites
        self._ancestors = ancestors
        self._values = values
        self._indices = indices
        self._program = program
        self._params = params
        self._states = states
        self._dtype = dtype

    def state(self, site: str, key: str) -> Mapping[str, jax.Array]:
        """Return the arrays from before the draw."""
        part = parts_of(self._sites[site].estimator.baseline)[int(key)]
        found = self._registered(self._states, site, key, part)
        return {name: jax.lax.stop_gradient(value) for name, value in found.items()}

    def predict_all(self, sites: Sequence[str], key: str, baseline: Any) -> None:
        """Return None: XLA sees all networks anyway."""

    def predict(self, site: str, key: str, baseline: Any) -> jax.Array:
        """Return the network's or function's output for this draw."""
        plates = self._sites[site].plates
        sites = UpstreamSites(site, aligned_values(self._values, plates), self._ancestors)
        if not isinstance(baseline, NeuralBaseline):
            return jnp.asarray(
                call_with_sites(baseline.function, self._program.args, self._program.kwargs, sites), self._dtype
            )
        params = self._registered(self._params, site, key, baseline)
        x = network_inputs(
            baseline, plates, self._indices, self._program.args, self._program.kwargs, sites, self._dtype
        )
        x = with_numbers(OPS, x, baseline.numbers(site))
        net = network(baseline.net, baseline.hidden, site)
        self._refuse_another(site, baseline, net, params, x)
        out = net.apply(params, x)
        if out.ndim == x.ndim and out.shape[-1] == 1:
            return out[..., 0]
        if out.ndim == x.ndim:
            raise BaselineError(
                f"The network of NeuralBaseline at site '{site}' returned shape {(*known_shape(out.shape[:-1], plates, 0), out.shape[-1])} for inputs of "
                f"shape {(*known_shape(x.shape[:-1], plates, 0), x.shape[-1])}; return one number for each element of the site's plates."
            )
        return out

    @staticmethod
    def _refuse_another(site: str, baseline: NeuralBaseline, net: Network, params: Any, x: jax.Array) -> None:
        """Refuse parameters of another network than the baseline's."""
        wanted = jax.eval_shape(net.init, jax.random.key(0), x)
        asked, found = _shapes(wanted), _shapes(params)
        for name in sorted({*asked, *found}):
            if asked.get(name) != found.get(name):
                mine, theirs = asked.get(name, ()), found.get(name, ())
                raise BaselineError(another_network(baseline, site, name, theirs, mine, ANEW))

    def check_finite(self, site: str, baseline: Baseline, value: jax.Array) -> None:
        """Refuse a value that is known and not finite."""
        try:
            finite = bool(jnp.isfinite(jax.lax.stop_gradient(value)).all())
        except jax.errors.ConcretizationTypeError:
            return
        if not finite:
            raise BaselineError(
                f"{type(baseline).__name__} at site '{site}' returned NaN or infinity; check its inputs and its "
                "learning rate."
            )

    @staticmethod
    def _registered(where: Mapping[tuple[str, str], Any], site: str, key: str, part: Baseline) -> Any:
        if (site, key) not in where:
            raise BaselineError(
                f"{type(part).__name__} at site '{site}' needs parameters or state that NumPyro's SVI keeps, and only a "
                "wrapped guide can register them; write config_estimators(guide, {...}) with this estimator "
                "there (not only in the ELBO), and initialise SVI with that guide."
            )
        return where[site, key]
