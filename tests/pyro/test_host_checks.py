"""What Pyro's own ELBOs accept and refuse, this one does: programs without a site, shapes, plates, validation."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam

from pplgrad import (
    ELBO,
    IWAE,
    RELAX,
    RODEO,
    BaselineError,
    DisARM,
    EstimatorError,
    Expectation,
    ImpossibleValueError,
    LocalExpectation,
    NeuralBaseline,
    PplgradError,
    ProgramError,
    Renyi,
    ScoreFunction,
)
from pplgrad.pyro import TraceGrad_ELBO, config_estimators


def nothing():
    pass


def observed():
    pyro.sample("x", dist.Normal(pyro.param("m", torch.tensor(0.5)), 1.0), obs=torch.tensor(1.0))


@pytest.mark.grid
@pytest.mark.parametrize("objective", [ELBO(), Expectation(), IWAE(), Renyi(0.5)], ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("higher_order", [False, True])
def test_a_program_without_a_site_has_loss_0(objective, particles, vectorized, higher_order):
    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, objective=objective, higher_order=higher_order)
    for guide in (nothing, config_estimators(nothing, {})):
        assert SVI(nothing, guide, Adam({"lr": 0.1}), elbo).step() == 0
        assert elbo.loss(nothing, guide) == elbo.differentiable_loss(nothing, guide).item() == 0
        assert elbo.describe(nothing, guide).rows == []
        elbo.diagnose(nothing, guide)


@pytest.mark.grid
@pytest.mark.parametrize("objective", [ELBO(), Expectation(), IWAE(), Renyi(0.5)], ids=repr)
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
def test_a_guide_without_a_site_has_the_loss_of_the_data(objective, particles, vectorized):
    pyro.clear_param_store()
    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, objective=objective)
    right = -dist.Normal(0.5, 1.0).log_prob(torch.tensor(1.0)).item()
    assert elbo.loss(observed, nothing) == pytest.approx(right)
    assert elbo.loss_and_grads(observed, nothing) == pytest.approx(right)
    assert pyro.param("m").unconstrained().grad.item() == pytest.approx(-0.5)


def test_a_program_without_a_site_compiles():
    pyro.clear_param_store()
    svi = SVI(nothing, nothing, Adam({"lr": 0.1}), TraceGrad_ELBO(compile={"backend": "eager"}))
    assert [svi.step() for _ in range(4)] == [0] * 4


def at(shape, events):
    def program(param=False):
        loc = pyro.param("loc", torch.zeros(*shape)) if param else torch.zeros(*shape)
        pyro.sample("x", dist.Normal(loc, 1.0).to_event(events))

    return program


def in_plate(dim, dependent=False):
    def program():
        with pyro.plate("p", 3, dim=dim):
            pyro.sample("x", dist.Bernoulli(torch.full((3, *(1,) * (-dim - 1)), 0.5)))

    return program


def sequential():
    for _ in pyro.plate("loop", 2):
        pass
    plain()


def plain():
    pyro.sample("x", dist.Bernoulli(0.5))


def collides():
    with pyro.plate("a", 3, dim=-1), pyro.plate("b", 3, dim=-1):
        pyro.sample("x", dist.Bernoulli(torch.full((3,), 0.5)))


def undeclared():
    with pyro.plate("a", 3, dim=-1):
        pyro.sample("x", dist.Bernoulli(torch.full((2, 3), 0.5)))


def nested():
    with pyro.plate("a", 3, dim=-1):
        pyro.sample("z", dist.Bernoulli(0.5))
        with pyro.plate("b", 2, dim=-2):
            pyro.sample("x", dist.Bernoulli(0.5))


REFUSED = {
    "events": (at((2,), 1), at((2, 1), 2), {}, "event_dims disagree at site 'x'"),
    "shapes": (at((1, 2), 2), at((2, 1), 2), {}, "shapes disagree at site 'x'"),
    "batches": (at((2,), 1), at((3, 2), 1), {}, "shapes disagree at site 'x'"),
    "dimension": (in_plate(-2), in_plate(-1), {}, "shapes disagree at site 'x'"),
    "collision": (collides, collides, {}, "collide|collision"),
    "no plate": (undeclared, undeclared, {}, 'At site "x", invalid log_prob shape; Expected .* actual .*; Try one of'),
    "nesting": (nested, nested, {"max_plate_nesting": 1}, "ncreasing max_plate_nesting to"),
}


@pytest.mark.grid
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("vectorized", [False, True])
def test_validation_refuses_what_pyro_refuses(case, particles, vectorized):
    model, guide, kwargs, message = REFUSED[case]
    elbo = TraceGrad_ELBO(particles, vectorize_particles=vectorized, **kwargs)
    expected = ".*" if vectorized else message
    with pytest.raises(ValueError, match=expected):
        elbo.loss(model, guide)
    with pytest.raises(ValueError, match=expected) as caught:
        elbo.loss_and_grads(model, guide)
    if not vectorized and case != "collision":
        assert isinstance(caught.value, ProgramError) and "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["events", "shapes", "batches", "no plate", "nesting"])
def test_without_validation_nothing_is_refused(case):
    model, guide, kwargs, _ = REFUSED[case]
    with pyro.validation_enabled(False):
        TraceGrad_ELBO(**kwargs).loss_and_grads(model, guide)


def test_a_plate_of_the_guide_that_the_model_has_not_is_warned_of():
    with pytest.warns(UserWarning, match="Found plate statements in guide but not model"):
        TraceGrad_ELBO().loss_and_grads(plain, sequential)
    with pyro.validation_enabled(False):
        TraceGrad_ELBO().loss_and_grads(plain, sequential)


def test_a_program_that_changes_its_shapes_is_checked_again():
    """What the checks look at is compared at each step that reuses a structure: the one that differs is not reused."""
    shape = [2]

    def model():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        pyro.sample("x", dist.Normal(torch.zeros(shape[0]), 1.0).to_event(1))

    elbo = TraceGrad_ELBO()
    for _ in range(4):
        elbo.loss_and_grads(model, guide)
    shape[0] = 1
    with pytest.raises(ProgramError, match="shapes disagree at site 'x'"):
        elbo.loss_and_grads(model, guide)


def test_a_factor_in_the_guide_needs_no_word_about_its_gradient():
    """`has_rsample` tells Pyro's ELBOs how to differentiate; here the cost is charged to what it was computed from."""

    def model():
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.2))))
        pyro.factor("f", 0.7 * z)

    assert TraceGrad_ELBO().loss_and_grads(model, guide) != 0


