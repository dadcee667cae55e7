"""The reward rises above what imitation alone reaches, strings become valid, and scores reach the right rows."""

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
    return load_script(ROOT / "models" / "molecules.py", ("numpyro", "pyro")).module


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_reward_rises():
    import molecule_design

    params, objective = molecule_design.trained("numpyro", 300, 0)
    _, qed = molecule_design.judged(params, 1)
    _, before = molecule_design.judged(script().initial(script().OPTIONS, 0), 1)
    assert np.isnan(before).mean() > 0.9 and np.isnan(qed).mean() < 0.3
    assert np.nan_to_num(before).mean() < 0.05 and np.nan_to_num(qed).mean() > 0.45
    assert objective[-30:].mean() > objective[:30].mean() + 0.5


@pytest.mark.slow
def test_pyro_finds_molecules():
    """A short run without examples: the single letters that are molecules become more frequent."""
    import molecule_design

    model = molecule_design.model_script("molecules")
    options = {**model.OPTIONS, "length": 30, "hidden": 8, "imitation": 0.0}
    data, _ = model.load(options, 0)
    program = model.pyro_program(options, data, 0)
    choice = {"c*": molecule_design.ScoreFunction(molecule_design.LeaveOneOut())}
    settings = dict(estimators=choice, objective=Expectation(), learning_rate=0.05, particles=4, batch_size=64)
    params, _ = molecule_design.train("pyro", program, data, 12, 0, **settings)
    reward = [
        model.scores(model.encoded(model.strings(p, 400, options, 0), 30)).mean()
        for p in (model.initial(options, 0), params)
    ]
    assert reward[1] > 3 * reward[0] and reward[1] > 0.1


def test_scores_are_rdkits():
    from rdkit import Chem
    from rdkit.Chem import QED

    model = script()
    rows = model.encoded(["CCO", "C(", "", "c1ccccc1", "CC$C"], 10)
    exact = [QED.qed(Chem.MolFromSmiles(string)) for string in ("CCO", "c1ccccc1", "CC")]
    assert np.allclose(model.scores(rows), [exact[0], 0, 0, exact[1], exact[2]], atol=1e-6)
    assert model.scores(np.stack([rows, rows[::-1]])).shape == (2, 5)


@pytest.mark.slow
def test_the_gradient_is_exact():
    """Over all strings of two characters, against the derivative of the enumerated mean reward and entropy."""
    model, bonus = script(), 0.2
    signs = len(model.ALPHABET)
    outcomes = np.stack(np.divmod(np.arange(signs**2), signs), -1)
    with jax.enable_x64(True):
        options = {**model.OPTIONS, "length": 2, "hidden": 3, "imitation": 0.0}
        program, guide = model.numpyro_program(options, None, 0)
        rng, x = np.random.default_rng(0), np.zeros((1, 2))
        params = {n: jnp.asarray(rng.normal(size=np.shape(v))) for n, v in model.initial(options, 0).items()}
        elbo = TraceGrad_ELBO(estimators={"c": ScoreFunction()}, objective=Expectation(bonus))
        eye, scores = jnp.eye(signs), model.scores(outcomes)

        def log_qs(params, row):
            h, logits = model.advance(jnp, params, jnp.zeros((1, 3)), eye[:1])
            first = jax.nn.log_softmax(logits[0])[row[0]]
            _, logits = model.advance(jnp, params, h, eye[row[0]][None])
            return first, jax.nn.log_softmax(logits[0])[row[1]]

        def exact(params):
            first, second = jax.vmap(lambda row: log_qs(params, row))(outcomes)
            charged = first + jnp.where(outcomes[:, 0] > 0, second, 0.0)
            return (jnp.exp(first + second) * (scores - bonus * charged)).sum()

        held = params

        def weighted(params, row):
            forced = handlers.substitute(guide, data={"c": row[:, None]})
            return -jnp.exp(sum(log_qs(held, row))) * elbo.loss(jax.random.key(0), params, program, forced, x)

        found = jax.jit(jax.vmap(jax.grad(weighted), (None, 0)))(params, outcomes)
        wanted = jax.grad(exact)(params)
        for name in params:
            # RDKit's scores come in single precision, and both sides use them.
            assert np.allclose(found[name].sum(0), wanted[name], rtol=0, atol=1e-9), name
        assert np.abs(wanted["out_b"]).max() > 1e-3


@pytest.mark.slow
def test_the_gradient_is_exact_in_pyro():
    from pplgrad.pyro import TraceGrad_ELBO as PyroELBO
    from pplgrad.testing.in_pyro import array, expected_gradient, isolated
    from pplgrad.testing.programs import Case

    model, bonus = script(), 0.2
    signs = len(model.ALPHABET)
    rows = np.stack(np.divmod(np.arange(signs**2), signs), -1)
    options = {**model.OPTIONS, "length": 2, "hidden": 3, "imitation": 0.0}
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=np.shape(v)) for name, v in model.initial(options, 0).items()}
    with isolated():
        program, guide = model.pyro_program(options, None, 0)
        x = array(np.zeros((1, 2)))
        case = Case("molecules", values, {"c0": ((1,), signs), "c1": ((1,), signs)},
                    lambda host: (lambda: program(x), lambda: guide(x)))  # fmt: skip
        elbo = PyroELBO(estimators={"c*": ScoreFunction()}, objective=Expectation(bonus))
        found = expected_gradient(case, lambda: elbo, 1)

        params, eye = {name: array(v).requires_grad_() for name, v in values.items()}, torch.eye(signs)
        h, logits = model.advance(torch, params, torch.zeros(1, 3), eye[:1])
        first = logits.log_softmax(-1)[0, rows[:, 0]]
        _, logits = model.advance(torch, params, h.expand(len(rows), 3), eye[rows[:, 0]])
        second = logits.log_softmax(-1)[np.arange(len(rows)), rows[:, 1]]
        # What follows the end sign is drawn, and counts for nothing.
        charged = first + second * array(rows[:, 0] > 0)
        value = ((first + second).exp() * (array(model.scores(rows)) - bonus * charged)).sum()
        value.backward()
    for name, exact in params.items():
        assert np.allclose(-found[name], exact.grad.numpy(), rtol=0, atol=1e-9), name
    assert params["out_b"].grad.abs().max() > 1e-3
