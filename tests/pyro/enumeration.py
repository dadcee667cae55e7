"""Enumerate every outcome of a small Pyro program, and compare estimates with the exact gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites

from pplgrad.pyro._distributions import unmasked
from tests.programs import Case, Host

Outcome = dict[str, np.ndarray]


def array(x: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x), dtype=torch.float64)


def _mask(mask: Any) -> Any:
    return poutine.mask(mask=torch.as_tensor(np.asarray(mask)))


HOST = Host(
    sample=pyro.sample,
    param=lambda name, value: pyro.param(name, value.clone()),
    plate=pyro.plate,
    mask=_mask,
    scale=lambda s: poutine.scale(scale=s),
    factor=pyro.factor,
    dist=dist,
    array=array,
    xp=xp,
)


class Force(Messenger):
    """Makes the guide draw given outcomes, one for each particle; the sites stay latent.

    It stands outside everything, where the particle plate has already broadcast the site, and leaves alone what the
    model replays.
    """

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
            base = unmasked(fn)
            loc, scale = base.loc, base.scale
            msg["value"] = loc + scale * array(self.noise[name]).expand(loc.shape)
        elif any(name in outcome for outcome in self.outcomes):
            vectorized = any(f.name == "num_particles_vectorized" for f in msg["cond_indep_stack"])
            if vectorized:
                stacked = np.stack([o[name] for o in self.outcomes])
            else:
                visit = self.visits.get(name, 0)
                self.visits[name] = visit + 1
                stacked = self.outcomes[visit % len(self.outcomes)][name]
            integer = "Categorical" in type(unmasked(fn)).__name__
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
        result, start = {}, 0
        for name, n in sizes.items():
            result[name] = np.array(flat[start : start + n]).reshape(case.latents[name][0])
            start += n
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
        result[name] = np.zeros(value.shape) if value.grad is None else value.grad.numpy().copy()
        value.grad = None
    return result


def log_weight_and_objective(case: Case, model: Callable, guide: Callable, outcome: Outcome) -> tuple[Any, Any]:
    """Return log q of the outcome's discrete sites, unscaled and unmasked, and log p − log q as Trace_ELBO has it."""
    with Force([outcome], case.noise):
        guide_trace = poutine.trace(guide).get_trace()
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace()
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    log_w = sum(
        unmasked(guide_trace.nodes[name]["fn"]).log_prob(guide_trace.nodes[name]["value"]).sum()
        for name in case.latents
    )
    return log_w, model_trace.log_prob_sum() - guide_trace.log_prob_sum()


def exact_loss(case: Case, model: Callable, guide: Callable) -> torch.Tensor:
    """Return −E_q[log p − log q] by summing over every outcome and every subsample."""
    subsets = subsamples(case)
    total: Any = 0.0
    for subset in subsets:
        for outcome in outcomes(case):
            log_w, objective = log_weight_and_objective(case, model, guide, outcome | subset)
            total = total - log_w.exp() * objective / len(subsets)
    return total


def exact_gradient(case: Case) -> dict[str, np.ndarray]:
    """Return the gradient of the enumerated loss."""
    fresh(case)
    model, guide = case.build(HOST)
    exact_loss(case, model, guide).backward()
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


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-9) -> None:
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=tolerance, rtol=0, err_msg=name)
