"""JAX's settings about ranks and types of arrays are about the user's code: estimators run under every one that the program runs under."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI

from pplgrad import ELBO, REBAR, LocalExpectation, ScoreFunction, UnorderedSet
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
from pplgrad.testing.in_numpyro import HOST, parameters
from pplgrad.testing.programs import CASES
from tests.branching import EXACT, RANDOM

ESTIMATORS = {**EXACT, **RANDOM}
# Programs that NumPyro's own ELBOs run without a promotion of ranks.
STRICT = ("hierarchy", "single", "categorical_index", "mixed", "event")
QUICK = ("local", "disarm", "arm")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ESTIMATORS])
def test_ranks_are_not_promoted_for_the_user(name):
    estimator, fitting = ESTIMATORS[name]
    chosen = next(program for program in STRICT if program in fitting)
    case = CASES[chosen]
    model, guide = case.build(HOST)
    guide = config_estimators(guide, dict.fromkeys(case.latents, estimator))
    svi = SVI(model, guide, numpyro.optim.Adam(0.1), TraceGrad_ELBO(2))
    with jax.numpy_rank_promotion("raise"):
        state, loss = jax.eval_shape(lambda key: svi.update(svi.init(key)), jax.random.key(0))
    assert loss.shape == () and set(parameters(case)) <= set(svi.get_params(state))


X = jnp.array([0.0, 2.0, 1.3])


def model():
    with numpyro.plate("data", 3):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.4, 0.6])))
        numpyro.sample("x", dist.Normal(2 * z.astype(X.dtype), 1.0), obs=X)


def guide():
    with numpyro.plate("data", 3):
        numpyro.sample("z", dist.Categorical(logits=numpyro.param("a", jnp.zeros((3, 2), X.dtype))))


def exact():
    """Return the gradient at zero: the difference between the costs of the two values, a quarter of it."""
    costs = np.log([0.4, 0.6]) - 0.5 * (np.asarray(X)[:, None] - [0.0, 2.0]) ** 2
    return 0.25 * (costs - costs[:, ::-1]) * -1


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("numpy_rank_promotion", "raise"),
        ("numpy_dtype_promotion", "strict"),
        ("enable_x64", False),
        ("enable_x64", True),
    ],
)
@pytest.mark.parametrize("fuse", [True, False])
def test_the_gradient_is_right_under_every_setting(setting, value, fuse):
    elbo = TraceGrad_ELBO(estimators={"z": LocalExpectation()}, fuse=fuse)
    with getattr(jax, setting)(value):
        run = jax.grad(lambda params: elbo.loss(jax.random.key(0), params, model, guide))
        params = {"a": jnp.zeros((3, 2), X.dtype)}
        for found in (run(params)["a"], jax.jit(run)(params)["a"]):
            np.testing.assert_allclose(found, exact(), rtol=1e-5)


def test_what_the_user_forbids_is_forbidden_in_the_program():
    def broad():
        numpyro.sample("z", dist.Normal(jnp.zeros((2, 3)) + jnp.zeros(3), 1.0).to_event(2))

    with jax.numpy_rank_promotion("raise"), pytest.raises(ValueError, match="rank_promotion"):
        TraceGrad_ELBO(estimators={"z": ScoreFunction()}).loss(jax.random.key(0), {}, broad, broad)


@pytest.mark.slow
@pytest.mark.grid
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize(
    "estimator",
    [
        ScoreFunction(),
        *(pytest.param(x, marks=pytest.mark.slow) for x in (LocalExpectation(), REBAR(learn=False), UnorderedSet(2))),
    ],
    ids=str,
)
def test_keys_that_are_used_again_on_purpose_pass_jax_s_check(estimator, particles, fuse):
    def binary():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=1.3)

    def proposal():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.1)))

    elbo = TraceGrad_ELBO(particles, estimators={"z": estimator}, fuse=fuse)
    gradient = jax.grad(lambda params, key: elbo.loss(key, params, binary, proposal))
    plain = jax.jit(gradient)({"a": 0.1}, jax.random.key(0))
    with jax.debug_key_reuse(True):
        assert jnp.allclose(gradient({"a": 0.1}, jax.random.key(0))["a"], plain["a"])
        assert jnp.allclose(jax.jit(gradient)({"a": 0.1}, jax.random.key(0))["a"], plain["a"])


@pytest.mark.slow
def test_a_weight_of_zero_is_one_weight_among_others():
    """KL annealing from zero: one compiled step serves every weight."""
    elbo = TraceGrad_ELBO(estimators={"*": LocalExpectation()}, objective=ELBO(kl_weight=lambda weight: weight))
    params = {"a": jnp.tile(jnp.array([0.1, 0.4], X.dtype), (3, 1))}

    def gradient(weight):
        run = lambda params: elbo.loss(jax.random.key(0), params, lambda _: model(), lambda _: guide(), weight)  # noqa: E731
        return jax.grad(run)(params)["a"]

    compiled = jax.jit(gradient)
    for weight in (0.0, 0.5, 1.0, 0.0):
        np.testing.assert_allclose(compiled(weight), gradient(weight), rtol=1e-5)
