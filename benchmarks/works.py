"""The programs that are measured, written once for both libraries, with their data and the parameters at which they start.

All latents are Bernoulli, so that the score function is every contestant's estimator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.shared import OPTIONS, sbn

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Work:
    """One program at one size.

    `kind` is "sbn" (the belief network of models/sbn.py: `size` latents in each of `layers` layers, `batch` images), "chain" (`size`
    sites, each with an observation, in a Python loop), "scan" (the same chain in NumPyro's `scan` and Pyro's `markov`), "plate"
    (`size` latents for each of `batch` rows, all independent), or "categorical" (one latent of `size` categories for each of `batch` rows).
    """

    kind: str
    size: int
    layers: int = 1
    particles: int = 1
    batch: int = 100

    @property
    def name(self) -> str:
        """The work in words, as the command line's patterns see it.

        >>> Work("sbn", 200, particles=10).name
        'sbn 200, 1 layer, 10 particles'
        """
        words = [f"{self.kind} {self.size}"]
        if self.kind == "sbn":
            words.append(f"{self.layers} layer{'s' * (self.layers > 1)}")
        if self.kind in ("plate", "categorical"):
            words[0] += f" x {self.batch}"
        if self.particles > 1 or self.kind == "sbn":
            words.append(f"{self.particles} particle{'s' * (self.particles > 1)}")
        return ", ".join(words)

    @property
    def plates(self) -> int:
        """The number of nested plates."""
        return {"sbn": 1, "plate": 2, "categorical": 1}.get(self.kind, 0)

    @property
    def options(self) -> dict[str, Any]:
        """The options of models/sbn.py."""
        return {**OPTIONS, "latents": self.size, "layers": self.layers}


def arrays(work: Work, seed: int) -> Arrays:
    """Return the data: `x` is what a step sees, `train` (for the belief network) what its initial parameters are made of."""
    rng = np.random.default_rng(seed)
    if work.kind == "sbn":
        train, _ = sbn().load(work.options, seed)
        return {"x": train[: work.batch], "train": train}
    if work.kind == "plate":
        return {"x": rng.normal(size=(work.batch, work.size))}
    return {"x": rng.normal(size=work.batch if work.kind == "categorical" else work.size)}


def start(work: Work, data: Arrays, seed: int) -> Arrays:
    """Return the parameters at which every contestant starts."""
    if work.kind == "sbn":
        return sbn().initial(work.options, data["train"], seed)
    if work.kind == "plate":
        rng = np.random.default_rng(seed)
        return {name: 0.3 + 0.1 * rng.normal(size=work.size) for name in ("prior", "mean", "intercept", "slope")}
    if work.kind == "categorical":
        rng = np.random.default_rng(seed)
        return {name: 0.3 * rng.normal(size=work.size) for name in ("prior", "mean", "intercept", "slope")}
    return {"p": np.array([0.3, -0.5, 0.8]), "q": np.array([-0.4, 0.7])}


def pyro_program(work: Work, data: Arrays, seed: int, double: bool = False) -> tuple[Callable, Callable, tuple]:
    """Return model, guide and their arguments for Pyro, in float64 if `double`."""
    import pyro
    import pyro.distributions as dist
    import torch

    def array(values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64 if double else torch.float32)

    steps = (lambda length: pyro.markov(range(length))) if work.kind == "scan" else range
    program = _program(work, pyro, dist, torch, array, data, seed, steps)
    return (*program, (array(data["x"]),))


def numpyro_program(work: Work, data: Arrays, seed: int, double: bool = False) -> tuple[Callable, Callable, tuple]:
    """Return model, guide and their arguments for NumPyro, in float64 if `double`."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def array(values: Any) -> Any:
        return jnp.asarray(values, jnp.float64 if double else jnp.float32)

    if work.kind == "scan":
        program = _scan(array, start(work, data, seed))
    else:
        program = _program(work, numpyro, dist, jnp, array, data, seed, range)
    return (*program, (array(data["x"]),))


