"""Every deliberately broken estimator is caught by the exactness checks, in NumPyro as in Pyro."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

from pplgrad import ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.numpyro._tracing import particle_trace
from pplgrad.testing.in_numpyro import HOST, exact_gradient, expected_gradient, parameters
from pplgrad.testing.programs import CASES
from tests.mutants import MUTANTS

pytestmark = pytest.mark.filterwarnings("ignore:Missing a plate statement")


def error(name, estimator, particles, stateful=False):
    """Return how far the expected gradient is from the exact one, from a state with a past if there is one."""
    case = CASES[name]
    chosen = dict.fromkeys(case.latents, estimator)
    wrap, extra = (lambda guide: guide), {}
    if stateful:
        wrap = lambda guide: config_estimators(guide, chosen)  # noqa: E731
        _, guide = case.build(HOST)
        seeded = handlers.seed(handlers.substitute(wrap(guide), parameters(case)), jax.random.key(0))
        sites = handlers.trace(seeded).get_trace()
        states = {n: s["value"] for n, s in sites.items() if s["type"] == "mutable"}
        extra = {
            n: jax.tree.map(lambda x: x - 1.3, state) | {"weight": jnp.full(state["weight"].shape, 0.4)}
            for n, state in states.items()
        }
        assert extra
    found = expected_gradient(
        case, TraceGrad_ELBO(particles, estimators=None if stateful else chosen), particles, wrap, extra
    )
    wanted = exact_gradient(case)
    return max(np.abs(found[key] - wanted[key]).max() for key in wanted)


@pytest.mark.grid(together="mutants")
@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name, monkeypatch):
    mutant = MUTANTS[name]
    assert error(mutant.case, mutant.estimator, mutant.particles, mutant.stateful) < 1e-9
    mutant.apply(monkeypatch)
    assert error(mutant.case, mutant.estimator, mutant.particles, mutant.stateful) > 1e-6


@pytest.mark.parametrize(("change", "name"), [("scaled", "scaled"), ("scaled", "subsampled"), ("masked", "masked")])
def test_scaled_and_masked_scores_are_caught(change, name, monkeypatch):
    """What NumPyro 0.22's TraceGraph_ELBO does: it scales and masks the score with the cost."""
    plain = particle_trace._collected
    traces = {}

    def collected(static, guide_trace, *rest):
        arrays = plain(static, guide_trace, *rest)
        for site in arrays.scores:
            traces[site] = guide_trace[site]
            if change == "scaled":
                arrays.scores[site] = arrays.scores[site] * particle_trace._scale(guide_trace[site])
            else:
                arrays.scores[site] = guide_trace[site]["fn"].log_prob(guide_trace[site]["value"])
        return arrays

    monkeypatch.setattr(particle_trace, "_collected", collected)
    assert error(name, ScoreFunction(), 1) > 1e-6
    assert traces


def test_only_what_is_direct_would_miss_a_chain(monkeypatch):
    """One quick mutant of the shared set, so that the quick subset has one in this library too."""
    mutant = MUTANTS["only_direct_dependencies"]
    mutant.apply(monkeypatch)
    assert error(mutant.case, mutant.estimator, mutant.particles) > 1e-6
