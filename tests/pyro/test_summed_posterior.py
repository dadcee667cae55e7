"""The posterior of summed sites against every joint value of theirs, run one by one; and the hosts' tools with wrapped guides."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, config_enumerate, infer_discrete
from pyro.infer.autoguide import AutoNormal

from pplgrad import ConfigurationError, DisARM, GumbelSoftmax, ImpossibleValueError, ProgramError, ScoreFunction
from pplgrad.pyro import config_estimators, summed_posterior
from pplgrad.pyro._tracing import marginal_sites, posterior_of_sums
from tests.covering import mostly
from tests.pyro.marginal import SUM
from tests.pyro.posteriors import PADDING, POSTERIORS, Posterior, padded

BY_HAND = [pytest.param(name, marks=pytest.mark.slow) if name == "factorial" else name for name in POSTERIORS]


DRAWS = 600


def given_the_same_draws(name, num_samples=1):
    """Return what a program's draws are, the posterior of each kind given them, and that by brute force for each draw."""
    model, guide = POSTERIORS[name]()
    found = {}
    for kind in ("marginals", "map", "samples"):
        pyro.set_rng_seed(4)
        found[kind] = summed_posterior(model, guide, kind=kind, num_samples=num_samples)
    pyro.set_rng_seed(4)
    every = summed_posterior(model, guide, kind="map", num_samples=num_samples, draws=True)
    drawn = {key: x for key, x in every.items() if key not in found["map"]}
    rows = [{key: x[0, i] for key, x in drawn.items()} for i in range(num_samples)]
    return model, rows, found


def off(name, num_samples=1, kinds=("marginals", "map")):
    """Return by how much a program's marginals are off, and how many of its most probable values."""
    model, rows, found = given_the_same_draws(name, num_samples)
    worst = {"marginals": 0.0, "map": 0.0}
    for i, drawn in enumerate(rows):
        right = Posterior(model, drawn, PADDING.get(name))
        for kind, wanted in (("marginals", right.marginals()), ("map", right.most_probable())):
            assert wanted.keys() == found[kind].keys()
            for key, x in wanted.items():
                assert found[kind][key].shape == (1, num_samples, *x.shape)
                worst[kind] = max(worst[kind], float((x - found[kind][key][0, i]).abs().max()))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(["masked chain", "tree", "padded"], BY_HAND))
def test_marginals_and_most_probable_values_are_those_of_brute_force(name):
    worst = off(name, 1 if name == "factorial" else 2)
    assert worst["marginals"] < 1e-9 and worst["map"] == 0.0, worst
    assert all(x.shape[:2] == (1, 1) for x in summed_posterior(*POSTERIORS[name]()).values())


