"""How often `assess_fit` passes exact posteriors, and how often it names poor guides: rates over many small fits, in Pyro.

    python -m benchmarks.assessing --fits 100

Each fit has data of its own, drawn from the model. "limit" is how often the limit below the evidence, at level 0.01, is not above it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import torch

from pplgrad import Assessment
from pplgrad.pyro import assess_fit

Guide = Callable[[torch.Tensor], None]


def switch(wrong: float) -> tuple[Guide, Guide]:
    """Return a model with a finite latent and a binary datum each, and a guide that is `wrong` in the slope of its probability."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * z), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.2 + wrong / 2 + (0.6 - wrong) * x))

    return model, guide


def gaussian(width: float) -> tuple[Guide, Guide]:
    """Return a model with two Gaussian latents of each datum, and a guide of `width` times the posterior's standard deviation."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, width * math.sqrt(0.2)).to_event(1))

    return model, guide


CASES = {
    "finite, exact posterior": (switch, 0.0),
    "finite, posterior mixed with its opposite": (switch, 0.4),
    "Gaussian, exact posterior": (gaussian, 1.0),
    "Gaussian, half as wide": (gaussian, 0.5),
    "Gaussian, a fifth too narrow": (gaussian, 0.8),
}


def evidence(make: Callable, x: torch.Tensor) -> float:
    """Return the log evidence."""
    if make is switch:
        return float(len(x) * math.log(0.5))
    return float(dist.Normal(0.0, math.sqrt(1.25)).log_prob(x).sum())


def assessments(make: Callable, value: float, fits: int) -> Iterator[tuple[Assessment, float]]:
    """Yield the assessment of each fit, and the log evidence of its data."""
    model, guide = make(value)
    for seed in range(fits):
        torch.manual_seed(10_000 + seed)
        empty = torch.zeros(20) if make is switch else torch.zeros(20, 2)
        x = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(empty).nodes["x"]["value"]
        found = assess_fit(model, guide, (x,), samples=200, replicates=200, simulations=25, rank_draws=19, seed=seed)
        yield found, evidence(make, x)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=100)
    fits = parser.parse_args().fits
    print("| guide | passed | poor weights | predictive p < 0.01 | calibration p < 0.01 | limit ≤ evidence |")
    print("|---|---|---|---|---|---|")
    for name, (make, value) in CASES.items():
        rows = list(assessments(make, value, fits))
        failed = [{v.part for v in found.verdicts if v.status == "failed"} for found, _ in rows]
        counts = [sum(part in x for x in failed) for part in ("weights", "predictive checks", "calibration")]
        below = sum(found.evidence.limit <= exact for found, exact in rows)
        cells = [sum(found.passed for found, _ in rows), *counts, below]
        print(f"| {name} | " + " | ".join(f"{x} of {fits}" for x in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
