"""One particle of a program: run guide and model, and hand over log densities, values and what they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import Distribution
from numpyro.handlers import seed, substitute, trace

from pplgrad.configuration import EstimatorMapping, collect_mappings
from pplgrad.core.baseline import parts_of
from pplgrad.core.estimator import Estimator
from pplgrad.core.mixtures import Mixture
from pplgrad.core.objectives import CostWeights
from pplgrad.core.plates import Plate
from pplgrad.core.program import Program, Proposed
from pplgrad.engine.checks import impossible_log_prob, is_about_the_value
from pplgrad.engine.closed_forms import Counting
from pplgrad.engine.description import SummedSite
from pplgrad.errors import EstimatorError, PplgradError, ProgramError
from pplgrad.numpyro._array_ops import ours
from pplgrad.numpyro._compat import leaves_of, unmasked
from pplgrad.numpyro._compat_jax import TRACING_ERRORS, reused, tag
from pplgrad.numpyro._distributions import (
    FiniteDraw,
    counts,
    drawn_again,
    family,
    finite_draw,
    is_count,
    is_reparameterized,
    parameters,
    ranking_logits,
    throws,
)
from pplgrad.numpyro._mixtures import mixture
from pplgrad.numpyro._tracing.closed_forms import closed_form
from pplgrad.numpyro._tracing.control_flow import Flow
from pplgrad.numpyro._tracing.factors import Dims
from pplgrad.numpyro._tracing.handlers import (
    Intervene,
    Resolve,
    SiteMessenger,
    make_constant,
    site_key,
)
from pplgrad.numpyro._tracing.marginal_laws import InComponent, Marginal, summed_sites, weight_of
from pplgrad.numpyro._tracing.model_trace import Drawn, model_trace, sample_sites
from pplgrad.numpyro._tracing.proposals import proposed_draws, refuse_unlike
from pplgrad.numpyro._tracing.provenance import SitePlates
from pplgrad.numpyro._tracing.supports import bounds

# The steps of a scan lie left of every plate, in a dimension of their own.
TIME_DIM = -8
TIME = "_time"


@dataclass
class ParticleTrace:
    """What tracing one particle shows beside arrays: sites in order, plates, marks, mappings."""

    guide: list[str] = field(default_factory=list)
    model: list[str] = field(default_factory=list)
    estimators: dict[str, Estimator] = field(default_factory=dict)
    plates: dict[str, tuple[Plate, ...]] = field(default_factory=dict)
    event_dims: dict[str, int] = field(default_factory=dict)
    families: dict[str, str] = field(default_factory=dict)
    observed: list[str] = field(default_factory=list)
    guide_flows: dict[str, Flow] = field(default_factory=dict)
    model_flows: dict[str, Flow] = field(default_factory=dict)
    tokens: dict[Any, str] = field(default_factory=dict)
    params: dict[Any, str] = field(default_factory=dict)
    mutables: dict[Any, str] = field(default_factory=dict)
    mappings: list[EstimatorMapping] = field(default_factory=list)
    extended: set[str] = field(default_factory=set)
    reparameterized: set[str] = field(default_factory=set)
    closed: dict[str, str] = field(default_factory=dict)
    summed: list[SummedSite] = field(default_factory=list)
    # Of densities that are summed together: where the values of the summed sites are in the numbers, and each one's dimensions.
    variables: dict[str, SitePlates] = field(default_factory=dict)
    factors: dict[str, list[tuple[str, Dims]]] = field(default_factory=dict)
    from_prior: list[str] = field(default_factory=list)
    """The sites that the model alone draws."""

    def site_plates(self) -> dict[str, SitePlates]:
        """Return the plates of each latent site of the guide, and where they are in its value."""
        plates: Any = self.plates
        return {
            name: SitePlates(tuple(p for p in plates["score", name] if not p.time), self.event_dims[name])
            for name in self.estimators
        }


@dataclass
class ParticleOutputs:
    """What one particle computes.

    `fresh_params` are baselines' parameters that the caller did not give, at their initial values; `probes` are the
    arrays whose provenance tells what each density reads; `finite`, `again`, `parameters`, `rankings`, `counts`, `mixtures` and `throws` are
    there for sites whose estimators ask for branches.
    """

    scores: dict[str, jax.Array]
    model_costs: dict[str, jax.Array]
    guide_costs: dict[str, jax.Array]
    squares: dict[str, jax.Array]
    values: dict[str, jax.Array]
    indices: dict[str, jax.Array]
    mutable: dict[str, Any]
    fresh_params: dict[str, Any]
    probes: dict[str, list[jax.Array]]
    finite: dict[str, FiniteDraw]
    again: dict[str, tuple[jax.Array, jax.Array]]
    parameters: dict[str, dict[str, jax.Array]]
    counts: dict[str, tuple[jax.Array, jax.Array, jax.Array]]
    rankings: dict[str, jax.Array]
    mixtures: dict[str, Mixture]
    throws: dict[str, jax.Array]
    through: dict[str, jax.Array]
    weights_alone: dict[str, jax.Array]


jax.tree_util.register_dataclass(
    ParticleOutputs,
    [field.name for field in fields(ParticleOutputs)],
    [],
)


def run_particle(
    key: jax.Array,
    params: dict,
    program: Program,
    resolve: Resolve,
    counting: Counting,
    intervene: Intervene | None = None,
) -> tuple[ParticleOutputs, ParticleTrace]:
    """Run the guide, and the model against it, with the draws that `Trace_ELBO` would make, or `intervene` puts there."""
    args, kwargs = program.args, program.kwargs
    static = ParticleTrace()
    params = dict(params)
    model_seed, guide_seed = jax.random.split(key)
    guide, proposed = program.guide, None
    if isinstance(guide, Proposed):
        proposed = proposed_draws(guide.proposal, guide_seed, params, args, kwargs)
        guide = substitute(guide.guide, data=proposed)
    with collect_mappings() as static.mappings:
        messenger = SiteMessenger(resolve, static.estimators, guide_seed, intervene, None, (args, kwargs))
        with messenger:
            guide_trace = trace(substitute(seed(guide, guide_seed), data=params)).get_trace(*args, **kwargs)
    static.guide_flows = messenger.flows
    if proposed is not None:
        refuse_unlike(proposed, static.estimators, guide_trace)
    for name, estimator in list(static.estimators.items()):
        if name in guide_trace:
            if name not in messenger.extended:
                make_constant(guide_trace[name], estimator)
        else:
            # Hidden by a block around the control flow in which it was drawn, like a hidden site elsewhere.
            del static.estimators[name]
    mutable = {name: site["value"] for name, site in guide_trace.items() if site["type"] == "mutable"}
    params.update(mutable)
    static.extended = messenger.extended
    drawn = Drawn(guide_trace, static.guide_flows, static.extended)
    against, static.model_flows, divergences = model_trace(program, model_seed, params, drawn, check=intervene is None)
    mutable.update({name: site["value"] for name, site in against.items() if site["type"] == "mutable"})
    static.from_prior = [
        name for name, site in sample_sites(against).items() if not (site["is_observed"] or name in guide_trace)
    ]
    again = jax.random.fold_in(reused(guide_seed), 1)
    _close(static, guide_trace, against, divergences, counting)
    return _collected(static, guide_trace, against, mutable, params, again, counting), static


def _close(static: ParticleTrace, guide_trace: dict, against: dict, divergences: set[str], counting: Counting) -> None:
    """Note which sites have their divergence or entropy in closed form."""
    for name, chosen in static.estimators.items():
        infer = guide_trace[name]["infer"]
        own = infer.get("closed_form") or ("kl" if infer.get("kl") == "analytic" or name in divergences else None)
        kind = counting.closed.find(name, own, chosen, name in against, counting.weights)
        if kind is not None and _is_scanned(static.guide_flows, name):
            raise EstimatorError(
                f"Site '{name}' is drawn inside scan, where its '{kind}' has no closed form here; drop it."
            )
        if kind is not None:
            static.closed[name] = kind


def _drawn_with(site: Any) -> Any:
    """Return the key that the host has drawn a site's value with; None if the value was put there."""
    return None if site["kwargs"].get("sample_shape") else site["kwargs"].get("rng_key")


