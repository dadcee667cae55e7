"""`assess_fit`: numbers equal those by hand, exact posteriors pass, poor guides are named, and what has no weights is refused."""

from contextlib import contextmanager

import numpy as np
import pytest

from pplgrad.assessment import assessing, calibration, weights
from pplgrad.errors import ConfigurationError, ProgramError
from tests import assessed
from tests.assessed import X


@contextmanager
def doubles():
    """Let JAX compute in double precision."""
    from pplgrad.testing.in_numpyro import isolated

    with isolated():
        yield


@pytest.fixture(params=[assessed.in_pyro, assessed.in_numpyro], ids=["pyro", "numpyro"])
def host(request):
    with doubles():
        yield request.param()


def assess(host, program, x=X, **options):
    options = {"samples": 200, "replicates": 0, **options}
    return host.plugin.assess_fit(*program, (host.array(x),), **options)


def close(first, second, tolerance=1e-9):
    np.testing.assert_allclose(first, second, rtol=tolerance, atol=tolerance)


def check_weights(host):
    """Compare weights, effective sizes, the bound and the evidence with those by hand."""
    found = assess(host, assessed.local(host))
    z, k = (found._draws.latents[name].values for name in ("z", "k"))
    assert z.shape == (200, 4) and len(np.unique(z)) == 2 and len(np.unique(k)) == 3
    log_p, log_q = assessed.local_by_hand(z, k.astype(int), X)
    w = np.exp(log_p - log_q)
    close(found._draws.log_weights, log_p - log_q)
    close(found.ess, w.sum(0) ** 2 / (w**2).sum(0) / 200)
    close(found.evidence.elements, np.log(w.mean(0)))
    close(found.evidence.bound, np.log(w.mean(0)).sum() + assessed.BESIDE)
    close(found.evidence.elbo, (log_p - log_q).mean(0).sum() + assessed.BESIDE)
    close(found._draws.log_p, log_p.sum(1) + assessed.BESIDE)
    close(found.evidence.exact, assessed.local_evidence(X).sum() + assessed.BESIDE)
    parts = np.split(w, 10)
    lowest = min(np.log(part.mean(0)).sum() for part in parts)
    close(found.evidence.limit, lowest - np.log(100) / 10 + assessed.BESIDE)
    assert found.plates == ("data",) and found.khat.shape == (4,)
    close(found._draws.latents["z"].log_q + found._draws.latents["k"].log_q, log_q)


@pytest.mark.slow
def test_weights_and_evidence_are_those_by_hand(host):
    check_weights(host)


@pytest.mark.slow
def test_one_weight_where_data_share_a_latent(host):
    found = assess(host, assessed.shared(host))
    assert found.plates == () and found.khat.shape == ()
    close(found.evidence.exact, assessed.shared_evidence(X))
    assert "whole program" in str(found)


@pytest.mark.slow
def test_a_support_that_depends_on_a_latent_is_not_enumerated(host):
    ppl, dist, array = host.ppl, host.dist, host.array

    def sites():
        k = ppl.sample("k", dist.Categorical(probs=array(assessed.PRIOR)))
        return ppl.sample("z", dist.Binomial(k + 1, array(0.4)))

    def model(x):
        ppl.sample("x", dist.Normal(1.0 * sites(), 1.0), obs=x)

    found = assess(host, (model, lambda x: sites()), np.array(0.4))
    assert found.evidence.exact is None and "'z'" in found.evidence.why_not


@pytest.mark.slow
def test_sites_that_are_summed_out_count_with_their_sum(host):
    if host.name == "numpyro":
        pytest.importorskip("funsor")
    found = assess(host, assessed.summed(host), replicates=50)
    z = found._draws.latents["z"].values
    pairs = [assessed.local_by_hand(z, np.full(z.shape, k), X)[0] for k in range(3)]
    log_q = assessed.bernoulli(z, 0.2 + 0.5 / (1 + np.exp(-X)))
    close(found._draws.log_weights, np.log(np.exp(pairs).sum(0)) - log_q)
    close(found.evidence.exact, assessed.local_evidence(X).sum())
    assert {check.name for check in found.checks} == {"x: mean", "x: spread"}


