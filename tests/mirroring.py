"""`Mirrored` exactly, in both libraries: the noise of normal sites is integrated by a quadrature without error for polynomials."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pplgrad.estimators.mirrored import Mirrored

DATA = np.array([0.3, -0.6, 1.4])
PARAMS = {
    "m": np.array([0.4, -0.7, 0.2]),
    "s": np.array([0.1, -0.3, 0.2]),
    "top": np.array([0.5, -0.2]),
    "b": np.array([0.3, 0.6]),
}
"""Of the elements: means and log scales; of what they share: mean and log scale; of the model."""


def program(h: Any) -> tuple[Any, Any]:
    """Return a program with a normal site in a subsampled plate, two joint numbers of an element, under a shared normal site."""

    def minibatch():
        return h.plate("data", 3, subsample_size=2, dim=-1)

    def model():
        b = h.param("b", h.array(PARAMS["b"]))
        u = h.sample("u", h.dist.Normal(b[0], 1.0))
        with minibatch() as index:
            x = h.sample("x", h.dist.Normal(u[..., None] + h.array(np.zeros((2, 2))), 1.0).to_event(1))
            # A cost that does not separate into those of an element's two numbers.
            h.sample("y", h.dist.Normal(b[1] * x[..., 0] * x[..., 1] + x[..., 0], 1.0), obs=h.array(DATA)[index])

    def guide():
        m, s, top = (h.param(name, h.array(PARAMS[name])) for name in ("m", "s", "top"))
        u = h.sample("u", h.dist.Normal(top[0], h.xp.exp(top[1])))
        with minibatch() as index:
            loc, scale = m[index][:, None] + h.array([0.0, 0.5]), h.xp.exp(s[index])[:, None] + h.array([0.0, 0.3])
            h.sample("x", h.dist.Normal(loc + 0.3 * u[..., None], scale).to_event(1))

    return model, guide


def exact_loss(xp: Any, params: Any, nodes: Any, weights: Any) -> Any:
    """Return −E_q[log p − log q] of all three elements, of the formulas alone, from nodes (n, 3) for u and the two numbers."""

    def log_normal(x, loc, scale):
        return -0.5 * ((x - loc) / scale) ** 2 - xp.log(scale) - 0.5 * np.log(2 * np.pi)

    m, s, top, b = (params[name] for name in PARAMS)
    one = top[0] * 0 + 1.0
    u = top[0] + xp.exp(top[1]) * nodes[:, 0]
    total = log_normal(u, b[0], one) - log_normal(u, top[0], xp.exp(top[1]))
    for i, y in enumerate(DATA):
        places = [(m[i] + 0.3 * u, xp.exp(s[i])), (m[i] + 0.5 + 0.3 * u, xp.exp(s[i]) + 0.3)]
        x = [loc + scale * nodes[:, 1 + j] for j, (loc, scale) in enumerate(places)]
        for value, (loc, scale) in zip(x, places, strict=True):
            total = total + log_normal(value, u, one) - log_normal(value, loc, scale)
        total = total + log_normal(y * one, b[1] * x[0] * x[1] + x[0], one)
    return -(weights * total).sum()


def quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Return nodes (n, 3) and weights of the noise of u and of an element's two numbers.

    A rule of k points has no error up to the power 2 k − 1: an estimate has u's noise to the sixth, an element's to the fourth.
    """
    rules = [np.polynomial.hermite_e.hermegauss(points) for points in (4, 3, 3)]
    nodes = np.array(list(itertools.product(*(nodes for nodes, _ in rules))))
    return nodes, np.prod(list(itertools.product(*(weights / weights.sum() for _, weights in rules))), axis=1)


def noise_of(node: Any) -> dict[str, Any]:
    """Return the noise of each site.

    That of both elements is the same, since no term of a sound estimate has the numbers of two; credit across elements would.
    """
    return {"u": node[0], "x": node[1:]}


SUBSETS = list(itertools.combinations(range(3), 2))
"""The minibatches, each as probable as the others."""


@dataclass(frozen=True)
class Mutant:
    """A term of the estimator that is wrong."""

    name: str
    method: str
    change: Any


def _costs_of_the_draw(plain, self, terms):
    return plain(self, replace(terms, costs=terms.costs * 0 + terms.downstream[:, None]))


def _scored_as_the_draw(plain, self, terms):
    """The image's cost is charged to the density of the draw."""
    kept = replace(terms.alternatives, kept=terms.draw.value)
    return plain(self, replace(terms, alternatives=kept))


def _about_zero(plain, self, draw):
    """The image's law is not the draw's."""
    found = plain(self, draw)
    return replace(found, values=draw.place(-draw.value[:, None]), kept=-draw.value)


MUTANTS = [
    Mutant("wrong sign", "branch_surrogate", lambda plain, self, terms: -plain(self, terms)),
    Mutant("both counted in full", "branch_surrogate", lambda plain, self, terms: 2 * plain(self, terms)),
    Mutant("image charged with the draw's costs", "branch_surrogate", _costs_of_the_draw),
    Mutant("image scored as the draw", "branch_surrogate", _scored_as_the_draw),
    Mutant("mirrored about zero", "alternatives", _about_zero),
]


def apply(mutant: Mutant, patch: Any) -> None:
    """Break the estimator."""
    plain = getattr(Mirrored, mutant.method)
    patch.setattr(Mirrored, mutant.method, lambda self, x: mutant.change(plain, self, x))
