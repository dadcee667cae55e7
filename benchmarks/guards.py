"""What the guard of a reused structure costs, as a share of an eager step: `make bench-guards`.

Each row takes turns: a step that uses a known structure again, and the guard's comparison alone (`Guard.holds`), on one thread; the
share is the ratio of their medians. Large arrays are compared number by number, which is what costs there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.shared import OPTIONS, in_turns, sbn
from pplgrad import ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO
from pplgrad.pyro._guards import Guard


def chain() -> tuple[Callable, Callable, tuple]:
    """Return a chain of ten binary sites."""

    def model() -> None:
        z = torch.zeros(())
        for i in range(10):
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=z - 0.5))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.7))

    def guide() -> None:
        logits = pyro.param("logits", torch.zeros(10))
        for i in range(10):
            pyro.sample(f"z{i}", dist.Bernoulli(logits=logits[i]))

    return model, guide, ()


def with_arrays(numbers: int) -> tuple[Callable, Callable, tuple]:
    """Return the chain with an array that the model reads."""
    model, guide, _ = chain()
    data = np.random.default_rng(0).normal(size=numbers)

    def reading() -> None:
        model()
        pyro.factor("f", torch.tensor(float(data[0])))

    return reading, guide, ()


def network() -> tuple[Callable, Callable, tuple]:
    """Return a program with two networks."""
    decoder = torch.nn.Sequential(
        torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 32)
    )
    encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(len(x), 8)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    return model, guide, (torch.ones(64, 32),)


def belief_network() -> tuple[Callable, Callable, tuple]:
    """Return models/sbn.py."""
    train, _ = sbn().load(OPTIONS, 0)
    model, guide = sbn().pyro_program({**OPTIONS, "latents": 200}, train, 0)
    return model, guide, (torch.tensor(train[:100], dtype=torch.float32),)


def programs() -> Iterator[tuple[str, tuple[Callable, Callable, tuple]]]:
    """Yield the programs by name."""
    yield "chain of 10", chain()
    yield "belief network", belief_network()
    yield "two networks", network()
    yield "array of 8 kB", with_arrays(1_000)
    yield "array of 800 kB", with_arrays(100_000)
    yield "array of 8 MB", with_arrays(1_000_000)


def main() -> None:
    """Measure and show a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("program", "step ms", "guard ms", "share")
    for name, (model, guide, args) in programs():
        pyro.clear_param_store()
        elbo = TraceGrad_ELBO(estimators={"*": ScoreFunction()})

        def step(elbo: Any = elbo, program: tuple = (model, guide, *args)) -> None:
            elbo.loss_and_grads(*program)

        for _ in range(4):
            step()
        guard = Guard(model, guide)
        times = in_turns({"step": step, "guard": guard.holds}, given.seconds)
        taken, guarded = (float(np.median(times[each])) for each in ("step", "guard"))
        table.add_row(name, f"{taken:.2f}", f"{guarded:.3f}", f"{100 * guarded / taken:.1f}%")
    Console().print(table)


if __name__ == "__main__":
    main()
