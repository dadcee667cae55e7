"""The posterior of summed sites against every joint value of theirs, run one by one; and the host's tools with wrapped guides."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate, infer_discrete
from numpyro.infer import SVI, Predictive
from numpyro.infer.autoguide import AutoNormal

from pplgrad import (
    ConfigurationError,
    DisARM,
    GumbelSoftmax,
    ImpossibleValueError,
    LeaveOneOut,
    NeuralBaseline,
    ProgramError,
    ScoreFunction,
)
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators, summed_posterior
from pplgrad.numpyro._compat import mask_of, unmasked
from pplgrad.numpyro._compat_jax import sub_jaxprs
from pplgrad.numpyro._tracing import posterior_of_sums
from pplgrad.testing.in_numpyro import HOST, array
from tests.covering import mostly
from tests.numpyro.against_brute_force import KEY, excess, given_the_same_draws, off
from tests.numpyro.marginal import SUM
from tests.numpyro.posteriors import POSTERIORS, Posterior, padded

pytestmark = pytest.mark.slow  # Each compiles for seconds; Pyro's are quick.


@pytest.mark.parametrize("name", mostly(["masked chain", "scan with draws", "padded"], POSTERIORS))
def test_marginals_and_most_probable_values_are_those_of_brute_force(name):
    worst = off(name, 2)
    assert worst["marginals"] < 1e-9 and worst["map"] == 0.0, worst


SAMPLED = [
    "tree",
    "mixture",
    "two steps",
    "chain",
    "scan under a summed site",
    "scan of second order",
    "left to right",
    "tiny",
    "local in scan",
]


@pytest.mark.parametrize("name", mostly(["mixture", "two steps"], SAMPLED))
def test_joint_samples_have_their_frequencies(name):
    assert abs(excess(name)) < 4


@pytest.mark.parametrize("name", mostly(["padded"], ["tree", "scan with a plate", "local in scan", "padded"]))
def test_a_sample_is_one_value_of_each_element(name, monkeypatch):
    """The derivatives that a sample and the most probable value are read from are one at one value of each element."""
    plain, seen = posterior_of_sums._Densities.derivatives, []

    def derivatives(self, changed, ring):
        found = plain(self, changed, ring)
        seen.append(found[0])
        return found

    monkeypatch.setattr(posterior_of_sums._Densities, "derivatives", derivatives)
    model, guide, params = POSTERIORS[name]()
    for kind in ("samples", "map"):

        def run(key, kind=kind):
            seen.clear()
            summed_posterior(key, params, model, guide, kind=kind)
            return list(seen)

        monkeypatch.setattr(jax, "vmap", lambda f: lambda keys: jax.tree.map(lambda x: x[None], f(keys[0])))
        for found in run(KEY):
            for x in found.values():
                assert (x.sum(-1) == 1).all() and ((x == 0) | (x == 1)).all()


def test_each_draw_of_the_guide_has_its_own_posterior_and_minibatch():
    model, params, rows, found = given_the_same_draws("subsampled", ("marginals",), 6)
    assert len({tuple(row["data"].tolist()) for row in rows}) > 1
    for i, drawn in enumerate(rows):
        right = Posterior(model, params, drawn).marginals()["k"]
        np.testing.assert_allclose(found["marginals"]["k"][0, i], right, atol=1e-9)


def test_padding_leaves_a_path_as_it_is_alone():
    """The most probable path of each sequence is that of a program which has this sequence alone, without its padding."""
    model, params, rows, found = given_the_same_draws("padded", ("map",))
    joint = Posterior(model, params, rows[0]).most_probable()
    path = np.asarray(found["map"]["k"][0, 0])
    assert (joint["k"][0] != path[0]).any(), "Padding changes nothing in this program."
    x, w = array([[0.1, 1.9, 0.7], [1.4, 0.6, 0.4]]), rows[0]["w"]
    for i, length in enumerate([3, 1]):

        def alone(i=i, length=length):
            k = 2
            for t in range(length):
                law = dist.Bernoulli(probs=jnp.where(k == 1, 0.6, jnp.where(k == 0, 0.02, 0.45)))
                k = numpyro.sample(f"k{t}", law, infer=dict(SUM))
                numpyro.sample(f"x{t}", dist.Normal(k + 0.1 * w, 1.0), obs=x[i, t])

        for key, value in Posterior(alone, {}, {}).most_probable().items():
            assert path[int(key[1]), i] == value


@pytest.mark.exhaustive
def test_a_scale_around_everything_changes_nothing():
    model, guide, params = POSTERIORS["scan under a summed site"]()
    found = [
        summed_posterior(KEY, params, handlers.scale(model, factor), guide, kind="marginals") for factor in (1.0, 3.0)
    ]
    for key in found[0]:
        np.testing.assert_array_equal(found[0][key], found[1][key])


@pytest.mark.exhaustive
def test_under_jit_it_is_the_same():
    model, guide, params = POSTERIORS["padded"]()
    for kind in ("samples", "marginals", "map"):

        def run(key, kind=kind):
            return summed_posterior(key, params, model, guide, kind=kind, num_samples=2)

        for x, y in zip(jax.tree.leaves(run(KEY)), jax.tree.leaves(jax.jit(run)(KEY)), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-12)


def test_the_program_does_not_grow_with_the_steps_of_a_scan():
    def size(steps, kind):
        def model():
            def body(k, x):
                k = numpyro.sample("k", dist.Categorical(logits=jnp.eye(3)[k]), infer=dict(SUM))
                numpyro.sample("x", dist.Normal(k, 1.0), obs=x)
                return k, None

            scan(body, 0, jnp.zeros(steps))

        def run(key):
            return summed_posterior(key, {}, model, lambda: None, kind=kind)

        return count(jax.make_jaxpr(run)(KEY).jaxpr)

    def count(jaxpr):
        return sum(1 + sum(map(count, sub_jaxprs(equation))) for equation in jaxpr.eqns)

    for kind in ("samples", "marginals", "map"):
        assert size(200, kind) == size(20, kind)


def small(x):
    b = numpyro.sample("b", dist.Bernoulli(0.5))
    k = numpyro.sample("k", dist.Bernoulli(logits=b), infer=dict(SUM))
    numpyro.sample("x", dist.Normal(k + b, 1.0), obs=x)


def small_guide(x):
    numpyro.sample("b", dist.Bernoulli(0.5))


def test_the_guide_draws_what_it_is_and_not_what_an_estimator_relaxes():
    found = []
    for wrapped in (small_guide, config_estimators(small_guide, {"b": GumbelSoftmax(0.5)})):
        found.append(summed_posterior(KEY, {}, small, wrapped, 0.3, num_samples=5, draws=True))
    assert set(found[1]["b"].flatten().tolist()) <= {0, 1}
    assert set(found[0]) == set(found[1]) == {"b", "k"}
    for key, x in found[0].items():
        np.testing.assert_array_equal(x, found[1][key])


@pytest.mark.parametrize("wrap", [lambda guide: guide, lambda guide: config_estimators(guide, {"b": DisARM()})])
def test_a_site_that_the_guide_enumerates_is_drawn(wrap):
    def guide(x):
        numpyro.sample("b", dist.Bernoulli(0.5), infer=dict(SUM))

    found = summed_posterior(KEY, {}, config_enumerate(small), wrap(guide), 0.3, kind="marginals", num_samples=2)
    assert list(found) == ["k"] and found["k"].shape == (1, 2, 2)


def test_a_guide_with_learned_baselines_and_with_several_particles_needs_neither():
    guide = config_estimators(small_guide, {"b": ScoreFunction(NeuralBaseline())})
    svi = SVI(small, guide, numpyro.optim.Adam(0.01), TraceGrad_ELBO())
    params = svi.get_params(svi.init(KEY, 0.3))
    assert summed_posterior(KEY, params, small, guide, 0.3)["k"].shape == (1, 1)
    guide = config_estimators(small_guide, {"b": ScoreFunction(LeaveOneOut())})
    assert summed_posterior(KEY, {}, small, guide, 0.3)["k"].shape == (1, 1)


REFUSED = {
    "kind": ({"kind": "mean"}, ConfigurationError, 'kind=\'mean\'.*write "samples", "marginals" or "map"'),
    "no draws": ({"num_samples": 0}, ConfigurationError, "num_samples=0"),
    "half a draw": ({"num_samples": 1.5}, ConfigurationError, "num_samples=1.5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name):
    given, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        summed_posterior(KEY, {}, *padded(), **given)


def refused_model(kind):
    def model():
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        if kind == "nothing":
            return
        if kind == "steered" and w > 0:
            return
        law = dist.Categorical(array([0.2, 0.5, 0.3]))
        k = numpyro.sample("k", law, infer=dict(SUM))
        mean = k.sum() if kind == "mixed" else k
        numpyro.factor("f", k * (jnp.nan if kind == "nan" else 0.0))
        with handlers.scale(scale=2.0 if kind == "scales" else 1.0):
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=0.3)
        numpyro.sample("y", dist.Categorical(jnp.eye(4)[k]), obs=3 if kind == "impossible" else 1)
        if kind == "extra":
            numpyro.sample("other", dist.Bernoulli(0.3))

    return model


WORDS = {
    "nothing": (ProgramError, "found no site that is summed out"),
    "steered": (ProgramError, "Python control flow depends on a value"),
    "mixed": (ProgramError, "may mix"),
    "scales": (ProgramError, "different scales"),
    "nan": (ImpossibleValueError, "'k' have no posterior: the log density of 'f', 'x', 'y' is NaN or infinite"),
    "impossible": (ImpossibleValueError, "'k' have no posterior"),
    "extra": (ProgramError, "'other'"),
}


@pytest.mark.parametrize("kind", WORDS)
def test_what_has_no_posterior_is_refused(kind):
    def guide():
        numpyro.sample("w", dist.Normal(0.0, 1.0))

    error, words = WORDS[kind]
    with pytest.raises(error, match=words):
        summed_posterior(KEY, {}, refused_model(kind), guide)
    if kind in ("nan", "impossible"):
        found = jax.jit(lambda key: summed_posterior(key, {}, refused_model(kind), guide, kind="marginals"))(KEY)
        assert jnp.isnan(found["k"]).all()


def mixture(x):
    numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Bernoulli(0.5), infer=dict(SUM))
        numpyro.sample("x", dist.Normal(8.0 * k, 1.0), obs=x)


def by_function(x):
    numpyro.sample("w", dist.Normal(numpyro.param("m", 0.0), 1.0))


WRAPPED = {
    "bare": lambda: by_function,
    "wrapped": lambda: config_estimators(by_function, {"w": ScoreFunction()}),
    "wrapped twice": lambda: config_estimators(config_estimators(by_function, {"w": ScoreFunction()}), {}),
    "autoguide": lambda: config_estimators(AutoNormal(handlers.block(mixture, hide=["k"])), {"w": ScoreFunction()}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_hosts_tools_take_wrapped_guides(name):
    x, guide = array([-0.3, 8.2, 7.9]), WRAPPED[name]()
    svi = SVI(mixture, guide, numpyro.optim.Adam(0.01), TraceGrad_ELBO())
    params = svi.get_params(svi.init(KEY, x))
    found = summed_posterior(KEY, params, mixture, guide, x, kind="map", num_samples=2, draws=True)
    assert found["k"].tolist() == [[[0, 1, 1]] * 2] and found["w"].shape == (1, 2)
    draws = handlers.trace(handlers.substitute(handlers.seed(guide, KEY), data=params)).get_trace(x)
    given = handlers.substitute(mixture, data={"w": draws["w"]["value"]})
    for temperature in (0, 1):
        inferred = infer_discrete(given, first_available_dim=-2, temperature=temperature, rng_key=KEY)
        assert handlers.trace(handlers.seed(inferred, KEY)).get_trace(x)["k"]["value"].tolist() == [0, 1, 1]
    for discrete in (True, False):
        predictive = Predictive(mixture, guide=guide, params=params, num_samples=50, infer_discrete=discrete)(KEY, x)
        assert predictive["k"].shape == (50, 3) and (not discrete or (predictive["k"] == jnp.array([0, 1, 1])).all())
    again = Predictive(mixture, {key: value[0] for key, value in found.items()}, return_sites=("k",))(KEY, x)
    np.testing.assert_array_equal(again["k"], found["k"][0])


def test_masked_data_say_nothing_and_a_masked_site_has_its_posterior():
    """NumPyro's `Predictive(infer_discrete=True)` takes a masked site for uniform."""

    def model():
        numpyro.sample("w", dist.Normal(0.0, 1.0))
        with handlers.mask(mask=False):
            k = numpyro.sample("k", dist.Bernoulli(0.2), infer=dict(SUM))
            numpyro.sample("x", dist.Normal(8.0 * k, 1.0), obs=8.0)
        j = numpyro.sample("j", dist.Bernoulli(0.3 + 0.4 * k), infer=dict(SUM))
        numpyro.sample("y", dist.Normal(j, 1.0), obs=1.0)

    def guide():
        numpyro.sample("w", dist.Normal(0.0, 1.0))

    found = summed_posterior(KEY, {}, model, guide, kind="marginals")
    right = Posterior(model, {}, {"w": array(0.0)}).marginals()
    for key, x in right.items():
        np.testing.assert_allclose(found[key][0, 0], x, atol=1e-9)
    host = Predictive(model, guide=guide, params={}, num_samples=1000, infer_discrete=True)(KEY)
    assert abs(host["k"].mean() - 0.5) < 0.1 and found["k"][0, 0, 1] < 0.3