@pytest.mark.slow
def test_masked_elements_do_not_count(host):
    found = assess(host, assessed.padded(host), replicates=20)
    a, b = (found._draws.latents[name].values for name in "ab")
    close(found._draws.log_weights, assessed.padded_by_hand(a, b, X))
    assert found.evidence.exact is None and "'b' is masked" in found.evidence.why_not
    mean = next(check for check in found.checks if check.name == "y: mean")
    close(mean.observed, X[[0, 2, 3]].mean())


def test_a_mask_in_one_program_alone_is_refused(host):
    with pytest.raises(ProgramError, match="'b' is masked differently"):
        assess(host, assessed.padded(host, both=False))


def test_a_masked_latent_that_counts_elsewhere_is_refused(host):
    ppl, dist, array = host.ppl, host.dist, host.array

    def sites(x, obs):
        with ppl.plate("data", x.shape[0]):
            with host.mask([True, False, True, True]):
                z = ppl.sample("z", dist.Bernoulli(array(0.3)))
            if obs:
                ppl.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ProgramError, match="'z' is masked where site 'x' of the model reads it"):
        assess(host, (lambda x: sites(x, True), lambda x: sites(x, False)))


@pytest.mark.slow
def test_a_mask_that_depends_on_the_draws_is_refused(host):
    ppl, dist, array = host.ppl, host.dist, host.array
    mask = ppl.poutine.mask if host.name == "pyro" else ppl.handlers.mask

    def sites(x, obs):
        with ppl.plate("data", x.shape[0]):
            there = ppl.sample("there", dist.Bernoulli(array(0.5)))
            with mask(mask=there == 1):
                where = ppl.sample("where", dist.Normal(array(0.0), 1.0))
            if obs:
                ppl.sample("x", dist.Normal(there * where, 1.0), obs=x)

    with pytest.raises(
        ProgramError, match="'where' (is masked where|depends)|mask of site 'where' depends on the draws"
    ):
        assess(host, (lambda x: sites(x, True), lambda x: sites(x, False)))
    # Of one datum the first draw may be one in which nothing is masked.
    for seed in range(4):
        with pytest.raises(ProgramError, match="'where'"):
            assess(host, (lambda x: sites(x, True), lambda x: sites(x, False)), X[:1], seed=seed)


@pytest.mark.slow
def test_what_has_no_weights_is_refused(host):
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x):
        with ppl.plate("data", 4, subsample_size=2) as rows:
            z = ppl.sample("z", dist.Normal(array(0.0), 1.0))
            ppl.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x):
        with ppl.plate("data", 4, subsample_size=2):
            ppl.sample("z", dist.Normal(array(0.0), 1.0))

    with pytest.raises(ProgramError, match="Plate 'data' draws 2 of its 4 elements.*without subsample_size"):
        assess(host, (model, guide))
    good = assessed.gaussian(host)
    data = np.stack([X, X], -1)

    def scaled(x):
        with host.scale(0.5):
            return good[0](x)

    with pytest.raises(ProgramError, match="Site 'z' is scaled"):
        assess(host, (scaled, good[1]), data)
    with pytest.raises(ProgramError, match="draws no latent site"):
        assess(host, (lambda x: ppl.sample("x", dist.Normal(array(0.0), 1.0), obs=x[0]), lambda x: None))

    def more(x):
        ppl.sample("w", dist.Normal(array(0.0), 1.0))
        return good[0](x)

    with pytest.raises(ProgramError, match="Site 'w' is drawn by the model alone"):
        assess(host, (more, good[1]), data)

    def point(x):
        with ppl.plate("data", x.shape[0]):
            ppl.sample("z", dist.Delta(0.8 * x).to_event(1))

    with pytest.raises(ProgramError, match="Site 'z' of the guide is a point mass"):
        assess(host, (good[0], point), data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"samples": 50}, "samples=50"),
        ({"simulations": 5}, "simulations=5"),
        ({"level": 1.0}, "level=1.0"),
        ({"tolerated": -0.1}, "tolerated=-0.1"),
        ({"checks": {"a": 1}}, "checks="),
        ({"plates": ("rows",)}, "names plate 'rows'"),
    ],
)
def test_wrong_options_are_refused(host, options, words):
    with pytest.raises(ConfigurationError, match=words):
        assess(host, assessed.local(host), **options)