@pytest.mark.parametrize("declared", [False, None, True])
def test_a_factor_that_is_the_density_of_a_hidden_draw_is_refused(declared):
    """Its score term is what Pyro's ELBOs add for `has_rsample=False`; nothing here would."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.4))

    def guide():
        m = pyro.param("m", torch.tensor(0.3))
        z = m + torch.randn(())
        pyro.factor("q", dist.Normal(m, 1.0).log_prob(z), has_rsample=declared)
        pyro.sample("z", dist.Delta(z))

    elbo = TraceGrad_ELBO()
    if declared:
        for _ in range(4):
            elbo.loss_and_grads(model, guide)
        return
    for _ in range(4):
        with pytest.raises(
            ProgramError, match="The factor 'q' in the guide is the density of a draw that is no sample"
        ):
            elbo.loss_and_grads(model, guide)


def test_a_factor_beside_a_hidden_draw_is_none_of_its_density():
    def model():
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.2))))
        torch.randn(())
        pyro.factor("f", 0.7 * z)

    TraceGrad_ELBO(estimators={"z": ScoreFunction()}).loss_and_grads(model, guide)


@pytest.mark.grid
@pytest.mark.parametrize("particles", [1, 2, 3])
@pytest.mark.parametrize("grad", [False, True])
def test_more_plates_than_the_first_program_had(particles, grad):
    elbo = TraceGrad_ELBO(particles, vectorize_particles=True)
    run = elbo.loss_and_grads if grad else elbo.loss
    run(in_plate(-1), in_plate(-1))
    with pytest.raises(ProgramError, match="ncreasing max_plate_nesting"):
        run(nested, nested)


def test_branches_know_the_nesting_without_validation():
    elbo = TraceGrad_ELBO(vectorize_particles=True, max_plate_nesting=1, estimators={"x": DisARM()})
    with pyro.validation_enabled(False), pytest.raises(ProgramError, match="x.*try increasing max_plate_nesting"):
        elbo.loss_and_grads(nested, nested)


class Own(dist.Normal):
    """A density of the user's own, that fails in its own way or leaves it to the host."""

    def __init__(self, what):
        self.what = what
        super().__init__(0.0, 1.0)

    def log_prob(self, value):
        if self.what == "support":
            return dist.Exponential(1.0).log_prob(value - 99)
        if self.what == "message":
            raise self.failure("")
        if self.what == "shape":
            return torch.zeros(2) + torch.zeros(3)
        raise ValueError("the user's own")

    failure = RuntimeError


@pytest.mark.grid
@pytest.mark.parametrize(("what", "error"), [("own", ValueError), ("shape", RuntimeError), ("message", RuntimeError)])
@pytest.mark.parametrize("grad", [False, True])
def test_an_error_of_the_users_own_density_passes_as_it_is(what, error, grad):
    def model():
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", Own(what), obs=torch.tensor(0.1))

    elbo = TraceGrad_ELBO()
    with pytest.raises(error) as caught:
        (elbo.loss_and_grads if grad else elbo.loss)(model, plain_z)
    assert not isinstance(caught.value, PplgradError)
    assert "log_prob" in [entry.name for entry in caught.traceback]


def plain_z():
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))


@pytest.mark.parametrize("fn", [lambda: Own("support"), lambda: dist.Exponential(1.0)], ids=["own", "host"])
def test_a_value_outside_of_the_support_is_named(fn):
    def model():
        pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", fn(), obs=torch.tensor(-1.0))

    with pytest.raises(ImpossibleValueError, match="The log density at site 'x' .* outside the"):
        TraceGrad_ELBO().loss_and_grads(model, plain_z)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("fault", [IndexError, KeyError, RuntimeError, AssertionError])
