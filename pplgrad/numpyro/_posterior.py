"""`summed_posterior`: what the sites that were summed out are, given the guide's draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from numpyro.handlers import seed, substitute, trace

from pplgrad.core.objectives import ELBO
from pplgrad.core.program import Program
from pplgrad.engine.closed_forms import Counting
from pplgrad.engine.marginal_sites import check_posterior, no_posterior, nothing_summed
from pplgrad.errors import ProgramError, first_line
from pplgrad.estimators.score import ScoreFunction
from pplgrad.numpyro._array_ops import concrete, ours
from pplgrad.numpyro._compat import root
from pplgrad.numpyro._compat_jax import TRACING_ERRORS, reused
from pplgrad.numpyro._tracing import posterior_of_sums
from pplgrad.numpyro._tracing.handlers import OffZero
from pplgrad.numpyro._tracing.marginal_laws import Component, Marginal
from pplgrad.numpyro._tracing.model_trace import Drawn, model_trace, sample_sites
from pplgrad.numpyro._tracing.particle_trace import ParticleOutputs, ParticleTrace, run_particle
from pplgrad.numpyro._tracing.specification import numbered


def summed_posterior(
    rng_key: jax.Array,
    params: dict[str, Any],
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    kind: str = "samples",
    num_samples: int = 1,
    draws: bool = False,
    **kwargs: Any,
) -> dict[str, jax.Array]:
    r"""Return the exact posterior of the sites that are summed out, given draws of the guide.

    Each of `num_samples` draws w of the guide gives, for the summed sites z (those of the model with `infer={"enumerate": "parallel"}`, which the
    guide does not draw), their posterior p(z | w, x) = p(z, w, x) / Σ_z p(z, w, x):

    - "samples": one joint sample z ~ p(z | w, x).
    - "marginals": p(z_i = v | w, x) for each site, element and value v, which is ∂ log Σ_z p(z, w, x) / ∂ε for ε added to log p(z_i = v | ·).
    - "map": the most probable joint value, argmax_z p(z, w, x). In a `scan` or a `markov` chain this is Viterbi's path.

    All three are one pass back through the sums of the objective, whose cost is a few times that of the sums. Along `scan` it is a recursion
    backward in time, linear in the number of steps, and the program does not grow with it. All draws of the guide run at once (`jax.vmap`).

    A scale (`handlers.scale`, the N/n of a subsampled plate) stands outside of the logarithm in the ELBO, and has no part in the posterior. A mask
    on a site that reads z removes its density. A mask on z itself is ignored, as in the ELBO, so that padding after the end of a
    sequence gets its prediction. But a masked element has no part in the "map" of the others if nothing that counts reads it: sequences of
    different length get the paths that they would have alone.

    A site with `obs_mask` has its own name, and the observed value (in "marginals" the probability 1 of it) where that is known. In the body of a
    `scan` it has the name that NumPyro gives the part that is not observed, and a prediction where it is.

    Args:
        rng_key: a key.
        params: the parameters, such as `svi.get_params(state)`.
        model: the model.
        guide: the guide. It may be wrapped (`config_estimators`) or an autoguide. Draws are those that the guide makes by itself, also
            where an estimator would relax them.
        args: positional arguments of the program.
        kind: "samples" (the default), "marginals" or "map".
        num_samples: number of draws of the guide. Default: 1.
        draws: True adds what the guide drew: its latent sites, and the indices of subsampled plates. Default: False.
        kwargs: keyword arguments of the program.

    Returns:
        A dict from the names of sites to arrays: `arviz.from_dict({"posterior": found})`, before version 1 `arviz.from_dict(posterior=found)`, takes it.

    Shapes:
        (1, num_samples, \*plates, \*event): one chain, the draws, and one value of the site as the model draws it: in a `scan` the steps come before
        the plates. "marginals": (1, num_samples, \*plates, values), in the order of the distribution's `enumerate_support`. In a
        subsampled plate the elements are those of each draw's own minibatch.

    Raises:
        ConfigurationError: `kind` or `num_samples` is none.
        ProgramError: no site is summed out, guide and model do not match, Python control flow depends on a value, or sites cannot be summed out
            together (such as a site outside of a subsampled plate that data inside read: their scales differ).
        ImpossibleValueError: a density is NaN or infinite, or zero at all values of the summed sites. Inside `jit`, where no value can be
            looked at, the marginals are NaN instead, and samples and most probable values mean nothing.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> def model():
        ...     w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        ...     k = numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        ...     numpyro.sample("x", dist.Normal(4 * k, 1.0), obs=4.0)
        >>> def guide():
        ...     numpyro.sample("w", dist.Normal(0.0, 1.0))
        >>> summed_posterior(jax.random.key(0), {}, model, guide, kind="map", num_samples=3)["k"].tolist()
        [[1, 1, 1]]
        >>> summed_posterior(jax.random.key(0), {}, model, guide, kind="marginals")["k"].shape
        (1, 1, 2)

    References:
        Viterbi (1967), for "map"; Carter and Kohn (1994) and Frühwirth-Schnatter (1994), forward filter and backward sample.
        Obermeyer et al. (2019), tensor variable elimination, for plates.
        Darwiche (2003), marginals as derivatives.
    """
    check_posterior(kind, num_samples)
    program = Program(model, guide, args, kwargs)
    components: list[Component] = []

    def given_one_draw(key: jax.Array) -> tuple[dict[str, jax.Array], list[jax.Array]]:
        components.clear()
        return _given_one_draw(key, params, program, kind, draws, components)

    keys = jax.random.split(reused(rng_key), num_samples)
    try:
        _refuse_mixed(keys[0], params, program)
        found, possible = jax.vmap(given_one_draw)(keys)
    except TRACING_ERRORS as error:
        raise ProgramError(
            "summed_posterior() cannot follow the program, because its Python control flow depends on a value; write the control flow with "
            f"jnp.where, cond or scan. ({first_line(error)})"
        ) from error
    for component, mine in zip(components, possible, strict=True):
        if concrete(mine.all()) == 0:
            named = [(root(site["name"]), s) for site, s in zip(component.sites, component.summed, strict=True)]
            both = [list(dict.fromkeys(name for name, s in named if s is wanted)) for wanted in (True, False)]
            raise no_posterior(*both)
    return {name: x[None] for name, x in found.items()}


def _given_one_draw(
    key: jax.Array, params: dict, program: Program, kind: str, draws: bool, components: list[Component]
) -> tuple[dict[str, jax.Array], list[jax.Array]]:
    """Return what is asked for given one draw of the guide, and whether anything is possible in each of the components, which it notes."""
    guide_key, model_key, own_key = jax.random.split(key, 3)
    messenger = OffZero()
    with messenger:
        guide = substitute(seed(program.guide, guide_key), data=params)
        guide_trace = trace(guide).get_trace(*program.args, **program.kwargs)
    mutable = {name: site["value"] for name, site in guide_trace.items() if site["type"] == "mutable"}
    drawn = Drawn(guide_trace, messenger.flows, set())
    found_trace = model_trace(program, model_key, {**params, **mutable}, drawn).trace
    found: dict[str, jax.Array] = {}
    if draws:
        found.update(
            {name: site["value"] for name, site in sample_sites(guide_trace).items() if not site["is_observed"]}
        )
        for name, site in found_trace.items():
            if site["type"] == "plate" and len(site["value"]) < site["args"][0]:
                found[name] = site["value"]
    laws = [site["fn"] for site in found_trace.values() if isinstance(site.get("fn"), Marginal)]
    components += [law.component for law in laws if any(law.component.summed)]
    if not components:
        raise nothing_summed()
    possible = []
    for number, component in enumerate(components):
        more, fine = _posterior(component, jax.random.fold_in(own_key, number), kind)
        found.update(posterior_of_sums.with_known(more, component, found_trace, kind))
        possible.append(fine)
    return found, possible


@ours
def _posterior(component: Component, key: jax.Array, kind: str) -> tuple[dict[str, jax.Array], jax.Array]:
    kinds = {
        "samples": posterior_of_sums.samples,
        "marginals": posterior_of_sums.marginals,
        "map": posterior_of_sums.most_probable,
    }
    return kinds[kind](component, key)


def _refuse_mixed(key: jax.Array, params: dict, program: Program) -> None:
    """Refuse a model that may mix the values of a summed site, as the ELBO does."""
    seen: list[ParticleTrace] = []
    counting = Counting(ELBO().weights(program.args, program.kwargs))

    def particle(key: jax.Array, params: dict) -> ParticleOutputs:
        arrays, static = run_particle(key, params, program, lambda *_: ScoreFunction(), counting)
        seen.append(static)
        return arrays

    closed, shapes = jax.make_jaxpr(particle, return_shape=True)(key, params)
    numbered(closed, shapes, seen[-1])
