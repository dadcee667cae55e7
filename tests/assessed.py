"""Small programs for the tests of `assess_fit`, written once for both libraries, with what is known of them by hand."""

import itertools
from types import SimpleNamespace

import numpy as np


def in_pyro():
    import pyro
    import pyro.distributions as dist
    import torch

    import pplgrad.pyro as plugin

    pyro.clear_param_store()
    return SimpleNamespace(
        name="pyro",
        plugin=plugin,
        ppl=pyro,
        dist=dist,
        array=lambda x: torch.as_tensor(np.asarray(x, float)),
        as_is=lambda x: torch.as_tensor(np.asarray(x)),
        mask=lambda x: pyro.poutine.mask(mask=torch.as_tensor(np.asarray(x))),
        scale=lambda x: pyro.poutine.scale(scale=x),
        exp=torch.exp,
    )


def in_numpyro():
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    import pplgrad.numpyro as plugin

    return SimpleNamespace(
        name="numpyro",
        plugin=plugin,
        ppl=numpyro,
        dist=dist,
        array=lambda x: jnp.asarray(np.asarray(x, float)),
        as_is=lambda x: jnp.asarray(np.asarray(x)),
        mask=lambda x: numpyro.handlers.mask(mask=jnp.asarray(np.asarray(x))),
        scale=lambda x: numpyro.handlers.scale(scale=x),
        exp=jnp.exp,
    )


X = np.array([-0.7, 0.4, 2.1, 1.2])
PRIOR = np.array([0.2, 0.5, 0.3])
MEANS = np.array([-1.0, 0.5, 2.0])


def normal(x, loc, scale=1.0):
    return -0.5 * ((x - loc) / scale) ** 2 - np.log(scale) - 0.5 * np.log(2 * np.pi)


def bernoulli(value, p):
    return np.where(value == 1, np.log(p), np.log1p(-p))


def local(host):
    """Two finite latents of each datum, the second of which the guide draws given the first; an observed site beside."""
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x):
        ppl.sample("y", dist.Normal(array(0.3), 1.0), obs=array(0.8))
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", dist.Bernoulli(array(0.3)))
            k = ppl.sample("k", dist.Categorical(probs=array(PRIOR)))
            ppl.sample("x", dist.Normal(array(MEANS)[k] + z, 1.0), obs=x)

    def guide(x):
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", dist.Bernoulli(0.2 + 0.5 / (1 + host.exp(-x))))
            logits = z[..., None] * array([0.5, 0.0, -0.5]) + x[..., None] * array([-0.4, 0.0, 0.4])
            ppl.sample("k", dist.Categorical(logits=logits))

    return model, guide


def local_by_hand(z, k, x):
    """Return log p and log q of the program `local` for one datum each."""
    log_p = bernoulli(z, 0.3) + np.log(PRIOR)[k] + normal(x, MEANS[k] + z)
    logits = z[..., None] * np.array([0.5, 0.0, -0.5]) + x[..., None] * np.array([-0.4, 0.0, 0.4])
    log_k = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = np.take_along_axis(log_k, k[..., None], -1)[..., 0]
    return log_p, bernoulli(z, 0.2 + 0.5 / (1 + np.exp(-x))) + own


BESIDE = float(normal(0.8, 0.3))
"""The density of the site of `local` that no draw changes."""


def local_evidence(x):
    """Return the log evidence of each datum of `local`."""
    pairs = [np.broadcast_arrays(z, k, x)[:2] for z in (0, 1) for k in range(3)]
    return np.log(sum(np.exp(local_by_hand(z, k, x)[0]) for z, k in pairs))


def shared(host):
    """A latent that all data share, and one of each datum: one weight for the whole program."""
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x):
        w = ppl.sample("w", dist.Bernoulli(array(0.4)))
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", dist.Bernoulli(array(0.3)))
            ppl.sample("x", dist.Normal(w + z, 1.0), obs=x)

    def guide(x):
        ppl.sample("w", dist.Bernoulli(array(0.6)))
        with ppl.plate("data", x.shape[0]):
            ppl.sample("z", dist.Bernoulli(0.2 + 0.5 / (1 + host.exp(-x))))

    return model, guide


def shared_evidence(x):
    """Return the log evidence of `shared`."""
    total = 0.0
    for w, *z in itertools.product((0, 1), repeat=1 + len(x)):
        z = np.array(z)
        total += np.exp(bernoulli(w, 0.4) + bernoulli(z, 0.3).sum() + normal(x, w + z).sum())
    return np.log(total)


def summed(host):
    """The program `local` with `k` summed out of the model."""
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x):
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", dist.Bernoulli(array(0.3)))
            k = ppl.sample("k", dist.Categorical(probs=array(PRIOR)), infer={"enumerate": "parallel"})
            ppl.sample("x", dist.Normal(array(MEANS)[k] + z, 1.0), obs=x)

    def guide(x):
        with ppl.plate("data", x.shape[0]):
            ppl.sample("z", dist.Bernoulli(0.2 + 0.5 / (1 + host.exp(-x))))

    return model, guide


def gaussian(host, width=1.0, shift=0.0):
    """Two Gaussian latents of each datum; the guide is the exact posterior for `width` 1 and `shift` 0."""
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x):
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", dist.Normal(array([0.0, 0.0]), 1.0).to_event(1))
            ppl.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x):
        with ppl.plate("data", x.shape[0]):
            ppl.sample("z", dist.Normal(0.8 * x + shift, width * np.sqrt(0.2)).to_event(1))

    return model, guide


def switch(host, wrong=0.0):
    """A finite latent of each datum and data with two values; the guide is the exact posterior for `wrong` 0."""
    ppl, dist, array = host.ppl, host.dist, host.array

    def model(x):
        with ppl.plate("data", x.shape[0]):
            z = ppl.sample("z", dist.Bernoulli(array(0.5)))
            ppl.sample("x", dist.Bernoulli(0.2 + 0.6 * z), obs=x)

    def guide(x):
        with ppl.plate("data", x.shape[0]):
            ppl.sample("z", dist.Bernoulli(0.2 + (0.6 - wrong) * x))

    return model, guide


def padded(host, both=True):
    """Two latents in a row for each datum, of which a mask leaves one for some; `both` says that the guide has the mask too."""
    ppl, dist, array = host.ppl, host.dist, host.array
    lengths = np.array([True, False, True, True])

    def model(x):
        with ppl.plate("data", x.shape[0]):
            a = ppl.sample("a", dist.Bernoulli(array(0.3)))
            ppl.sample("x", dist.Normal(a, 1.0), obs=x)
            with host.mask(lengths):
                b = ppl.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
                ppl.sample("y", dist.Normal(2.0 * b, 1.0), obs=x)

    def guide(x):
        with ppl.plate("data", x.shape[0]):
            ppl.sample("a", dist.Bernoulli(0.2 + 0.5 / (1 + host.exp(-x))))
            with host.mask(lengths if both else np.ones(4, bool)):
                ppl.sample("b", dist.Bernoulli(0.6 + 0 * x))

    return model, guide


def padded_by_hand(a, b, x):
    """Return log p − log q of each datum of `padded`."""
    kept = np.array([True, False, True, True])
    first = bernoulli(a, 0.3) + normal(x, a) - bernoulli(a, 0.2 + 0.5 / (1 + np.exp(-x)))
    second = bernoulli(b, 0.2 + 0.5 * a) + normal(x, 2.0 * b) - bernoulli(b, 0.6)
    return first + np.where(kept, second, 0.0)
