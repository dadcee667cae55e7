"""Paths that leave a plate and come back, or mix its elements inside, in NumPyro: every estimator is exact, or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import SVI, TraceGraph_ELBO
from numpyro.optim import Adam

from pplgrad import IWAE, VIMCO, LocalExpectation, ProgramError, Renyi, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO, check_gradients, config_estimators, is_baseline_param
from pplgrad.numpyro._tracing import provenance, specification
from pplgrad.numpyro._tracing.axis_rules import _RULES
from pplgrad.testing.in_numpyro import (
    HOST,
    array,
    assert_same,
    exact_bound_gradient,
    exact_gradient,
    expected_gradient,
    gradient_error,
    z_score,
)
from pplgrad.testing.programs import Case
from pplgrad.testing.reentering import REENTERED
from tests.bounds import bound
from tests.numpyro.test_axes import keeps_all
from tests.numpyro.test_check import still_there
from tests.reentering import BASELINES, BRANCHED, LEARNED, PAIRS, RANDOM, REFUSED, pairs, scored

pytestmark = pytest.mark.filterwarnings("ignore:Missing a plate statement")


@pytest.mark.grid(together="reentered in NumPyro")
@pytest.mark.parametrize("name", scored())
def test_exact(name):
    assert gradient_error(REENTERED[name], ScoreFunction(), 1, False) < 1e-9


@pytest.mark.grid(together="reentered in NumPyro")
@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", BASELINES)
def test_exact_with_a_baseline(kind, name):
    baseline, particles = BASELINES[kind]
    assert gradient_error(REENTERED[name], ScoreFunction(baseline), particles, True) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "reentered_plate") for kind in LEARNED), ("network", "mixed_in_one_of_two")]
    + [(kind, "reentered_subsampled") for kind in ("network", "average-per-element")],
)
def test_exact_with_what_a_baseline_has_learned(kind, name):
    case = REENTERED[name]
    chosen = dict.fromkeys(case.latents, ScoreFunction(LEARNED[kind]))
    model, guide = case.build(HOST)
    result = SVI(model, config_estimators(guide, chosen), Adam(0.05), TraceGrad_ELBO()).run(
        jax.random.key(0), 5, progress_bar=False
    )
    extra = {n: v for n, v in result.params.items() if is_baseline_param(n)} | (result.state.mutable_state or {})
    found = expected_gradient(case, TraceGrad_ELBO(), 1, lambda g: config_estimators(g, chosen), extra)
    assert_same(found, exact_gradient(case))


@pytest.mark.grid(together="reentered in NumPyro")
@pytest.mark.slow
@pytest.mark.parametrize(("short", "name"), pairs(BRANCHED))
def test_exact_with_branches(short, name):
    assert gradient_error(REENTERED[name], BRANCHED[short][0], 1, False) < 1e-9


@pytest.mark.grid(together="reentered in NumPyro")
@pytest.mark.slow
@pytest.mark.parametrize(("short", "name"), pairs(RANDOM))
def test_unbiased(short, name):
    assert z_score(REENTERED[name], RANDOM[short][0], 1, False, 20_000, 0) < 4.5


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("objective", [IWAE(), Renyi(0.5)], ids=["iwae", "renyi"])
def test_weights_of_elements_are_refused(name, objective):
    model, guide = REENTERED[name].build(HOST)
    elbo = TraceGrad_ELBO(2, estimators={"*": VIMCO()}, objective=objective)
    with pytest.raises(ProgramError, match=REFUSED[name]):
        elbo.loss(jax.random.key(0), {}, model, guide)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reentered_plate", "mixed_in_plate_sum", "mixed_by_site"])
def test_weights_of_the_whole_are_exact(name):
    case = REENTERED[name]
    elbo = TraceGrad_ELBO(2, estimators=dict.fromkeys(case.latents, VIMCO()), objective=IWAE(plates=()))
    assert_same(expected_gradient(case, elbo, 2), exact_bound_gradient(case, bound(1.0), 2, 0))


PARAMS = {"a": np.array([0.3, -0.6, 0.9, 0.4, -1.1]), "b": np.array([-0.2, 0.9, 1.3, -0.7])}
SLOPES, OBSERVED = np.array([1.0, 2.0]), np.array([[0.7, -1.0], [0.2, 0.9]])
SIZE = {"g": 2, "z": 4, "w": 4}


def bern(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def params():
    return (numpyro.param(name, array(value)) for name, value in PARAMS.items())


def plate():
    return numpyro.plate("p", 2)


def decided_at_each_step(reverse=False):
    """The decision of a step reads the plate of the step, and is carried on to the next."""

    def model():
        _, b = params()

        def step(g, x):
            with plate():
                z = bern("z", b[0] + b[1] * g)
                numpyro.sample("x", dist.Normal(g * SLOPES + b[2] * z, 1.0), obs=x)
            return bern("g", b[3]), None

        scan(step, jnp.zeros((), int), array(OBSERVED), reverse=reverse)

    def guide():
        a, _ = params()

        def step(g, _):
            with plate():
                z = bern("z", a[:2] + a[2] * g)
            return bern("g", a[3] * z.sum() + a[4]), None

        scan(step, jnp.zeros((), int), None, length=2, reverse=reverse)

    return model, guide, {"z": ((2, 2), 2), "g": ((2,), 2)}


def exchanged_at_each_step():
    """The next step's elements read those of this step the other way round."""

    def model():
        _, b = params()

        def step(z, x):
            with plate():
                z = bern("z", b[0] + b[1] * z[::-1])
                numpyro.sample("x", dist.Normal(b[2:] * z, 1.0), obs=x)
            return z, None

        scan(step, jnp.zeros(2, int), array(OBSERVED))

    def guide():
        a, _ = params()

        def step(z, _):
            with plate():
                z = bern("z", a[:2] + a[2] * z[::-1])
            return z, None

        scan(step, jnp.zeros(2, int), None, length=2)

    return model, guide, {"z": ((2, 2), 2)}


