"""Enumerate every outcome of a small NumPyro program, and compare estimates with the exact gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.infer.util import compute_log_probs

from pplgrad.core.estimator import Estimator
from pplgrad.core.noise import replaced_noise
from pplgrad.core.objectives import CostWeights
from pplgrad.numpyro import (
    PermutationMatrix,
    PlackettLuce,
    Subset,
    TraceGrad_ELBO,
    config_estimators,
    is_baseline_param,
)
from pplgrad.numpyro._compat import unmasked
from pplgrad.numpyro._compat_jax import as_function
from pplgrad.numpyro._distributions import finite_draw, finite_parts
from pplgrad.numpyro._tracing.relaxations import OneHotCategorical
from pplgrad.testing.cells import NumberedNoise, cells, disturb, z_of
from pplgrad.testing.programs import Case, Host, once

KEY = 7
PLAIN = CostWeights(1.0, 1.0, 1.0)


def array(x: Any) -> jax.Array:
    return jnp.asarray(x if isinstance(x, jax.Array) else np.asarray(x), dtype=jnp.float64)


HOST = Host(
    sample=numpyro.sample,
    param=numpyro.param,
    plate=numpyro.plate,
    mask=lambda mask: handlers.mask(mask=jnp.asarray(mask)),
    scale=lambda s: handlers.scale(scale=s),
    factor=numpyro.factor,
    dist=dist,
    one_hot=lambda logits: OneHotCategorical(logits=logits),
    subset=Subset,
    ranking=PlackettLuce,
    permutation=PermutationMatrix,
    array=array,
    xp=jnp,
)


def forced(guide: Callable, outcomes: dict[str, jax.Array], noise: dict[str, np.ndarray], particles: int) -> Callable:
    """Make the guide draw given outcomes, of shape (particles, ...); the sites stay latent.

    The particle is recognised by its key, so that this works however particles are mapped.
    """
    which_particle = _which_particle(particles)

    def run(*args: Any, **kwargs: Any) -> Any:
        which = which_particle()

        def choose(site: Any) -> Any:
            name = site["name"]
            return outcomes[name][which] if name in outcomes else _with_noise(site, noise)

        data = {name: value[which] for name, value in outcomes.items()}
        with handlers.substitute(data=data) if not noise else handlers.substitute(substitute_fn=choose):
            return guide(*args, **kwargs)

    return run


def _which_particle(particles: int) -> Callable[[], Any]:
    """Return a function that tells, inside the guide, which particle runs, from its key."""
    key = jax.random.key(KEY)
    keys = [key] if particles == 1 else list(jax.random.split(key, particles))
    known = [jax.random.split(jax.random.split(k)[1])[1] for k in keys]
    known_data = jnp.stack([jax.random.key_data(k) for k in known])

    def which() -> Any:
        mine = jax.random.key_data(numpyro.prng_key())
        return jnp.argmax(jnp.all(known_data == mine, -1)) if particles > 1 else 0

    return which


def _with_noise(site: Any, noise: dict[str, np.ndarray]) -> Any:
    """Return a Normal's draw from its fixed noise, or None for another site."""
    if site["name"] not in noise:
        return None
    base = unmasked(site["fn"])
    while not hasattr(base, "loc"):
        base = base.base_dist
    return jnp.broadcast_to(base.loc + base.scale * array(noise[site["name"]]), site["fn"].shape())


def _count(case: Case) -> int:
    """Return the number of subsamples."""
    return int(np.prod([len(list(itertools.combinations(range(n), k))) for n, k in case.subsamples.values()] or [1]))


def outcomes(case: Case) -> Iterator[dict[str, np.ndarray]]:
    """Yield all joint values of the discrete latents, with every subsample."""
    sizes = {name: int(np.prod(shape)) for name, (shape, _) in case.latents.items()}
    supports = [range(case.latents[name][1]) for name, n in sizes.items() for _ in range(n)]
    names = list(case.subsamples)
    subsets = [list(itertools.combinations(range(n), k)) for n, k in case.subsamples.values()]
    for picked in itertools.product(*subsets):
        for flat in itertools.product(*supports):
            result: dict[str, np.ndarray] = {n: np.array(s) for n, s in zip(names, picked, strict=True)}
            start, possible = 0, True
            for name, n in sizes.items():
                index = np.array(flat[start : start + n]).reshape(case.latents[name][0])
                possible &= case.can_be(name, index)
                result[name] = case.value(name, index)
                start += n
            if possible:
                yield result


