"""Python that is steered by what a relaxed value was made into, and derivatives that are cut along it: refused, and nothing else is."""

import concurrent.futures
import copy

import pyro
import pyro.distributions as dist
import pytest
import torch

from pplgrad import REBAR, RELAX, EstimatorError, GumbelSoftmax, MuProp, ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from tests.pyro.jumps import CONTINUOUS, JUMPING, LAWS, OBSERVED

COUNT = torch.tensor(3)
POOL = concurrent.futures.ThreadPoolExecutor(1)


def counted(z):
    """A loop that runs as often as the value says."""
    count = 0.0
    while count < 3 * z + 0.5:
        count += 1.0
    return torch.tensor(count)


STEERED = {
    "while": counted,
    "if": lambda z: torch.tensor(1.0 if z + 1.0 > 1.5 else 2.0),
    "if, without a gradient": lambda z: torch.tensor(1.0 if (3 * z).detach() > 1.5 else 2.0),
    "range": lambda z: sum((torch.ones(()) for _ in range(int(3 * z + 0.5))), torch.zeros(())),
    "a list": lambda z: torch.tensor([1.0, 2.0, 3.0][int(2 * z)]),
    "numbers": lambda z: torch.as_tensor((2 * z).detach().numpy()).round(),
}
FREE = {
    "a loop that counts": lambda z: sum(2 * z for _ in range(3)),
    "another value": lambda z: 2 * z if COUNT > 2 else z,
    "a comparison that a density makes": lambda z: torch.nn.functional.softplus(2 * z) + (z + 0.5).clamp(min=0.2),
}


def step(change, estimator):
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(change(z * 1.0), 1.0), obs=torch.tensor(0.7))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    return TraceGrad_ELBO(estimators={"z": estimator}).loss_and_grads(model, guide)


