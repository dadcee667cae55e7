"""A support that moves with a parameter, or with a draw that carries gradient, is refused where E[score] = 0 is needed."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.distributions import transforms as t
from numpyro.infer import SVI

from pplgrad import EstimatorError, Reparam, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from tests.numpyro.differentiating import WAYS, handed

e = jnp.exp
REFUSED = "at site 'x' .* needs a support that stays where it is"


def m():
    return numpyro.param("m", jnp.array(0.3))


def transformed(base, *transforms):
    return dist.TransformedDistribution(base, list(transforms))


class Window(dist.Distribution):
    """A distribution of the user's own, without a reparameterized sampler."""

    arg_constraints = {"low": constraints.real}

    def __init__(self, low):
        self.low = low
        super().__init__(jnp.shape(low))

    @property
    def support(self):
        return constraints.interval(self.low, self.low + 1)

    def sample(self, key, sample_shape=()):
        return jax.random.uniform(key, sample_shape) + jax.lax.stop_gradient(self.low)

    def log_prob(self, value):
        return 0 * self.low


def mixture():
    parts = [dist.Normal(0.0, 1.0), transformed(dist.Uniform(0.0, 1.0), t.AffineTransform(m(), 1.0))]
    return dist.MixtureGeneral(dist.Categorical(probs=jnp.ones(2) / 2), parts, support=constraints.real)


MOVING = {
    "both bounds": lambda: dist.Uniform(m() - 2, m() + 2),
    "upper bound": lambda: dist.Uniform(0.0, e(m())),
    "Pareto": lambda: dist.Pareto(e(m()), 3.0),
    "event": lambda: dist.Uniform(jnp.zeros(2), e(m()) * jnp.ones(2)).to_event(1),
    "expanded": lambda: dist.Uniform(m(), m() + 1).expand([3]).to_event(1),
    "masked": lambda: dist.Uniform(m(), m() + 1).mask(True),
    "shifted": lambda: transformed(dist.Uniform(0.0, 1.0), t.AffineTransform(m(), 2.0)),
    "scaled": lambda: transformed(dist.Uniform(0.0, 1.0), t.AffineTransform(0.0, e(m()))),
    "scaled, and says so": lambda: transformed(
        dist.Uniform(0.0, 1.0), t.AffineTransform(0.0, e(m()), domain=constraints.unit_interval)
    ),
    "shifted half-line": lambda: transformed(dist.Normal(0.0, 1.0), t.ExpTransform(), t.AffineTransform(m(), 1.0)),
    "interval": lambda: transformed(dist.Normal(0.0, 1.0), dist.biject_to(constraints.interval(m(), 5.0))),
    "truncated": lambda: dist.TruncatedNormal(0.0, 1.0, low=m()),
    "truncated twice": lambda: dist.TruncatedNormal(0.0, 1.0, low=-3.0, high=m()),
    "own": lambda: Window(m()),
    "mixture": mixture,
    "Delta": lambda: dist.Delta(m()),
    "upstream": lambda: dist.Uniform(numpyro.sample("u", dist.Normal(m(), 1.0)), 9.0),
}
FIXED = {
    "beta by its logit": lambda: transformed(
        dist.Beta(e(m()), 2.0), t.SigmoidTransform().inv, t.AffineTransform(0.0, 2.0)
    ),
    "gamma by its logarithm": lambda: transformed(
        dist.Gamma(e(m()), 2.0), t.ExpTransform().inv, t.AffineTransform(m(), 2.0)
    ),
    "a batch of edges": lambda: transformed(
        dist.Uniform(jnp.zeros(3), jnp.ones(3)).to_event(1), t.PowerTransform(2.0), t.AffineTransform(0.0, 2.0)
    ),
    "constant": lambda: dist.Uniform(jax.lax.stop_gradient(m()) - 2, 3.0),
    "Normal": lambda: dist.Normal(m(), 1.0),
    "Weibull": lambda: dist.Weibull(e(m()), e(m())),
    "Kumaraswamy": lambda: dist.Kumaraswamy(e(m()), e(m())),
    "Gumbel": lambda: dist.Gumbel(m(), e(m())),
    "LogNormal": lambda: dist.LogNormal(m(), 1.0),
    "HalfNormal": lambda: dist.HalfNormal(e(m())),
    "Beta": lambda: dist.Beta(e(m()), 1.0),
    "truncated": lambda: dist.TruncatedNormal(m(), 1.0, low=0.0),
    "scaled half-line": lambda: transformed(dist.Exponential(e(m())), t.AffineTransform(0.0, e(m()))),
    "Affine": lambda: transformed(dist.Normal(0.0, 1.0), t.AffineTransform(m(), e(m()))),
    "Sigmoid": lambda: transformed(dist.Normal(m(), 1.0), t.SigmoidTransform()),
    "scored": lambda: dist.Uniform(
        jnp.clip(numpyro.sample("u", dist.Normal(m(), 1.0), infer={"estimator": ScoreFunction()}), -9, 2), 9.0
    ),
}


