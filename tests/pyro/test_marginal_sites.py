"""Model sites that are summed out beside sampled ones: exact against sums written by hand, for every kind of estimator."""

import itertools
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex

from pplgrad import (
    IWAE,
    REBAR,
    DisARM,
    Enumerate,
    GumbelSoftmax,
    LocalExpectation,
    MuProp,
    NeuralBaseline,
    PplgradError,
    Renyi,
    ScoreFunction,
)
from pplgrad.core.objectives import ELBO
from pplgrad.pyro import TraceGrad_ELBO, check_gradients, summed_posterior
from pplgrad.pyro._tracing import marginal_sites, provenance
from pplgrad.testing.in_pyro import (
    HOST,
    assert_same,
    exact_bound_gradient,
    exact_gradient,
    expected_gradient,
    expected_gradient_over_cells,
    fresh,
    gradient,
    worst,
)
from tests.bounds import bound
from tests.pyro.compiling import assert_like_eager
from tests.pyro.marginal import PROGRAMS, SUM

ESTIMATORS = {
    "default": None,
    "score": ScoreFunction(),
    "leave-one-out": ScoreFunction(samples=2),
    "neural": ScoreFunction(NeuralBaseline()),
    "local": LocalExpectation(),
    "joint": Enumerate(),
    "disarm": DisARM(),
    "muprop": MuProp(),
}


def made(program, estimator, particles=1, vectorized=False, **given):
    if estimator is not None:
        given["estimators"] = dict.fromkeys(program.case.latents, estimator)
    return lambda: TraceGrad_ELBO(particles, vectorize_particles=vectorized, max_plate_nesting=2, **given)


def not_binary(name, short):
    return short in ("disarm", "muprop") and name == "parent in the guide"


@pytest.mark.slow
@pytest.mark.grid(without=not_binary)
@pytest.mark.parametrize("short", ESTIMATORS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_exact(name, short):
    program, estimator = PROGRAMS[name](), ESTIMATORS[short]
    over = expected_gradient_over_cells if getattr(estimator, "uses_branches", False) else expected_gradient
    assert_same(over(program.case, made(program, estimator), 1), exact_gradient(program.by_hand))


@pytest.mark.parametrize("name", ["subsampled", "chain", "parent in the guide"])
def test_particles_together(name):
    program = PROGRAMS[name]()
    wanted = exact_gradient(program.by_hand)
    assert_same(expected_gradient(program.case, made(program, None, 2, True), 2), wanted)
    assert_same(expected_gradient_over_cells(program.case, made(program, LocalExpectation(), 1, True)), wanted)


@pytest.mark.grid
@pytest.mark.parametrize(("objective", "power"), [(IWAE(), 1.0), (Renyi(0.4), 0.6)])
@pytest.mark.parametrize("name", ["subsampled", "chain", "parent in the guide"])
def test_bounds(name, objective, power):
    program = PROGRAMS[name]()
    wanted = exact_bound_gradient(program.by_hand, bound(power), 2, 0)
    assert_same(
        expected_gradient(program.case, made(program, ScoreFunction(), 2, True, objective=objective), 2), wanted
    )


@pytest.mark.parametrize("short", ["rebar", "gumbel"])
def test_relaxed_sites_are_followed_into_a_sum(short):
    """The derivative of a sum with respect to a relaxed site that it reads is that of the sum written by hand."""
    program, found = PROGRAMS["mixture"](), []
    for case in (program.case, program.by_hand):
        fresh(case)
        pyro.set_rng_seed(3)
        estimator = {"rebar": REBAR(0.5, learn=False), "gumbel": GumbelSoftmax(0.5)}[short]
        loss = TraceGrad_ELBO(estimators=dict.fromkeys(case.latents, estimator)).loss_and_grads(*case.build(HOST))
        found.append({**gradient(), "loss": np.array(loss)})
    assert_same(*found)


def test_describe_names_what_is_summed_out():
    program = PROGRAMS["tree"]()
    fresh(program.case)
    rows = {row["site"]: row for row in TraceGrad_ELBO().describe(program.summed, program.guide).rows}
    assert rows["c"] == {
        "site": "c",
        "distribution": "Bernoulli",
        "plates": "rows, columns",
        "estimator": "summed out",
        "baseline": "none",
        "evaluations": 0,
        "reason": "infer={'enumerate': 'parallel'}",
    }
    assert list(rows) == ["w", "z", "k", "r", "c"]


def test_check_gradients_enumerates_the_sampled_sites():
    program = PROGRAMS["subsampled"]()
    fresh(program.case)
    found = check_gradients(program.summed, program.guide, draws=100, warm_up=0)
    assert found.status != "biased" and "enumerated" in str(found)


def small(k="Categorical", mask=None, scale=None, **infer):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        laws = {
            "Categorical": lambda: dist.Categorical(logits=torch.stack([z, -z], -1)),
            "Poisson": lambda: dist.Poisson(z.exp()),
        }
        k_ = pyro.sample("k", laws[k](), infer=infer)
        b = pyro.sample("b", dist.Bernoulli(logits=0.3 * k_))
        with poutine.scale(scale=scale or 1.0):
            pyro.sample("x", dist.Normal(z + k_ + b, 1.0), obs=torch.tensor(0.3))

    return model


def small_guide():
    pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))
    pyro.sample("b", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.1))))