def test_a_mask_is_found_in_what_is_around_a_distribution():
    mask = jnp.array([True, False])
    law = dist.Bernoulli(0.3).expand([2]).mask(mask)
    for fn in (law, law.to_event(1), law.expand([3, 2]), law.mask(jnp.array([True, True]))):
        assert (mask_of(fn) == mask).all() and mask_of(unmasked(fn)) is None


LABELS = {"some": [True, False, True, False], "all": [True] * 4, "none": [False] * 4}


@pytest.mark.grid
@pytest.mark.parametrize("law", ["Bernoulli", "one-hot", "Categorical"])
@pytest.mark.parametrize("labels", LABELS)
def test_a_known_label_is_what_was_observed(labels, law):
    """At a site with `obs_mask` known rows have their value, which is certain, and the others their posterior."""
    known, label = jnp.array(LABELS[labels]), jnp.array([0, 1, 1, 0])
    x, probs = jnp.array([3.0, 2.0, -2.0, -1.0]), jnp.array([0.7, 0.3])
    laws = {
        "Bernoulli": (dist.Bernoulli(probs[1]), label),
        "Categorical": (dist.Categorical(probs), label),
        "one-hot": (HOST.one_hot(jnp.log(probs)), jnp.eye(2, dtype=int)[label]),
    }
    fn, seen = laws[law]

    def model():
        with numpyro.plate("data", 4):
            y = numpyro.sample("y", fn, obs=seen, obs_mask=known, infer=dict(SUM))
            number = y[..., 1] if law == "one-hot" else y
            numpyro.sample("x", dist.Normal(2.0 * number, 1.0), obs=x)

    def posterior(**given):
        return jax.jit(lambda key: summed_posterior(key, {}, model, lambda: None, **given))(KEY)

    logs = jnp.log(probs) + dist.Normal(jnp.array([0.0, 2.0]), 1.0).log_prob(x[:, None])
    wanted = np.where(known[:, None], jnp.eye(2)[label], jax.nn.softmax(logs, -1))
    found = posterior(kind="marginals", num_samples=2)
    assert list(found) == ["y"]
    np.testing.assert_allclose(found["y"], np.broadcast_to(wanted, (1, 2, 4, 2)), atol=1e-9)
    best = wanted.argmax(-1)
    found = posterior(kind="map")["y"]
    np.testing.assert_array_equal(found[0, 0], np.eye(2)[best] if law == "one-hot" else best)
    drawn = posterior(num_samples=20)["y"]
    assert drawn.shape == (1, 20, *seen.shape) and (drawn[0][:, known] == seen[known]).all()


@pytest.mark.parametrize("kind", ["samples", "marginals", "map"])
def test_the_dict_is_laid_out_as_arviz_takes_it(kind):
    """ArviZ takes arrays of shape (chain, draw, *shape), those of one group with the same chains and draws."""
    model, guide, params = POSTERIORS["tree"]()
    given = {"kind": kind, "num_samples": 3, "draws": True}
    found = jax.eval_shape(lambda key: summed_posterior(key, params, model, guide, **given), KEY)
    assert {"k", "r", "c", "w", "z"} == set(found)
    assert {x.shape[:2] for x in found.values()} == {(1, 3)}
    assert found["z"].shape == (1, 3, 2, 1)
    assert found["c"].shape == (1, 3, 2, 2, *((2,) if kind == "marginals" else ()))
