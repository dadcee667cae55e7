"""Bad input: one plain sentence that names the site and the remedy."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import SVI
from numpyro.optim import Adam

from pplgrad import (
    BaselineError,
    ConfigurationError,
    DecayingAverage,
    EstimatorError,
    FunctionBaseline,
    ImpossibleValueError,
    LeaveOneOut,
    MeasureValued,
    NeuralBaseline,
    OptimalConstant,
    ProgramError,
    Reparam,
    ScoreFunction,
)
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

PARAMS = {"a": jnp.array(0.2), "m": jnp.array(0.1)}


def model(x=None):
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(z + mu, 1.0), obs=0.3)


def guide(x=None):
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.2)))
    numpyro.sample("mu", dist.Normal(numpyro.param("m", 0.1), 1.0))


def fails(error, match, model=model, guide=guide, elbo=None, **kwargs):
    elbo = elbo or TraceGrad_ELBO(**kwargs)
    key = jax.random.key(0)
    for act in (elbo.loss, jax.jit(lambda k, p: elbo.loss(k, p, model, guide)), elbo.diagnose):
        args = (key, PARAMS) if act not in (elbo.loss, elbo.diagnose) else (key, PARAMS, model, guide)
        with pytest.raises(error, match=match) as caught:
            act(*args)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["y", "layer*"])
def test_unknown_site_or_pattern(key):
    match = rf"names '{key}'".replace("*", r"\*") + ".*the sites are: 'z', 'mu'"
    fails(ConfigurationError, match, estimators={key: ScoreFunction()})
    wrapped = config_estimators(guide, {key: ScoreFunction()})
    fails(ConfigurationError, match, guide=wrapped)
    # SVI.init traces the guide before any ELBO sees it, and says nothing.
    SVI(model, wrapped, Adam(0.1), TraceGrad_ELBO()).init(jax.random.key(0))


def test_observed_site():
    fails(EstimatorError, "site 'x' is observed", estimators={"x": ScoreFunction()})

    def observed():
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=0.3, infer={"estimator": ScoreFunction()})

    fails(EstimatorError, "Site 'x' .* is observed", model=observed)

    def in_the_model():
        numpyro.sample("z", dist.Bernoulli(0.5), infer={"estimator": ScoreFunction()})
        numpyro.sample("mu", dist.Normal(0.0, 1.0))

    fails(EstimatorError, "Site 'z' .* is in the model", model=in_the_model)


def test_estimators_that_do_not_fit():
    fails(EstimatorError, r"Reparam\(\) cannot be used at site 'z': Bernoulli", estimators={"z": Reparam()})
    for baseline in (LeaveOneOut(), OptimalConstant()):
        fails(BaselineError, "site 'z' needs at least two particles", estimators={"z": ScoreFunction(baseline)})


def test_learned_baseline_on_a_bare_guide():
    for baseline in (DecayingAverage(), NeuralBaseline()):
        chosen = {"z": ScoreFunction(baseline)}
        fails(BaselineError, "at site 'z' needs .*config_estimators", estimators=chosen)


def test_site_missing_from_the_model_or_the_guide():
    def more():
        guide()
        numpyro.sample("extra", dist.Bernoulli(0.5))

    fails(ProgramError, "'extra' is in the guide but not in the model", guide=more)

    def less():
        numpyro.sample("mu", dist.Normal(numpyro.param("m", 0.1), 1.0))

    fails(ProgramError, "'z' is in the model but not in the guide", guide=less)


@pytest.mark.slow
@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (-float("inf"), "infinite")])
def test_impossible_cost(value, kind):
    def broken(x):
        model()
        numpyro.factor("culprit", x)

    def with_data(x):
        guide()

    key, elbo = jax.random.key(0), TraceGrad_ELBO()
    match = f"site 'culprit' in the model is {kind}"
    with pytest.raises(ImpossibleValueError, match=match):
        elbo.loss(key, PARAMS, broken, with_data, jnp.array(value))
    with pytest.raises(ImpossibleValueError, match=match):
        jax.grad(lambda p: elbo.loss(key, p, broken, with_data, jnp.array(value)))(PARAMS)
    svi = SVI(broken, with_data, Adam(0.1), elbo)
    state = svi.init(key, jnp.array(0.0))
    with pytest.raises(ImpossibleValueError, match=match):
        svi.update(state, jnp.array(value))
    _, loss = jax.jit(svi.update)(state, jnp.array(value))
    assert jnp.isnan(loss)
    with pytest.raises(ImpossibleValueError, match=match):
        elbo.diagnose(key, PARAMS, broken, with_data, jnp.array(value))


def branching(x=None):
    z = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.sample("mu", dist.Normal(0.0, 1.0))
    if z == 1:
        numpyro.factor("f", jnp.array(1.0))


@pytest.mark.slow
def test_program_that_cannot_be_vectorized():
    elbo = TraceGrad_ELBO(3)
    with pytest.raises(ProgramError, match="cannot run under vectorize_particles.*use vectorize_particles=False"):
        elbo.loss(jax.random.key(0), PARAMS, branching, guide)
    loss = TraceGrad_ELBO(3, vectorize_particles=False).loss(jax.random.key(0), PARAMS, branching, guide)
    assert jnp.isfinite(loss)


@pytest.mark.slow
def test_wrong_baselines():
    def loss(baseline):
        wrapped = config_estimators(guide, {"z": ScoreFunction(baseline)})
        svi = SVI(model, wrapped, Adam(0.1), TraceGrad_ELBO())
        x = jnp.ones((4, 2))
        return svi.update(svi.init(jax.random.key(0), x), x)

    with pytest.raises(BaselineError, match="at site 'z' returned shape"):
        loss(FunctionBaseline(lambda x: x))
    with pytest.raises(BaselineError, match="at site 'z' returned shape"):
        loss(NeuralBaseline((lambda key, x: {"w": jnp.ones(2)}, lambda p, x: x * p["w"]), inputs=lambda x: x))
    with pytest.raises(BaselineError, match="at site 'z' returned NaN"):
        loss(FunctionBaseline(lambda x: jnp.nan))
    with pytest.raises(ConfigurationError, match="flax linen or nnx module"):
        loss(NeuralBaseline(lambda x: x, inputs=lambda x: x))
    with pytest.raises(BaselineError, match="site 'z' reads its own value"):
        loss(FunctionBaseline(lambda x, sites: sites["z"]))
    with pytest.raises(BaselineError, match="reads site 'nothing'"):
        loss(FunctionBaseline(lambda x, sites: sites["nothing"]))


def test_baseline_may_not_read_downstream_of_its_site():
    def deep_guide():
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("w", dist.Bernoulli(0.3 + 0.4 * z))

    def deep_model():
        numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("w", dist.Bernoulli(0.5))

    read_w = {"z": ScoreFunction(FunctionBaseline(lambda sites: sites["w"])), "w": ScoreFunction()}
    with pytest.raises(BaselineError, match="'w', which is computed from its value"):
        TraceGrad_ELBO(estimators=read_w).loss(jax.random.key(0), {}, deep_model, deep_guide)
    read_z = {"w": ScoreFunction(FunctionBaseline(lambda sites: sites["z"])), "z": ScoreFunction()}
    TraceGrad_ELBO(estimators=read_z).loss(jax.random.key(0), {}, deep_model, deep_guide)


def test_a_family_is_a_class_and_no_name():
    """A class of the user's own that is called Normal has another density, which a coupling of normals would get wrong."""

    class Normal(dist.Normal):
        def log_prob(self, value, intermediates=None):
            return dist.Laplace(self.loc, self.scale).log_prob(value)

    def program():
        numpyro.sample("z", Normal(numpyro.param("a", 0.5), 1.0))

    elbo = TraceGrad_ELBO(estimators={"z": MeasureValued()})
    with pytest.raises(EstimatorError, match=r"site 'z'.*test_errors.*Normal is not among"):
        elbo.loss(jax.random.key(0), {}, program, program)