def excess(name, draws):
    """Return how far the frequencies of joint samples are from their probabilities: χ² less its mean, in its standard deviations."""
    model, (drawn,), _ = given_the_same_draws(name)
    right, (_, guide) = Posterior(model, drawn), POSTERIORS[name]()
    given = poutine.Trace()
    for key, x in drawn.items():
        given.add_node(key, type="sample", name=key, value=x, is_observed=False, infer={})
    found = summed_posterior(model, poutine.replay(guide, trace=given), num_samples=draws)
    outcomes = [
        tuple(torch.cat([right.support[k][x].flatten() for k, x in one.items()]).tolist()) for one in right.outcomes
    ]
    rows = torch.cat([found[key][0].reshape(draws, -1) for key in right.shapes], 1).tolist()
    numbers = {outcome: i for i, outcome in enumerate(outcomes)}
    counts = torch.bincount(torch.tensor([numbers[tuple(row)] for row in rows]), minlength=len(outcomes))
    expected = right.probabilities() * draws
    order = expected.argsort(descending=True)[: int((expected > 0).sum())]
    cells = max(2, int((expected > 5).sum()))
    pool = [order[: cells - 1], order[cells - 1 :]]
    seen = torch.cat([counts[pool[0]], counts[pool[1]].sum()[None]]).double()
    wanted = torch.cat([expected[pool[0]], expected[pool[1]].sum()[None]])
    assert not counts[expected == 0].any()
    return float(((seen - wanted) ** 2 / wanted).sum() - (cells - 1)) / math.sqrt(2 * (cells - 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", mostly(["padded"], ["tree", "second order", "left to right", "tiny", "padded"]))
def test_joint_samples_have_their_frequencies(name):
    assert abs(excess(name, DRAWS)) < 4


def test_each_draw_of_the_guide_has_its_own_posterior_and_minibatch():
    model, rows, found = given_the_same_draws("subsampled", 6)
    assert len({tuple(row["data"].tolist()) for row in rows}) > 1
    for i, drawn in enumerate(rows):
        torch.testing.assert_close(found["marginals"]["k"][0, i], Posterior(model, drawn).marginals()["k"])


def test_padding_leaves_a_path_as_it_is_alone():
    """The most probable path of each sequence is that of a program which has this sequence alone, without its padding."""
    model, rows, found = given_the_same_draws("padded")
    joint = Posterior(model, rows[0]).most_probable()
    assert not torch.equal(joint["k0"], found["map"]["k0"][0, 0]), "Padding changes nothing in this program."
    x, w = torch.tensor([[0.1, 1.9, 0.7], [1.4, 0.6, 0.4], [0.9, 1.6, 0.1]]), rows[0]["w"]
    for i, length in enumerate([3, 1, 2]):

        def alone(i=i, length=length):
            k = torch.tensor(0.0)
            for t in range(length):
                k = pyro.sample(
                    f"k{t}", dist.Bernoulli(0.45 if t == 0 else torch.where(k == 1, 0.6, 0.02)), infer=dict(SUM)
                )
                pyro.sample(f"x{t}", dist.Normal(k + 0.1 * w, 1.0), obs=x[i, t])

        for key, value in Posterior(alone, {}).most_probable().items():
            assert found["map"][key][0, 0, i] == value


def test_a_scale_around_everything_changes_nothing():
    model, guide = POSTERIORS["tree"]()
    found = []
    for factor in (1.0, 3.0):
        pyro.set_rng_seed(2)
        found.append(summed_posterior(poutine.scale(model, factor), guide, kind="marginals"))
    for key in found[0]:
        assert torch.equal(found[0][key], found[1][key])


def test_the_guide_draws_what_it_is_and_not_what_an_estimator_relaxes():
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        k = pyro.sample("k", dist.Bernoulli(logits=b), infer=dict(SUM))
        pyro.sample("x", dist.Normal(k + b, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("b", dist.Bernoulli(0.5))

    found = []
    for wrapped in (guide, config_estimators(guide, {"b": GumbelSoftmax(0.5)})):
        pyro.set_rng_seed(2)
        found.append(summed_posterior(model, wrapped, num_samples=5, draws=True))
    assert set(found[1]["b"].flatten().tolist()) <= {0.0, 1.0}
    assert list(found[0]) == list(found[1]) == ["b", "k"]
    assert all(torch.equal(x, found[1][key]) for key, x in found[0].items())


@pytest.mark.parametrize("wrap", [lambda guide: guide, lambda guide: config_estimators(guide, {"b": DisARM()})])
def test_a_site_that_the_guide_enumerates_is_drawn(wrap):
    """`config_enumerate` on both sides: what the guide draws is given, and the rest is summed out."""

    @config_enumerate
    def model(x):
        b = pyro.sample("b", dist.Bernoulli(0.5))
        k = pyro.sample("k", dist.Bernoulli(logits=b))
        pyro.sample("x", dist.Normal(k + b, 1.0), obs=x)

    def guide(x):
        pyro.sample("b", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    found = summed_posterior(model, wrap(guide), torch.tensor(0.3), kind="marginals", num_samples=2)
    assert list(found) == ["k"] and found["k"].shape == (1, 2, 2)


REFUSED = {
    "kind": ({"kind": "mean"}, ConfigurationError, 'kind=\'mean\'.*write "samples", "marginals" or "map"'),
    "no draws": ({"num_samples": 0}, ConfigurationError, "num_samples=0"),
    "half a draw": ({"num_samples": 1.5}, ConfigurationError, "num_samples=1.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name):
    given, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        summed_posterior(*padded(), **given)


def refused_model(kind):
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        infer = {} if kind == "nothing" else {**SUM, "num_samples": 4} if kind == "monte carlo" else SUM
        logits = torch.zeros(3) if kind == "undeclared_batch" else w
        k = pyro.sample("k", dist.Bernoulli(logits=logits), infer=infer) if kind != "nothing" else w
        with pyro.plate("data", 4, subsample_size=2 if kind == "scales" else 4) as index:
            scale = 0.5 * k if kind == "impossible" else 1.0
            x = torch.full((4,), 3.0)[index]
            law = (
                dist.Uniform(0.0, scale + 0.1)
                if kind == "impossible"
                else dist.Normal(w + k if kind == "scales" else w, scale)
            )
            with pyro.validation_enabled(False):
                pyro.sample("x", law, obs=x)

    return model


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("nothing", ProgramError, "no site that is summed out.*infer="),
        ("scales", ProgramError, "'k' and 'x' are summed out together.*different scales"),
        ("impossible", ImpossibleValueError, "'k' have no posterior.*'x' is NaN or infinite at all"),
        ("undeclared_batch", ProgramError, "site 'k' has the shape .*pyro.plate or .to_event"),
        ("monte carlo", ProgramError, "Site 'k'.*num_samples"),
    ],
)
def test_what_has_no_posterior_is_refused(kind, error, words):
    with pytest.raises(error, match=words):
        summed_posterior(refused_model(kind), lambda: pyro.sample("w", dist.Normal(0.0, 1.0)), max_plate_nesting=1)


def test_draws_of_no_common_shape_are_refused():
    def model(late):
        b = pyro.sample("b", dist.Bernoulli(0.5))
        if late or b:
            pyro.sample("k", dist.Bernoulli(0.5), infer=dict(SUM))
        with pyro.plate("data", 1 + int(b), dim=-1):
            pyro.sample("l", dist.Bernoulli(0.5), infer=dict(SUM))

    def guide(late):
        pyro.sample("b", dist.Bernoulli(0.5))

    for late, words in ((False, "Site 'k' is there in some draws"), (True, "Site 'l' has the shape")):
        with pytest.raises(ProgramError, match=words):
            summed_posterior(model, guide, late, num_samples=20)


def mixture(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(logits=w), infer=dict(SUM))
        pyro.sample("x", dist.Normal(8.0 * k, 1.0), obs=x)


def by_function(x):
    pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))


WRAPPED = {
    "function": lambda: config_estimators(by_function, {"w": ScoreFunction()}),
    "twice": lambda: config_estimators(config_estimators(by_function, {"w": ScoreFunction()}), {}),
    "autoguide": lambda: config_estimators(AutoNormal(poutine.block(mixture, hide=["k"])), {"w": ScoreFunction()}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_hosts_tools_take_wrapped_guides(name):
    x, guide = torch.tensor([-0.3, 8.2, 7.9]), WRAPPED[name]()
    found = summed_posterior(mixture, guide, x, kind="map", num_samples=2, draws=True)
    assert found["k"].tolist() == [[[0.0, 1.0, 1.0]] * 2] and found["w"].shape == (1, 2)
    trace = poutine.trace(guide).get_trace(x)
    for temperature in (0, 1):
        inferred = infer_discrete(poutine.replay(mixture, trace=trace), first_available_dim=-2, temperature=temperature)
        assert poutine.trace(inferred).get_trace(x).nodes["k"]["value"].tolist() == [0.0, 1.0, 1.0]
    predictive = Predictive(
        infer_discrete(mixture, first_available_dim=-2), guide=guide, num_samples=3, return_sites=("k", "w")
    )
    assert predictive(x)["k"].tolist() == [[0.0, 1.0, 1.0]] * 3
    for parallel in (False, True):
        prior = Predictive(mixture, guide=guide, num_samples=50, return_sites=("w", "k"), parallel=parallel)(x)
        assert prior["w"].numel() == 50 and prior["k"].shape == (50, 3) and 0 < prior["k"].mean() < 1
    again = Predictive(mixture, {key: value[0] for key, value in found.items()}, return_sites=("k",))(x)
    assert torch.equal(again["k"], found["k"][0])


HERE = "pplgrad.pyro._tracing"


def scale_inside_of_the_logarithm(monkeypatch):
    plain = marginal_sites._log_prob
    monkeypatch.setattr(f"{HERE}.marginal_sites._log_prob", lambda site: plain(site) * site["scale"] ** 2)


def a_factor_counted_twice(monkeypatch):
    plain = marginal_sites._log_prob
    monkeypatch.setattr(
        f"{HERE}.marginal_sites._log_prob", lambda site: plain(site) * (2 if site["is_observed"] else 1)
    )


def masks_ignored(monkeypatch):
    monkeypatch.setattr(f"{HERE}.marginal_sites.scale_and_mask", lambda x, mask: x)


def plates_in_the_wrong_order(monkeypatch):
    plain = posterior_of_sums._Summed.laid_out

    def laid_out(self, x, dims):
        swapped = dims[:2] if len(set(dims) & set(self.plates)) == 2 else ""
        return plain(self, x, swapped[::-1] + dims[len(swapped) :])

    monkeypatch.setattr(posterior_of_sums._Summed, "laid_out", laid_out)


def the_parents_marginal(monkeypatch):
    """The values of a site are taken for those of the site before it in the chain."""
    plain = posterior_of_sums._Summed.of

    def of(number, site):
        found = plain(number, site)
        before = [name for dim, name in site["infer"]["_dim_to_symbol"].items() if dim in site["infer"]["_dim_to_id"]]
        others = [name for name in before if name != found.own and name not in found.plates]
        return type(found)(**{**vars(found), "own": others[0]}) if others else found

    monkeypatch.setattr(posterior_of_sums._Summed, "of", of)


def padding_counts(monkeypatch):
    monkeypatch.setattr(
        posterior_of_sums, "_counting", lambda densities: {x.name: torch.ones(x.batch).bool() for x in densities.summed}
    )


def masked_sites_never_count(monkeypatch):
    monkeypatch.setattr(
        posterior_of_sums, "_reads", lambda densities, number, site, counts: torch.zeros(site.batch).bool()
    )


def each_site_by_itself(monkeypatch):
    """The most probable value of each site, and not of all together."""

    def of(component):
        densities = posterior_of_sums._Densities(component)
        found = posterior_of_sums.marginals(component)
        return {x.name: x.support[found[x.name].argmax(-1)] for x in densities.summed}

    monkeypatch.setattr("pplgrad.pyro._posterior._KINDS", {**KINDS, "map": of})


MUTANTS = {
    scale_inside_of_the_logarithm: ("subsampled", "marginals"),
    a_factor_counted_twice: ("mixture", "marginals"),
    masks_ignored: ("masked chain", "marginals"),
    plates_in_the_wrong_order: ("tree", "marginals"),
    the_parents_marginal: ("chain", "marginals"),
    padding_counts: ("padded", "map"),
    masked_sites_never_count: ("masked chain", "map"),
    each_site_by_itself: ("left to right", "map"),
}
KINDS = {"samples": posterior_of_sums.samples, "marginals": posterior_of_sums.marginals}


@pytest.mark.parametrize("mutant", mostly(list(MUTANTS)[:5], MUTANTS), ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    name, kind = MUTANTS[mutant]
    mutant(monkeypatch)
    try:
        found = off(name)
    except (ProgramError, IndexError, RuntimeError):  # What is laid out in a wrong way may not fit at all.
        return
    assert found[kind] > 1e-6


def samples_of_each_site_by_itself(monkeypatch):
    def of(component):
        found = posterior_of_sums.marginals(component)
        densities = posterior_of_sums._Densities(component)
        return {x.name: x.support[dist.Categorical(found[x.name]).sample()] for x in densities.summed}

    monkeypatch.setattr(
        "pplgrad.pyro._posterior._KINDS", {**KINDS, "map": posterior_of_sums.most_probable, "samples": of}
    )


def samples_of_the_prior_of_plates(monkeypatch):
    plain = marginal_sites._log_prob
    monkeypatch.setattr(f"{HERE}.marginal_sites._log_prob", lambda site: plain(site) * (site["name"] != "x"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "draws"),
    # The second one is far off, and shows in few draws.
    [(samples_of_each_site_by_itself, DRAWS), (samples_of_the_prior_of_plates, DRAWS // 4)],
    ids=["each_site_by_itself", "the_prior_of_plates"],
)
def test_mutant_of_samples_is_caught(mutant, draws, monkeypatch):
    mutant(monkeypatch)
    assert excess("tree", draws) > 4


LABELS = {"some": [True, False, True, False], "all": [True] * 4, "none": [False] * 4}


@pytest.mark.grid
@pytest.mark.parametrize("law", ["Bernoulli", "OneHotCategorical", "Categorical"])
@pytest.mark.parametrize("labels", LABELS)
def test_a_known_label_is_what_was_observed(labels, law):
    """At a site with `obs_mask` known rows have their value, which is certain, and the others their posterior."""
    known, label = torch.tensor(LABELS[labels]), torch.tensor([0, 1, 1, 0])
    x, probs = torch.tensor([3.0, 2.0, -2.0, -1.0]), torch.tensor([0.7, 0.3])
    laws = {
        "Bernoulli": (dist.Bernoulli(probs[1]), label.to(probs.dtype)),
        "Categorical": (dist.Categorical(probs), label),
        "OneHotCategorical": (dist.OneHotCategorical(probs), torch.eye(2)[label]),
    }
    fn, seen = laws[law]

    @pyro.infer.config_enumerate
    def model():
        with pyro.plate("data", 4):
            y = pyro.sample("y", fn, obs=seen, obs_mask=known)
            number = y[..., 1] if law == "OneHotCategorical" else y
            pyro.sample("x", dist.Normal(2.0 * number, 1.0), obs=x)

    logs = probs.log() + dist.Normal(torch.tensor([0.0, 2.0]), 1.0).log_prob(x[:, None])
    wanted = torch.where(known[:, None], torch.eye(2)[label], logs.softmax(-1))
    found = summed_posterior(model, lambda: None, kind="marginals", max_plate_nesting=1, num_samples=2)
    assert list(found) == ["y"]
    torch.testing.assert_close(found["y"], wanted.expand(1, 2, 4, 2))
    best = wanted.argmax(-1)
    found = summed_posterior(model, lambda: None, kind="map", max_plate_nesting=1)["y"]
    torch.testing.assert_close(found[0, 0], torch.eye(2)[best] if law == "OneHotCategorical" else best.to(seen.dtype))
    drawn = summed_posterior(model, lambda: None, max_plate_nesting=1, num_samples=20)["y"]
    assert drawn.shape == (1, 20, *seen.shape) and (drawn[0][:, known] == seen[known]).all()


@pytest.mark.parametrize("kind", ["samples", "marginals", "map"])
def test_the_dict_is_laid_out_as_arviz_takes_it(kind):
    """ArviZ takes arrays of shape (chain, draw, *shape), those of one group with the same chains and draws."""
    model, guide = POSTERIORS["tree"]()
    found = summed_posterior(model, guide, kind=kind, num_samples=3, draws=True)
    assert {"k", "r", "c", "w", "z"} == set(found)
    assert {np.asarray(x).shape[:2] for x in found.values()} == {(1, 3)}
    assert np.asarray(found["z"]).shape == (1, 3, 2, 1)
    assert np.asarray(found["c"]).shape == (1, 3, 2, 2, *((2,) if kind == "marginals" else ()))


def test_a_name_that_looks_like_one_of_obs_mask_is_kept():
    def model():
        y = pyro.sample("y_unobserved", dist.Bernoulli(0.3), infer=dict(SUM))
        y = pyro.deterministic("y", 2.0 * y)
        pyro.sample("x", dist.Normal(y, 0.1), obs=torch.tensor(2.0))

    assert summed_posterior(model, lambda: None, kind="map")["y_unobserved"].item() == 1.0
