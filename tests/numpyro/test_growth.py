"""How work and variance grow: with the steps of a chain, unrolled or scanned, and with the branches of an estimator."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from pplgrad import (
    CARMS,
    ConfigurationError,
    DisARM,
    LocalExpectation,
    MeasureValued,
    ScoreFunction,
    StickBreakingDisARM,
    SumAndSample,
    TreeDisARM,
    UnorderedSet,
)
from pplgrad.core.plates import EVERY
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.numpyro._compat_jax import sub_jaxprs
from pplgrad.numpyro._tracing import specification
from pplgrad.testing.in_numpyro import HOST, assert_same, parameters
from pplgrad.testing.programs import CASES

SCORE = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
KEY = jax.random.key(0)


def unrolled(length):
    """Return a chain of so many Bernoulli sites, each with one observation."""

    def run(name, model):
        p, z = numpyro.param(name, jnp.array([0.3, -0.4, 0.7])), jnp.zeros(())
        for t in range(length):
            z = numpyro.sample(f"z{t}", dist.Bernoulli(logits=p[0] + p[1] * z))
            if model:
                numpyro.sample(f"x{t}", dist.Normal(p[2] * z, 1.0), obs=0.5)

    return lambda data: run("p", True), lambda data: run("q", False)


def scanned(length):
    """Return a chain in a scan, whose guide has a logit for each step."""

    def model(data):
        def step(z, x):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.2 + 0.4 * z)) * 1.0
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return z, None

        scan(step, jnp.zeros(()), data)

    def guide(data):
        logits = numpyro.param("q", jnp.full(length, 0.3))
        scan(lambda z, a: (numpyro.sample("z", dist.Bernoulli(logits=a - 0.5 * z)) * 1.0, None), jnp.zeros(()), logits)

    return model, guide


def gradient(program, length, data=None, elbo=SCORE):
    """Return the gradient with respect to the guide's parameter, as a function of a key."""
    data = jnp.linspace(-1.0, 1.0, length) if data is None else data
    start = {"q": jnp.full(length, 0.3)} if program is scanned else {"q": jnp.array([0.3, -0.4, 0.7])}
    model, guide = program(length)
    return lambda key: jax.grad(lambda q: elbo.loss(key, {"q": q}, model, guide, data))(start["q"])


def equations(jaxpr):
    """Return the number of operations of a program, those of loop bodies and calls among them."""
    return sum(1 + sum(equations(body) for body in sub_jaxprs(equation)) for equation in jaxpr.eqns)


def largest(jaxpr):
    """Return the number of entries of the largest array that a program computes."""
    sizes = [np.prod(var.aval.shape, dtype=int) for equation in jaxpr.eqns for var in equation.outvars]
    return max([*sizes, *(largest(body) for equation in jaxpr.eqns for body in sub_jaxprs(equation))], default=0)


def test_the_program_of_a_scan_does_not_grow():
    short, long = (equations(jax.make_jaxpr(gradient(scanned, n))(KEY).jaxpr) for n in (10, 1000))
    assert short == long


@pytest.mark.slow
def test_the_program_of_an_unrolled_chain_hardly_grows():
    """Of what a site adds nothing is left but taking its rows."""
    counts = [equations(jax.make_jaxpr(gradient(unrolled, n))(KEY).jaxpr) for n in (10, 20, 40)]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])
    assert counts[2] - counts[1] <= 20 * 12


@pytest.mark.slow
def test_an_earlier_cost_is_not_charged_to_a_later_draw():
    data = jnp.zeros(4)
    found = [gradient(scanned, 4, x)(KEY) for x in (data, data.at[1].set(100.0))]
    np.testing.assert_array_equal(found[0][2:], found[1][2:])
    assert (found[0][:2] != found[1][:2]).all()


@pytest.mark.slow
def test_the_variance_of_a_step_stays_flat(monkeypatch):
    """The last step pays for itself, however long the scan; charged with all costs, it pays for all noise before it."""

    def growth():
        found = [jax.jit(jax.vmap(gradient(scanned, n)))(jax.random.split(KEY, 4000))[:, -1] for n in (4, 64)]
        return np.var(found[1]) / np.var(found[0])

    assert 0.8 < growth() < 1.25
    monkeypatch.setattr(specification, "_flags", lambda flags, backwards: EVERY)
    monkeypatch.setattr(specification, "_own", lambda *_: EVERY)
    assert growth() > 5


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize(("particles", "vectorize"), [(1, True), (3, True), (3, False)])
@pytest.mark.parametrize("estimator", [LocalExpectation(), DisARM()])
def test_chunks_change_nothing(estimator, particles, vectorize):
    """Five alternatives and more, of two dependent sites, some at a time."""
    case = CASES["hierarchy"]
    model, guide = case.build(HOST)

    def found(at_once):
        chosen = dict.fromkeys(case.latents, estimator)
        elbo = TraceGrad_ELBO(particles, vectorize, estimators=chosen, max_parallel=at_once)
        return jax.jit(jax.grad(lambda p: elbo.loss(KEY, p, model, guide)))(parameters(case))

    wanted = found(None)
    assert any(np.abs(g).max() > 0 for g in wanted.values())
    assert_same(found(3), wanted, 1e-12)


