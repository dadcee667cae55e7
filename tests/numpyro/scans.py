"""Programs with discrete sites inside `scan`, whose sums over all draws are small."""

from contextlib import nullcontext

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan

from pplgrad.testing.in_numpyro import array
from pplgrad.testing.programs import Case

T = 3
DATA = [0.2, -0.4, 0.9]
PARAMS = {"a": np.array([0.3, 0.8]), "b": np.array([-0.2, 0.9, 1.3])}


def param(name):
    return numpyro.param(name, array(PARAMS[name]))


def bern(name, logits):
    return numpyro.sample(name, dist.Bernoulli(logits=logits))


def scanned_model(reverse=False, last=False, inner=None):
    def model():
        b = param("b")

        def step(z, x):
            z = bern("z", b[0] + b[1] * z)
            numpyro.sample("x", dist.Normal(b[2] * z, 1.0), obs=x)
            return z, None

        z, _ = scan(step, jnp.zeros((), int), array(DATA), reverse=reverse)
        if last:
            numpyro.factor("end", b[1] * z)

    return model


def scanned_guide(reverse=False):
    def guide():
        a = param("a")

        def step(z, t):
            z = bern("z", a[0] + a[1] * z + 0.1 * t)
            return z, None

        scan(step, jnp.zeros((), int), jnp.arange(T), reverse=reverse)

    return guide


def plate_guide():
    with numpyro.plate("time", T):
        bern("z", param("a")[0] * jnp.arange(T) + param("a")[1])


def two_sites_model():
    b = param("b")

    def step(carry, x):
        z = bern("z", b[0] + b[1] * carry)
        w = bern("w", b[1] * z - carry)
        numpyro.sample("x", dist.Normal(b[2] * w, 1.0), obs=x)
        return w, None

    scan(step, jnp.zeros((), int), array(DATA[:2]))


def two_sites_guide():
    a = param("a")

    def step(carry, _):
        z = bern("z", a[0] + a[1] * carry)
        w = bern("w", a[1] * z)
        return w, None

    scan(step, jnp.zeros((), int), None, length=2)


def plate_inside_model():
    b = param("b")

    def step(z, x):
        with numpyro.plate("inner", 2):
            z = bern("z", b[0] + b[1] * z)
            numpyro.sample("x", dist.Normal(b[2] * z, 1.0), obs=x)
        numpyro.sample("y", dist.Normal(b[0] * z.sum(), 1.0), obs=x)
        return z, None

    scan(step, jnp.zeros(2, int), array(DATA[:2]))


def plate_inside_guide():
    a = param("a")

    def step(z, _):
        with numpyro.plate("inner", 2):
            z = bern("z", a[0] + a[1] * z)
        return z, None

    scan(step, jnp.zeros(2, int), None, length=2)


def global_model():
    b = param("b")
    g = bern("g", b[0])

    def step(z, x):
        z = bern("z", b[0] + b[1] * z * g)
        numpyro.sample("x", dist.Normal(b[2] * z + g, 1.0), obs=x)
        return z, None

    scan(step, jnp.zeros((), int), array(DATA))


def global_guide():
    a = param("a")
    g = bern("g", a[1])

    def step(z, _):
        z = bern("z", a[0] + a[1] * z - g)
        return z, z

    _, zs = scan(step, jnp.zeros((), int), None, length=T)
    bern("after", a[0] * zs.sum())


def after_model():
    global_model()
    bern("after", param("b")[2])


def branches(name, z, weight):
    """Draw a site in one of two branches of `cond`."""
    return cond(z == 1, lambda x: bern(name, weight * x), lambda x: bern(name, -weight * x), z + 1.0)


def one_or_other_model():
    b = param("b")
    w = bern("w", 0.4 * bern("z", b[0]) - b[1])
    numpyro.sample("x", dist.Normal(b[2] * w, 1.0), obs=array(0.4))


def one_or_other_guide():
    a = param("a")
    branches("w", bern("z", a[0]), a[1])


def in_a_step_model():
    b = param("b")

    def step(c, x):
        w = bern("w", b[0] * bern("z", b[0] + b[1] * c) + b[1])
        numpyro.sample("x", dist.Normal(b[2] * w, 1.0), obs=x)
        return w, None

    scan(step, jnp.zeros((), int), array(DATA[:2]))


def in_a_step_guide():
    a = param("a")
    scan(lambda c, _: (branches("w", bern("z", a[0] + a[1] * c), a[1]), None), jnp.zeros((), int), None, length=2)


def two_steps_model():
    b = param("b")

    def step(z, x):
        z = bern("z", b[0] + b[1] * z)
        numpyro.sample("x", dist.Normal(b[2] * z, 1.0), obs=x)
        return z, None

    scan(step, jnp.zeros((), int), array(DATA[:2]))


def two_steps_guide():
    a = param("a")
    scan(lambda z, _: (bern("z", a[0] + a[1] * z), None), jnp.zeros((), int), None, length=2)


def scoped(prefix):
    """Return a model, a guide whose scan stands in a scope of that prefix, and their latent site."""

    def guide():
        a = param("a")
        with handlers.scope(prefix=prefix.rstrip("/")) if prefix else nullcontext():
            scan(lambda z, _: (bern("z", a[0] + a[1] * z), None), jnp.zeros((), int), None, length=2)

    def model():
        b = param("b")
        with numpyro.plate("time", 2):
            z = bern(f"{prefix}z", b[0])
            numpyro.sample("x", dist.Normal(b[2] * z, 1.0), obs=array(DATA[:2]))

    return model, guide, {f"{prefix}z": ((2,), 2)}


CASES = {
    "forward": (scanned_model(), scanned_guide(), {"z": ((T,), 2)}),
    "both-reverse": (scanned_model(True), scanned_guide(True), {"z": ((T,), 2)}),
    "guide-reverse": (scanned_model(), scanned_guide(True), {"z": ((T,), 2)}),
    "model-reverse": (scanned_model(True), scanned_guide(), {"z": ((T,), 2)}),
    "last-carry": (scanned_model(last=True), scanned_guide(), {"z": ((T,), 2)}),
    "plate-guide": (scanned_model(), plate_guide, {"z": ((T,), 2)}),
    "plate-guide-reverse": (scanned_model(True), plate_guide, {"z": ((T,), 2)}),
    "two-sites": (two_sites_model, two_sites_guide, {"z": ((2,), 2), "w": ((2,), 2)}),
    "plate-inside": (plate_inside_model, plate_inside_guide, {"z": ((2, 2), 2)}),
    "two-steps": (two_steps_model, two_steps_guide, {"z": ((2,), 2)}),
    "in-cond": (one_or_other_model, one_or_other_guide, {"z": ((), 2), "w": ((), 2)}),
    "in-cond-in-a-step": (in_a_step_model, in_a_step_guide, {"z": ((2,), 2), "w": ((2,), 2)}),
    "global-and-after": (after_model, global_guide, {"g": ((), 2), "z": ((T,), 2), "after": ((), 2)}),
}


def as_case(name):
    model, guide, latents = CASES[name]
    return Case(name, PARAMS, latents, lambda _: (model, guide))