@pytest.mark.grid
@pytest.mark.parametrize("estimator", [REBAR(learn=False), GumbelSoftmax(), MuProp()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", STEERED)
def test_what_is_steered_by_a_relaxed_value_is_refused(name, estimator):
    with pytest.raises(EstimatorError, match="Site 'z'"):
        step(STEERED[name], estimator)
    step(STEERED[name], ScoreFunction())


@pytest.mark.parametrize("name", FREE)
def test_what_is_not_steered_by_it_runs(name):
    step(FREE[name], REBAR(learn=False))


def without_gradient(z):
    with torch.no_grad():
        return 2 * z


def logged(z):
    LOGGED.append(z.detach())
    return z * 2.0


LOGGED = []
CUT = {
    "detach": lambda z: z.detach(),
    "detach of what was computed": lambda z: (2 * z + 1).detach() * 0.5,
    "detach of a part": lambda z: z[None].detach()[0] + z,
    "data": lambda z: z.data * 2.0,
    "no_grad": without_gradient,
    "where": lambda z: torch.where(2 * z > 0.7, 1.0, 0.2),
    "a truth value": lambda z: (z + 1.0 > 1.5) * 1.0,
    "whole numbers": lambda z: (2 * z).long() * 1.0,
    "a copy that forgets": lambda z: copy.deepcopy((z * 1.0).detach()),
    "legacy": lambda z: torch.zeros(1).new([2 * z])[0],
    "DLPack": lambda z: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack((2 * z).detach())),
    "set": lambda z: torch.zeros(()).set_((2 * z).detach()),
    "a thread": lambda z: POOL.submit(lambda: 2 * z).result(),
    "in a branch of the value": lambda z: torch.where(torch.tensor(True), z.detach() * 2, z),
}
WHOLE = {
    "what is only looked at": logged,
    "written": lambda z: torch.zeros(2).index_fill(0, torch.tensor([0]), 1.0).mul_(2 * z)[0],
    "softplus and relu": lambda z: torch.nn.functional.softplus(2 * z) + torch.relu(z - 0.3) + (z - 0.1).abs(),
    "half a normal": lambda z: (
        dist.HalfNormal(0.3 + z).log_prob(torch.tensor(0.4)) + dist.Laplace(2 * z, 1.0).log_prob(torch.tensor(0.4))
    ),
    "logsumexp": lambda z: torch.logsumexp(torch.stack([z, 2 * z]), 0),
    "clamped probabilities": lambda z: dist.Bernoulli(probs=0.2 + 0.5 * z).log_prob(torch.tensor(1.0)),
}


@pytest.mark.grid
@pytest.mark.filterwarnings("ignore:Converting a tensor")
@pytest.mark.parametrize("estimator", [REBAR(learn=False), RELAX()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("name", CUT)
def test_a_derivative_that_is_cut_is_refused_where_it_is_needed(name, estimator):
    with pytest.raises(EstimatorError, match="Site 'z' is relaxed, but the program cuts the derivative"):
        step(CUT[name], estimator)
    # These are right whatever the derivative is, or promise nothing.
    for other in (MuProp(), GumbelSoftmax(), ScoreFunction(), RELAX(through_cost=False)):
        step(CUT[name], other)


@pytest.mark.parametrize("name", WHOLE)
def test_a_derivative_that_is_whole_is_not_refused(name):
    step(WHOLE[name], REBAR(learn=False))


@pytest.mark.grid
@pytest.mark.parametrize("estimator", [REBAR(), REBAR(learn=False), RELAX()], ids=["rebar", "fixed", "relax"])
@pytest.mark.parametrize("name", JUMPING)
def test_what_jumps_is_refused(name, estimator):
    """A closed world: what is not known to be continuous, with a derivative that is its own, is a cut."""
    with pytest.raises(EstimatorError, match=r"Site 'z' is relaxed, but the program .*\(\w"):
        step(JUMPING[name], estimator)
    step(JUMPING[name], ScoreFunction())


@pytest.mark.parametrize("name", [*CONTINUOUS, *LAWS])
def test_what_is_continuous_is_not_refused(name):
    """The premise of the list holds, too: a function is the integral of its derivative."""
    function = {**CONTINUOUS, **LAWS}[name]
    step(function, REBAR(learn=False))
    if name != "half precision":
        points = (0.1 + 0.8 * (torch.arange(200.0) + 0.5) / 200).requires_grad_()
        slopes = [torch.autograd.grad(seeded(function, x), x)[0] for x in points.unbind()]
        rise = seeded(function, torch.tensor(0.9)) - seeded(function, torch.tensor(0.1))
        torch.testing.assert_close(0.8 * torch.stack(slopes).mean(), rise, atol=0.01, rtol=0.01)


def seeded(function, x):
    pyro.set_rng_seed(0)
    return function(x)


EXACT = ("leaky_relu", "largest", "order statistics", "logsumexp", "matrices")


@pytest.mark.grid(together="gradients of what is continuous")
@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_the_gradient_of_what_is_continuous(name):
    def law(z):
        return dist.Normal(CONTINUOUS[name](z), 1.0)

    def model():
        pyro.sample("x", law(pyro.sample("z", dist.Bernoulli(0.4)) * 1.0), obs=torch.tensor(0.7))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = TraceGrad_ELBO(estimators={"z": REBAR(learn=False)})
    found = []
    for _ in range(600):
        elbo.loss_and_grads(model, guide)
        found.append(pyro.param("a").grad.clone())
        pyro.param("a").grad = None
    a = torch.tensor(0.3, requires_grad=True)
    q, fit = a.sigmoid(), [law(torch.tensor(z)).log_prob(torch.tensor(0.7)) for z in (0.0, 1.0)]
    loss = q * (q / 0.4).log() + (1 - q) * ((1 - q) / 0.6).log() - (1 - q) * fit[0] - q * fit[1]
    draws = torch.stack(found)
    assert abs(draws.mean() - torch.autograd.grad(loss, a)[0]) < 4.5 * draws.std() / len(draws) ** 0.5


@pytest.mark.parametrize("name", OBSERVED)
def test_densities_at_a_site_are_not_refused(name):
    def model():
        law, value = OBSERVED[name](pyro.sample("z", dist.Bernoulli(0.4)) * 1.0)
        pyro.sample("x", law, obs=value)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    TraceGrad_ELBO(estimators={"z": REBAR(learn=False)}).loss_and_grads(model, guide)


@pytest.mark.parametrize("vectorized", [False, True])
def test_a_loss_without_gradient_cuts_nothing(vectorized):
    def model():
        pyro.sample("x", dist.Normal(2 * pyro.sample("z", dist.Bernoulli(0.4)), 1.0), obs=torch.tensor(0.7))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    elbo = TraceGrad_ELBO(2, vectorize_particles=vectorized, max_plate_nesting=0, estimators={"z": REBAR(learn=False)})
    for _ in range(3):
        elbo.loss(model, guide)
        elbo.loss_and_grads(model, guide)


FOLLOWING = {
    "detached": (lambda w: (2 * w).detach(), True),
    "compared": (lambda w: torch.where(w > 0.5, 1.0, 0.0), True),
    "steers": (lambda w: torch.tensor(1.0 if w > 0.5 else 0.0), True),
    "derived": (lambda w: torch.nn.functional.softplus(2 * w), False),
}


@pytest.mark.grid
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("name", FOLLOWING)
def test_a_continuous_site_that_follows(name, above):
    """Its path is part of the relaxed cost's slope where it follows; elsewhere it is Reparam's own affair."""
    change, cuts = FOLLOWING[name]

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        w = pyro.sample("w", dist.Normal(z if above else torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(change(w) + z, 1.0), obs=torch.tensor(0.7))

    def guide():
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))
        pyro.sample("w", dist.Normal(z if above else torch.zeros(()), 1.0))

    elbo = TraceGrad_ELBO(estimators={"z": REBAR(learn=False)})
    if above and cuts:
        with pytest.raises(EstimatorError, match="Site 'w'.*at site 'z'"):
            elbo.loss_and_grads(model, guide)
    else:
        elbo.loss_and_grads(model, guide)


@pytest.mark.parametrize("estimator", [REBAR(), RELAX()], ids=lambda e: type(e).__name__)
def test_a_hidden_draw_from_a_relaxed_value_is_refused(estimator):
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        w = pyro.poutine.block(lambda: pyro.sample("w", dist.Bernoulli(0.2 + 0.6 * z)))()
        pyro.sample("x", dist.Normal(3 * w, 1.0), obs=torch.tensor(0.7))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    with pytest.raises(EstimatorError, match="Site 'z'"):
        TraceGrad_ELBO(estimators={"z": estimator}).loss_and_grads(model, guide)
