"""Enumerate every outcome of a small Pyro program, and compare estimates with the exact gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites

from pplgrad.core.estimator import Estimator
from pplgrad.core.noise import replaced_noise
from pplgrad.core.objectives import CostWeights
from pplgrad.errors import ImpossibleValueError
from pplgrad.pyro import PermutationMatrix, PlackettLuce, Subset, TraceGrad_ELBO
from pplgrad.pyro._baselines import PREFIX
from pplgrad.pyro._distributions import family, finite_parts, unmasked
from pplgrad.pyro._rerun.draws import PyroDraw
from pplgrad.testing.cells import ListedNoise, NoiseShapes, cells, disturb, z_of
from pplgrad.testing.programs import CASES, Case, Host, once

Outcome = dict[str, np.ndarray]
PLAIN = CostWeights(1.0, 1.0, 1.0)


def array(x: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x), dtype=torch.float64)


def _mask(mask: Any) -> Any:
    return poutine.mask(mask=torch.as_tensor(mask))


HOST = Host(
    sample=pyro.sample,
    param=lambda name, value: pyro.param(name, value.clone()),
    plate=pyro.plate,
    mask=_mask,
    scale=lambda s: poutine.scale(scale=s),
    factor=pyro.factor,
    dist=dist,
    one_hot=lambda logits: dist.OneHotCategorical(logits=logits),
    subset=Subset,
    ranking=PlackettLuce,
    permutation=PermutationMatrix,
    array=array,
    xp=xp,
)


def with_noise(fn: Any, noise: np.ndarray) -> torch.Tensor:
    """Return a Normal's draw from its standard noise."""
    base = unmasked(fn)
    while not hasattr(base, "loc"):
        base = base.base_dist
    return base.loc + base.scale * array(noise).expand(base.loc.shape)


