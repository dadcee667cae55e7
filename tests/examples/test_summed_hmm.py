"""The chain is summed out exactly in both libraries, what is called exact is so by enumeration, and training gets there."""

import re
from itertools import product

import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp
from scipy.stats import norm, poisson

from pplgrad import LocalExpectation
from tests.examples.loading import example, loss_and_gradients, program
from tests.examples.stories import double_precision, shown

COUNTS = np.array([3, 1, 0, 4, 2], float)
DATA = np.column_stack([np.arange(5), COUNTS])


def enumerated(script, log_rates, stay):
    """Return log p(counts, z) of every chain z, and the chains."""
    k = len(log_rates)
    chains = np.array(list(product(range(k), repeat=len(COUNTS))))
    stays = chains[:, 1:] == chains[:, :-1]
    joint = -np.log(k) + np.where(stays, np.log(stay), np.log((1 - stay) / (k - 1))).sum(-1)
    return joint + poisson.logpmf(COUNTS, np.exp(log_rates)[chains]).sum(-1), chains


@pytest.mark.parametrize("states", [2, 3])
def test_messages_are_the_sum_over_all_chains(states):
    script = example("_story").model_script("summed_hmm")
    options, rng = {**script.OPTIONS, "states": states}, np.random.default_rng(0)
    log_rates, which = rng.normal(size=(4, states)), np.array([0, 2, 5, 1])
    log_prob, state = script.smoothed(options, DATA, log_rates, which)
    for i in range(4):
        joint, chains = enumerated(script, log_rates[i], script.STAYS[which[i]])
        assert np.isclose(log_prob[i], logsumexp(joint), atol=1e-12)
        share = np.exp(joint - logsumexp(joint)) @ (chains[:, :, None] == np.arange(states)).reshape(len(chains), -1)
        assert np.abs(state[i].ravel() - share).max() < 1e-12


def test_exact_is_the_mean_over_the_prior():
    """The grid, against Gauss and Hermite's rule and the sum over all chains."""
    script = example("_story").model_script("summed_hmm")
    options = {**script.OPTIONS, "years": 5}
    at, weight = np.polynomial.hermite_e.hermegauss(24)
    joint, rates = np.zeros(len(script.STAYS)), np.zeros(5)
    for (a, wa), (b, wb) in product(zip(at, weight, strict=True), repeat=2):
        log_rates = np.log(script.centers(options)) + options["spread"] * np.array([a, b])
        for i, stay in enumerate(script.STAYS):
            log_p, chains = enumerated(script, log_rates, stay)
            part = np.exp(log_p) * wa * wb / (2 * np.pi) / len(script.STAYS)
            joint[i] += part.sum()
            rates += part @ np.exp(log_rates)[chains]
    evidence, stays, found = script.exact(options, DATA)
    assert np.isclose(evidence, np.log(joint.sum()), atol=1e-8)
    assert np.allclose(stays, joint / joint.sum(), atol=1e-8) and np.allclose(found, rates / joint.sum(), atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pyro", "numpyro"])
@pytest.mark.parametrize("states", [2, 3])
def test_chain_is_summed_out(backend, states):
    """Value and gradients, with the chain enumerated; LocalExpectation is exact for any q(which_stay)."""
    with double_precision():
        script, options, made = program("summed_hmm", backend, DATA, states=states)
        rng = np.random.default_rng(states)
        log_rates, params = rng.normal(size=states), {"stay": rng.normal(size=len(script.STAYS))}
        params |= {"rates_loc": np.zeros(states), "rates_log_scale": np.zeros(states)}
        log_p = np.array([logsumexp(enumerated(script, log_rates, stay)[0]) for stay in script.STAYS])
        together = {"num_particles": 2, "vectorize_particles": True, "estimators": {"which_stay": LocalExpectation()}}
        _, found = loss_and_gradients(backend, made, DATA, params, {"log_rates": log_rates}, **together)
        log_q = log_softmax(params["stay"])
        wanted = np.exp(log_q) * (log_p - log_q - np.exp(log_q) @ (log_p - log_q))
        assert np.abs(found["stay"] + wanted).max() < 1e-9

        params["stay"] = 60.0 * (np.arange(len(script.STAYS)) == 4)
        loss, _ = loss_and_gradients(backend, made, DATA, params, {"log_rates": log_rates}, **together)
        prior = norm.logpdf(log_rates, np.log(script.centers(options)), 0.5).sum() - np.log(len(script.STAYS))
        assert abs(loss + prior + log_p[4]) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "steps"), [("pyro", 60), ("numpyro", 400)])
def test_story_gets_to_the_evidence(backend, steps, tmp_path):
    text = shown(
        "summed_hmm", tmp_path / "a.png", "--backend", backend, "--steps", steps, OPTIONS={"years": 20}, DRAWS=40
    )
    summed, sampled = re.findall(r"nats, (-?[\d.]+) below; q\(stay\) off by ([\d.]+)", text)
    assert -0.1 < float(summed[0]) < 0.6 < float(sampled[0]) and float(summed[1]) < 0.3
    before, after = re.search(r"variance of stay at the start: sampled ([\d.e+]+), summed ([\d.e+]+)", text).groups()
    assert float(before) > 2 * float(after)
    assert float(re.search(r"off by at most ([\d.]+) a year", text)[1]) < 0.6
