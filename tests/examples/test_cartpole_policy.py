"""The policy learns to balance Gymnasium's pole, and its gradient is that of the exact expected return."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpyro import handlers

from pplgrad import Expectation, ScoreFunction
from pplgrad.lab.script import load_script
from pplgrad.numpyro import TraceGrad_ELBO

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))


def script():
    return load_script(ROOT / "models" / "cartpole.py", ("numpyro",)).module


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "steps", "longest"), [("numpyro", 60, 200), ("pyro", 20, 60)])
def test_the_pole_is_balanced(backend, steps, longest):
    import cartpole_policy

    params, stood = cartpole_policy.trained(backend, steps, 0, True, longest)
    lengths = (~np.isnan(cartpole_policy.tried(params, 0))).sum(0)
    # An untrained policy stands for some 20 steps, and no return is above the longest.
    assert stood[:5].mean() < 45 and stood.max() < 1.05 * longest
    assert lengths.mean() > (190 if backend == "numpyro" else 55)


def test_the_equations_are_gymnasiums():
    model, rng = script(), np.random.default_rng(0)
    state = rng.uniform(-0.15, 0.15, (20, 4))
    made = model.environment(state, 100)
    for _ in range(5):
        action = rng.integers(0, 2, 20)
        after, fallen = model.moved(np, state, action)
        reached, _, terminated, _, _ = made.step(action)
        assert np.allclose(after, reached, atol=1e-6) and (fallen == terminated).all()
        state = after


@pytest.mark.slow
def test_the_gradient_is_exact():
    """Over all action sequences: with the value baseline and the entropy bonus, from where it falls in 10 of the 16."""
    model, steps, bonus = script(), 4, 0.3
    rng, x = np.random.default_rng(1), np.array([[0.1, 0.2, 0.15, 0.8]])
    outcomes = (np.arange(2**steps)[:, None] >> np.arange(steps)) & 1
    with jax.enable_x64(True):
        options = {**model.OPTIONS, "steps": steps, "hidden": 3}
        program, guide = model.numpyro_program(options, None, 0)
        start = model.initial(options, 0)
        params = {name: jnp.asarray(rng.normal(size=np.shape(value))) for name, value in start.items()}
        elbo = TraceGrad_ELBO(estimators={"a": ScoreFunction()}, objective=Expectation(bonus))

        def episode(params, actions):
            state, alive, log_q, reward, charged = jnp.asarray(x[0]), 1.0, 0.0, 0.0, 0.0
            for action in actions:
                chosen = jax.nn.log_softmax(model.network("policy", jnp, params, state))[action]
                log_q, charged, reward = log_q + chosen, charged + alive * chosen, reward + alive * model.REWARD
                after, fallen = model.moved(jnp, state, action)
                state, alive = jnp.where(alive, after, state), alive * (1 - fallen)
            return log_q, reward - bonus * charged

        def exact(params):
            log_q, value = jax.vmap(lambda actions: episode(params, actions))(outcomes)
            return (jnp.exp(log_q) * value).sum()

        def weighted(params, actions):
            forced = handlers.substitute(guide, data={"a": actions[:, None]})
            log_q, _ = episode(held, actions)
            return -jnp.exp(log_q) * elbo.loss(jax.random.key(0), params, program, forced, x)

        held = params
        found = jax.jit(jax.vmap(jax.grad(weighted), (None, 0)))(params, outcomes)
        wanted = jax.grad(exact)(params)
        for name in params:
            if name.startswith("policy"):
                assert np.abs(wanted[name]).max() > 1e-3
                assert np.allclose(found[name].sum(0), wanted[name], atol=1e-9)
            else:
                assert np.abs(found[name]).max() > 0
