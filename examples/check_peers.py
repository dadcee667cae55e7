"""A certificate for a gradient: NumPyro's own TraceGraph_ELBO in a subsampled plate, and pplgrad's.

b = E[estimate] - gradient of the enumerated objective. The score of a draw in a subsampled plate is log q unscaled
times the scaled cost; `TraceGraph_ELBO` (NumPyro 0.22) scales both, and is N/n times the gradient.
"""

import argparse

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import TraceGraph_ELBO

from pplgrad.numpyro import check_gradients

DATA = jnp.array([0.5, -1.0, 2.0, 0.3])


def model():
    with numpyro.plate("data", 4, subsample_size=2) as i:
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=DATA[i])


def guide():
    logits = numpyro.param("a", jnp.array([0.3, -0.4, 1.0, 0.8]))
    with numpyro.plate("data", 4, subsample_size=2) as i:
        numpyro.sample("z", dist.Bernoulli(logits=logits[i]))


def main() -> None:
    """Print both certificates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for elbo in (TraceGraph_ELBO(), None):
        print(check_gradients(model, guide, elbo=elbo, draws=given.draws, seed=given.seed), end="\n\n")


if __name__ == "__main__":
    main()
