"""Sites inside `cond`, control flow under `scope`, and distributions that do not declare what they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import Adam

from pplgrad import EstimatorError, OptimalConstant, ProgramError, ScoreFunction
from pplgrad.core.program import Program
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.numpyro._tracing.particle_trace import _score_squared
from pplgrad.testing.in_numpyro import array, assert_same, exact_gradient, expected_gradient
from pplgrad.testing.programs import Case

PARAMS = {"a": np.array([0.3, 0.8]), "b": np.array([-0.2, 0.9, 1.3])}
DATA = [0.2, -0.4]
KEY = jax.random.key(5)


def params():
    return {name: array(value) for name, value in PARAMS.items()}


def param(name):
    return numpyro.param(name, array(PARAMS[name]))


def bern(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def branches(name, z, weight):
    """Draw a site in one of two branches."""
    return cond(z == 1, lambda x: bern(name, weight * x), lambda x: bern(name, -weight * x), z + 1.0)


def flat(name, z, weight):
    return bern(name, jnp.where(z == 1, weight, -weight) * (z + 1.0))


def one_guide():
    bern("z", param("a")[0])


def two_guide(draw=branches):
    a = param("a")
    draw("w", bern("z", a[0]), a[1])


def two_model(draw=branches):
    b = param("b")
    w = draw("w", bern("z", b[0]), b[1])
    numpyro.sample("x", dist.Normal(b[2] * w, 1.0), obs=array(0.4))


def cost_in_branches():
    b = param("b")

    def one(x):
        numpyro.sample("x", dist.Normal(b[1] * x, 1.0), obs=array(0.3))

    def other(x):
        numpyro.sample("x", dist.Normal(b[2] * x, 2.0), obs=array(0.3))

    z = bern("z", b[0])
    cond(z == 1, one, other, z + 1.0)


def branch_in_scan_guide():
    a = param("a")

    def step(c, _):
        return branches("w", bern("z", a[0] + a[1] * c), a[1]), None

    scan(step, jnp.zeros((), int), None, length=2)


def scanned_model(draw=flat):
    b = param("b")

    def step(c, x):
        w = draw("w", bern("z", b[0] + b[1] * c), b[1])
        numpyro.sample("x", dist.Normal(b[2] * w, 1.0), obs=x)
        return w, None

    scan(step, jnp.zeros((), int), array(DATA))


class Undeclared(dist.Distribution):
    """A distribution as users write them: its parameter is not one of its declared arrays, nor is its support."""

    def __init__(self, loc):
        self.loc = loc
        super().__init__(jnp.shape(loc), ())

    def sample(self, key, sample_shape=()):
        return self.loc + jax.random.normal(key, (*sample_shape, *self.batch_shape))

    def log_prob(self, value):
        return -0.5 * (value - self.loc) ** 2


class Shift(dist.transforms.Transform):
    """A transform that cannot be flattened to arrays."""

    domain = codomain = dist.constraints.real

    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x + self.by

    def _inverse(self, y):
        return y - self.by

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return jnp.zeros_like(x)


def undeclared_model():
    b = param("b")
    numpyro.sample("x", Undeclared(b[2] * bern("z", b[0])), obs=array(0.4))


def shifted_model():
    b = param("b")
    shift = Shift(b[2] * bern("z", b[0]))
    numpyro.sample("x", dist.TransformedDistribution(dist.Normal(0.0, 1.0), shift), obs=array(0.4))


ONE, TWO = {"z": ((), 2)}, {"z": ((), 2), "w": ((), 2)}
CASES = {
    "cost-in-branches": (cost_in_branches, one_guide, ONE),
    "latent-in-branches-of-the-guide": (lambda: two_model(flat), two_guide, TWO),
    "branch-in-scan": (scanned_model, branch_in_scan_guide, {"z": ((2,), 2), "w": ((2,), 2)}),
    "undeclared-array": (undeclared_model, one_guide, ONE),
    "undeclared-transform": (shifted_model, one_guide, ONE),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_exact(name):
    model, guide, latents = CASES[name]
    case = Case(name, PARAMS, latents, lambda _: (model, guide))
    elbo = TraceGrad_ELBO(estimators=dict.fromkeys(latents, ScoreFunction()))
    assert_same(expected_gradient(case, elbo, 1), exact_gradient(case))


def gradient(model, guide, elbo=None):
    elbo = elbo or TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    return jax.jit(jax.value_and_grad(lambda p: elbo.loss(KEY, p, model, guide)))(params())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("branching", "plain"),
    [
        ((two_model, two_guide), (lambda: two_model(flat), two_guide)),
        ((lambda: scanned_model(branches), branch_in_scan_guide), (scanned_model, branch_in_scan_guide)),
    ],
    ids=["cond", "cond-in-scan"],
)
def test_branches_of_the_model_see_the_guides_values(branching, plain):
    """NumPyro replays no branch: its model goes on with a draw of its own, and the loss is that of no objective."""
    elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()})
    runs = [
        jax.jit(jax.value_and_grad(lambda p, key, m=m, g=g: elbo.loss(key, p, m, g))) for m, g in (branching, plain)
    ]
    for number in range(6):
        losses = [run(params(), jax.random.key(number)) for run in runs]
        for one, other in zip(*map(jax.tree.leaves, losses), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.slow
def test_reparameterized_branches_are_those_of_trace_elbo():
    def guide():
        m = param("a")
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))
        draw = lambda loc: numpyro.sample("x", dist.Normal(loc, 0.5))  # noqa: E731
        return cond(c > 0, lambda _: draw(m[0]), lambda _: draw(m[1]), None)

    def model():
        c = numpyro.sample("c", dist.Normal(0.0, 1.0))
        draw = lambda loc: numpyro.sample("x", dist.Normal(loc, 1.0))  # noqa: E731
        return cond(c > 0, lambda _: draw(20.0), lambda _: draw(0.0), None)

    found, wanted = gradient(model, guide, TraceGrad_ELBO(4)), gradient(model, guide, Trace_ELBO(4))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


def scoped(function):
    return handlers.scope(function, prefix="s", hide_types=["param"])


def chain_model(scope_inside=False):
    b = param("b")

    def step(z, x):
        z = bern("z", b[0] + b[1] * z)
        numpyro.sample("x", dist.Normal(b[2] * z, 1.0), obs=x)
        return z, None

    scan(scoped(step) if scope_inside else step, jnp.zeros((), int), array(DATA))


def chain_guide():
    a = param("a")

    def step(z, _):
        return bern("z", a[0] + a[1] * z), None

    scan(step, jnp.zeros((), int), None, length=2)


# SVI.init replays the whole guide trace into the scan, dicts of `mutable` and `flax_module` sites included.
@pytest.mark.filterwarnings("ignore:shape requires ndarray:DeprecationWarning")
@pytest.mark.slow
def test_scope_around_the_scan_of_a_guide():
    model = lambda: chain_model(scope_inside=True)  # noqa: E731
    wanted = gradient(chain_model, chain_guide)
    for guide in (
        scoped(chain_guide),
        scoped(config_estimators(chain_guide, {"z": ScoreFunction()})),
        config_estimators(scoped(chain_guide), {"s/z": ScoreFunction()}),
    ):
        for found in (
            gradient(model, guide),
            gradient(model, guide, TraceGrad_ELBO(estimators={"s/z": ScoreFunction()})),
        ):
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-12)
    for guide in (scoped(config_estimators(chain_guide)), config_estimators(scoped(chain_guide))):
        svi = SVI(model, guide, Adam(0.1), TraceGrad_ELBO())
        state, _ = svi.update(svi.init(KEY))
        assert set(state.mutable_state) == {"s/z$pplgrad.0.state"}
        assert state.mutable_state["s/z$pplgrad.0.state"]["weight"] > 0


def test_scope_around_the_scan_of_a_model_is_refused():
    with pytest.raises(ProgramError, match="'s/z' .* put the scope inside the body"):
        gradient(scoped(chain_model), scoped(chain_guide))


def test_one_configured_guide_under_two_scopes():
    part = config_estimators(lambda: bern("z", 0.1))

    def guide():
        for prefix in "pq":
            handlers.scope(part, prefix=prefix)()

    def model():
        bern("p/z", 0.2)
        bern("q/z", 0.3)

    svi = SVI(model, guide, Adam(0.1), TraceGrad_ELBO())
    state, _ = svi.update(svi.init(KEY))
    for name in ("p/z$pplgrad.0.state", "q/z$pplgrad.0.state"):
        assert state.mutable_state[name]["weight"] > 0


def test_estimator_in_a_body_of_the_model_is_refused():
    def model():
        def step(z, _):
            return numpyro.sample("z", dist.Bernoulli(0.4), infer={"estimator": ScoreFunction()}), None

        scan(step, jnp.zeros((), int), None, length=2)

    with pytest.raises(EstimatorError, match="Site 'z' .* is in the model"):
        gradient(model, chain_guide)


def test_score_function_and_optimal_constant_on_an_undeclared_distribution():
    def guide():
        numpyro.sample("y", Undeclared(param("a")[0]))

    def model():
        numpyro.sample("y", dist.Normal(0.0, 1.0))

    elbo = TraceGrad_ELBO(3, estimators={"y": ScoreFunction(OptimalConstant())})
    loss, _ = gradient(model, guide, elbo)
    np.testing.assert_allclose(loss, Trace_ELBO(3).loss(KEY, params(), model, guide))
    assert _score_squared(Undeclared(jnp.zeros(2)), jnp.ones(2)).shape == (2,)


@pytest.mark.slow
def test_nested_scan_is_charged_to_all_steps():
    """Steps of an inner scan are none of the outer one's: an earlier draw of the same outer step counts."""

    def program(weight, observe):
        def outer(c, _):
            def inner(z, y):
                if observe:
                    numpyro.sample("x", dist.Normal(weight[1] * z, 1.0), obs=y)
                return bern("z", weight[0] + weight[1] * z), None

            return scan(inner, c, array(DATA))[0], None

        scan(outer, jnp.zeros((), int), None, length=2)

    model, guide = (lambda: program(param("b"), True)), (lambda: program(param("a"), False))
    elbo = TraceGrad_ELBO(estimators={"z": ScoreFunction()})
    ((_, static, reads),), _ = elbo._runs(KEY, params(), Program(model, guide, (), {}))
    assert reads["model:x"]["z"][0] == 7 and static.guide_flows["z"].scanned
    np.testing.assert_allclose(elbo.loss(KEY, params(), model, guide), Trace_ELBO().loss(KEY, params(), model, guide))
