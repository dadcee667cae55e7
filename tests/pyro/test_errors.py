"""Bad input: one plain sentence that names the site and the remedy, and nothing is changed."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pplgrad import (
    BaselineError,
    ConfigurationError,
    EstimatorError,
    ImpossibleValueError,
    LeaveOneOut,
    OptimalConstant,
    ProgramError,
    Reparam,
    ScoreFunction,
)
from pplgrad.pyro import TraceGrad_ELBO, config_estimators


def model():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    x = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z + x, 1.0), obs=torch.tensor(0.3))


def guide():
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.2))))
    pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))


def fails(error, match, model=model, guide=guide, elbo=None, kwargs=None):
    """Check the error from step, loss and differentiable_loss, and that the stores are unchanged."""
    elbo = elbo or TraceGrad_ELBO(**(kwargs or {}))
    optimizer = Adam({"lr": 0.1})
    for act in (SVI(model, guide, optimizer, elbo).step, lambda: elbo.differentiable_loss(model, guide)):
        with pytest.raises(error, match=match) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert not list(pyro.get_param_store().keys())
        assert not optimizer.optim_objs


@pytest.mark.grid
@pytest.mark.parametrize("where", ["elbo", "wrapper"])
@pytest.mark.parametrize("key", ["y", "layer*"])
def test_unknown_site_or_pattern(where, key):
    chosen = {key: ScoreFunction()}
    match = rf"names '{key}'.replace".replace(".replace", "").replace("*", r"\*") + ".*the sites are: 'z', 'mu'"
    if where == "elbo":
        fails(ConfigurationError, match, kwargs={"estimators": chosen})
    else:
        fails(ConfigurationError, match, guide=config_estimators(guide, chosen))


def test_every_key_of_a_wrapper_deep_inside_is_checked():
    inner = config_estimators(guide, {"nothing": ScoreFunction()})

    def outer():
        return inner()

    fails(ConfigurationError, "config_estimators names 'nothing'", guide=outer)


def test_observed_site():
    fails(EstimatorError, "site 'x' is observed", kwargs={"estimators": {"x": ScoreFunction()}})

    def observed_in_model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.3), infer={"estimator": ScoreFunction()})

    fails(EstimatorError, "Site 'x' .* is observed", model=observed_in_model)

    def in_the_model():
        pyro.sample("z", dist.Bernoulli(0.5), infer={"estimator": ScoreFunction()})
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    fails(EstimatorError, "Site 'z' .* is in the model", model=in_the_model)


def test_reparam_without_a_reparameterized_sampler():
    fails(EstimatorError, r"Reparam\(\) cannot be used at site 'z': Bernoulli", kwargs={"estimators": {"z": Reparam()}})


@pytest.mark.parametrize("baseline", [LeaveOneOut(), OptimalConstant()])
def test_particles_needed(baseline):
    fails(BaselineError, "site 'z' needs at least two particles", kwargs={"estimators": {"z": ScoreFunction(baseline)}})


def test_not_an_estimator():
    with pytest.raises(ConfigurationError, match=r"write ScoreFunction\(\)"):
        TraceGrad_ELBO(estimators={"z": ScoreFunction})
    with pytest.raises(ConfigurationError, match="takes a mapping"):
        TraceGrad_ELBO(estimators=[ScoreFunction()])
    with pytest.raises(ConfigurationError, match="a baseline is an object"):
        ScoreFunction(baseline=0.5)

    def wrong():
        pyro.sample("z", dist.Bernoulli(0.5), infer={"estimator": "score"})
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    fails(ConfigurationError, "site 'z'", guide=wrong)


def test_site_missing_from_the_model_or_the_guide():
    def more():
        guide()
        pyro.sample("extra", dist.Bernoulli(0.5))

    fails(ProgramError, "'extra' is in the guide but not in the model", guide=more)

    def less():
        pyro.sample("mu", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))

    fails(ProgramError, "'z' is in the model but not in the guide", guide=less)


@pytest.mark.grid
@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "NaN"), (-float("inf"), "infinite")])
@pytest.mark.parametrize("after", [0, 4])
def test_impossible_cost(value, kind, after):
    """At the first step, and at a step that uses a known structure."""
    steps = []

    def broken():
        model()
        steps.append(1)
        loc = torch.tensor(value if len(steps) > after else 0.0)
        pyro.sample("culprit", dist.Normal(loc, 1.0, validate_args=False), obs=torch.tensor(0.0))

    elbo = TraceGrad_ELBO()
    for _ in range(after):
        elbo.loss_and_grads(broken, guide)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    with pytest.raises(ImpossibleValueError, match=f"site 'culprit' in the model is {kind}"):
        elbo.loss_and_grads(broken, guide)
    with pytest.raises(ImpossibleValueError, match="culprit"):
        elbo.loss(broken, guide)
    for name, old in before.items():
        assert (pyro.get_param_store()[name] == old).all()


def test_program_that_cannot_be_vectorized():
    def branching():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        if z:
            pyro.factor("f", torch.tensor(1.0))

    elbo = TraceGrad_ELBO(3, vectorize_particles=True, max_plate_nesting=0)
    fails(ProgramError, "cannot run under vectorize_particles=True", model=branching, elbo=elbo)

    def undeclared():
        pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2)))

    def undeclared_guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.zeros(2))))

    elbo = TraceGrad_ELBO(3, vectorize_particles=True, max_plate_nesting=0)
    with pytest.raises(ProgramError, match="vectorize_particles"):
        elbo.loss_and_grads(undeclared, undeclared_guide)


def test_an_error_is_one_sentence_without_the_shapes_of_the_trace():
    with pytest.raises(EstimatorError) as caught:
        TraceGrad_ELBO(estimators={"z": Reparam()}).loss_and_grads(model, guide)
    assert "\n" not in str(caught.value) and "Trace Shapes" not in str(caught.value)