def gaussian_data(count=30):
    return np.random.default_rng(3).normal(0, np.sqrt(1.25), (count, 2))


@pytest.mark.slow
def test_the_exact_posterior_passes(host):
    found = assess(host, assessed.gaussian(host), gaussian_data(), replicates=200, simulations=40)
    assert found.passed and found.sentence.startswith("No fault of the fit is seen")
    assert np.isneginf(found.khat).all() and np.allclose(found.ess, 1)
    exact = assessed.normal(gaussian_data(), 0.0, np.sqrt(1.25)).sum()
    close(found.evidence.bound, exact)
    assert found.evidence.exact is None and "no finite support" in found.evidence.why_not
    assert "upper bound" in str(found) and "not known" in str(found)
    value, density = found.calibration
    assert (value.site, value.quantity, value.ranks, value.elements) == ("z", "value", 40 * 30, 2)
    assert (density.site, density.quantity, density.ranks, density.elements) == ("z", "log q", 40 * 30, 1)
    assert max(map(len, str(found).splitlines())) <= 80 and found.sentence[:20] in found._repr_html_()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "shape"), [({"width": 0.4}, "too narrow"), ({"width": 1.8}, "too wide"), ({"shift": -0.3}, "too low")]
)
def test_a_poor_guide_is_named(host, options, shape):
    found = assess(host, assessed.gaussian(host, **options), gaussian_data(), simulations=40)
    assert not found.passed and f"draws of site 'z' are {shape}" in found.sentence
    if shape == "too narrow":
        assert found.poor.mean() > 0.5 and (found.khat > 0.7).mean() > 0.2
    assert found.evidence.limit < assessed.normal(gaussian_data(), 0.0, np.sqrt(1.25)).sum()


def check_bracket(host):
    """Both values of a datum have probability ½ under the model, so that all data sets have one evidence."""
    data = (np.arange(20) % 2).astype(float)
    found = assess(host, assessed.switch(host), data, simulations=20, rank_draws=9).simulated
    exact = -20 * np.log(2)
    close([found.lower, found.upper, found.gap], [exact, exact, 0.0], 1e-6)
    found = assess(host, assessed.switch(host, wrong=0.55), data, simulations=100, rank_draws=9).simulated
    lower, upper, _ = found.errors
    assert found.lower + 2 * lower < exact < found.upper - 2 * upper, found
    assert found.gap == pytest.approx(found.upper - found.lower) and found.simulations == 100
    return found


@pytest.mark.slow
def test_the_evidence_of_simulated_data_is_between_two_bounds(host):
    wide = check_bracket(host)
    data = (np.arange(20) % 2).astype(float)
    more = assess(host, assessed.switch(host, wrong=0.55), data, simulations=100, rank_draws=99)
    assert more.simulated.gap < 0.3 * wide.gap
    assert "of 100 simulated data sets" in str(more) and more.to_dict()["simulated"]["simulations"] == 100
    assert more.evidence.exact is not None
    # One weight for the whole program, and one for each datum: of both the mean evidence is known.
    marginal = -np.log(2 * np.pi * np.e * 1.25)
    for plates in (None, ()):
        found = assess(host, assessed.gaussian(host, width=0.7), gaussian_data(5), plates=plates, simulations=100)
        lower, upper, _ = found.simulated.errors
        assert found.simulated.lower - 4 * lower < 5 * marginal < found.simulated.upper + 4 * upper
        assert found.simulated.gap > 0
    summed = assess(host, assessed.summed(host), simulations=20)
    assert summed.simulated is None and "simulated" not in str(summed)