def _ask(arrays: ParticleOutputs, site: Any, fn: Any, estimator: Estimator, key: jax.Array, in_body: bool) -> None:
    """Note what an estimator that runs branches wants to know of its site."""
    name, value = site["name"], site["value"]
    finite = finite_draw(fn, value, None if in_body else _drawn_with(site))
    if finite is not None:
        arrays.finite[name] = finite
    elif estimator.num_resamples:
        arrays.again[name] = drawn_again(fn, site_key(key, name), estimator.num_resamples)
    found = parameters(fn)
    if found is not None:
        arrays.parameters[name] = found
    ranking = ranking_logits(fn)
    if ranking is not None:
        arrays.rankings[name] = ranking
    if estimator.num_counts and is_count(fn):
        arrays.counts[name] = counts(fn, value, estimator.num_counts)
    thrown = throws(fn, value) if estimator.num_counts else None
    if thrown is not None:
        arrays.throws[name] = thrown
    if estimator.follows_mixture:
        arrays.mixtures[name] = mixture(fn, value)


@ours
def _collected(
    static: ParticleTrace,
    guide_trace: dict,
    against: dict,
    mutable: dict,
    given: dict,
    again: jax.Array,
    counting: Counting,
) -> ParticleOutputs:
    """Return what a particle computes, and note in `static` what else its traces show."""
    arrays = ParticleOutputs({}, {}, {}, {}, {}, {}, mutable, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {})
    sizes = _note_marks(static, arrays, (*against.values(), *guide_trace.values()), given)
    static.summed = summed_sites(against)
    for site in sample_sites(against).values():
        _collect_from_model(static, arrays, site, sizes, counting.weights)
    for name, site in sample_sites(guide_trace).items():
        _collect_from_guide(static, arrays, site, sizes, counting.weights, again, against.get(name))
    return arrays


