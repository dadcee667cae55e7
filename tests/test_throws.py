"""`LocalExpectation` at a Multinomial: its expectation is the exact gradient, in both libraries.

Each element of a plate is one draw: the counts of every element of the site, and the throw of each that is summed over. It has parameters of its
own, so that one step returns the gradient at every draw, and their weighted sum is the expectation.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pytest
import torch

from pplgrad import EstimatorError, LocalExpectation, ScoreFunction
from pplgrad.core.noise import replaced_noise
from pplgrad.estimators.throws import Throw
from pplgrad.testing import in_numpyro, in_pyro
from tests.deciding import by_complex_steps
from tests.mixing import HOSTS, Given

COUNTS = [(i, j, 3 - i - j) for i in range(4) for j in range(4 - i)]
PARAMS = {
    "a": np.array([[0.3, -0.5, 0.2], [-0.4, 0.6, 0.1]]),
    "b": np.array([0.2, -0.1, 0.4]),
    "p": np.array(0.3),
}
OF = 3
"""The draws are a minibatch of so many times as many."""


def log_multinomial(logits, z):
    z = np.asarray(z)
    ways = math.lgamma(sum(z) + 1) - sum(math.lgamma(k + 1) for k in z)
    return ways + np.sum(z * logits) - np.sum(z) * np.log(np.exp(logits).sum())


def loss(p):
    """Return −E_q[log p − log q] of two draws that share a cost, under a decision."""
    total = 0.0
    for g, *z in itertools.product((0, 1), COUNTS, COUNTS):
        log_q = log_of_parent(p["p"], g)
        log_q = log_q + sum(log_multinomial(a * (1 + g), part) for a, part in zip(p["a"], z, strict=True))
        log_p = np.log(0.5) + sum(log_multinomial(p["b"], part) for part in z)
        log_p += -0.5 * (0.7 - 0.3 * z[0][0] * z[1][1] - 0.2 * z[0][2] - g) ** 2 - 0.5 * np.log(2 * np.pi)
        total = total + np.exp(log_q) * (log_q - log_p)
    return total


def log_of_parent(logit, g):
    return g * logit - np.log(1 + np.exp(logit))


def program(h, copies, count):
    data, half = h.array(0.7), h.array(0.5)

    def guide():
        with h.plate("draws", count * OF, subsample_size=count, dim=-1):
            g = h.sample("g", h.dist.Bernoulli(logits=copies("p")))
            h.sample("n", h.dist.Multinomial(3, logits=copies("a") * (1 + g[..., None, None])).to_event(1))

    def model():
        b = copies("b")[..., None, :]
        with h.plate("draws", count * OF, subsample_size=count, dim=-1):
            g = h.sample("g", h.dist.Bernoulli(probs=half))
            n = h.sample("n", h.dist.Multinomial(3, logits=h.xp.concat([b, b], axis=-2)).to_event(1))
            mean = 0.3 * n[..., 0, 0] * n[..., 1, 1] + 0.2 * n[..., 0, 2] + g
            h.sample("y", h.dist.Normal(mean, 1.0), obs=data)

    return model, guide


def draws():
    """Return all draws and throws: the counts, the throws, their probabilities, and the parameters of each."""
    rows = [
        (g, z, throws)
        for g in (0, 1)
        for z in itertools.product(COUNTS, repeat=2)
        for throws in itertools.product(range(3), repeat=2)
        if all(part[k] for part, k in zip(z, throws, strict=True))
    ]
    weights = [
        math.exp(sum(log_multinomial(a * (1 + g), part) for a, part in zip(PARAMS["a"], z, strict=True)))
        * math.exp(log_of_parent(PARAMS["p"], g))
        * math.prod(part[k] / 3 for part, k in zip(z, throws, strict=True))
        / OF
        for g, z, throws in rows
    ]
    copies = {name: np.repeat(x[None], len(rows), 0) for name, x in PARAMS.items()}
    values = {"g": np.array([g for g, _, _ in rows], float), "n": np.array([z for _, z, _ in rows], float)}
    return values, np.array([throws for _, _, throws in rows]), np.array(weights), copies


def loss_in_numpyro(values, **options):
    """Return the loss of the draws as a function of their parameters."""
    objective = in_numpyro.TraceGrad_ELBO(estimators={"g": ScoreFunction(), "n": LocalExpectation()}, **options)

    def at(arrays):
        model, guide = program(in_numpyro.HOST, lambda name: arrays[name], len(values["g"]))
        forced = in_numpyro.handlers.substitute(guide, data={name: jnp.asarray(x) for name, x in values.items()})
        return objective.loss(jax.random.key(0), {}, model, forced)

    return at


def error(library):
    """Return the largest error of the expectation."""
    values, throws, weights, copies = draws()
    host = HOSTS[library]
    with host.isolated(), replaced_noise(lambda site, ops: Given(ops, throws)):
        if library == "pyro":
            tensors = {name: torch.tensor(x, requires_grad=True) for name, x in copies.items()}
            pyro.clear_param_store()
            objective = in_pyro.TraceGrad_ELBO(
                max_plate_nesting=1, estimators={"g": ScoreFunction(), "n": LocalExpectation()}
            )
            with in_pyro.Force([values], {}):
                objective.loss_and_grads(*program(host.HOST, lambda name: tensors[name], len(values["g"])))
            found = {name: x.grad.numpy() for name, x in tensors.items()}
        else:
            found = jax.jit(jax.grad(loss_in_numpyro(values)))({name: jnp.asarray(x) for name, x in copies.items()})
    wanted = by_complex_steps(loss, PARAMS)
    return max(np.abs(np.tensordot(weights, found[name], 1) - wanted[name]).max() for name in wanted)


@pytest.mark.parametrize("library", HOSTS)
def test_exact(library):
    assert error(library) < 1e-10


@pytest.mark.slow
def test_second_derivatives_exact():
    """Along one direction, beside a difference of exact gradients."""
    values, throws, weights, copies = draws()
    along = {name: np.cos(np.arange(x.size)).reshape(x.shape) for name, x in PARAMS.items()}
    with in_numpyro.isolated(), replaced_noise(lambda site, ops: Given(ops, throws)):
        gradient = jax.grad(loss_in_numpyro(values, higher_order=True))
        point = {name: jnp.asarray(x) for name, x in copies.items()}
        tangent = {name: jnp.broadcast_to(along[name], x.shape) for name, x in point.items()}
        found = jax.jit(lambda p, t: jax.jvp(gradient, (p,), (t,))[1])(point, tangent)
    ahead, behind = (
        by_complex_steps(loss, {name: np.asarray(x + step * along[name]) for name, x in PARAMS.items()})
        for step in (1e-5, -1e-5)
    )
    for name, x in found.items():
        wanted = (ahead[name] - behind[name]) / 2e-5
        np.testing.assert_allclose(np.tensordot(weights, np.asarray(x), 1), wanted, atol=1e-8)


def once(self, terms):
    """Break it: one throw counts as if there were no other."""
    return plain(Throw(self.own, self.others, 0 * self.total + 1), terms)


def of_any_category(draw):
    """Break it: the throw's own category does not depend on the draw."""
    found = planned(draw)
    return type(found)(found.values, Throw(found.kept.own, found.kept.others * 0 - 1, found.kept.total))


