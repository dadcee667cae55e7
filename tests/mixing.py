"""Mixtures as guides, the same in both libraries: the expected gradient by quadrature, in one step.

Each element of a plate is one draw: a point of the quadrature for every particle, with the components that the elements of a site are taken
to be drawn from. It has parameters of its own, so that one step returns the gradient at every draw, and their weighted sum is the expectation.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import torch

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


def gauss(kinks, low, high):
    """Return nodes and weights of Gauss's rule on pieces between numbers at which an integrand has a kink."""
    ends = np.unique(np.concatenate([np.arange(low, high + 0.5), kinks]))
    x, w = np.polynomial.legendre.leggauss(12)
    half, middle = np.diff(ends) / 2, (ends[1:] + ends[:-1]) / 2
    return (middle[:, None] + half[:, None] * x).ravel(), (half[:, None] * w).ravel()


def equal(step):
    """Return equally spaced nodes, with the weights of the trapezoidal rule: as good for a smooth integrand that vanishes at both ends."""
    x = np.arange(-12.0, 12.0, step)
    return x, np.full_like(x, step)


class Given(Noise):
    """Makes the elements of the draws be drawn from given components, (particles, draws, elements)."""

    def __init__(self, ops, numbers):
        super().__init__(ops)
        self.numbers = numbers

    def uniform(self, shape, like):
        raise TypeError("continuous noise")

    def categorical(self, log_probs):
        like = self.ops.arange(1, log_probs)
        return self.ops.xp.reshape(self.ops.constant(self.numbers, like), log_probs.shape[:-1])