def check_ties(host):
    """Calibrate an exact posterior of a latent with two values, whose ranks are ties."""
    data = (np.arange(20) % 2).astype(float)
    found = assess(host, assessed.switch(host), data, simulations=50, rank_draws=19)
    assert found.passed, found.sentence
    assert not assess(host, assessed.switch(host, wrong=0.3), data, simulations=50, rank_draws=19).passed


@pytest.mark.slow
def test_finite_latents_are_calibrated_with_random_ranks_among_ties(host):
    check_ties(host)


@pytest.mark.slow
def test_a_guide_that_is_right_on_average_over_the_data_is_named(host):
    model, _ = assessed.switch(host)
    data = (np.arange(20) % 2).astype(float)

    def guide(x):
        with host.ppl.plate("data", x.shape[0]):
            host.ppl.sample("z", host.dist.Bernoulli(0.4 + 0.2 * x))

    found = assess(host, (model, guide), data, simulations=50, rank_draws=19)
    value, density = found.calibration
    assert value.p > 0.01 > density.p and "has not the posterior's probabilities" in found.sentence


@pytest.mark.slow
def test_a_guide_that_does_not_read_its_data_needs_refit(host):
    ppl, dist = host.ppl, host.dist
    model, _ = assessed.gaussian(host)
    data = gaussian_data(5)

    def blind(x):
        with ppl.plate("data", x.shape[0]):
            ppl.sample("z", dist.Normal(0.8 * host.array(data), np.sqrt(0.2)).to_event(1))

    with pytest.raises(ConfigurationError, match="pass refit="):
        assess(host, (model, blind), data, simulations=20)
    seen = []

    def refit(x):
        seen.append(np.asarray(x))
        _, guide = assessed.gaussian(host)
        return guide if host.name == "pyro" else (guide, {})

    found = assess(host, (model, blind), data, simulations=20, refit=refit)
    assert len(seen) == 20 and np.shape(seen[0]) == (5, 2) and found.passed


@pytest.mark.slow
def test_simulated_data_go_where_dream_says(host):
    model, guide = assessed.gaussian(host)
    data = host.array(gaussian_data(6))

    def wrapped(program):
        return lambda half: program(2 * half)

    options = {"samples": 100, "replicates": 0, "simulations": 20}
    with pytest.raises(ConfigurationError, match="'x' is observed, and its value is nowhere"):
        host.plugin.assess_fit(wrapped(model), wrapped(guide), (data / 2,), **options)
    dream = {"dream": lambda drawn, half: (drawn["x"] / 2,)}
    found = host.plugin.assess_fit(wrapped(model), wrapped(guide), (data / 2,), **options, **dream)
    assert found.calibration[0].ranks == 120
    wrong = {"dream": lambda drawn, half: (half,)}
    with pytest.raises(ProgramError, match="cannot be calibrated"):
        host.plugin.assess_fit(wrapped(model), wrapped(guide), (data / 2,), **options, **wrong)


def test_a_model_that_reads_its_data_twice_is_not_calibrated(host):
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x):
        with ppl.plate("data", 3):
            z = ppl.sample("z", dist.Normal(array(0.0), 1.0))
            ppl.sample("x", dist.Normal(z + 0.5 * x.sum(), 1.0), obs=x)

    def guide(x):
        with ppl.plate("data", 3):
            ppl.sample("z", dist.Normal(0.5 * x, 0.7))

    with pytest.raises(ProgramError, match="another density"):
        assess(host, (model, guide), X[:3], simulations=20)


