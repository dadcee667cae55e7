"""Mixtures as guides, the same in both libraries: the expected gradient by quadrature, in one step.

An element of a plate is a point of the quadrature, and an element of another one the component that has drawn it. Its costs are scaled by
the weight of the point times π_k q_k, so that the step's gradient is the expectation of the gradient of one draw.
"""

import jax
import numpy as np
import pyro

from pplgrad import IWAE, ImplicitReparam, StratifiedMixture
from pplgrad.core.mixtures import Mixture
from pplgrad.core.noise import Noise, replaced_noise
from pplgrad.testing import in_numpyro, in_pyro
from tests.deciding import by_complex_steps

HOSTS = {"pyro": in_pyro, "numpyro": in_numpyro}
PARAMS = {
    "a": np.array([0.4, -0.3, 0.1]),
    "m": np.array([[-1.1, 0.4], [0.6, -0.7], [1.5, 0.9]]),
    "s": np.array([[-0.5, 0.2], [0.1, -0.3], [-0.2, -0.4]]),
    "c": np.array(0.3),
}
LOG_DENSITIES = {
    "Normal": lambda z: -0.5 * z**2 - 0.5 * np.log(2 * np.pi),
    "Laplace": lambda z: -z * np.sign(z.real) - np.log(2),
    "Logistic": lambda z: -z - 2 * np.log(1 + np.exp(-z)),
    "Gumbel": lambda z: -z - np.exp(-z),
}


def nodes(kinks, low, high, points=16):
    """Return nodes and weights of Gauss's quadrature on pieces between numbers at which an integrand has a kink."""
    ends = np.unique(np.concatenate([np.arange(low, high + 0.5), kinks]))
    x, w = np.polynomial.legendre.leggauss(points)
    half, middle = np.diff(ends) / 2, (ends[1:] + ends[:-1]) / 2
    return (middle[:, None] + half[:, None] * x).ravel(), (half[:, None] * w).ravel()


class OneOfEach(Noise):
    """Makes the element of the plate of components be drawn from the component of its number."""

    def uniform(self, shape, like):
        raise TypeError("continuous noise")

    def categorical(self, log_probs):
        xp, count = self.ops.xp, log_probs.shape[-1]
        numbers = xp.reshape(self.ops.arange(count, log_probs), (1, 1, count, 1))
        return xp.broadcast_to(numbers, log_probs.shape[:-1])