def mixing(mix):
    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3), infer=dict(SUM))
        pyro.sample("x", dist.Normal(mix(1.0 * k), 1.0), obs=torch.tensor(0.3))
        small_guide()

    return model


def mixing_in_a_chain():
    k = torch.tensor(0)
    for t in pyro.markov(range(4)):
        k = pyro.sample(f"k{t}", dist.Categorical(torch.ones(2, 2)[k.max()] / 2), infer=dict(SUM))
        pyro.sample(f"x{t}", dist.Normal(k - ((1.0 * k).mean() if t == 3 else 0.0), 1.0), obs=torch.tensor(0.3))
    small_guide()


REFUSED = {
    "a sum over all values": (mixing(lambda k: k.sum()), {}, "'k' is summed out.*the density of site 'x' may mix them"),
    "a mean of all values": (mixing(lambda k: k - k.mean()), {}, "the density of site 'x' may mix them"),
    "reordered values": (mixing(lambda k: k.flip(0) if k.dim() else k), {}, "the density of site 'x' may mix them"),
    "a mean in a chain": (mixing_in_a_chain, {}, "the density of site 'x3' may mix them"),
    "not asked for": (small(), {}, "sum it out if it is discrete"),
    "sequential": (small(enumerate="sequential"), {}, "sum it out if it is discrete"),
    "no finite support": (small("Poisson", enumerate="parallel"), {}, "Site 'k'.*Poisson has no finite support"),
    "drawn values": (small(enumerate="parallel", num_samples=4), {}, "Site 'k'.*num_samples': 4.*leave it out"),
    "other scales": (
        small(scale=2.0, enumerate="parallel"),
        {},
        "'k' and 'x' are summed out together.*different scales",
    ),
    "weights": (small(enumerate="parallel"), {"objective": ELBO(kl_weight=0.5)}, "'b'.*'x' are summed out together"),
    "divergence": (small(enumerate="parallel"), {"closed_form": {"b": "kl"}}, "reads a site that is summed out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_summed_is_refused(name):
    model, given, words = REFUSED[name]
    with pytest.raises(PplgradError, match=words):
        TraceGrad_ELBO(**given).loss_and_grads(model, small_guide)


def test_draws_and_minibatches_of_the_model_are_the_same_where_values_are_compared():
    """One value of each summed site is compared at the same draws: nothing is refused that does not mix."""

    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))  # in the model alone
        with pyro.plate("data", 6, subsample_size=2) as index:
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3), infer=dict(SUM))
            pyro.sample("x", dist.Normal(k + m, 1.0), obs=torch.arange(6.0)[index])

    elbo = TraceGrad_ELBO(max_plate_nesting=1)
    with pytest.warns(UserWarning, match="Found vars in model but not guide"):
        for _ in range(4):
            elbo.loss_and_grads(model, lambda: None)