def _note_marks(static: ParticleTrace, arrays: ParticleOutputs, sites: Sequence[Any], given: dict) -> dict[str, int]:
    """Note the parameters and states of baselines and the elements of minibatches, and return the whole size of each plate."""
    sizes: dict[str, int] = {}
    for site in sites:
        if site["type"] == "plate":
            sizes[site["name"]] = site["args"][0]
            if site["value"].shape[0] != site["args"][0]:
                arrays.indices[site["name"]] = site["value"]
        elif site["type"] == "param" and "pplgrad" in site["kwargs"]:
            static.params.update(dict.fromkeys(site["kwargs"]["pplgrad"], site["name"]))
            if site["name"] not in given:
                arrays.fresh_params[site["name"]] = site["value"]
        elif site["type"] == "mutable" and "pplgrad" in site:
            static.mutables[site["pplgrad"]] = site["name"]
    return sizes


def _collect_from_model(
    static: ParticleTrace, arrays: ParticleOutputs, site: Any, sizes: dict[str, int], weights: CostWeights
) -> None:
    """Note the density of a site of the model, its plates, and what its distribution holds."""
    name = site["name"]
    static.model.append(name)
    site = _marked(site, name, static.model_flows)
    weight = weight_of(site, weights)
    cost = weighted(_log_prob(site, site["fn"], site["intermediates"]) * _scale(site), weight)
    if static.closed.get(name) == "kl":
        cost = jnp.zeros_like(cost)
    arrays.model_costs[name] = _in_time(cost, site, static.model_flows.get(name), backwards=True)
    static.plates["model", name] = _plates(site, arrays.model_costs[name], sizes, static.model_flows)  # type: ignore[index]
    arrays.probes["model:" + name] = _probes(site)
    if isinstance(site["fn"], Marginal):
        component = site["fn"].component
        arrays.probes["factors:" + name] = component.densities
        static.factors[name] = [(part["name"], d) for part, d in zip(component.sites, component.dims, strict=True)]
        static.variables.update(component.variables())
    if site["is_observed"]:
        static.observed.append(name)


