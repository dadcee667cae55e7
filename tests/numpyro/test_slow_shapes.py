"""What XLA computes many times as slowly on a CPU as the same numbers in another shape is not asked of it.

Sums over few entries along an axis that is not the last one take ten times as long as as many additions; elementwise operations and sums of an array
with a last axis of length 1 take 4 to 35 times as long as of one without it (jaxlib 0.10).
"""

import math

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI

import pplgrad.numpyro as ppl
from pplgrad import ARM, ARMS, REBAR, RELAX, DisARM, GumbelSoftmax, MuProp
from pplgrad.estimators import antithetic
from pplgrad.estimators.perturbed import PerturbedPair
from pplgrad.numpyro._compat_jax import every_equation

ROWS, LATENTS = 7, 5
FEW = 16


def model(x):
    w = numpyro.param("w", jnp.ones((LATENTS, 3)))
    with numpyro.plate("data", ROWS):
        z = numpyro.sample("z", dist.Bernoulli(0.4 * jnp.ones(LATENTS)).to_event(1))
        numpyro.sample("x", dist.Normal(jnp.tanh(z @ w), 1.0).to_event(1), obs=x)


def guide(x):
    a = numpyro.param("a", jnp.ones((3, LATENTS)))
    with numpyro.plate("data", ROWS):
        numpyro.sample("z", dist.Bernoulli(logits=x @ a).to_event(1))


def slow_sums(estimator):
    """Return the shapes and axes of slow sums over the elements' numbers in a step."""
    wrapped = ppl.config_estimators(guide, {"z": estimator})
    svi = SVI(model, wrapped, numpyro.optim.Adam(1e-3), ppl.TraceGrad_ELBO())
    data = jnp.ones((ROWS, 3))
    state = svi.init(jax.random.key(0), data)
    found = set()
    for equation in every_equation(jax.make_jaxpr(svi.update)(state, data).jaxpr):
        if equation.primitive.name != "reduce_sum":
            continue
        shape, axes = equation.invars[0].aval.shape, equation.params["axes"]
        summed = [shape[axis] for axis in axes]
        if math.prod(shape) < ROWS * LATENTS or math.prod(summed) == 1 or LATENTS not in shape:
            continue
        outer = max(summed) <= FEW and len(shape) - 1 not in axes
        if shape[-1] == 1 or (outer and not set(summed) & {ROWS, LATENTS}):
            found.add((shape, axes))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    [ARM(), DisARM(), ARMS(4), GumbelSoftmax(), MuProp(), REBAR(), RELAX(), RELAX(through_cost=False)],
    ids=str,
)
def test_no_estimator_asks_for_a_slow_sum(estimator):
    assert not slow_sums(estimator)


def test_a_slow_sum_is_caught(monkeypatch):
    monkeypatch.setattr(antithetic, "sum_over_draws", lambda xp, x: xp.sum(x, axis=1))
    assert slow_sums(ARMS(4))
    along = PerturbedPair.along_keys
    # Divided by the temperature with an axis of length 1 behind the elements.
    broken = lambda pair, slopes, weights, t: ((t * along(pair, slopes, weights, t))[..., None] / t)[..., 0]  # noqa: E731
    monkeypatch.setattr(PerturbedPair, "along_keys", broken)
    assert slow_sums(REBAR())