def _program(
    work: Work,
    ppl: Any,
    dist: Any,
    xp: Any,
    array: Callable,
    data: Arrays,
    seed: int,
    steps: Callable[[int], Any],
) -> tuple[Callable, Callable]:
    if work.kind == "sbn":
        return sbn().program(ppl, dist, xp, array, work.options, data["train"], seed)
    initial = {name: array(value) for name, value in start(work, data, seed).items()}
    if work.kind in ("plate", "categorical"):
        return (_plate if work.kind == "plate" else _categorical)(ppl, dist, initial)
    return _chain(ppl, dist, array, initial, work.size, steps)


def _chain(
    ppl: Any, dist: Any, array: Callable, initial: dict, length: int, steps: Callable
) -> tuple[Callable, Callable]:
    def model(x: Any) -> None:
        p, z = ppl.param("p", initial["p"]), array(0.0)
        for t in steps(length):
            z = ppl.sample(f"z{t}", dist.Bernoulli(logits=p[0] + p[1] * z))
            ppl.sample(f"x{t}", dist.Normal(p[2] * z, 1.0), obs=x[t])

    def guide(x: Any) -> None:
        q, z = ppl.param("q", initial["q"]), array(0.0)
        for t in steps(length):
            z = ppl.sample(f"z{t}", dist.Bernoulli(logits=q[0] + q[1] * z))

    return model, guide


def _scan(array: Callable, initial: dict) -> tuple[Callable, Callable]:
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan

    def model(x: Any) -> None:
        p = numpyro.param("p", initial["p"])

        def step(z: Any, x: Any) -> tuple[Any, None]:
            z = numpyro.sample("z", dist.Bernoulli(logits=p[0] + p[1] * z))
            numpyro.sample("x", dist.Normal(p[2] * z, 1.0), obs=x)
            return z.astype(x.dtype), None

        scan(step, array(0.0), x)

    def guide(x: Any) -> None:
        q = numpyro.param("q", initial["q"])

        def step(z: Any, x: Any) -> tuple[Any, None]:
            return numpyro.sample("z", dist.Bernoulli(logits=q[0] + q[1] * z)).astype(x.dtype), None

        scan(step, array(0.0), x)

    return model, guide


def _plate(ppl: Any, dist: Any, initial: dict) -> tuple[Callable, Callable]:
    def model(x: Any) -> None:
        prior, mean = (ppl.param(name, initial[name]) for name in ("prior", "mean"))
        with ppl.plate("latents", x.shape[-1], dim=-1), ppl.plate("data", x.shape[-2], dim=-2):
            z = ppl.sample("z", dist.Bernoulli(logits=prior))
            ppl.sample("x", dist.Normal(mean * z, 1.0), obs=x)

    def guide(x: Any) -> None:
        intercept, slope = (ppl.param(name, initial[name]) for name in ("intercept", "slope"))
        with ppl.plate("latents", x.shape[-1], dim=-1), ppl.plate("data", x.shape[-2], dim=-2):
            ppl.sample("z", dist.Bernoulli(logits=intercept + slope * x))

    return model, guide


def _categorical(ppl: Any, dist: Any, initial: dict) -> tuple[Callable, Callable]:
    def model(x: Any) -> None:
        prior, mean = (ppl.param(name, initial[name]) for name in ("prior", "mean"))
        with ppl.plate("data", len(x)):
            z = ppl.sample("z", dist.Categorical(logits=prior))
            ppl.sample("x", dist.Normal(mean[z], 1.0), obs=x)

    def guide(x: Any) -> None:
        intercept, slope = (ppl.param(name, initial[name]) for name in ("intercept", "slope"))
        with ppl.plate("data", len(x)):
            ppl.sample("z", dist.Categorical(logits=intercept + slope * x[:, None]))

    return model, guide