def test_a_factor_cannot_be_simulated(host):
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x):
        z = ppl.sample("z", dist.Normal(array(0.0), 1.0))
        ppl.sample("x", dist.Normal(z, 1.0), obs=x)
        ppl.factor("f", 0.1 * z)

    def guide(x):
        ppl.sample("z", dist.Normal(0.5 * x, 0.7))

    with pytest.raises(ProgramError, match="'f' is a factor"):
        assess(host, (model, guide), np.array(0.4), simulations=20)
    assert assess(host, (model, guide), np.array(0.4), replicates=20).checks[0].name == "x: mean"


@pytest.mark.slow
def test_predictive_checks_find_what_the_model_does_not_draw(host):
    program = assessed.gaussian(host)
    checks = {"largest": lambda data: data["x"].max()}
    found = assess(host, program, gaussian_data(), replicates=200, checks=checks)
    assert found.passed and [check.name for check in found.checks] == ["x: mean", "x: spread", "largest"]
    # Replicates follow their own datum: what is far from the prior is seen where the noise about it is not the model's.
    far = gaussian_data() * np.array([1.0, 9.0])
    found = assess(host, program, far, replicates=200, checks=checks)
    assert not found.passed and "of the data is" in found.sentence
    with pytest.raises(ConfigurationError, match="(?s)'pair'.*one finite number"):
        assess(host, program, gaussian_data(), replicates=20, checks={"pair": lambda data: data["x"][:2]})


@pytest.mark.slow
def test_collapse_is_told_and_decides_nothing(host):
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x):
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", dist.Bernoulli(array([0.5, 0.5, 0.5])).to_event(1))
            w = ppl.sample("w", dist.Normal(array(0.0), 1.0))
            ppl.sample("x", dist.Normal(z[..., 0] + 0.0 * w, 1.0), obs=x)

    def guide(x):
        with ppl.plate("data", x.shape[0]):
            p = 1 / (1 + host.exp(0.5 - x))[..., None] * array([1.0, 0.0, 0.0]) + array([0.0, 0.5, 0.999999])
            ppl.sample("z", dist.Bernoulli(p).to_event(1))
            ppl.sample("w", dist.Normal(array(0.0), 1.0))

    found = assess(host, (model, guide))
    z, w = found.collapse
    close([z.elements, z.decided, z.undecided, z.prior], [3, 1 / 3, 1 / 3, 1 / 3])
    assert (w.elements, w.prior) == (1, 1.0) and np.isnan(w.entropy)


@pytest.mark.slow
def test_draws_for_arviz_have_the_plates_names(host):
    found = assess(host, assessed.gaussian(host), gaussian_data(6), replicates=50)
    tree = found.to_arviz()
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert tree["sample_stats"]["log_weight"].dims == ("chain", "draw", "data")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    assert tree["posterior_predictive"]["x"].shape == (1, 50, 6, 2)
    close(tree["observed_data"]["x"].values, gaussian_data(6))
    close(
        tree["sample_stats"]["log_p"].values - tree["sample_stats"]["log_q"].values,
        tree["sample_stats"]["log_weight"].values.sum(-1),
    )


@pytest.mark.slow
def test_estimators_and_closed_forms_on_the_guide_change_nothing(host):
    from pplgrad import DecayingAverage, LocalExpectation, ScoreFunction

    model, guide = assessed.local(host)
    plain = assess(host, (model, guide))
    mapping = {"z": ScoreFunction(DecayingAverage(0.9)), "k": LocalExpectation()}
    wrapped = host.plugin.config_estimators(guide, mapping)
    close(assess(host, (model, wrapped)).evidence.exact, plain.evidence.exact)
    model, guide = assessed.gaussian(host)

    def closed(x):
        with host.ppl.plate("data", x.shape[0]):
            law = host.dist.Normal(0.8 * x, np.sqrt(0.2)).to_event(1)
            host.ppl.sample("z", law, infer={"closed_form": "kl"})

    close(assess(host, (model, closed), gaussian_data(5)).ess, 1)