class Program:
    """A mixture of laws in one or two dimensions: `law`, of log x or not, with correlated entries or not."""

    def __init__(self, law="Normal", dims=0, of_log=False, correlated=False, components=3):
        self.law, self.dims, self.of_log, self.correlated = law, dims, of_log, correlated
        self.params = {
            name: x if name == "c" else x[:components] if name == "a" else x[:components, : max(dims, 1)]
            for name, x in PARAMS.items()
        }
        self.components = components
        wide = (-9, 9) if law == "Normal" else (-30, 40)
        axes = [nodes(self.params["m"][:, d], *wide, 16 if dims < 2 else 10) for d in range(max(dims, 1))]
        self.u = np.stack([x.ravel() for x in np.meshgrid(*[x for x, _ in axes], indexing="ij")], -1)
        weights = np.prod(np.stack(np.meshgrid(*[w for _, w in axes], indexing="ij")), 0).ravel()
        logs = self._each(self.params)
        # A point that no component reaches counts for nothing.
        near = np.exp(logs).max(-1) * weights > 1e-18
        self.u, self.weights = self.u[near], weights[near]
        self.scales = np.maximum(self.weights[:, None] * np.exp(logs[near]), 1e-290)
        x = np.exp(self.u) if of_log else self.u
        self.x = np.broadcast_to(x[:, None], (len(x), components, x.shape[-1]))
        self.x = self.x if dims else self.x[..., 0]

    def _each(self, p):
        """Return log π_k q_k at all points, of u where x = exp u."""
        a, m, s = p["a"], p["m"], p["s"]
        z = self.u[:, None] - m
        if self.correlated:
            first = z[..., :1] / np.exp(s[:, :1])
            z = np.concatenate([first, (z[..., 1:] - 0.5 * first) / np.exp(s[:, 1:])], -1)
        else:
            z = z / np.exp(s)
        return (LOG_DENSITIES[self.law](z) - s).sum(-1) + a - np.log(np.exp(a).sum())

    def loss(self, p):
        """Return −E_q[log p − log q] by quadrature."""
        log_q = np.log(np.exp(self._each(p)).sum(-1))
        normal = LOG_DENSITIES["Normal"]
        log_p = (normal(self.u / 1.5) - np.log(1.5)).sum(-1)
        mean = np.sin(self.u.sum(-1)) * self.u[:, -1] + p["c"] * self.u[:, 0]
        log_p = log_p + normal((0.4 - mean) / 0.8) - np.log(0.8)
        return np.sum(self.weights * np.exp(log_q) * (log_q - log_p))

    def exact(self):
        return by_complex_steps(self.loss, self.params)

    def build(self, h):
        """Return model and guide of the host."""
        xp, scales = h.xp, h.array(self.scales)

        def value(name):
            return h.param(name, h.array(self.params[name]))

        def components():
            m, s = value("m"), value("s")
            if self.correlated:
                rows = [xp.stack([xp.exp(s[:, 0]), 0 * s[:, 0]], -1), xp.stack([0.5 + 0 * s[:, 0], xp.exp(s[:, 1])], -1)]
                return h.dist.MultivariateNormal(m, scale_tril=xp.stack(rows, -2))
            law = getattr(h.dist, "LogNormal" if self.of_log else self.law)
            return law(m, xp.exp(s)).to_event(1) if self.dims else law(m[:, 0], xp.exp(s[:, 0]))

        def guide():
            mixture = h.dist.MixtureSameFamily(h.dist.Categorical(logits=value("a")), components())
            with h.plate("component", self.components, dim=-1), h.plate("point", len(self.x), dim=-2), h.scale(scales):
                h.sample("x", mixture)

        def model():
            c, zero = value("c"), h.array(np.zeros(max(self.dims, 1)))
            law = (h.dist.LogNormal if self.of_log else h.dist.Normal)(zero, 1.5)
            law = law.to_event(1) if self.dims else law
            with h.plate("component", self.components, dim=-1), h.plate("point", len(self.x), dim=-2), h.scale(scales):
                x = h.sample("x", law)
                u = xp.log(x) if self.of_log else x
                u = u if self.dims else u[..., None]
                mean = xp.sin(u.sum(-1)) * u[..., -1] + c * u[..., 0]
                h.sample("y", h.dist.Normal(mean, 0.8), obs=h.array(0.4))

        return model, guide

    def expected(self, library, estimator, **options):
        """Return the expectation of the estimate."""
        host = HOSTS[library]
        with host.isolated(), replaced_noise(lambda site, ops: OneOfEach(ops)):
            model, guide = self.build(host.HOST)
            given = {"max_plate_nesting": 2} if library == "pyro" else {}
            objective = (in_pyro if library == "pyro" else in_numpyro).TraceGrad_ELBO(
                estimators={"x": estimator}, **given, **options
            )
            if library == "pyro":
                pyro.clear_param_store()
                with in_pyro.Force([{"x": self.x}], {}):
                    objective.loss_and_grads(model, guide)
                return in_pyro.gradient()
            forced = in_numpyro.handlers.substitute(guide, data={"x": in_numpyro.array(self.x)})
            params = {name: in_numpyro.array(x) for name, x in self.params.items()}
            key = jax.random.key(0)
            found = jax.grad(lambda p: objective.loss(key, p, model, forced))(params)
            return {name: np.asarray(x) for name, x in found.items()}

    def error(self, library, estimator, **options):
        """Return the largest error of the expectation."""
        found, wanted = self.expected(library, estimator, **options), self.exact()
        return max(np.abs(found[name] - wanted[name]).max() for name in wanted)
