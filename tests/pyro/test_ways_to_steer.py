"""Ways in which a draw steers Python that no value shows: an error that is caught, memory that NumPy sees, weights of zero."""

import contextlib
import ctypes

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import pytest
import torch

from pplgrad import ELBO, ConfigurationError, LeaveOneOut, LocalExpectation, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._tracing.callers import _covered
from pplgrad.testing.in_pyro import assert_same, exact_gradient, expected_gradient
from pplgrad.testing.programs import Case
from tests.pyro.test_provenance import found_of, reads_of


def numpy_s_view(z):
    buffer = torch.zeros(1)
    view = buffer.numpy()
    buffer[0] = z
    return torch.tensor(float(view[0]))


def numpy_s_memory(z):
    memory = np.zeros(1)
    torch.from_numpy(memory)[0] = z
    return torch.from_numpy(memory * 1.0)[0].float()


HELD = np.zeros(1)
SHOWN = torch.from_numpy(HELD)


def memory_held_outside(z):
    SHOWN.copy_(z)
    return torch.tensor(float(HELD[0]))


def an_address(z):
    buffer = torch.zeros(1)
    place = buffer.data_ptr()
    buffer[0] = z
    return torch.tensor(ctypes.c_float.from_address(place).value)


def by_dlpack(z):
    buffer = torch.zeros(1)
    view = np.from_dlpack(buffer)
    buffer[0] = z
    return torch.tensor(float(view[0]))


def by_buffer(z):
    memory = bytearray(4)
    torch.frombuffer(memory, dtype=torch.float32)[0] = z
    return torch.tensor(float(np.frombuffer(memory, np.float32)[0]))


def jitter(z):
    try:
        torch.linalg.cholesky(torch.diag(torch.stack([torch.ones(()), 0.5 - z])))
    except RuntimeError:
        return torch.tensor(1.0)
    return torch.tensor(0.0)


def out_of_range(z):
    try:
        torch.ones(2).gather(0, 2 * z.long()[None])
    except RuntimeError:
        return torch.tensor(1.0)
    return torch.tensor(0.0)


def a_check(z):
    try:
        dist.MultivariateNormal(torch.zeros(2), torch.diag(torch.stack([torch.ones(()), 0.5 - z])), validate_args=True)
    except ValueError:
        return torch.tensor(1.0)
    return torch.tensor(0.0)


def suppressed(z):
    with contextlib.suppress(ValueError):
        dist.Normal(0.0, 0.5 - z, validate_args=True)
        return torch.tensor(0.0)
    return torch.tensor(1.0)


def caught_further_out(z):
    def check():
        dist.Normal(0.0, 0.5 - z, validate_args=True)

    try:
        check()
    except ValueError:
        return torch.tensor(1.0)
    return torch.tensor(0.0)


STEERING = [numpy_s_view, numpy_s_memory, memory_held_outside, an_address, by_dlpack, by_buffer, jitter, out_of_range]
STEERING += [a_check, suppressed, caught_further_out]


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:The given buffer")
@pytest.mark.parametrize("outcome", [0, 1])
@pytest.mark.parametrize("way", STEERING, ids=lambda way: way.__name__)
def test_what_steers_is_charged_whatever_comes_out(way, outcome, monkeypatch):
    plain = torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda p, *more, **given: 0 * plain(p, *more, **given) + outcome)
    layouts, _ = found_of(*reads_of(way), monkeypatch)
    assert "z1" in layouts[-1]["x"]


def test_a_check_of_arguments_outside_of_try_steers_nothing(monkeypatch):
    def way(z):
        with pyro.poutine.scale(scale=2.0):
            pyro.sample("y", dist.Normal(0.0, z + 1.0, validate_args=True), obs=torch.tensor(1.0))
        return torch.tensor(1.0)

    layouts, _ = found_of(*reads_of(way), monkeypatch)
    assert layouts[-1]["x"] == set() and layouts[-1]["y"] == {"z1"}