class Program:
    """A site of `elements` mixtures of a family, of log x or not, whose components have `dims` dimensions (0: numbers), correlated or not."""

    def __init__(
        self,
        law="Normal",
        dims=0,
        of_log=False,
        correlated=False,
        elements=1,
        components=3,
        particles=1,
        step=None,
        of=1,
    ):
        """The draws are a minibatch of `of` times as many."""
        self.of = of
        self.law, self.dims, self.of_log, self.correlated = law, dims, of_log, correlated
        self.elements, self.components, self.particles = elements, components, particles
        width = max(dims, 1) * elements
        self.params = {name: x if name == "c" else x[:components] for name, x in PARAMS.items()}
        self.params |= {name: self.params[name][:, :width] for name in "ms"}
        axes = [
            equal(step) if step else gauss(m, *((-12, 12) if law == "Normal" else (-30, 40)))
            for m in self.params["m"].T
        ]
        self.u = np.stack([x.ravel() for x in np.meshgrid(*[x for x, _ in axes], indexing="ij")], -1)
        self.weights = np.prod(np.stack(np.meshgrid(*[w for _, w in axes], indexing="ij")), 0).ravel()
        self._lay_out()

    def _lay_out(self):
        """Make the draws: for each particle every point with every choice of components, those of weight 0 left out."""
        with np.errstate(over="ignore"):
            near = self._each(self.params).max((1, 2)) > -60
        self.u, self.weights = self.u[near], self.weights[near]
        logs = self._each(self.params)
        draws = []
        for numbers in itertools.product(range(self.components), repeat=self.elements):
            of = np.log(self.weights) + sum(logs[:, i, k] for i, k in enumerate(numbers))
            draws += [(point, numbers, weight) for point, weight in enumerate(of) if weight > -41]
        rows = np.array(list(itertools.product(range(len(draws)), repeat=self.particles)))
        points, numbers, weights = (np.array(x) for x in zip(*draws, strict=True))
        self.numbers = np.moveaxis(numbers[rows], 1, 0)
        self.of_draw = np.exp(weights[rows].sum(1))
        x = np.moveaxis((np.exp(self.u) if self.of_log else self.u)[points[rows]], 1, 0)
        self.whole, self.noise = x, {}
        self.values = {"x": x if self.dims or self.elements > 1 else x[..., 0]}

    def components_of(self, site):
        """Return the numbers of the components of a site's elements, (particles, draws, elements)."""
        return self.numbers

    def _each(self, p):
        """Return log π_k q_k of each element at all points, of u where x = exp u: (points, elements, components)."""
        m, s = (np.reshape(p[name], (self.components, self.elements, -1)).swapaxes(0, 1) for name in "ms")
        z = self.u.reshape(len(self.u), self.elements, 1, -1) - m
        if self.correlated:
            first = z[..., :1] / np.exp(s[..., :1])
            z = np.concatenate([first, (z[..., 1:] - 0.5 * first) / np.exp(s[..., 1:])], -1)
        else:
            z = z / np.exp(s)
        a = p["a"]
        return (LOG_DENSITIES[self.law](z) - s).sum(-1) + a - np.log(np.exp(a).sum())

    def loss(self, p):
        """Return minus the bound by quadrature."""
        log_q = np.log(np.exp(self._each(p)).sum(-1)).sum(-1)
        normal, u = LOG_DENSITIES["Normal"], self.u
        mean = np.sin(u.sum(-1)) * u[:, -1] + p["c"] * u[:, 0]
        log_w = (normal(u / 1.5) - np.log(1.5)).sum(-1) + normal((0.4 - mean) / 0.8) - np.log(0.8) - log_q
        weights = self.weights * np.exp(log_q)
        if self.particles == 1:
            return -np.sum(weights * log_w)
        pair = np.log((np.exp(log_w)[:, None] + np.exp(log_w)) / 2)
        return -np.sum(weights[:, None] * weights * pair)

    def build(self, h, copies):
        """Return model and guide of the host; `copies` has the parameters of each draw."""
        # What Pyro finds in a program's closures is known to be no draw: not the whole of this object.
        xp, count, elements, choices, correlated = (
            h.xp,
            len(self.of_draw),
            self.elements,
            self.components,
            self.correlated,
        )
        vector, event, whole = bool(self.dims or elements > 1), bool(self.dims), count * self.of
        positive, family = self.of_log, getattr(h.dist, "LogNormal" if self.of_log else self.law)
        zero, data = h.array(np.zeros(self.u.shape[-1] if vector else ())), h.array(0.4)

        def components():
            m, s = copies("m"), copies("s")
            if correlated:
                rows = [xp.stack([xp.exp(s[..., 0]), 0 * s[..., 0]], -1)]
                rows.append(xp.stack([0.5 + 0 * s[..., 0], xp.exp(s[..., 1])], -1))
                return h.dist.MultivariateNormal(m, scale_tril=xp.stack(rows, -2))
            if elements > 1:
                return family(xp.moveaxis(m, -1, -2), xp.exp(xp.moveaxis(s, -1, -2)))
            return family(m, xp.exp(s)).to_event(1) if event else family(m[..., 0], xp.exp(s[..., 0]))

        def guide():
            logits = copies("a")
            if elements > 1:
                logits = xp.broadcast_to(logits[..., None, :], (count, elements, choices))
            mixture = h.dist.MixtureSameFamily(h.dist.Categorical(logits=logits), components())
            with h.plate("draws", whole, subsample_size=count, dim=-1):
                h.sample("x", mixture.to_event(1) if elements > 1 else mixture)

        def model():
            law = (h.dist.LogNormal if positive else h.dist.Normal)(zero, 1.5)
            with h.plate("draws", whole, subsample_size=count, dim=-1):
                x = h.sample("x", law.to_event(1) if vector else law)
                u = xp.log(x) if positive else x
                u = u if vector else u[..., None]
                mean = xp.sin(u.sum(-1)) * u[..., -1] + copies("c") * u[..., 0]
                h.sample("y", h.dist.Normal(mean, 0.8), obs=data)

        return model, guide

    def expected(self, library, estimator, **options):
        """Return the expectation of the estimate."""
        options = {"estimators": {"x*": estimator}, "num_particles": self.particles, **options}
        copies = {name: np.broadcast_to(x, (len(self.of_draw), *x.shape)) for name, x in self.params.items()}
        # Particles that run one by one in Pyro ask for their own components one after the other.
        looped = library == "pyro" and options.get("vectorize_particles") is False
        turn = itertools.count()

        def given(site, ops):
            numbers = self.components_of(site)
            return Given(ops, numbers[next(turn)] if looped else numbers)

        with HOSTS[library].isolated(), replaced_noise(given):
            found = (self._pyro if library == "pyro" else self._numpyro)(copies, options)
        return {name: np.tensordot(self.of_draw, x, 1) / self.of for name, x in found.items()}

    def _pyro(self, copies, options):
        values = {name: torch.tensor(x, requires_grad=True) for name, x in copies.items()}
        model, guide = self.build(in_pyro.HOST, lambda name: values[name])
        pyro.clear_param_store()
        rows = [{name: x[i] for name, x in self.values.items()} for i in range(self.particles)]
        with in_pyro.Force(rows, self.noise):
            options = {"vectorize_particles": self.particles > 1, **options}
            objective = in_pyro.TraceGrad_ELBO(max_plate_nesting=1, **options)
            objective.loss_and_grads(model, guide)
        return {name: x.grad.numpy() for name, x in values.items()}

    def _numpyro(self, copies, options):
        objective, key = in_numpyro.TraceGrad_ELBO(**options), jax.random.key(in_numpyro.KEY)

        def loss(values):
            model, guide = self.build(in_numpyro.HOST, lambda name: values[name])
            forced = in_numpyro.forced(guide, jax.tree.map(jnp.asarray, self.values), self.noise, self.particles)
            return objective.loss(key, {}, model, forced)

        return jax.jit(jax.grad(loss))({name: jnp.asarray(x) for name, x in copies.items()})

    def error(self, library, estimator, **options):
        """Return the largest error of the expectation."""
        found, wanted = self.expected(library, estimator, **options), by_complex_steps(self.loss, self.params)
        return max(np.abs(found[name] - wanted[name]).max() for name in wanted)