class Force(Messenger):
    """Makes the guide draw given outcomes, one for each particle; the sites stay latent.

    It stands outside everything, where the particle plate has already broadcast the site, and leaves alone what the
    model replays.
    """

    only_draws = True  # A structure that is found under one set of values holds under another.

    def __init__(self, outcomes: list[Outcome], noise: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.outcomes = outcomes
        self.noise = noise
        self.visits: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if msg["is_observed"] or msg["done"]:
            return
        if type(fn).__name__ == "_Subsample":
            if name in self.outcomes[0]:
                msg["value"], msg["done"] = torch.as_tensor(self.outcomes[0][name]), True
            return
        if name in self.noise:
            msg["value"] = with_noise(fn, self.noise[name])
        elif any(name in outcome for outcome in self.outcomes):
            vectorized = any(f.name == "num_particles_vectorized" for f in msg["cond_indep_stack"])
            if vectorized:
                stacked = np.stack([o[name] for o in self.outcomes])
            else:
                visit = self.visits.get(name, 0)
                self.visits[name] = visit + 1
                stacked = self.outcomes[visit % len(self.outcomes)][name]
            integer = family(fn) in ("Categorical", "PlackettLuce")
            value = torch.as_tensor(stacked) if integer else array(stacked)
            msg["value"] = value.reshape(fn.batch_shape + fn.event_shape)
        else:
            raise AssertionError(f"unforced site {name}")
        msg["done"] = True


def outcomes(case: Case) -> Iterator[Outcome]:
    """Yield all joint values of the discrete latents."""
    sizes = {name: int(np.prod(shape)) for name, (shape, _) in case.latents.items()}
    supports = [range(case.latents[name][1]) for name, n in sizes.items() for _ in range(n)]
    for flat in itertools.product(*supports):
        result, start, possible = {}, 0, True
        for name, n in sizes.items():
            index = np.array(flat[start : start + n]).reshape(case.latents[name][0])
            possible &= case.can_be(name, index)
            result[name] = case.value(name, index)
            start += n
        if possible:
            yield result


def subsamples(case: Case) -> list[Outcome]:
    """Return all subsets of the subsampled plates, as index arrays."""
    names = list(case.subsamples)
    choices = [list(itertools.combinations(range(n), k)) for n, k in case.subsamples.values()]
    return [dict(zip(names, map(np.array, picked), strict=True)) for picked in itertools.product(*choices)]


def fresh(case: Case) -> None:
    """Put the case's parameters, and nothing else, into the param store."""
    pyro.clear_param_store()
    for name, value in case.params.items():
        pyro.param(name, array(value).clone())


def gradient() -> dict[str, np.ndarray]:
    """Return the gradients of the parameters in the store, and forget them."""
    result = {}
    for name, value in pyro.get_param_store().named_parameters():
        result[name] = np.zeros(value.shape) if value.grad is None else value.grad.cpu().numpy().copy()
        value.grad = None
    return result


def log_weight_and_objective(
    case: Case, model: Callable, guide: Callable, outcome: Outcome, weights: CostWeights = PLAIN
) -> tuple[Any, Any]:
    """Return log q of the outcome's discrete sites, unscaled and unmasked, and log p − log q as Trace_ELBO has it.

    `weights` are those of another objective.
    """
    with Force([outcome], case.noise):
        guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    log_w = sum(
        unmasked(guide_trace.nodes[name]["fn"]).log_prob(guide_trace.nodes[name]["value"]).sum()
        for name in case.latents
    )
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    objective: Any = 0.0
    for trace, sign, latent in ((model_trace, 1.0, weights.prior), (guide_trace, -1.0, weights.guide)):
        for node in trace.nodes.values():
            if node["type"] == "sample":
                weight = weights.observed if node["is_observed"] else latent
                objective = objective + sign * weight * node["log_prob_sum"]
    return log_w, objective


def exact_loss(case: Case, model: Callable, guide: Callable, weights: CostWeights = PLAIN) -> torch.Tensor:
    """Return −E_q[log p − log q] by summing over every outcome and every subsample."""
    subsets = subsamples(case)
    total: Any = 0.0
    for subset in subsets:
        for outcome in outcomes(case):
            log_w, objective = log_weight_and_objective(case, model, guide, outcome | subset, weights)
            total = total - log_w.exp() * objective / len(subsets)
    return total


Combine = Callable[[Any, Any], Any]
"""From an array namespace and the log weights of all particles, (particles, *elements), to a bound's value."""


def exact_bound_gradient(
    case: Case, combine: Combine, particles: int, keep: int, draws_move: bool = True
) -> dict[str, np.ndarray]:
    """Return the gradient of −E[Σ combine(log weights)], summed over every tuple of outcomes with the same subsample.

    The weights have the last `keep` batch dimensions as elements; a subsampled plate's scale multiplies their bound. The
    probabilities of the draws are constants unless `draws_move`.
    """
    fresh(case)
    model, guide = case.build(HOST)
    subsets = subsamples(case)
    scale = float(np.prod([size / drawn for size, drawn in case.subsamples.values()])) if keep else 1.0
    total: Any = 0.0
    for subset in subsets:
        rows = [_log_weight_by_element(case, model, guide, outcome | subset, keep) for outcome in outcomes(case)]
        for picked in itertools.product(rows, repeat=particles):
            log_q = sum(row[0] for row in picked)
            log_q = log_q if draws_move else log_q.detach()
            bound = scale * combine(xp, torch.stack([row[1] for row in picked]) / scale).sum()
            total = total - log_q.exp() * bound / len(subsets)
    total.backward()
    return gradient()


def _log_weight_by_element(case: Case, model: Callable, guide: Callable, outcome: Outcome, keep: int) -> tuple:
    """Return log q of the discrete sites and log p − log q of each element."""
    with Force([outcome], case.noise):
        guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    log_q: Any = 0.0
    total: Any = 0.0
    for trace, sign in ((prune_subsample_sites(model_trace), 1.0), (prune_subsample_sites(guide_trace), -1.0)):
        trace.compute_log_prob()
        for name, node in trace.nodes.items():
            if node["type"] == "sample":
                x = node["log_prob"]
                total = total + sign * x.sum(tuple(range(x.dim() - keep))) if x.dim() > keep else total + sign * x
                if sign < 0 and name in case.latents:
                    log_q = log_q + unmasked(node["fn"]).log_prob(node["value"]).sum()
    return log_q, total


def exact_gradient(case: Case, weights: CostWeights = PLAIN) -> dict[str, np.ndarray]:
    """Return the gradient of the enumerated loss."""
    fresh(case)
    if weights is not PLAIN:
        return _exact_gradient(case, weights)
    return once("pyro gradient", case, lambda: _exact_gradient(case, weights))


def _exact_gradient(case: Case, weights: CostWeights) -> dict[str, np.ndarray]:
    model, guide = case.build(HOST)
    exact_loss(case, model, guide, weights).backward()
    return gradient()


def expected_gradient(
    case: Case,
    make_elbo: Callable[[], Any],
    particles: int,
    wrap: Callable = lambda guide: guide,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Return E[estimate] over every tuple of outcomes of the particles, from `loss_and_grads`.

    `prepare` puts the state of baselines into the param store before each step.
    """
    fresh(case)
    model, guide = case.build(HOST)
    elbo = make_elbo()
    total = {name: np.zeros(value.shape) for name, value in case.params.items()}
    every = list(outcomes(case))
    subsets = subsamples(case)
    for subset in subsets:
        with torch.no_grad():
            weights = [
                float(log_weight_and_objective(case, model, guide, o | subset)[0].exp())
                / len(subsets) ** (1 / particles)
                for o in every
            ]
        for picked in itertools.product(range(len(every)), repeat=particles):
            fresh(case)
            prepare()
            force = Force([every[i] | subset for i in picked], case.noise)
            with force:
                elbo.loss_and_grads(model, wrap(guide))
            weight = float(np.prod([weights[i] for i in picked]))
            found = gradient()
            for name in total:
                total[name] += weight * found[name]
    return total


class Drive(Messenger):
    """Makes every run of the guide draw from given uniform numbers, one set for each particle; the sites stay latent.

    Without any, only the continuous sites' noise is held.
    """

    only_draws = True

    def __init__(
        self, uniforms: list[Outcome], noise: dict[str, np.ndarray], sizes: dict[str, int] | None = None
    ) -> None:
        """`sizes` are those of supports, for sites whose support is infinite."""
        super().__init__()
        self.uniforms = uniforms
        self.noise = noise
        self.sizes = sizes or {}

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if msg["is_observed"] or msg["done"]:
            return
        if type(fn).__name__ == "_Subsample":
            if self.uniforms and name in self.uniforms[0]:
                msg["value"], msg["done"] = torch.as_tensor(self.uniforms[0][name]), True
            return
        if name in self.noise:
            msg["value"] = with_noise(fn, self.noise[name])
        elif not self.uniforms:
            return
        else:
            plated = any(frame.name == "num_particles_vectorized" for frame in msg["cond_indep_stack"])
            uniform = array(np.stack([u[name] for u in self.uniforms]))
            if plated:
                # The branches of a particle stand next to each other, and share its numbers.
                rows, *rest = listed_parts(fn, self.sizes.get(name, 0))[0].batch_shape
                uniform = uniform.reshape(
                    len(self.uniforms), *(1,) * (len(rest) - uniform.dim() + 1), *uniform.shape[1:]
                )
                uniform = uniform.repeat_interleave(rows // len(self.uniforms), 0)
            else:
                uniform = uniform[0]
            msg["value"] = inverse_cdf(fn, uniform, self.sizes.get(name, 0))
        msg["done"] = True


def listed_parts(fn: Any, size: int) -> tuple[Any, torch.Tensor]:
    """Return the distribution of one element and its values: the first counts, so many, where they are not finite."""
    base = unmasked(fn)
    parts = finite_parts(base)
    while parts is None and hasattr(base, "base_dist") and isinstance(base, dist.Independent):
        base = base.base_dist
    return parts or (base, torch.arange(size, dtype=torch.float64))


def inverse_cdf(fn: Any, uniform: torch.Tensor, size: int = 0) -> torch.Tensor:
    """Return the value of a distribution at a uniform number for each element; `size` as in `listed_parts`."""
    base, support = listed_parts(fn, size)
    listed = support.reshape(len(support), *(1,) * len(base.batch_shape), *base.event_shape)
    probs = probability_of(base, listed).moveaxis(0, -1)
    probs = probs.expand(*base.batch_shape, -1)
    index = (uniform.expand(base.batch_shape)[..., None] > probs.cumsum(-1)[..., :-1]).sum(-1)
    # `support[index]` would take a single index out of its tensor, and a program that reads values is watched at every step.
    return support.index_select(0, index.reshape(-1)).reshape(index.shape + support.shape[1:])


def probability_of(base: Any, listed: torch.Tensor) -> torch.Tensor:
    """Return the probabilities of values; 0 outside of the support, which may differ between elements."""
    inside = base.support.check(listed) if not base.event_shape else torch.tensor(True)
    if bool(inside.all()):
        return base.log_prob(listed).detach().exp()
    return torch.where(inside, base.log_prob(torch.where(inside, listed, 0.0)).detach().exp(), 0.0)


def probabilities(case: Case, guide: Callable, every: list[Outcome]) -> Outcome:
    """Return the probabilities of each discrete site's categories under all outcomes: (outcomes, *shape, categories)."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in case.latents}
    for outcome in every:
        with Force([outcome], case.noise), torch.no_grad():
            trace = poutine.trace(guide).get_trace()
        for name, tables in found.items():
            site = trace.nodes[name]
            draw = PyroDraw(name, site, False).finite()
            if draw is None:
                base, support = listed_parts(site["fn"], case.latents[name][1])
                listed = support.reshape(-1, *(1,) * site["value"].dim()).expand(-1, *site["value"].shape)
                tables.append(probability_of(base, listed).movedim(0, -1).numpy())
            else:
                tables.append(draw.log_probs()[0].detach().exp().cpu().numpy())
    return {name: np.stack(tables) for name, tables in found.items()}


def expected_gradient_over_cells(case: Case, make_elbo: Callable[[], Any], particles: int = 1) -> dict[str, np.ndarray]:
    """Return E[estimate] over all draws, the draws of branches, and the estimators' own finite noise.

    Several particles must be vectorized.
    """
    fresh(case)
    model, guide = case.build(HOST)
    elbo = make_elbo()
    total = {name: np.zeros(value.shape) for name, value in case.params.items()}
    shapes: NoiseShapes | None = None
    subsets = subsamples(case)

    learned: Outcome = {}
    supports = {name: size for name, (_, size) in case.latents.items()}

    def step(uniforms: list[Outcome], noise: Callable) -> dict[str, np.ndarray]:
        fresh(case)
        for name, value in learned.items():
            pyro.param(name, array(value))
        with Drive(uniforms, case.noise, supports), replaced_noise(noise):
            elbo.loss_and_grads(model, guide)
        return gradient()

    for subset in subsets:
        tables = probabilities(case, guide, [outcome | subset for outcome in outcomes(case)])
        for picked in itertools.product(list(cells(tables)), repeat=particles):
            uniforms = [uniform | subset for uniform, _ in picked]
            size = float(np.prod([size for _, size in picked])) / len(subsets)
            if shapes is None:
                shapes = NoiseShapes()
                step(uniforms, shapes.recording)
                learned.update(disturbed())
            for noise in shapes.outcomes():
                listed = ListedNoise(noise)
                try:
                    found = step(uniforms, listed.make)
                except ImpossibleValueError:
                    # What is never drawn may have no gradient at all.
                    if math.exp(listed.log_weight) > 0:
                        raise
                    continue
                weight = size * float(np.exp(float(listed.log_weight)))
                for name in total if weight > 0 else ():
                    total[name] += weight * found[name]
    return total


def disturbed() -> Outcome:
    """Return what estimators have put into the param store to be learned, away from where it starts."""
    store = pyro.get_param_store()
    return {n: disturb(n, store[n].detach().cpu().numpy()) for n in store.keys() if n.startswith(PREFIX)}


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-9) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=tolerance, rtol=0, err_msg=name)