plain, planned = Throw.surrogate, Throw.alternatives


@pytest.mark.parametrize(
    ("name", "broken"), [("surrogate", once), ("alternatives", staticmethod(of_any_category))], ids=["once", "any"]
)
def test_mutant_is_caught(name, broken, monkeypatch):
    monkeypatch.setattr(Throw, name, broken)
    assert error("pyro") > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("library", HOSTS)
def test_nothing_thrown_and_what_is_impossible(library):
    """A draw of no throws has no gradient of its own, and no branch gives a category of probability 0 a throw."""
    host = HOSTS[library]

    def step(thrown):
        def guide():
            p = host.HOST.param("a", host.HOST.array(0.4))
            probs = host.HOST.xp.stack([p, 0 * p, 1 - p])
            host.HOST.sample("n", host.HOST.dist.Multinomial(thrown, probs=probs))

        def model():
            n = host.HOST.sample("n", host.HOST.dist.Multinomial(thrown, probs=host.HOST.array([0.3, 0.0, 0.7])))
            host.HOST.factor("f", 0.7 * n[..., 0] * n[..., 2])

        if library == "pyro":
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            in_pyro.TraceGrad_ELBO(estimators={"n": LocalExpectation()}).loss_and_grads(model, guide)
            return in_pyro.gradient()["a"]
        objective = in_numpyro.TraceGrad_ELBO(estimators={"n": LocalExpectation()})
        return jax.jit(jax.grad(lambda a: objective.loss(jax.random.key(0), {"a": a}, model, guide)))(jnp.asarray(0.4))

    with host.isolated():
        if library == "numpyro":  # Torch refuses to throw nothing.
            assert float(step(0)) == 0
        assert np.isfinite(float(step(2))) and float(step(2)) != 0


@pytest.mark.slow
@pytest.mark.parametrize("library", HOSTS)
def test_a_dirichlet_multinomial_is_refused(library):
    host = HOSTS[library]
    with host.isolated():
        h = host.HOST

        def law():
            h.sample("n", h.dist.DirichletMultinomial(h.array(np.ones(3)), 3))

        with pytest.raises(EstimatorError, match="'n': DirichletMultinomial .* ScoreFunction"):
            if library == "pyro":
                in_pyro.TraceGrad_ELBO(estimators={"n": LocalExpectation()}).loss_and_grads(law, law)
            in_numpyro.TraceGrad_ELBO(estimators={"n": LocalExpectation()}).loss(jax.random.key(0), {}, law, law)
