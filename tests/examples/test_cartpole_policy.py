"""The policy learns to balance Gymnasium's pole, and its gradient is that of the exact expected return."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from numpyro import handlers

from pplgrad import Expectation, ScoreFunction
from pplgrad.lab.script import load_script
from pplgrad.numpyro import TraceGrad_ELBO

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))


def script():
    return load_script(ROOT / "models" / "cartpole.py", ("numpyro", "pyro")).module


STEPS, BONUS, START = 4, 0.3, np.array([[0.1, 0.2, 0.15, 0.8]])
"""An episode from where the pole falls in 10 of the 16 action sequences."""
SEQUENCES = (np.arange(2**STEPS)[:, None] >> np.arange(STEPS)) & 1


def small():
    """Return the script, its options, and parameters away from where they start."""
    model, rng = script(), np.random.default_rng(1)
    options = {**model.OPTIONS, "steps": STEPS, "hidden": 3}
    return model, options, {name: rng.normal(size=np.shape(x)) for name, x in model.initial(options, 0).items()}


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
    model, options, values = small()
    with jax.enable_x64(True):
        program, guide = model.numpyro_program(options, None, 0)
        params = {name: jnp.asarray(value) for name, value in values.items()}
        elbo = TraceGrad_ELBO(estimators={"a": ScoreFunction()}, objective=Expectation(BONUS))

        def episode(params, actions):
            state, alive, log_q, reward, charged = jnp.asarray(START[0]), 1.0, 0.0, 0.0, 0.0
            for action in actions:
                chosen = jax.nn.log_softmax(model.network("policy", jnp, params, state))[action]
                log_q, charged, reward = log_q + chosen, charged + alive * chosen, reward + alive * model.REWARD
                after, fallen = model.moved(jnp, state, action)
                state, alive = jnp.where(alive, after, state), alive * (1 - fallen)
            return log_q, reward - BONUS * charged

        def exact(params):
            log_q, value = jax.vmap(lambda actions: episode(params, actions))(SEQUENCES)
            return (jnp.exp(log_q) * value).sum()

        def weighted(params, actions):
            forced = handlers.substitute(guide, data={"a": actions[:, None]})
            log_q, _ = episode(held, actions)
            return -jnp.exp(log_q) * elbo.loss(jax.random.key(0), params, program, forced, START)

        held = params
        found = jax.jit(jax.vmap(jax.grad(weighted), (None, 0)))(params, SEQUENCES)
        wanted = jax.grad(exact)(params)
        for name in params:
            if name.startswith("policy"):
                assert np.abs(wanted[name]).max() > 1e-3
                assert np.allclose(found[name].sum(0), wanted[name], rtol=0, atol=1e-9)
            else:
                assert np.abs(found[name]).max() > 0


@pytest.mark.slow
def test_the_gradient_is_exact_in_pyro():
    """The same over Gymnasium's environment, whose states are single numbers: a shorter episode has fewer sites."""
    from pplgrad.pyro import TraceGrad_ELBO as PyroELBO
    from pplgrad.testing.in_pyro import Force, array, fresh, gradient, isolated
    from pplgrad.testing.programs import Case

    model, options, values = small()
    with isolated():
        program, guide = model.pyro_program(options, None, 0)
        elbo = PyroELBO(estimators={"a*": ScoreFunction()}, objective=Expectation(BONUS))
        params = {name: array(value).requires_grad_() for name, value in values.items()}
        x, found, value = array(START), {name: np.zeros(np.shape(v)) for name, v in values.items()}, 0.0
        for actions in episodes(model):
            log_q, bonus, state = 0.0, 0.0, x
            made = model.environment(START, STEPS)
            for action in actions:
                chosen = model.network("policy", torch, params, state).log_softmax(-1)[0, action]
                log_q, bonus = log_q + chosen, bonus - BONUS * chosen
                state = array(made.step(np.array([action]))[0])
            value = value + log_q.exp() * (model.REWARD * len(actions) + bonus)
            fresh(Case("cartpole", values, {}, None))
            with Force([{f"a{t}": np.array([a]) for t, a in enumerate(actions)}], {}):
                elbo.loss_and_grads(program, guide, x)
            found = {name: found[name] - log_q.exp().item() * g for name, g in gradient().items()}
        value.backward()
    for name, exact in params.items():
        if name.startswith("policy"):
            assert exact.grad.abs().max() > 1e-3
            assert np.allclose(found[name], exact.grad.numpy(), rtol=0, atol=1e-9)
        else:
            assert np.abs(found[name]).max() > 0


def episodes(model):
    """Return all action sequences, up to where the pole falls."""
    found = set()
    for actions in SEQUENCES:
        made = model.environment(START, STEPS)
        fallen = [bool(made.step(np.array([action]))[2][0]) for action in actions]
        found.add(tuple(actions[: fallen.index(True) + 1 if True in fallen else STEPS].tolist()))
    return sorted(found)