class Followed(Program):
    """A mixture of numbers that a Normal draw follows, each draw with noise of its own."""

    def __init__(self, step=0.1):
        super().__init__(components=2, step=step)

    def _lay_out(self):
        noise, weights = np.polynomial.hermite_e.hermegauss(12)
        self.u = np.stack([np.repeat(self.u[:, 0], len(noise)), np.tile(noise, len(self.u))], -1)
        self.weights = np.repeat(self.weights, len(noise)) * np.tile(weights / weights.sum(), len(self.weights))
        super()._lay_out()
        self.noise = {"w": self.whole[0, :, 1]}

    def _each(self, p):
        x = self.u[:, :1, None]
        each = LOG_DENSITIES["Normal"]((x - p["m"][:, 0]) / np.exp(p["s"][:, 0])) - p["s"][:, 0]
        return each + p["a"] - np.log(np.exp(p["a"]).sum())

    def loss(self, p):
        """Return −E_q[log p − log q] by quadrature."""
        (x, noise), normal = self.u.T, LOG_DENSITIES["Normal"]
        log_q = np.log(np.exp(self._each(p)).sum(-1))[:, 0]
        w = p["c"] * np.sin(x) + 0.7 * noise
        log_p = normal(x / 1.5) - np.log(1.5) + normal(w - 0.3 * x) + normal((0.4 - x * w) / 2) - np.log(2)
        return np.sum(self.weights * np.exp(log_q) * (log_q + normal(noise) - np.log(0.7) - log_p))

    def build(self, h, copies):
        """Return model and guide of the host."""
        xp, count, data = h.xp, len(self.of_draw), h.array(0.4)

        def guide():
            with h.plate("draws", count, dim=-1):
                components = h.dist.Normal(copies("m")[..., 0], xp.exp(copies("s")[..., 0]))
                x = h.sample("x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=copies("a")), components))
                h.sample("w", h.dist.Normal(copies("c") * xp.sin(x), 0.7))

        def model():
            with h.plate("draws", count, dim=-1):
                x = h.sample("x", h.dist.Normal(h.array(0.0), 1.5))
                w = h.sample("w", h.dist.Normal(0.3 * x, 1.0))
                h.sample("y", h.dist.Normal(x * w, 2.0), obs=data)

        return model, guide


class Pair(Program):
    """Two mixtures of numbers, neither of which follows the other, in sites of their own: the elements of one in `Program`."""

    def __init__(self, step=0.1, particles=1):
        super().__init__(elements=2, components=2, step=step, particles=particles)

    def _lay_out(self):
        super()._lay_out()
        self.values = {"x0": self.whole[..., 0], "x1": self.whole[..., 1]}

    def components_of(self, site):
        return self.numbers[..., int(site[1:]) : int(site[1:]) + 1]

    def build(self, h, copies):
        """Return model and guide of the host."""
        xp, count, data = h.xp, len(self.of_draw), h.array(0.4)

        def guide():
            with h.plate("draws", count, dim=-1):
                for i in range(2):
                    components = h.dist.Normal(copies("m")[..., i], xp.exp(copies("s")[..., i]))
                    h.sample(f"x{i}", h.dist.MixtureSameFamily(h.dist.Categorical(logits=copies("a")), components))

        def model():
            with h.plate("draws", count, dim=-1):
                x, y = (h.sample(f"x{i}", h.dist.Normal(h.array(0.0), 1.5)) for i in range(2))
                h.sample("y", h.dist.Normal(xp.sin(x + y) * y + copies("c") * x, 0.8), obs=data)

        return model, guide


DRAWS = 4000
IN_A_FAMILY = {
    "p": np.array(0.2),
    "a": np.array([0.4, -0.3]),
    "m": np.array([-1.1, 0.8]),
    "s": np.array([-0.3, 0.1]),
    "c": np.array(0.7),
}


class Family:
    """A mixture between a binary parent and a child: independent draws, each with parameters of its own. The child is binary, or `smooth`."""

    def __init__(self, smooth=False):
        self.smooth = smooth

    def build(self, h, copies):
        """Return model and guide of the host."""
        xp, data, half, third, smooth = h.xp, h.array(0.4), h.array(0.5), h.array(0.3), self.smooth

        def guide():
            with h.plate("draws", DRAWS, dim=-1):
                b = h.sample("b", h.dist.Bernoulli(logits=copies("p")))
                m = copies("m") + 0.8 * b[..., None]
                a = copies("a") * (1 + b[..., None])
                x = h.sample(
                    "x", h.dist.MixtureSameFamily(h.dist.Categorical(logits=a), h.dist.Normal(m, xp.exp(copies("s"))))
                )
                h.sample(
                    "z", h.dist.Normal(copies("c") * x, 0.7) if smooth else h.dist.Bernoulli(logits=copies("c") * x)
                )

        def model():
            with h.plate("draws", DRAWS, dim=-1):
                b = h.sample("b", h.dist.Bernoulli(probs=half))
                x = h.sample("x", h.dist.Normal(b, 1.5))
                z = h.sample("z", h.dist.Normal(third, 1.0) if smooth else h.dist.Bernoulli(probs=third))
                h.sample("y", h.dist.Normal(xp.sin(x) + z * x - b, 0.8), obs=data)

        return model, guide

    def loss(self, p):
        """Return −E_q[log p − log q] by sums and quadrature."""
        (x, weights), normal, total = equal(0.1), LOG_DENSITIES["Normal"], 0.0
        noise, of_noise = np.polynomial.hermite_e.hermegauss(20) if self.smooth else ((0, 1), (1.0, 1.0))
        for b, (z, of_z) in itertools.product((0, 1), zip(noise, of_noise, strict=True)):
            a, logit = p["a"] * (1 + b), p["c"] * x
            each = normal((x[:, None] - p["m"] - 0.8 * b) / np.exp(p["s"])) - p["s"] + a - np.log(np.exp(a).sum())
            log_q = np.log(np.exp(each).sum(-1)) + b * p["p"] - np.log(1 + np.exp(p["p"]))
            log_p = np.log(0.5) + normal((x - b) / 1.5) - np.log(1.5)
            if self.smooth:
                # The density of the noise is in the weights of the quadrature.
                of_z, log_of_z, z = of_z / np.sum(of_noise), normal(z) - np.log(0.7), logit + 0.7 * z
                log_p = log_p + normal(z - 0.3)
            else:
                log_of_z = 0
                log_q = log_q + z * logit - np.log(1 + np.exp(logit))
                log_p = log_p + np.log(0.3 if z else 0.7)
            log_p = log_p + normal((0.4 - (np.sin(x) + z * x - b)) / 0.8) - np.log(0.8)
            total = total + of_z * np.sum(weights * np.exp(log_q) * (log_q + log_of_z - log_p))
        return total

    def z_score(self, library, estimators):
        """Return the largest error of the mean of draws, in standard errors, over the parameters."""
        copies = {name: np.broadcast_to(x, (DRAWS, *x.shape)) for name, x in IN_A_FAMILY.items()}
        with HOSTS[library].isolated():
            if library == "pyro":
                pyro.set_rng_seed(0)
                values = {name: torch.tensor(x, requires_grad=True) for name, x in copies.items()}
                model, guide = self.build(in_pyro.HOST, lambda name: values[name])
                in_pyro.TraceGrad_ELBO(max_plate_nesting=1, estimators=estimators).loss_and_grads(model, guide)
                found = {name: x.grad.numpy() for name, x in values.items()}
            else:
                objective = in_numpyro.TraceGrad_ELBO(estimators=estimators)

                def loss(values):
                    return objective.loss(
                        jax.random.key(1), {}, *self.build(in_numpyro.HOST, lambda name: values[name])
                    )

                found = jax.jit(jax.grad(loss))({name: jnp.asarray(x) for name, x in copies.items()})
        exact = by_complex_steps(self.loss, IN_A_FAMILY)
        scores = []
        for name, x in found.items():
            # A draw's own gradient is one part of the sum over the plate.
            error = np.asarray(x).mean(0) - exact[name]
            scores.append(np.abs(error / (np.asarray(x).std(0) / DRAWS**0.5)).max())
        return max(scores)
