"""Programs whose sites exist or not depending on the value of one, the same in both libraries; the exact gradients by complex steps."""

import itertools

import numpy as np

PARAMS = {"a": np.array([0.3, -0.4, 0.7, 0.2]), "b": np.array([0.3, 0.4])}


def _categorical(logits, z):
    return logits[z] - np.log(np.exp(np.array(logits)).sum())


def _bernoulli(logit, z):
    return z * logit - np.log(1 + np.exp(logit))


def _normal(mean, x):
    return -0.5 * (x - mean) ** 2 - 0.5 * np.log(2 * np.pi)


def by_complex_steps(objective, params):
    """Return the gradient of a function of arrays, written in operations that numbers with an imaginary part go through."""
    found = {}
    for name, value in params.items():
        found[name] = np.zeros(value.shape)
        for i in np.ndindex(value.shape):
            moved = {key: x.astype(complex) for key, x in params.items()}
            moved[name][i] += 1e-30j
            found[name][i] = objective(moved).imag / 1e-30
    return found


def observed(h):
    """z decides which data exist: no other draw, so that a local expectation at z has the exact gradient whatever is drawn."""

    def guide():
        a = h.param("a", h.array(PARAMS["a"]))
        h.sample("z", h.dist.Categorical(logits=a[:3]))

    def model():
        b = h.param("b", h.array(PARAMS["b"]))
        z = h.sample("z", h.dist.Categorical(logits=h.array([0.1, 0.2, 0.3])))
        if z == 0:
            h.sample("w", h.dist.Normal(b[0], 1.0), obs=h.array(0.2))
        if z > 0:
            with h.plate("data", 2):
                h.sample("x", h.dist.Normal(b[0] + b[1] * z, 1.0), obs=h.array([0.3, -0.5]))
        h.sample("y", h.dist.Normal(b[1] * z, 1.0), obs=h.array(0.7))

    return model, guide


def _loss_of_observed(p):
    total = 0.0
    for z in range(3):
        log_q = _categorical(p["a"][:3], z)
        log_p = _categorical([0.1, 0.2, 0.3], z) + _normal(p["b"][1] * z, 0.7)
        if z == 0:
            log_p += _normal(p["b"][0], 0.2)
        else:
            log_p += sum(_normal(p["b"][0] + p["b"][1] * z, x) for x in (0.3, -0.5))
        total += np.exp(log_q) * (log_q - log_p)
    return total


def latent(h):
    """Two elements of z decide together which draws of the guide exist, and one of these whether another does."""

    def guide():
        a = h.param("a", h.array(PARAMS["a"]))
        with h.plate("pair", 2):
            z = h.sample("z", h.dist.Bernoulli(logits=a[:2]))
        if z.sum() > 0:
            w = h.sample("w", h.dist.Bernoulli(logits=a[2] * z.sum()))
            if w > 0:
                h.sample("v", h.dist.Bernoulli(logits=a[3] * w + 0.1))

    def model():
        b = h.param("b", h.array(PARAMS["b"]))
        with h.plate("pair", 2):
            z = h.sample("z", h.dist.Bernoulli(logits=h.array([0.1, -0.2])))
        w = 0.5
        if z.sum() > 0:
            w = 1.0 * h.sample("w", h.dist.Bernoulli(logits=b[0]))
            if w > 0:
                v = h.sample("v", h.dist.Bernoulli(logits=b[1] * w))
                h.sample("y", h.dist.Normal(v * b[1], 1.0), obs=h.array(0.7))
        h.sample("x", h.dist.Normal(b[0] * w + z.sum(), 1.0), obs=h.array(0.3))

    return model, guide


def _loss_of_latent(p):
    total, (a, b) = 0.0, (p["a"], p["b"])
    for z in itertools.product((0, 1), repeat=2):
        log_qz = _bernoulli(a[0], z[0]) + _bernoulli(a[1], z[1])
        log_pz, count = _bernoulli(0.1, z[0]) + _bernoulli(-0.2, z[1]), sum(z)
        worlds = [(None, None)] if not count else [(0, None), (1, 0), (1, 1)]
        for w, v in worlds:
            log_q, log_p = log_qz, log_pz
            if w is not None:
                log_q, log_p = log_q + _bernoulli(a[2] * count, w), log_p + _bernoulli(b[0], w)
            if v is not None:
                log_q, log_p = log_q + _bernoulli(a[3] + 0.1, v), log_p + _bernoulli(b[1], v) + _normal(v * b[1], 0.7)
            log_p += _normal(b[0] * (0.5 if w is None else w) + count, 0.3)
            total += np.exp(log_q) * (log_q - log_p)
    return total


PROGRAMS = {"observed": (observed, _loss_of_observed), "latent": (latent, _loss_of_latent)}


def exact(name):
    """Return the exact gradient of the loss."""
    return by_complex_steps(PROGRAMS[name][1], PARAMS)
