"""What a watched step does not watch operation by operation: the hosts' checks of arguments, and densities of common distributions."""

import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Distribution, constraints

from pplgrad import ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._tracing import argument_checks, known_densities
from pplgrad.pyro._tracing.provenance import PlateAxis, Provenance

PLATE = ("plate", -1)


def drawn(provenance, kind=torch.float64):
    return provenance.tag("z", torch.tensor([0.0, 1.0, 1.0]).to(kind), [PlateAxis("plate", -1)])


LAWS = {
    "bernoulli": lambda z: (dist.Bernoulli(logits=z - 0.3), torch.tensor([1.0, 0.0, 1.0])),
    "bernoulli of a draw": lambda z: (dist.Bernoulli(logits=torch.tensor(0.3)), z),
    "normal": lambda z: (dist.Normal(z, 2.0), torch.tensor(0.4)),
    "normal over another plate": lambda z: (dist.Normal(z, torch.ones(4, 1)), torch.zeros(4, 3)),
    "bernoulli of probabilities": lambda z: (dist.Bernoulli(probs=0.2 + 0.1 * z), torch.tensor([1.0, 0.0, 1.0])),
    "summed": lambda z: (dist.Normal(z[:, None], torch.ones(2)).to_event(1), torch.zeros(3, 2)),
    "summed over the plate": lambda z: (dist.Normal(z, torch.ones(4, 1)).to_event(1), torch.zeros(4, 3)),
    "summed twice": lambda z: (
        dist.Bernoulli(logits=z[:, None, None] - torch.ones(2, 5)).to_event(1).to_event(1),
        z[:, None, None].expand(3, 2, 5),
    ),
    "summed over two": lambda z: (
        dist.Bernoulli(probs=0.5 * torch.ones(3, 2, 5)).to_event(2),
        z[:, None, None].expand(3, 2, 5),
    ),
    "summed categories": lambda z: (
        dist.Categorical(logits=z[:, None, None] * torch.ones(4, 2)).to_event(1),
        torch.ones(3, 4).long(),
    ),
    "a value with more axes": lambda z: (dist.Normal(torch.zeros(2), 1.0).to_event(1), z[:, None] * torch.ones(2)),
    "normal of a sum": lambda z: (dist.Normal(z.sum(), 1.0), torch.zeros(3)),
    "normal across": lambda z: (dist.Normal(z[:, None], 1.0), z),
    "categorical": lambda z: (dist.Categorical(logits=torch.stack([z, -z], -1)), torch.tensor([1, 0, 1])),
    "categorical over categories": lambda z: (dist.Categorical(logits=z), torch.tensor([1, 0])),
    "categorical of a draw": lambda z: (dist.Categorical(logits=torch.zeros(2)), z.long()),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_known_density_reads_what_watching_finds(name):
    with Provenance() as provenance:
        law, value = LAWS[name](drawn(provenance))
        known, watched = known_densities.log_density(law, value), law.log_prob(value)
        assert provenance.of(known) == provenance.of(watched) != 0
        assert torch.equal(known, watched)
        for axis in range(-known.dim(), 0):
            place = [("plate", axis)]
            assert provenance.mixed(known, "z", place) == provenance.mixed(watched, "z", place)


def test_others_are_watched(monkeypatch):
    """Subclasses, laws whose parameters are computed when they are read, and values that are converted."""
    monkeypatch.setattr(known_densities, "WithoutDispatch", None)

    class Mine(dist.Normal):
        pass

    class MineSummed(dist.Independent):
        pass

    with Provenance() as provenance:
        z = drawn(provenance)
        for law, value in (
            (Mine(z, 1.0), torch.zeros(3)),
            (dist.Categorical(probs=torch.stack([0.2 + 0.1 * z, 0.8 - 0.1 * z], -1)), torch.tensor([0, 1, 0])),
            (dist.Categorical(logits=torch.zeros(2)), z),
            (MineSummed(dist.Normal(z, 1.0), 1), torch.zeros(3)),
            (dist.Exponential(1 + z), torch.ones(3)),
        ):
            assert provenance.of(known_densities.log_density(law, value)) != 0


def caught(z):
    try:
        dist.Bernoulli(probs=2 * z)
    except ValueError:
        return True
    return False


def value_caught(z):
    try:
        dist.Bernoulli(0.5).log_prob(2 * z)
    except ValueError:
        return True
    return False


@pytest.mark.grid
@pytest.mark.parametrize("steer", [caught, value_caught])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_check_that_the_program_may_catch_steers_it(steer, value):
    """Whether it fails or not."""
    with Provenance() as provenance:
        z = provenance.tag("z", torch.tensor(value))
        steer(z)
        assert provenance.names(provenance.escaped) == ["z"]


@pytest.mark.parametrize("steer", [caught, value_caught])
def test_the_tests_see_it_if_what_may_be_caught_is_not_asked(steer, monkeypatch):
    monkeypatch.setattr(argument_checks, "may_be_caught", lambda: False)
    with Provenance() as provenance:
        steer(provenance.tag("z", torch.tensor(0.0)))
        assert provenance.escaped == 0


def test_a_check_that_nothing_catches_steers_nothing():
    def guide():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("p", dist.Dirichlet(z + torch.ones(2)))
        return z

    def model():
        pyro.sample("x", dist.Bernoulli(probs=0.5 * guide()), obs=torch.tensor(0.0))

    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()})
    elbo.loss_and_grads(model, guide)
    (structure,) = elbo._structures._known.values()
    assert structure.read_at is None and structure.reusable


