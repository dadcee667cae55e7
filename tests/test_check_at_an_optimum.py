"""`check_gradients` where a guide has reached the posterior: all that cancels leaves rounding errors, which are no bias."""

import numpy as np
import pytest

from pplgrad import DisARM, LeaveOneOut, ScoreFunction
from pplgrad.diagnostics.certificate import Reference, certify
from pplgrad.testing.programs import CASES
from tests.assessed import in_numpyro, in_pyro
from tests.covering import mostly

ESTIMATORS = {"score": ScoreFunction(), "leave-one-out": ScoreFunction(LeaveOneOut()), "DisARM": DisARM()}
PRIOR = 0.4
SOME = ("single", "subsampled", "masked", "one_hot", "five", "coupled_plate", "model_only_plate")


def optimum(x):
    """Return the log odds of the posterior of z, z ~ Bernoulli(PRIOR), x | z ~ Normal(2 z, 1)."""
    return np.log(PRIOR / (1 - PRIOR)) + 2 * x - 2


@pytest.fixture(params=[in_pyro, in_numpyro], ids=["pyro", "numpyro"])
def host(request):
    return request.param()


def checked(host, x, logits, estimator, particles, **given):
    """Check an estimator of z in single precision, where the guide's log odds are `logits`."""
    ppl, dist = host.ppl, host.dist
    data, start = (host.as_is(np.asarray(values, np.float32)) for values in (x, logits))

    def model():
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Bernoulli(PRIOR))
            ppl.sample("x", dist.Normal(2 * z, 1.0), obs=data)

    def guide():
        with ppl.plate("data", len(x)):
            ppl.sample("z", dist.Bernoulli(logits=ppl.param("a", start)))

    return host.plugin.check_gradients(
        model, guide, num_particles=particles, estimators={"z": estimator}, warm_up=0, draws=1000, **given
    )


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATORS)
def test_rounding_errors_at_the_optimum_are_no_bias(host, name):
    particles = 4 if name == "leave-one-out" else 1
    for number in (2, 3):  # At these, rounding errors alone are called a bias unless what draws do not show is known.
        x = np.random.default_rng(number).normal(1.0, 1.5, 3)
        near = optimum(x) + 10.0 ** -(4 + number)
        found = checked(host, x, near, ESTIMATORS[name], particles, seed=number)
        assert found.status != "biased", str(found)
        if name == "leave-one-out" and number == 3:
            assert found.status == "unbiased" and "rounding may make" in found.verdict, str(found)


def test_a_bias_above_rounding_is_found_at_the_optimum():
    """Draws that scatter by rounding alone: a bias of ten times its size is told, one of its size is not."""
    exact = np.full(3, 1e-8)

    def draws(bias):
        def some(count, seed):
            rng = np.random.default_rng(seed)
            yield bias + 1e-6 * rng.choice([-1.0, 0.0, 1.0], (count, 3))

        return some

    numbers = {"count": 1000, "level": 0.01, "tolerance": 0.05, "rounding": 3e-4, "seed": 0}
    blocks = {("parameter", "a"): np.arange(3)}
    asked = []

    def rounding(draws):
        asked.append(draws)
        return np.full(3, 1e-6), np.zeros(3)

    def status(bias, **given):
        return certify("it", draws(bias), Reference("as good as zero", exact=exact), blocks, **numbers, **given).status

    assert status(1e-6) == status(1e-6, unseen_error=lambda draws: (np.zeros(3), np.zeros(3))) == "biased"
    assert status(1e-6, unseen_error=rounding) == "unbiased" and asked == [500]
    assert status(1e-5, unseen_error=rounding) == "biased"
    # Rare values may explain an error, and do not say that there is none.
    assert status(1e-6, unseen_error=lambda draws: (np.zeros(3), np.full(3, 1e-6))) == "unknown"
    # What is not finite says nothing.
    assert status(1e-6, unseen_error=lambda draws: (np.full(3, np.inf), np.zeros(3))) == "biased"


@pytest.mark.slow
def test_values_that_no_draw_met_are_no_bias(host):
    """A value of probability 0.0005 or 0.001 is worth as much as all others together, and most halves of the draws lack it."""
    for number, odds in enumerate((-7.6, -6.9)):
        found = checked(host, [0.0], [odds], ScoreFunction(), 1, seed=number)
        assert found.status == "unknown", str(found)


def hosts_of(name):
    """Return both plug-ins' draws of a program of the tests."""
    import jax

    from pplgrad.core.program import Program
    from pplgrad.numpyro._diagnostics.gradient_draws import Gradients as InNumPyro
    from pplgrad.pyro._diagnostics.gradient_draws import Gradients as InPyro
    from pplgrad.testing import in_numpyro as numpyros
    from pplgrad.testing import in_pyro as pyros

    case = CASES[name]
    pyros.fresh(case)
    with InPyro(Program(*case.build(pyros.HOST), (), {})) as mine:
        yield mine
    with jax.enable_x64(True):
        yield InNumPyro(Program(*case.build(numpyros.HOST), (), {}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Missing a plate statement")
@pytest.mark.parametrize("name", mostly(SOME, sorted(CASES)))
def test_what_variance_does_not_show_is_known_of_every_program(name):
    """Finite, of the size of double precision, and alike in both libraries but for what they draw."""
    some = []
    for host in hosts_of(name):
        rounding, rare = host.unseen_error(10**9)
        # Values below 0.4, of which every binary site has one.
        _, less = host.unseen_error(25)
        assert np.isfinite(less).all() and 0 < np.linalg.norm(rounding) < 1e-9
        assert np.linalg.norm(rare) < 1e-6 * (1 + np.linalg.norm(rounding) / np.finfo(float).eps)
        some.append(np.linalg.norm(less) > 1e-6)
    assert some[0] == some[1]