def _collect_from_guide(
    static: ParticleTrace,
    arrays: ParticleOutputs,
    site: Any,
    sizes: dict[str, int],
    weights: CostWeights,
    again: jax.Array,
    in_model: Any,
) -> None:
    """Note the density of a site of the guide, its plates, what its distribution holds, and for a draw what its estimator asks for."""
    name = site["name"]
    static.guide.append(name)
    if site["is_observed"]:
        static.observed.append(name)
    flow = static.guide_flows.get(name)
    site = _marked(site, name, static.guide_flows)
    log_q = _log_prob(site, site["fn"], site["intermediates"])
    estimator = static.estimators.get(name)
    if estimator is not None and estimator.sticking_the_landing:
        fixed = {**site, "value": jax.lax.stop_gradient(site["value"])}
        weight = jax.lax.stop_gradient(weights.guide) if _is_array(weights.guide) else weights.guide
        detached = weighted(_log_prob(fixed, site["fn"], None) * jax.lax.stop_gradient(_scale(site)), weight)
        arrays.through[name] = _in_time(detached, site, flow)
    counted = closed_form(name, static.closed[name], site, in_model) if name in static.closed else log_q
    cost = weighted(counted * _scale(site), weights.guide)
    if estimator is not None:
        _collect_draw(static, arrays, site, sizes, log_q, estimator, again)
        if name not in static.closed and (_is_array(site["scale"]) or _is_array(weights.guide)):
            alone = weighted(jax.lax.stop_gradient(log_q) * _scale(site), weights.guide)
            arrays.weights_alone[name] = _in_time(alone, site, flow)
    arrays.guide_costs[name] = _in_time(cost, site, flow)
    static.plates["guide", name] = _plates(site, arrays.guide_costs[name], sizes, static.guide_flows)  # type: ignore[index]
    arrays.probes["guide:" + name] = _probes(site)


def _collect_draw(
    static: ParticleTrace,
    arrays: ParticleOutputs,
    site: Any,
    sizes: dict[str, int],
    log_q: jax.Array,
    estimator: Estimator,
    again: jax.Array,
) -> None:
    """Note a draw: its value, its score, and what its estimator asks for."""
    name, flow = site["name"], static.guide_flows.get(site["name"])
    if "pplgrad" in site["infer"]:
        static.tokens[site["infer"]["pplgrad"]] = name
    bare = unmasked(site["fn"])
    score = log_q if bare is site["fn"] else _log_prob(site, bare, site["intermediates"])
    arrays.scores[name] = _in_time(score, site, flow)
    arrays.values[name] = site["value"]
    static.event_dims[name] = site["fn"].event_dim
    static.families[name] = family(site["fn"])
    if is_reparameterized(site["fn"]):
        static.reparameterized.add(name)
    static.plates["score", name] = _plates(site, arrays.scores[name], sizes, static.guide_flows)  # type: ignore[index]
    if any(part.needs_score_squared for part in parts_of(estimator.baseline)):
        arrays.squares[name] = _in_time(_score_squared(bare, site["value"]), site, flow)
    if estimator.needs_fixed_support:
        arrays.probes["bounds:" + name] = bounds(site["fn"])
    if estimator.uses_branches or estimator.enumerates:
        _ask(arrays, site, bare, estimator, again, flow is not None)


def _marked(site: Any, name: str, flows: Mapping[str, Flow]) -> Any:
    """Return a site with a tagged value. A scan returns values as they were drawn, before they were tagged."""
    if site["is_observed"] or not _is_scanned(flows, name):
        return site
    return {**site, "value": tag(name, site["value"])}


def weighted(cost: jax.Array, weight: Any) -> jax.Array:
    """Return a cost times its weight in the objective; a weight of 0 leaves nothing, not even of an infinite cost."""
    if isinstance(weight, (int, float)) and weight in (0, 1):
        return cost if weight else jnp.zeros_like(cost)
    return cost * weight


def _is_array(weight: Any) -> bool:
    """Return whether a scale or weight is an array of JAX's, through which gradient may flow."""
    return isinstance(weight, jax.Array)


def _scale(site: Any) -> Any:
    return 1.0 if site["scale"] is None else site["scale"]