@pytest.mark.slow
def test_nothing_is_left_behind():
    import pyro
    import torch

    host = assessed.in_pyro()
    model, _ = assessed.gaussian(host)

    def guide(x):
        with pyro.plate("data", x.shape[0]):
            scale = pyro.param("scale", torch.tensor(0.4))
            pyro.sample("z", pyro.distributions.Normal(0.8 * x, scale).to_event(1))

    def refit(x):
        with torch.no_grad():
            pyro.param("scale").unconstrained().fill_(np.sqrt(0.2))
        pyro.param("new", torch.tensor(1.0))

    guide(host.array(gaussian_data(3)))
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    found = assess(host, (model, guide), gaussian_data(3), simulations=20, refit=refit)
    assert torch.equal(torch.rand(3), wanted)
    assert dict(pyro.get_param_store().items()).keys() == {"scale"} and pyro.param("scale").item() == pytest.approx(0.4)
    assert found.calibration[0].shape == "uniform"


# Mutants: each is a fault that a check above catches.


def _k_of_losses(logs):
    return weights.tail_shapes(-logs)


def _unnormalised(logs):
    w = np.exp(logs)
    return w.sum(0) / np.sqrt((w**2).sum(0)) / len(w)


def _without_ties(truth, draws, rng):
    return np.count_nonzero(draws < truth, 0)


def _mean_of_logs(logs):
    return logs.mean(0)


def _all_draws_at_once(logs, level):
    return float(weights.mean_weights(logs).sum()) - np.log(1 / level) / 10


def _truth_left_out(draws, truth):
    lower = float(weights.mean_weights(draws.reshape(len(draws), -1)).sum())
    return lower, lower


def _truth_beside(draws, truth):
    flat, own = draws.reshape(len(draws), -1), truth.reshape(1, -1)
    return float(weights.mean_weights(flat).sum()), float(
        weights.mean_weights(own).sum() - len(own) * np.log(len(draws))
    )


def _guide_dropped(table, *rest):
    from dataclasses import replace

    log_q = table.element_log_q["z"] + table.element_log_q["k"]
    return _GATHERED(replace(table, log_weights=table.log_weights + log_q), *rest)


def _plate_ignored(table, plates, *rest):
    from dataclasses import replace

    logs = table.log_weights.reshape(len(table.log_weights), -1).sum(1)
    return _GATHERED(replace(table, log_weights=logs), (), *rest)


from pplgrad.assessment.gathering import gathered as _GATHERED  # noqa: E402

MUTANTS = {
    "weights not normalised": (check_weights, [(assessing, "effective_sizes", _unnormalised)]),
    "mean of log weights": (check_weights, [(weights, "mean_weights", _mean_of_logs)]),
    "limit of one part": (check_weights, [(weights, "limit_below", _all_draws_at_once)]),
    "bracket without the exact draw": (check_bracket, [(assessing, "ends", _truth_left_out)]),
    "bracket of the exact draw alone": (check_bracket, [(assessing, "ends", _truth_beside)]),
    "ranks without random ties": (check_ties, [(calibration, "ranks_of", _without_ties)]),
    "density of the guide dropped": (check_weights, [("weighted_draws", "gathered", _guide_dropped)]),
    "plate ignored": (check_weights, [("weighted_draws", "gathered", _plate_ignored)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(host, name, monkeypatch):
    from importlib import import_module

    check, changes = MUTANTS[name]
    if host.name == "numpyro" and not isinstance(changes[0][0], str):
        pytest.skip("What both libraries share runs in one of the two.")
    for module, function, mutant in changes:
        if isinstance(module, str):
            module = import_module(f"pplgrad.{host.name}._diagnostics.{module}")
        assert hasattr(module, function)
        monkeypatch.setattr(module, function, mutant)
    with pytest.raises(AssertionError):
        check(host)