def test_a_program_that_fails_in_a_branch_names_the_site(fault, vectorized):
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        if z.numel() > 1 or z.item() == 1:
            raise fault
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.1))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(-99.0))))

    elbo = TraceGrad_ELBO(vectorize_particles=vectorized, estimators={"z": LocalExpectation()})
    if fault is KeyError and vectorized:
        pytest.skip("no sign of broadcasting")
    with pytest.raises(ProgramError, match="site 'z'.*ScoreFunction\\(\\)") as caught:
        elbo.loss_and_grads(model, guide)
    cause = caught.value.__cause__
    assert isinstance(cause, fault)


LEARNED = {
    "RELAX then RODEO": (RELAX(), RODEO()),
    "RODEO then RELAX": (RODEO(), RELAX()),
    "RELAX of another size": (RELAX(hidden=32), RELAX(hidden=8)),
    "a network of another size": (
        ScoreFunction(NeuralBaseline(inputs=lambda: torch.ones(3), hidden=(8,))),
        ScoreFunction(NeuralBaseline(inputs=lambda: torch.ones(3), hidden=(4,))),
    ),
    "a network with other inputs": (
        ScoreFunction(NeuralBaseline(inputs=lambda: torch.ones(3), hidden=(8,))),
        ScoreFunction(NeuralBaseline(inputs=lambda: torch.ones(2), hidden=(8,))),
    ),
    "another network": (
        ScoreFunction(NeuralBaseline(torch.nn.Linear(3, 1).double(), inputs=lambda: torch.ones(3))),
        ScoreFunction(NeuralBaseline(torch.nn.Linear(2, 1).double(), inputs=lambda: torch.ones(2))),
    ),
}


def bernoulli_model():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize("case", LEARNED)
def test_what_another_estimator_has_learned_is_refused(case):
    first, second = LEARNED[case]
    TraceGrad_ELBO(estimators={"z": first}).loss_and_grads(bernoulli_model, plain_z)
    elbo = TraceGrad_ELBO(estimators={"z": second})
    with pytest.raises((EstimatorError, BaselineError), match="at site 'z' learns .*delete the names that begin with"):
        elbo.loss_and_grads(bernoulli_model, plain_z)
    store = pyro.get_param_store()
    for name in [name for name in store.keys() if name.startswith("pplgrad.baseline.z.")]:
        del store[name]
    elbo.loss_and_grads(bernoulli_model, plain_z)  # The remedy.
    TraceGrad_ELBO(estimators={"z": second}).loss_and_grads(bernoulli_model, plain_z)  # And goes on from there.


def test_a_baseline_whose_inputs_change_their_size_is_refused():
    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction(NeuralBaseline(inputs=lambda x: x, hidden=(4,)))})
    model, guide = lambda x: bernoulli_model(), lambda x: plain_z()
    elbo.loss_and_grads(model, guide, torch.ones(3))
    with pytest.raises(BaselineError, match="at site 'z' learns '0.weight' of shape \\(4, 2\\)"):
        elbo.loss_and_grads(model, guide, torch.ones(2))


def test_named_parameters_are_those_that_have_gradients(tmp_path):
    """State of a baseline is read by its name, saved and loaded with the store, and is no parameter."""
    store, elbo = pyro.get_param_store(), TraceGrad_ELBO()
    name = "pplgrad.baseline.z.0.mean"
    for _ in range(2):
        elbo.loss_and_grads(bernoulli_model, plain_z)
    assert name in store and name in store.keys() and name in dict(store.items())
    assert all(leaf.grad is not None for _, leaf in store.named_parameters())
    assert name not in dict(store.named_parameters())
    mean = store[name].item()
    store.save(tmp_path / "store")
    with store.scope():
        assert name not in store
    assert store[name].item() == mean
    pyro.clear_param_store()
    store.load(tmp_path / "store")
    assert store[name].item() == mean
    elbo.loss_and_grads(bernoulli_model, plain_z)
    assert store[name].item() != mean  # It went on from there.
    assert name not in dict(store.named_parameters())
    assert pickle.loads(pickle.dumps(store.get_state()))["params"][name].item() == store[name].item()


def test_a_store_that_was_saved_with_state_among_its_parameters_goes_on():
    """Saved before state was told from parameters: the same names, all of them in `params`."""
    elbo = TraceGrad_ELBO()
    elbo.loss_and_grads(bernoulli_model, plain_z)
    state = pyro.get_param_store().get_state()
    assert type(state["params"]) is dict and "pplgrad.baseline.z.0.mean" in state["params"]
    pyro.clear_param_store()
    pyro.get_param_store().set_state(state)
    elbo.loss_and_grads(bernoulli_model, plain_z)
    assert all(leaf.grad is not None for _, leaf in pyro.get_param_store().named_parameters())