def test_comparing_values_hides_nothing_from_what_is_watched():
    """What distributions compute lazily and keep is seen: it was not where values were compared before the densities were recorded."""

    def model():
        b = pyro.sample("b", dist.Bernoulli(0.3))
        g = pyro.sample("g", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 2):
            k = pyro.sample("k", dist.Bernoulli(torch.sigmoid(g + b)), infer=dict(SUM))
            pyro.sample("x", dist.Normal(k * g, 1.0), obs=torch.tensor([0.3, 1.0]))

    def guide():
        pyro.sample("b", dist.Bernoulli(torch.sigmoid(pyro.param("l", torch.tensor(0.1)))))
        pyro.sample("g", dist.Normal(pyro.param("m", torch.tensor(0.1)), 0.7))

    elbo = TraceGrad_ELBO(max_plate_nesting=1)
    for _ in range(3):
        elbo.loss_and_grads(model, guide)


DROP = torch.nn.Dropout(0.5)
HIDDEN = {
    "in the guide": (DROP, lambda x: x, lambda x: x),
    "in the model": (lambda x: x, DROP, lambda x: x),
    "of each value": (lambda x: x, lambda x: x, DROP),
    "noise of each value": (lambda x: x, lambda x: x, lambda x: x + torch.randn_like(x)),
    "a draw of each value": (lambda x: x, lambda x: x, lambda x: torch.bernoulli(0.2 + 0.6 * x)),
    "everywhere": (DROP, DROP, DROP),
}


@pytest.mark.grid
@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("name", HIDDEN)
def test_values_are_compared_beside_draws_outside_of_sites(name, mixes):
    """A network with dropout is no reason not to look, and none to refuse."""
    in_guide, in_model, of_value = HIDDEN[name]

    def model():
        w = pyro.sample("w", dist.Bernoulli(0.4))
        m = pyro.sample("m", dist.Normal(in_model(torch.ones(4)).sum(), 1.0))  # in the model alone
        with pyro.plate("data", 6, subsample_size=2):
            k = pyro.sample("k", dist.Categorical(torch.ones(3) / 3), infer=dict(SUM))
            loc = of_value(torch.eye(3)[k]) @ torch.tensor([0.0, 1.0, 2.0]) + w + m
            pyro.sample("x", dist.Normal(loc - loc.mean() if mixes else loc, 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("w", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.1)) * in_guide(torch.ones(3)).sum()))

    elbo = TraceGrad_ELBO(max_plate_nesting=1)
    with pytest.warns(UserWarning, match="Found vars in model but not guide"):
        if mixes:
            with pytest.raises(PplgradError, match="the density of site 'x' may mix them"):
                elbo.loss_and_grads(model, guide)
        else:
            for _ in range(4):
                elbo.loss_and_grads(model, guide)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_densities_of_other_types_of_numbers_are_summed_together(steps):
    """Data in float64 under a prior in float32: what Pyro's contraction takes for an error has the wider type."""
    x, move = torch.randn(4, dtype=torch.float64), torch.randn(3, 3)

    def model():
        w = pyro.sample("w", dist.Bernoulli(0.4))
        k = torch.tensor(0)
        for t in pyro.markov(range(steps)):
            k = pyro.sample(f"k{t}", dist.Categorical(logits=Vindex(move)[k]), infer=dict(SUM))
            pyro.sample(f"x{t}", dist.Normal(k.double() + w, 1.0), obs=x[t])

    def guide():
        pyro.sample("w", dist.Bernoulli(logits=pyro.param("a", torch.tensor(50.0))))

    pyro.clear_param_store()
    terms = []
    for ks in itertools.product(range(3), repeat=steps):
        moves = [move.double().log_softmax(-1)[a, b] for a, b in zip((0, *ks), ks, strict=False)]
        terms.append(sum(moves) + sum(dist.Normal(k + 1.0, 1.0).log_prob(x[t]) for t, k in enumerate(ks)))
    loss = TraceGrad_ELBO(max_plate_nesting=0).loss(model, guide)
    assert loss == pytest.approx(float(-torch.stack(terms).logsumexp(0) - np.log(0.4)), rel=1e-6)
    found = summed_posterior(model, guide, kind="marginals", max_plate_nesting=0)
    probs = torch.stack(terms).softmax(0)
    last = [
        sum(p for ks, p in zip(itertools.product(range(3), repeat=steps), probs, strict=True) if ks[-1] == k)
        for k in range(3)
    ]
    torch.testing.assert_close(
        found[f"k{steps - 1}"].squeeze(), torch.stack(last), rtol=1e-6, atol=1e-6, check_dtype=False
    )
    assert summed_posterior(model, guide, max_plate_nesting=0)["k0"].dtype == torch.long