def stacked(items: list[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
    return {name: jnp.stack([jnp.asarray(item[name]) for item in items]) for name in items[0]}


def log_weight_and_objective(
    case: Case, params: dict, outcome: dict[str, jax.Array], weights: CostWeights = PLAIN
) -> tuple[Any, Any]:
    """Return log q of the discrete sites, unscaled and unmasked, and log p − log q as Trace_ELBO has it.

    `weights` are those of another objective.
    """
    model, guide = case.build(HOST)
    one = {name: value[None] for name, value in outcome.items()}
    model_key, guide_key = jax.random.split(jax.random.key(KEY))
    guide = handlers.seed(forced(guide, one, case.noise, 1), guide_key)
    log_q, guide_trace = compute_log_probs(guide, (), {}, params)
    log_p, _ = compute_log_probs(handlers.replay(handlers.seed(model, model_key), guide_trace), (), {}, params)
    log_w = jnp.zeros(())
    for name in case.latents:
        site = guide_trace[name]
        log_w = log_w + unmasked(site["fn"]).log_prob(site["value"]).sum()
    prior = sum(x for name, x in log_p.items() if name in log_q)
    observed = sum(x for name, x in log_p.items() if name not in log_q)
    objective = weights.observed * observed + weights.prior * prior - weights.guide * sum(log_q.values())
    return log_w - jnp.log(_count(case)), objective


def parameters(case: Case) -> dict[str, jax.Array]:
    return {name: array(value) for name, value in case.params.items()}


def exact_gradient(case: Case, weights: CostWeights = PLAIN) -> dict[str, np.ndarray]:
    """Return the gradient of −E_q[log p − log q], summed over every outcome and every subsample."""
    if weights is not PLAIN:
        return _exact_gradient(case, weights)
    return once("numpyro gradient", case, lambda: _exact_gradient(case, weights))


def exact_hessian(case: Case) -> dict[str, dict[str, np.ndarray]]:
    """Return the second derivatives of −E_q[log p − log q], by pairs of parameters."""
    return _exact_gradient(case, PLAIN, jax.hessian)


def _exact_gradient(case: Case, weights: CostWeights, derive: Callable = jax.grad) -> Any:
    every = stacked(list(outcomes(case)))

    def loss(params: dict) -> jax.Array:
        log_w, objective = jax.vmap(lambda o: log_weight_and_objective(case, params, o, weights))(every)
        return -(jnp.exp(log_w) * objective).sum()

    return jax.tree.map(np.asarray, jax.jit(derive(loss))(parameters(case)))


Combine = Callable[[Any, Any], Any]
"""From an array namespace and the log weights of all particles, (particles, *elements), to a bound's value."""


def exact_bound_gradient(
    case: Case, combine: Combine, particles: int, keep: int, draws_move: bool = True, derive: Callable = jax.grad
) -> dict[str, np.ndarray]:
    """Return the gradient of −E[Σ combine(log weights)], summed over every tuple of outcomes with the same subsample.

    The weights have the last `keep` batch dimensions as elements; a subsampled plate's scale multiplies their bound. The
    probabilities of the draws are constants unless `draws_move`.
    """
    every = list(outcomes(case))
    picked = _tuples(case, every, particles)
    rows = stacked([{n: np.stack([every[i][n] for i in p]) for n in every[0]} for p in picked])
    scale = float(np.prod([size / drawn for size, drawn in case.subsamples.values()])) if keep else 1.0
    subsets = _count(case)

    def loss(params: dict) -> jax.Array:
        def one(draws: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            log_q, logs = jax.vmap(lambda o: _log_weight_by_element(case, params, o, keep))(draws)
            return log_q.sum(), scale * combine(jnp, logs / scale).sum()

        log_q, bound = jax.vmap(one)(rows)
        log_q = log_q if draws_move else jax.lax.stop_gradient(log_q)
        return -(jnp.exp(log_q) * bound).sum() / subsets

    return jax.tree.map(np.asarray, jax.jit(derive(loss))(parameters(case)))


def _log_weight_by_element(case: Case, params: dict, outcome: dict, keep: int) -> tuple[jax.Array, jax.Array]:
    """Return log q of the discrete sites and log p − log q of each element."""
    model, guide = case.build(HOST)
    one = {name: value[None] for name, value in outcome.items()}
    model_key, guide_key = jax.random.split(jax.random.key(KEY))
    guide = handlers.seed(forced(guide, one, case.noise, 1), guide_key)
    log_q, guide_trace = compute_log_probs(guide, (), {}, params, sum_log_prob=False)
    replayed = handlers.replay(handlers.seed(model, model_key), guide_trace)
    log_p, _ = compute_log_probs(replayed, (), {}, params, sum_log_prob=False)

    def by_element(x: jax.Array) -> jax.Array:
        return x.sum(range(x.ndim - keep))

    sites = [guide_trace[name] for name in case.latents]
    drawn = sum(unmasked(site["fn"]).log_prob(site["value"]).sum() for site in sites)
    return drawn, sum(map(by_element, log_p.values())) - sum(map(by_element, log_q.values()))


def _tuples(case: Case, every: list, particles: int) -> list[tuple[int, ...]]:
    """Return the tuples of outcomes whose subsample is the same."""

    def subset(i: int) -> list:
        return [every[i][name].tolist() for name in case.subsamples]

    joint = itertools.product(range(len(every)), repeat=particles)
    return [p for p in joint if all(subset(i) == subset(p[0]) for i in p)]


def _weights(case: Case) -> np.ndarray:
    """Return the probability of each outcome."""
    one = jax.vmap(lambda o: log_weight_and_objective(case, parameters(case), o)[0])
    return np.exp(np.asarray(jax.jit(one)(stacked(list(outcomes(case))))))


def expected_gradient(
    case: Case,
    elbo: Any,
    particles: int,
    wrap: Callable = lambda guide: guide,
    extra: dict | None = None,
    shared: bool = False,
    derive: Callable = jax.grad,
) -> dict[str, np.ndarray]:
    """Return E[estimate] over every tuple of outcomes of the particles; `extra` is state and parameters of baselines.

    Particles that are `shared` have the same subsample. `derive` may be `jax.hessian`.
    """
    model, guide = case.build(HOST)
    every = list(outcomes(case))
    weights = once("numpyro weights", case, lambda: _weights(case))
    picked = _tuples(case, every, particles) if shared else list(itertools.product(range(len(every)), repeat=particles))
    tuples = stacked([{n: np.stack([every[i][n] for i in p]) for n in every[0]} for p in picked])

    def loss(params: dict, draws: dict[str, jax.Array]) -> jax.Array:
        run = wrap(forced(guide, draws, case.noise, particles))
        return elbo.loss_with_mutable_state(jax.random.key(KEY), {**params, **(extra or {})}, model, run)["loss"]

    found = jax.jit(jax.vmap(derive(loss), (None, 0)))(parameters(case), tuples)
    weight = np.array([np.prod([weights[i] for i in p]) for p in picked])
    if shared:
        weight = weight * _count(case) ** (particles - 1)
    return jax.tree.map(lambda g: np.tensordot(weight, np.asarray(g), 1), found)


def driven(
    guide: Callable,
    uniforms: dict[str, jax.Array],
    noise: dict[str, np.ndarray],
    particles: int,
    sizes: dict[str, int] | None = None,
) -> Callable:
    """Make the guide draw from given uniform numbers, of shape (particles, ...), in whatever branch it runs.

    `sizes` are those of supports, for sites whose support is infinite.
    """
    which = _which_particle(particles)

    def run(*args: Any, **kwargs: Any) -> Any:
        mine = which()

        def choose(site: Any) -> Any:
            name = site["name"]
            if site["type"] == "plate" or name not in uniforms:
                return uniforms[name][mine] if name in uniforms else _with_noise(site, noise)
            return inverse_cdf(site["fn"], uniforms[name][mine], (sizes or {}).get(name, 0))

        with handlers.substitute(substitute_fn=choose):
            return guide(*args, **kwargs)

    return run


def with_fixed_noise(guide: Callable, case: Case) -> Callable:
    """Hold the noise of the continuous sites, and let the others be drawn."""
    return handlers.substitute(guide, substitute_fn=lambda site: _with_noise(site, case.noise))


def listed_parts(fn: Any, size: int) -> tuple[Any, jax.Array]:
    """Return the distribution of one element and its values: the first counts, so many, where they are not finite."""
    base = unmasked(fn)
    parts = finite_parts(base)
    while parts is None and isinstance(base, dist.Independent):
        base = base.base_dist
    return parts or (base, jnp.arange(size))


def inverse_cdf(fn: Any, uniform: jax.Array, size: int = 0) -> jax.Array:
    """Return the value of a distribution at a uniform number for each element; `size` as in `listed_parts`."""
    base, support = listed_parts(fn, size)
    listed = support.reshape(len(support), *(1,) * (uniform.ndim), *base.event_shape)
    probs = jnp.moveaxis(probability_of(base, listed), 0, -1)
    index = jnp.sum(uniform[..., None] > jnp.cumsum(probs, -1)[..., :-1], -1)
    return support[index]


def probability_of(base: Any, listed: jax.Array) -> jax.Array:
    """Return the probabilities of values; 0 outside of the support, which may differ between elements."""
    if base.event_shape:
        return jnp.exp(base.log_prob(listed))
    inside = base.support(listed)
    return jnp.where(inside, jnp.exp(base.log_prob(jnp.where(inside, listed, 0))), 0.0)


def probabilities(case: Case, outcome: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return the probabilities of each discrete site's categories, (*shape, categories), under an outcome."""
    _, guide = case.build(HOST)
    key = jax.random.split(jax.random.key(KEY))[1]
    one = {name: value[None] for name, value in outcome.items()}
    run = handlers.substitute(handlers.seed(forced(guide, one, case.noise, 1), key), data=parameters(case))
    sites = handlers.trace(run).get_trace()
    found = {}
    for name in case.latents:
        draw = finite_draw(unmasked(sites[name]["fn"]), sites[name]["value"])
        if draw is None:
            base, support = listed_parts(sites[name]["fn"], case.latents[name][1])
            value = sites[name]["value"]
            listed = jnp.broadcast_to(support.reshape(-1, *(1,) * value.ndim), (len(support), *value.shape))
            found[name] = jnp.moveaxis(probability_of(base, listed), 0, -1)
        else:
            found[name] = jnp.exp(draw.log_probs)
    return found


def _tables(case: Case) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Return each subsample with the probabilities of its categories under every outcome."""
    found = []
    every_table = jax.jit(jax.vmap(lambda o: probabilities(case, o)))
    for _, group in itertools.groupby(outcomes(case), key=lambda o: [o[name].tolist() for name in case.subsamples]):
        every = list(group)
        tables = {name: np.asarray(x) for name, x in every_table(stacked(every)).items()}
        found.append(({name: every[0][name] for name in case.subsamples}, tables))
    return found


def expected_gradient_over_cells(
    case: Case,
    elbo: Any,
    particles: int = 1,
    wrap: Callable = lambda guide: guide,
    extra: dict | None = None,
    derive: Callable = jax.grad,
) -> Any:
    """Return E[estimate] over all draws, the draws of branches, and the estimators' own finite noise.

    `derive` may be `jax.hessian`.
    """
    model, guide = case.build(HOST)
    rows: list[dict[str, np.ndarray]] = []
    sizes: list[float] = []
    for subset, tables in once("numpyro tables", case, lambda: _tables(case)):
        for picked in itertools.product(list(cells(tables)), repeat=particles):
            uniforms = {n: np.stack([u[n] for u, _ in picked]) for n in tables}
            rows.append({**uniforms, **{n: np.stack([x] * particles) for n, x in subset.items()}})
            sizes.append(float(np.prod([size for _, size in picked])) / _count(case))
    params, draws, noise = parameters(case), stacked(rows), NumberedNoise()
    supports = {name: size for name, (_, size) in case.latents.items()}

    def loss(params: dict, draw: dict[str, jax.Array], number: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise.start(number)
        with replaced_noise(noise.make):
            run = wrap(driven(guide, draw, case.noise, particles, supports))
            value = elbo.loss_with_mutable_state(jax.random.key(KEY), {**params, **(extra or {})}, model, run)["loss"]
        return value, jnp.asarray(noise.log_weight)

    def one(params: dict, draw: dict[str, jax.Array], number: jax.Array) -> Any:
        found, log_weight = derive(loss, has_aux=True)(params, draw, number)
        # An impossible outcome may have no gradient at all.
        weight = jnp.exp(log_weight)
        return jax.tree.map(lambda g: jnp.where(weight > 0, weight * g, 0), found)

    # How many outcomes the noise has is known once the estimator has been traced, which happens once.
    first = {name: x[0] for name, x in draws.items()}
    closed, shapes = jax.make_jaxpr(one, return_shape=True)(params, first, jnp.array(0))
    every = {name: jnp.repeat(x, noise.count, axis=0) for name, x in draws.items()}
    numbers = jnp.tile(jnp.arange(noise.count), len(rows))

    def traced(*row: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(shapes), as_function(closed)(*jax.tree.leaves((params, *row))))

    found = jax.jit(jax.vmap(traced))(every, numbers)
    return jax.tree.map(lambda g: np.tensordot(np.repeat(sizes, noise.count), np.asarray(g), 1), found)


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-9) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=tolerance, rtol=0, err_msg=name)


def worst(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Return the largest difference between two gradients."""
    return max(float(np.abs(found[name] - value).max()) for name, value in wanted.items())


@contextmanager
def isolated() -> Iterator[None]:
    """Run in float64, and put the switch back.

    The switch is the process's: JAX runs callbacks in threads of its own, which `jax.enable_x64` does not reach. A new thread
    has what the process has, where this one may stand inside `jax.enable_x64`.
    """
    with ThreadPoolExecutor(1) as thread:
        before = thread.submit(lambda: jax.config.jax_enable_x64).result()
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def make_elbo(case: Case, estimator: Estimator, particles: int, vectorized: bool = True) -> TraceGrad_ELBO:
    """Return an ELBO with the estimator at all discrete sites of a program."""
    return TraceGrad_ELBO(particles, vectorized or particles == 1, estimators=dict.fromkeys(case.latents, estimator))


def kept_by_the_guide(case: Case, estimator: Estimator) -> tuple[Callable, dict[str, jax.Array]]:
    """Return a wrapper of the guide that registers what the estimator learns, and that, away from where it starts."""
    if not estimator.learned(1, 2):
        return lambda guide: guide, {}

    def wrap(guide: Callable) -> Callable:
        return config_estimators(guide, dict.fromkeys(case.latents, estimator))

    run = handlers.substitute(handlers.seed(wrap(case.build(HOST)[1]), 0), data=parameters(case))
    sites = handlers.trace(run).get_trace()
    known = {n: site["value"] for n, site in sites.items() if site["type"] == "param" and is_baseline_param(n)}
    return wrap, {name: array(disturb(name, np.asarray(value))) for name, value in known.items()}


def gradient_error(case: Case, estimator: Estimator, particles: int, vectorized: bool) -> float:
    """Return how far the expected gradient is from the exact one."""
    again = estimator.uses_branches or estimator.enumerates
    over = expected_gradient_over_cells if again else expected_gradient
    wrap, extra = kept_by_the_guide(case, estimator)
    found = over(case, make_elbo(case, estimator, particles, vectorized), particles, wrap, extra)
    wanted = exact_gradient(case)
    return max(float(np.abs(found[name] - value).max()) for name, value in wanted.items())


def z_score(case: Case, estimator: Estimator, particles: int, vectorized: bool, draws: int, seed: int) -> float:
    """Return the largest |z| of the mean estimate against the exact gradient."""
    wanted = exact_gradient(case)
    model, guide = case.build(HOST)
    wrap, extra = kept_by_the_guide(case, estimator)
    guide = wrap(with_fixed_noise(guide, case))
    objective = make_elbo(case, estimator, particles, vectorized)

    def one(params: dict, key: jax.Array) -> dict:
        return jax.grad(lambda p: objective.loss(key, {**p, **extra}, model, guide))(params)

    params, keys = parameters(case), jax.random.split(jax.random.key(seed), draws)
    # A thousand at once stay in the processor's cache.
    found = jax.jit(lambda p, keys: jax.lax.map(lambda key: one(p, key), keys, batch_size=1000))(params, keys)
    return max(z_of(np.asarray(found[name]), value) for name, value in wanted.items())
