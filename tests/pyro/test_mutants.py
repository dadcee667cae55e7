"""Every deliberately broken estimator is caught by the exactness checks."""

import numpy as np
import pyro
import pytest
from pyro.infer import SVI
from pyro.optim import Adam

from pplgrad import ScoreFunction
from pplgrad.core.sites import Run
from pplgrad.pyro import TraceGrad_ELBO, is_baseline_param
from pplgrad.pyro._tracing import particle_trace
from pplgrad.testing.in_pyro import HOST, exact_gradient, expected_gradient, fresh
from pplgrad.testing.programs import CASES
from tests.mutants import MUTANTS


def error(name, estimator, particles, stateful=False):
    """Return how far the expected gradient is from the exact one."""
    case = CASES[name]

    def elbo():
        return TraceGrad_ELBO(particles, estimators=dict.fromkeys(case.latents, estimator))

    state = {}
    if stateful:
        fresh(case)
        model, guide = case.build(HOST)
        svi = SVI(model, guide, Adam({"lr": 0.05}), elbo())
        for _ in range(5):
            svi.step()
        store = pyro.get_param_store()
        state = {key: value.detach().clone() for key, value in store.items() if is_baseline_param(key)}

    def prepare():
        for key, value in state.items():
            pyro.param(key, value.clone())

    found = expected_gradient(case, elbo, particles, prepare=prepare)
    wanted = exact_gradient(case)
    return max(np.abs(found[key] - wanted[key]).max() for key in wanted)


SLOW = ("guide_costs_with_the_wrong_sign",)


@pytest.mark.grid(together="mutants")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MUTANTS])
def test_mutant_is_caught(name, monkeypatch):
    mutant = MUTANTS[name]
    assert error(mutant.case, mutant.estimator, mutant.particles, mutant.stateful) < 1e-9
    mutant.apply(monkeypatch)
    assert error(mutant.case, mutant.estimator, mutant.particles, mutant.stateful) > 1e-6


def scaled_score(traces, run):
    """The score of a subsampled or scaled site is scaled with its cost (NumPyro 0.22's TraceGraph_ELBO)."""
    scores = [score * site["scale"] for score, (_, site) in zip(run.scores, traces.guide_sites, strict=True)]
    return Run(run.particles, scores, run.costs, run.indices, run.score_squared)


def masked_score(traces, run):
    """The score of a masked site is masked with its cost (NumPyro's TraceGraph_ELBO)."""
    scores = [
        score if site["mask"] is None else score * site["mask"]
        for score, (_, site) in zip(run.scores, traces.guide_sites, strict=True)
    ]
    return Run(run.particles, scores, run.costs, run.indices, run.score_squared)


@pytest.mark.parametrize(
    ("change", "name"), [(scaled_score, "scaled"), (scaled_score, "subsampled"), (masked_score, "masked")]
)
def test_scaled_and_masked_scores_are_caught(change, name, monkeypatch):
    plain = particle_trace.record

    def record(traces, *args):
        return change(traces, plain(traces, *args))

    monkeypatch.setattr("pplgrad.pyro._running.record", record)
    if name == "masked":
        # The mask must also hide a cost that the masked draw decides, or there is nothing to lose.
        case = CASES["masked"]
        assert case.latents
    wrong = error(name, ScoreFunction(), 1)
    assert wrong > 1e-6