@pytest.mark.slow
def test_chunks_bound_the_memory():
    """No array is larger than the rows of a chunk ask for: 32 latents, 5 data of 8 pixels, 4 rows."""
    latents, batch = 32, 5

    def model():
        w = numpyro.param("w", jnp.ones((latents, 8)))
        with numpyro.plate("data", batch):
            z = numpyro.sample("z", dist.Bernoulli(0.5 * jnp.ones(latents)).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=jnp.ones((batch, 8)))

    def guide():
        with numpyro.plate("data", batch):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.ones(latents))).to_event(1))

    def size(at_once, fuse):
        elbo = TraceGrad_ELBO(estimators={"z": LocalExpectation()}, max_parallel=at_once, fuse=fuse)
        params = {"a": jnp.full(latents, 0.1), "w": jnp.ones((latents, 8))}
        return largest(jax.make_jaxpr(jax.grad(lambda p: elbo.loss(KEY, p, model, guide)))(params).jaxpr)

    # The categories' tables have two entries for each latent.
    assert size(4, False) <= 2 * 4 * batch * latents < latents * batch * latents <= size(None, False)
    # What branches share needs no rows; the pixels of all branches are left.
    assert size(4, True) <= 2 * batch * latents < latents * batch * 8 <= size(None, True) < latents * batch * latents


@pytest.mark.parametrize(
    ("rows", "particles", "words"),
    [(0, 1, "1 or more"), (True, 1, "1 or more"), (2.0, 1, "1 or more"), (3, 4, "4 particles run at once already")],
)
def test_other_numbers_of_rows_are_refused(rows, particles, words):
    with pytest.raises(ConfigurationError, match=words):
        TraceGrad_ELBO(particles, max_parallel=rows)
    assert TraceGrad_ELBO(4, False, max_parallel=3).max_parallel == 3


def of_categories(count, elements=1):
    """Return a program of one categorical site under a cost of all of its elements."""

    def model():
        z = numpyro.sample("z", dist.Categorical(logits=jnp.zeros((elements, count))).to_event(1))
        numpyro.factor("f", jnp.sum(jnp.linspace(0.0, 1.0, count)[z]))

    def guide():
        logits = numpyro.param("l", jnp.zeros((elements, count)))
        numpyro.sample("z", dist.Categorical(logits=logits).to_event(1))

    return model, guide


def lowered(estimator, count, elements=1, **options):
    model, guide = of_categories(count, elements)
    elbo = TraceGrad_ELBO(estimators={"z": estimator}, **options)
    grad = jax.grad(lambda p, key: elbo.loss(key, p, model, guide))
    return jax.jit(grad).lower({"l": jnp.zeros((elements, count))}, KEY)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "more"),
    [
        (CARMS(3), CARMS(6)),
        (UnorderedSet(2), UnorderedSet(5)),
        (SumAndSample(2), SumAndSample(5)),
        (ScoreFunction(samples=2), ScoreFunction(samples=6)),
        (TreeDisARM(), None),
        (StickBreakingDisARM(), None),
        (LocalExpectation(), None),
        (MeasureValued(), None),
        (ScoreFunction(), None),
    ],
    ids=str,
)
def test_programs_do_not_grow(estimator, more):
    """Neither with categories, nor with elements, nor (but by the levels of a set) with draws."""

    def lines(*args):
        return lowered(*args).as_text().count("\n")

    plain = lines(estimator, 6, 2)
    assert lines(estimator, 60, 2) < 1.3 * plain
    assert lines(estimator, 6, 4) < 1.3 * plain
    if more is not None:
        assert lines(more, 6, 2) < 2 * plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (ScoreFunction(), {}),
        (ScoreFunction(samples=3), {}),
        (UnorderedSet(3), {}),
        (SumAndSample(3), {}),
        (CARMS(3), {}),
        (LocalExpectation(), {"max_parallel": 50}),
        (MeasureValued(), {"max_parallel": 50}),
    ],
    ids=str,
)
def test_memory_is_linear_in_categories(estimator, options):
    small, large = (
        lowered(estimator, count, **options).compile().memory_analysis().temp_size_in_bytes for count in (1000, 4000)
    )
    assert large < 6 * small + 2**18