def worst(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Return the largest difference between two gradients."""
    return max(float(np.abs(found[name] - value).max()) for name, value in wanted.items())


@contextmanager
def isolated() -> Iterator[None]:
    """Run in float64 with a param store and a generator of its own, and put everything back."""
    dtype, store = torch.get_default_dtype(), pyro.get_param_store().get_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_default_dtype(dtype)
        pyro.get_param_store().set_state(store)


def validated(case: Case) -> Any:
    """Return a context in which Pyro's validation is on, but for the program with a batch dimension that no plate declares."""
    return pyro.validation_enabled(case is not CASES["batch_without_plate"])


def make_elbo(case: Case, estimator: Estimator, particles: int, vectorized: bool) -> TraceGrad_ELBO:
    """Return an ELBO with the estimator at all discrete sites of a program."""
    chosen = dict.fromkeys(case.latents, estimator)
    return TraceGrad_ELBO(particles, vectorize_particles=vectorized, max_plate_nesting=2, estimators=chosen)


def gradient_error(case: Case, estimator: Estimator, particles: int, vectorized: bool) -> float:
    """Return how far the expected gradient is from the exact one."""
    again = estimator.uses_branches or estimator.enumerates
    over = expected_gradient_over_cells if again else expected_gradient
    with validated(case):
        found = over(case, lambda: make_elbo(case, estimator, particles, vectorized), particles)
        return worst(found, exact_gradient(case))


def z_score(case: Case, estimator: Estimator, particles: int, vectorized: bool, draws: int, seed: int) -> float:
    """Return the largest |z| of the mean estimate against the exact gradient."""
    wanted = exact_gradient(case)
    model, guide = case.build(HOST)
    objective = make_elbo(case, estimator, particles, vectorized)
    torch.manual_seed(seed)
    found: list[Outcome] = []
    learned: Outcome = {}
    for _ in range(draws):
        fresh(case)
        for name, value in learned.items():
            pyro.param(name, array(value))
        with Drive([], case.noise), validated(case):
            objective.loss_and_grads(model, guide)
        if not found and estimator.keeps_state and not learned:
            learned = disturbed()
            continue
        found.append(gradient())
    return max(z_of(np.stack([g[name] for g in found]), value) for name, value in wanted.items())