def after_a_scan():
    """The last carry decides outside of the scan, and the data stand in the plate."""

    def model():
        _, b = params()
        zs = scan(lambda z, _: ((z := _in_plate("z", b[0] + b[1] * z)), z), jnp.zeros(2, int), None, length=2)[1]
        g = bern("g", b[2])
        with plate():
            numpyro.sample("x", dist.Normal(g * SLOPES + 0.3 * zs[0], 1.0), obs=array(OBSERVED[0]))

    def guide():
        a, _ = params()
        last, _ = scan(lambda z, _: ((z := _in_plate("z", a[:2] + a[2] * z)), z), jnp.zeros(2, int), None, length=2)
        bern("g", a[3] * last.sum() + a[4])

    return model, guide, {"z": ((2, 2), 2), "g": ((), 2)}


def _in_plate(name, logits):
    with plate():
        return bern(name, logits)


def simple(read, latents=None):
    """Return a plate whose data are observed by `read(z, b)`."""

    def model():
        _, b = params()
        with plate():
            z = bern("z", b[0])
            read(z, b)

    def guide():
        a, _ = params()
        with plate():
            bern("z", a[:2])

    return model, guide, latents or {"z": ((2,), 2)}


def observe(loc, x=OBSERVED[0]):
    numpyro.sample("x", dist.Normal(loc, 1.0), obs=array(x))


def scaled_by(read):
    return lambda z, b: handlers.scale(lambda: observe(b[2:]), scale=read(z))()


def masked_by(read):
    return lambda z, b: handlers.mask(lambda: observe(b[2:]), mask=read(z))()


def by_loop(z, b):
    """An element reads those before it, through a loop of the program's own along the plate."""
    observe(b[2:] * jax.lax.scan(lambda c, x: (c + x, c), 0.0, 1.0 * z)[1])


def by_branch(z, b):
    """One element decides which numbers all are compared with."""
    observe(jax.lax.cond(z[0] > 0, lambda: b[2:], lambda: b[:2]))


def by_distribution(z, b):
    """A covariance between the elements makes them one joint event, outside of the plate; the plate's data read its draws."""
    observe(b[2:] * jnp.linalg.solve(jnp.array([[2.0, 0.3], [0.3, 1.0]]), 1.0 * z))


def branching_sites():
    """A branch of the program, chosen by an element, draws or does not."""

    def model():
        _, b = params()
        with plate():
            z = bern("z", b[0])
        cond(z[0] > 0, lambda _: bern("g", b[1]), lambda _: bern("g", b[2]), None)
        with plate():
            observe(z * b[2:])

    def guide():
        a, _ = params()
        with plate():
            z = bern("z", a[:2])
        cond(z.sum() > 0, lambda _: bern("g", a[2]), lambda _: bern("g", a[3]), None)

    return model, guide, {"z": ((2,), 2), "g": ((), 2)}