def test_a_check_of_the_users_is_watched():
    """One that keeps what it reads, as a constraint may."""
    kept = []

    class Keeping(constraints.Constraint):
        def check(self, value):
            kept.append(float(value.sum()))
            return torch.ones((), dtype=torch.bool)

    class Mine(dist.Normal):
        arg_constraints = {"loc": Keeping(), "scale": constraints.positive}

    with Provenance() as provenance:
        Mine(drawn(provenance), 1.0)
        assert provenance.names(provenance.escaped) == ["z"] and kept


def test_a_constraint_of_the_users_in_a_law_of_the_hosts_is_watched(monkeypatch):
    kept = []

    class Keeping(constraints.Constraint):
        def check(self, value):
            kept.append(float(value.sum()))
            return torch.ones((), dtype=torch.bool)

    monkeypatch.setattr(dist.Normal, "arg_constraints", {"loc": Keeping()})
    with Provenance() as provenance:
        dist.Normal(drawn(provenance), 1.0)
        assert provenance.names(provenance.escaped) == ["z"] and kept


def test_another_density_in_the_place_of_a_known_one_is_watched(monkeypatch):
    kept = []

    def log_prob(self, value):
        kept.append(float(self.loc.sum()))
        return self.loc

    monkeypatch.setattr(dist.Normal, "log_prob", log_prob)
    with Provenance() as provenance:
        known_densities.log_density(dist.Normal(drawn(provenance), 1.0), torch.zeros(3))
        assert provenance.names(provenance.escaped) == ["z"] and kept


def test_nothing_is_unknown_under_vmap():
    """Where tensors are wrapped, and checks are off, since they could not read."""
    with Provenance() as provenance:
        z = drawn(provenance)
        found = torch.vmap(lambda x: dist.Normal(x, 1.0, validate_args=False).log_prob(x))(z)
        assert provenance.names(provenance.of(found)) == ["z"] and provenance.unfollowed_at is None


def test_the_checks_are_back_after_a_step_in_every_thread():
    before = Distribution.__init__, Distribution._validate_sample

    def step():
        def run():
            pyro.sample("z", dist.Bernoulli(0.5))

        TraceGrad_ELBO(estimators={"z": ScoreFunction()}).loss_and_grads(run, run)

    inside = threading.Event(), threading.Event()

    def other():
        with Provenance():
            inside[0].set()
            inside[1].wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    inside[0].wait(60)
    step()
    assert Distribution.__init__ is not before[0]
    inside[1].set()
    thread.join()
    assert (Distribution.__init__, Distribution._validate_sample) == before


def test_a_check_that_fails_still_fails():
    def run():
        pyro.sample("z", dist.Bernoulli(probs=torch.tensor(1.5)))

    with pytest.raises(ValueError, match="parameter probs"):
        TraceGrad_ELBO().loss_and_grads(run, run)