def step(make, estimator, upstream=False, guide=None, **kwargs):
    def plain():
        numpyro.sample("x", make())

    def model():
        if upstream:
            numpyro.sample("u", dist.Normal(0.0, 1.0))
        with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=0):
            shape = make().shape()
        numpyro.sample("x", dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)).mask(False))

    elbo = TraceGrad_ELBO(estimators={"x": estimator}, **kwargs)
    loss = lambda params: elbo.loss(jax.random.key(0), params, model, guide or plain)  # noqa: E731
    return jax.grad(loss)({"m": jnp.array(0.3)})


def without_a_sampler(case, estimator):
    """Return whether a case has no reparameterized sampler to refuse."""
    return isinstance(estimator, Reparam) and case in ("own", "mixture")


@pytest.mark.grid(without=without_a_sampler)
@pytest.mark.parametrize("estimator", [ScoreFunction(), ScoreFunction(samples=2), Reparam(sticking_the_landing=True)])
@pytest.mark.parametrize("case", MOVING)
def test_moving(case, estimator):
    with pytest.raises(EstimatorError, match=REFUSED) as caught:
        step(MOVING[case], estimator, case == "upstream")
    assert ("use Reparam() there" in str(caught.value)) == (case not in ("own", "mixture"))


@pytest.mark.parametrize("case", [case for case in MOVING if case not in ("own", "mixture")])
def test_the_remedy_runs(case):
    step(MOVING[case], Reparam(), case == "upstream")


@pytest.mark.parametrize("case", FIXED)
def test_fixed(case):
    step(FIXED[case], ScoreFunction(), case == "scored")


def test_bounds_from_data_and_from_mutable_state_are_constant():
    def model(high):
        numpyro.sample("x", dist.Uniform(-1.0, 9.0))

    def guide(high):
        low = numpyro.primitives.mutable("low", jnp.array(-0.5))
        numpyro.sample("x", dist.Uniform(low, high))
        m()

    elbo = TraceGrad_ELBO(estimators={"x": ScoreFunction()})
    svi = SVI(model, guide, numpyro.optim.Adam(0.1), elbo)
    state = svi.init(jax.random.key(0), jnp.array(2.0))
    state, _ = jax.jit(svi.update)(state, jnp.array(2.0))
    assert jnp.isfinite(svi.evaluate(state, jnp.array(2.0)))
    assert jnp.isfinite(svi.run(jax.random.key(0), 2, jnp.array(2.0), progress_bar=False).losses).all()


@pytest.mark.grid
@pytest.mark.parametrize("by", ["argument", "closure"])
@pytest.mark.parametrize("way", WAYS)
def test_bounds_that_are_differentiated_from_outside(way, by):
    def model(low):
        numpyro.sample("x", dist.Uniform(-9.0, 9.0))

    def guide(low):
        numpyro.sample("x", dist.Uniform(low, low + 1))

    elbo = TraceGrad_ELBO(estimators={"x": ScoreFunction()})
    with pytest.raises(EstimatorError, match=REFUSED):
        WAYS[way](handed(elbo, jax.random.key(0), model, guide)[by])(jnp.array(0.3))


@pytest.mark.slow
def test_a_count_that_is_drawn_carries_no_gradient():
    def program(rate):
        n = numpyro.sample("n", dist.Poisson(rate))
        numpyro.sample("k", dist.Binomial(n + 3, logits=rate))

    elbo = TraceGrad_ELBO()
    loss = lambda params: elbo.loss(jax.random.key(0), params, lambda: program(2.0), lambda: program(e(m())))  # noqa: E731
    jax.grad(loss)({"m": jnp.array(0.3)})


def scanned():
    low = m() - 2

    def body(carry, _):
        return carry, numpyro.sample("x", dist.Uniform(low, 3.0))

    scan(body, 0.0, None, length=2)


def scanned_model():
    scan(lambda c, _: (c, numpyro.sample("x", dist.Normal(0.0, 1.0))), 0.0, None, length=2)


def python():
    if m() > 0:  # A program that cannot be traced.
        numpyro.sample("x", dist.Uniform(m() - 2, 3.0))


def inside_jit():
    low = jax.jit(lambda a, b: a - 2 + b)(m(), jax.lax.stop_gradient(m()))
    numpyro.sample("x", dist.Uniform(low, 3.0))


def test_inside_scan():
    elbo = TraceGrad_ELBO(estimators={"x": ScoreFunction()})
    with pytest.raises(EstimatorError, match=REFUSED):
        elbo.loss(jax.random.key(0), {"m": jnp.array(0.3)}, scanned_model, scanned)


@pytest.mark.slow
@pytest.mark.parametrize("guide", [python, inside_jit])
def test_other_ways_to_run(guide):
    with pytest.raises(EstimatorError, match=REFUSED):
        step(MOVING["both bounds"], ScoreFunction(), guide=guide)


MUTANTS = {
    "stop_gradient is nothing": lambda closed, inputs, unknown: [True] * len(closed.jaxpr.outvars),
    "nothing carries gradient": lambda closed, inputs, unknown: [False] * len(closed.jaxpr.outvars),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant, monkeypatch):
    monkeypatch.setattr("pplgrad.numpyro._tracing.specification.gradient_reaches", MUTANTS[mutant])
    if mutant.startswith("stop"):
        with pytest.raises(EstimatorError):
            step(FIXED["constant"], ScoreFunction())
    else:
        step(MOVING["both bounds"], ScoreFunction())