def _probes(site: Any) -> list[jax.Array]:
    """Return every array that a site's distribution is known to hold, and an observed value."""
    if isinstance(site["fn"], (Marginal, InComponent)):
        return site["fn"].probes()
    leaves = [*leaves_of(site["fn"]), *leaves_of(site["scale"])]
    if site["is_observed"]:
        leaves += jax.tree.leaves(site["value"])
    return [jnp.asarray(leaf) for leaf in leaves]


def _log_prob(site: Any, fn: Distribution, intermediates: Any) -> jax.Array:
    """Return the log density of a site's value, naming the site if it cannot be computed."""
    try:
        return fn.log_prob(site["value"], intermediates) if intermediates else fn.log_prob(site["value"])
    except PplgradError:
        raise
    except TRACING_ERRORS:
        raise  # Python control flow in a density is followed one particle after the other, as elsewhere.
    except (ValueError, TypeError) as error:
        if not is_about_the_value(error):
            raise
        raise impossible_log_prob(site["name"], fn, error) from error


def _in_time(x: jax.Array, site: Any, flow: Flow | None, backwards: bool = False) -> jax.Array:
    """Move a scanned site's first dimension to `TIME_DIM`, for a reversed scan of the model `backwards`.

    NumPyro hands the guide's stored values to the model's steps in the order of execution, whatever the direction of
    the model's scan, so that a model that runs in reverse stores its densities against the order of the values.
    """
    if flow is None or not flow.scanned:
        return x
    if x.ndim > -TIME_DIM:
        raise ProgramError(f"Site '{site['name']}' in a scan has more than {-TIME_DIM - 1} batch dimensions.")
    if flow.reverse and backwards:
        x = jnp.flip(x, 0)
    return x.reshape(x.shape[0], *(1,) * (-TIME_DIM - x.ndim), *x.shape[1:])


def _plates(site: Any, x: jax.Array, sizes: dict[str, int], flows: dict[str, Flow]) -> tuple[Plate, ...]:
    """Return the site's plates, except one whose dimension the log density does not span in full."""
    frames = [
        Plate(frame.name, frame.dim, frame.size, sizes.get(frame.name, frame.size))
        for frame in site["cond_indep_stack"]
        if -frame.dim <= x.ndim and x.shape[frame.dim] == frame.size
    ]
    if _is_scanned(flows, site["name"]):
        frames.append(Plate(TIME, TIME_DIM, x.shape[TIME_DIM], x.shape[TIME_DIM], time=True))
    return tuple(frames)


def _score_squared(fn: Any, value: Any) -> jax.Array:
    """Return the squared gradient of log q with respect to the distribution's parameters, summed over them."""
    value = jax.lax.stop_gradient(value)
    leaves = leaves_of(fn)
    tree = jax.tree.structure(fn) if leaves else None
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    batch = fn.batch_shape
    if not floats:
        return jnp.zeros(batch, jnp.result_type(float))

    def density(parameters: list) -> jax.Array:
        filled = list(leaves)
        for i, parameter in zip(floats, parameters, strict=True):
            filled[i] = parameter
        return jax.tree.unflatten(tree, filled).log_prob(value)

    # One gradient for each element: a parameter shared by elements is first copied to each.
    given = [jax.lax.stop_gradient(jnp.asarray(leaves[i])) for i in floats]
    _, pull = jax.vjp(lambda p: density(p), given)
    if all(leaf.shape[: len(batch)] == batch for leaf in given):
        (gradients,) = pull(jnp.ones(batch, given[0].dtype if given else float))
        return sum(jnp.sum(jnp.reshape(g**2, (*batch, -1)), -1) for g in gradients)
    count = 1
    for size in batch:
        count *= size
    basis = jnp.eye(count).reshape(count, *batch)
    gradients = jax.vmap(lambda b: pull(b)[0])(basis)
    return sum(jnp.sum(jnp.reshape(g**2, (count, -1)), -1) for g in gradients).reshape(batch)  # type: ignore[union-attr]


def _is_scanned(flows: Mapping[str, Flow], name: str) -> bool:
    return name in flows and flows[name].scanned