def guide_scaled_by_draws():
    """The guide's own density of w is scaled by what the other element draws."""

    def program(logits, more):
        with plate():
            z = bern("z", logits[:2])
            with handlers.scale(scale=1.0 + more * z[::-1]):
                w = bern("w", logits[2:4] * (1 - z))
        return z, w

    def model():
        _, b = params()
        _, w = program(b, 0.0)
        with plate():
            observe(w * SLOPES)

    return model, lambda: program(next(params()), 0.5), {"z": ((2,), 2), "w": ((2,), 2)}


def other_dimension():
    """The model has the plate in another dimension than the guide: no element there is the draw's own."""

    def model():
        _, b = params()
        with numpyro.plate("q", 2, dim=-2), plate():
            z = bern("z", b[0] + jnp.zeros((2, 1)))
            numpyro.sample("x", dist.Normal(b[2:] * z.T, 1.0), obs=array(OBSERVED))

    def guide():
        a, _ = params()
        with numpyro.plate("q", 2, dim=-2), plate():
            bern("z", jnp.stack([a[:2], a[2:4]]))

    return model, guide, {"z": ((2, 2), 2)}


PROGRAMS = {
    "decided-at-each-step": decided_at_each_step(),
    "decided-in-reverse": decided_at_each_step(True),
    "exchanged-at-each-step": exchanged_at_each_step(),
    "after-a-scan": after_a_scan(),
    "scale": simple(scaled_by(lambda z: 1.0 + z[::-1])),
    "mask": simple(masked_by(lambda z: z[::-1] > 0)),
    "loop": simple(by_loop),
    "branch": simple(by_branch),
    "solve": simple(by_distribution),
    "cond": branching_sites(),
    "guide-scaled": guide_scaled_by_draws(),
    "other-dimension": other_dimension(),
}


def as_case(name):
    model, guide, latents = PROGRAMS[name]
    return Case(name, PARAMS, latents, lambda _: (model, guide))


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_exact_through_what_numpyro_alone_has(name):
    assert gradient_error(as_case(name), ScoreFunction(), 1, False) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scale", "mask", "loop", "guide-scaled"])
def test_exact_with_branches_through_what_numpyro_alone_has(name):
    assert gradient_error(as_case(name), LocalExpectation(), 1, False) < 1e-9


BROKEN = {
    "cumsum": "mixed_cumulative",
    "rev": "mixed_reverse",
    "sort": "mixed_sorted",
    "transpose": "mixed_transposed",
}


@pytest.mark.slow
@pytest.mark.parametrize("operation", BROKEN)
def test_an_operation_that_counts_as_elementwise_is_caught(operation, monkeypatch):
    assert operation in _RULES
    keeps_all(operation)(monkeypatch)
    assert gradient_error(REENTERED[BROKEN[operation]], ScoreFunction(), 1, False) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed_in_plate_sum", "mixed_by_site", "mixed_in_data", "mixed_matrix"])
def test_elements_taken_for_independent_are_caught(name, monkeypatch):
    plain = specification._aligned

    def aligned(*given):
        return {site: read._replace(across=frozenset()) for site, read in plain(*given).items()}

    monkeypatch.setattr(specification, "_aligned", aligned)
    assert gradient_error(REENTERED[name], ScoreFunction(), 1, False) > 1e-6


def test_a_lost_event_dimension_is_caught(monkeypatch):
    plain = provenance.SitePlates.axes
    monkeypatch.setattr(
        provenance.SitePlates, "axes", lambda self, shape: plain(provenance.SitePlates(self.plates, 0), shape)
    )
    assert gradient_error(REENTERED["mixed_over_events"], ScoreFunction(), 1, False) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reentered_plate", "mixed_in_plate_sum", "mixed_matrix"])
def test_it_finds_that_tracegraph_takes_one_element_of_what_comes_back(name):
    """NumPyro 0.22's own `TraceGraph_ELBO` charges an element with its own costs alone, however these depend on it."""
    model, guide = REENTERED[name].build(HOST)
    start = {key: np.asarray(value) + 0.7 for key, value in REENTERED[name].params.items()}
    if name == "reentered_plate":
        start = {"a": np.array([0.4, -0.3, -1.0, 2.0]), "b": np.array([0.0, 0.0, 1.0, 2.0])}
    found = check_gradients(model, guide, elbo=TraceGraph_ELBO(), params=start, draws=8000)
    still_there(found, "costs of other elements of a plate")
    assert check_gradients(model, guide, params=start, draws=8000, tolerance=0.3).status == "unbiased"
