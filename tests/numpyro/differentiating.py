"""Ways in which what a program is given, and no parameter of its ELBO's, is differentiated: JAX hands each of them another tracer."""

import jax
import jax.numpy as jnp

X = jnp.array([1.0, 2.0])


def over_vmap(f):
    return jax.grad(lambda w: jax.vmap(lambda x: f(w * x))(X).sum())


def over_scan(f):
    return jax.grad(lambda w: jax.lax.scan(lambda total, x: (total + f(w * x), None), jnp.zeros(()), X)[0])


WAYS = {
    "grad": jax.grad,
    "grad of jit": lambda f: jax.grad(jax.jit(f)),
    "jit of grad": lambda f: jax.jit(jax.grad(f)),
    "grad of vmap over data": over_vmap,
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "grad of scan over data": over_scan,
}
"""By name, what makes of a function of a number its gradient."""


def handed(elbo, key, model, guide):
    """Return losses as functions of what model and guide are called with: handed in as an argument, and closed over."""
    return {
        "argument": lambda w: elbo.loss(key, {}, model, guide, w),
        "closure": lambda w: elbo.loss(key, {}, lambda: model(w), lambda: guide(w)),
    }