class Level(dist.Distribution):
    """A discrete distribution of the user's own that declares no parameters: all of none are reparameterized, says NumPyro."""

    support = constraints.nonnegative_integer

    def __init__(self, logits):
        self.logits = logits
        super().__init__(jnp.shape(logits)[:-1])

    def sample(self, key, sample_shape=()):
        return jax.random.categorical(key, self.logits, shape=sample_shape + self.batch_shape)

    def log_prob(self, value):
        log_p = jnp.broadcast_to(jax.nn.log_softmax(self.logits), (*value.shape, self.logits.shape[-1]))
        return jnp.take_along_axis(log_p, value[..., None], -1)[..., 0]


class Shift(dist.Distribution):
    """The same, of real numbers."""

    support = constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(jnp.shape(loc))

    def sample(self, key, sample_shape=()):
        return self.loc + jax.random.normal(key, sample_shape + self.batch_shape)

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).log_prob(value)


class DeclaredShift(Shift):
    has_rsample = True


class PropertyOfShift(Shift):
    has_rsample = property(lambda self: True)


A = jnp.array([0.3, -0.2])


@pytest.mark.parametrize(
    ("law", "reparameterized"),
    [
        (Level, False),
        (lambda a: Level(a[None]).to_event(1), False),
        (lambda a: Level(a).expand([3]).to_event(1), False),
        (lambda a: Level(a).mask(True), False),
        (lambda a: Shift(a[0]), False),
        (lambda a: DeclaredShift(a[0]), True),
        (lambda a: PropertyOfShift(a[0]), True),
    ],
    ids=["discrete", "event", "expanded", "masked", "real", "real, declared", "real, by a property"],
)
def test_a_distribution_that_declares_no_parameters(law, reparameterized):
    """Only one that says of itself that its draws are differentiable is taken for reparameterized."""

    def program():
        numpyro.sample("z", law(numpyro.param("a", A)))

    key, params = jax.random.key(0), {"a": A}
    (row,) = TraceGrad_ELBO().describe(key, params, program, program).rows
    assert row["estimator"] == ("Reparam()" if reparameterized else "ScoreFunction()")
    chosen = TraceGrad_ELBO(estimators={"z": Reparam()})
    if reparameterized:
        assert jnp.isfinite(chosen.loss(key, params, program, program))
    else:
        with pytest.raises(EstimatorError, match=r"Reparam\(\) cannot be used at site 'z'"):
            chosen.loss(key, params, program, program)