@pytest.mark.parametrize("where", ["summed in the model", "observed in the model", "drawn in the guide"])
def test_steps_that_overlap_are_refused(where):
    """Where `vectorized_markov` computes a density several times it leaves it to the ELBO to count it once."""
    from pyro.contrib.funsor import vectorized_markov

    def chain(drawn, **infer):
        k = 0
        for t in vectorized_markov(name="time", size=4, dim=-1):
            if drawn:
                k = pyro.sample(f"k{t}", dist.Categorical(torch.ones(3, 3)[k]), infer=infer)
            if where != "drawn in the guide":
                pyro.sample(f"x{t}", dist.Normal(1.0 * k, 1.0), obs=torch.zeros(4)[t])

    def model():
        chain(where != "observed in the model", **SUM)

    def guide():
        if where == "drawn in the guide":
            chain(True)

    with pytest.raises(PplgradError, match="vectorized_markov.*write the loop with pyro.markov"):
        TraceGrad_ELBO(max_plate_nesting=1).loss_and_grads(model, guide)
    if where == "summed in the model":
        with pytest.raises(PplgradError, match="vectorized_markov.*write the loop with pyro.markov"):
            summed_posterior(model, guide)


def test_a_sum_that_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr("pplgrad.pyro._tracing.marginal_sites.MOST", 900)

    def model():
        total = 0
        for i in range(3):
            k = pyro.sample(f"k{i}", dist.Categorical(torch.ones(10)), infer={"enumerate": "parallel"})
            total = total + k
        pyro.sample("x", dist.Normal(total.float(), 1.0), obs=torch.tensor(0.3))

    with pytest.raises(PplgradError, match="site 'x'.*1,000 numbers.*LocalExpectation.*ScoreFunction"):
        TraceGrad_ELBO(max_plate_nesting=0).loss_and_grads(model, lambda: None)


@pytest.mark.parametrize(
    "name", ["subsampled", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in PROGRAMS if n != "subsampled")]
)
def test_a_compiled_step_is_an_eager_one(name):
    assert_like_eager(PROGRAMS[name]().case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixture", pytest.param("chain", marks=pytest.mark.exhaustive)])
def test_a_compiled_step_with_branches_is_an_eager_one(name):
    program = PROGRAMS[name]()
    assert_like_eager(program.case, estimators=dict.fromkeys(program.case.latents, DisARM()))


TRACING = "pplgrad.pyro._tracing"


def without_scale(monkeypatch):
    monkeypatch.setattr(f"{TRACING}.marginal_sites._common_scale", lambda component: 1.0)


def summed_in_the_wrong_plate(monkeypatch):
    plain = marginal_sites._component

    def component(trace, names, dims):
        found = plain(trace, names, dims)
        return replace(found, ordinals=tuple(frozenset.union(*found.ordinals) for _ in found.ordinals))

    monkeypatch.setattr(f"{TRACING}.marginal_sites._component", component)


def a_factor_counted_twice(monkeypatch):
    plain = marginal_sites.sum_out

    def sum_out(trace):
        found = plain(trace)
        found.add_node("x again", **{**trace.nodes["x"], "name": "x again", "value": trace.nodes["x"]["value"]})
        return found

    monkeypatch.setattr(f"{TRACING}.marginal_sites.sum_out", sum_out)


def one_factor_is_taken_for_all_that_is_read(monkeypatch):
    plain = provenance.Provenance.combined
    monkeypatch.setattr(provenance.Provenance, "combined", lambda self, out, read: plain(self, out, read[:1]))


MUTANTS = {
    without_scale: "subsampled",
    summed_in_the_wrong_plate: "tree",
    a_factor_counted_twice: "parent in the guide",
    one_factor_is_taken_for_all_that_is_read: "tree",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    program = PROGRAMS[MUTANTS[mutant]]()
    mutant(monkeypatch)
    try:
        found = expected_gradient(program.case, made(program, ScoreFunction()), 1)
    except (PplgradError, ValueError):  # A sum in the wrong plate may be refused.
        return
    assert worst(found, exact_gradient(program.by_hand)) > 1e-6