def test_where_code_catches():
    def plain():
        return str(1)

    def tried():
        try:
            return str(1)
        except ValueError:
            return str(2)

    def managed():
        with pyro.plate("data", 2):
            return str(1)

    assert not _covered(plain.__code__) and not _covered(managed.__code__) and _covered(tried.__code__)


@pytest.mark.parametrize("kind", ["python", "argument"])
def test_a_cost_with_a_weight_of_zero_keeps_its_dependencies(kind):
    """KL annealing from zero: the weight is another one at a later step, and what the costs depend on is not."""
    now = {"weight": 0.0}

    def model(weight=None):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(3 * z, 1.0), obs=torch.tensor(2.0))

    def guide(weight=None):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    weight = (lambda w: float(w)) if kind == "argument" else (lambda *_: now["weight"])
    args = lambda: (torch.tensor(now["weight"]),) if kind == "argument" else ()  # noqa: E731

    def gradient(elbo):
        pyro.clear_param_store()
        elbo.loss_and_grads(model, guide, *args())
        return pyro.get_param_store()._params["a"].grad.clone()

    made = lambda: TraceGrad_ELBO(estimators={"z": LocalExpectation()}, objective=ELBO(kl_weight=weight))  # noqa: E731
    kept = made()
    for _ in range(6):
        gradient(kept)
    for now["weight"] in (1.0, 0.5, 0.0, 1.0):
        torch.testing.assert_close(gradient(kept), gradient(made()))


@pytest.mark.parametrize("size", [len, torch.numel, lambda z: z.shape[0], lambda z: torch.ones_like(z).sum()])
def test_a_size_that_python_reads_has_no_particles_in_it(size):
    """Which dimension is whose shows in no operation: a particle by itself is compared with those that run together."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.4)).to_event(1))
        pyro.sample("x", dist.Normal(3 * z.sum(-1) / size(z), 0.5), obs=torch.tensor(1.2))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.full((3,), 9.0))).to_event(1))

    elbo = TraceGrad_ELBO(2, 0, vectorize_particles=True, estimators={"z": LocalExpectation()})
    with pytest.warns(UserWarning, match="site 'x' mixes particles"):
        elbo.loss_and_grads(model, guide)


def test_a_size_is_not_taken_on_trust_where_no_particle_can_be_compared():
    """Dropout is another one when a particle runs by itself, of consequence or not."""

    def model():
        torch.nn.functional.dropout(torch.ones(4), 0.5)
        z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).to_event(1))
        pyro.sample("x", dist.Normal(3 * z.sum(-1) / len(z), 0.5), obs=torch.tensor(0.7))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor([0.3, -0.5]))).to_event(1))

    case = Case("sized", {"a": np.array([0.3, -0.5])}, {"z": ((2,), 2)}, lambda host: (model, guide))

    def elbo():
        chosen = {"z": ScoreFunction(LeaveOneOut())}
        return TraceGrad_ELBO(3, max_plate_nesting=0, vectorize_particles=True, estimators=chosen)

    with pytest.warns(UserWarning, match="reads the size of a draw at .*test_ways_to_steer.*run one by one"):
        found = expected_gradient(case, elbo, 3)
    assert_same(found, exact_gradient(case))


@pytest.mark.parametrize("kind", ["planar", "radial", "sylvester"])
def test_a_flow_remembers_the_inverse_of_its_draw(kind):
    make = {"planar": transforms.planar, "radial": transforms.radial, "sylvester": transforms.sylvester}[kind]
    flow = make(2)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.module("flow", flow)
        pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    elbo = TraceGrad_ELBO()
    assert all(elbo.loss_and_grads(model, guide) < 1e6 for _ in range(4))


@pytest.mark.parametrize("weight", [-1.0, None, "1", torch.ones(3), float("nan")], ids=str)
def test_a_weight_that_is_no_weight_is_refused(weight):
    def program():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    elbo = TraceGrad_ELBO(objective=ELBO(kl_weight=lambda: weight))
    with pytest.raises(ConfigurationError, match="weight"):
        elbo.loss_and_grads(lambda: pyro.sample("z", dist.Bernoulli(0.3)), program)
