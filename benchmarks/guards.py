"""What the guard and the second watching cost, as a share of a step: `make bench-guards`.

Paired: each program's reused steps, its guard alone, its watched steps, and Trace_ELBO's steps are timed in turns, in one run. So are
Trace_ELBO's steps under two modes of torch's that do nothing: whatever watches every operation from Python costs at least that.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pplgrad import ScoreFunction
from pplgrad.pyro import TraceGrad_ELBO

TURNS = 100


def programs() -> Iterator[tuple[str, Callable, Callable]]:
    """Yield (name, model, guide)."""
    data = torch.tensor(0.7)

    def chain(where: Callable) -> None:
        z = torch.tensor(0.0)
        for i in range(10):
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=where(i) + 0.3 * z))

    def chain_model() -> None:
        chain(lambda i: torch.tensor(0.1))
        pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0), obs=data)

    yield "chain of 10", chain_model, lambda: chain(lambda i: pyro.param("a", torch.zeros(10))[i])
    network = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.Tanh(), torch.nn.Linear(200, 784))
    inverse = torch.nn.Sequential(torch.nn.Linear(784, 200), torch.nn.Tanh(), torch.nn.Linear(200, 200))
    image = torch.ones(64, 784)

    def belief_model() -> None:
        pyro.module("network", network)
        with pyro.plate("images", 64):
            z = pyro.sample("z", dist.Bernoulli(torch.full((200,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=network(z)).to_event(1), obs=image)

    def belief_guide() -> None:
        pyro.module("inverse", inverse)
        with pyro.plate("images", 64):
            pyro.sample("z", dist.Bernoulli(logits=inverse(image)).to_event(1))

    yield "belief network", belief_model, belief_guide
    large = np.ones(125_000)

    def array_model() -> None:
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        with pyro.plate("data", len(large)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(large, dtype=torch.float32))

    yield (
        "arrays of 1 MB",
        array_model,
        lambda: pyro.sample("z", dist.Bernoulli(logits=pyro.param("b", torch.tensor(0.1)))),
    )


def seconds(action: Callable[[], object]) -> float:
    """Return how much of the processor's time something takes: what other processes do in between does not count."""
    begin = time.process_time()
    action()
    return time.process_time() - begin


class _EveryOperation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _EveryFunction(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def row(model: Callable, guide: Callable, turns: int = TURNS) -> tuple[float, float, float, float, float]:
    """Return a step's milliseconds, the guard's share, the share of watching again over 500 steps, and watched steps and idle modes by Trace_ELBO's."""
    pyro.clear_param_store()
    chosen = {"*": ScoreFunction()}
    kept, watched = TraceGrad_ELBO(estimators=chosen), TraceGrad_ELBO(estimators=chosen, reuse_structure=False)
    host = Trace_ELBO()
    for elbo in (kept, watched, host) * 3:
        elbo.loss_and_grads(model, guide)
    (known,) = kept._structures._known.values()
    assert known.guard is not None, "this program is to have a guard"

    def under_modes() -> None:
        with _EveryFunction(), _EveryOperation():
            loss = host.differentiable_loss(model, guide)
        if loss.requires_grad:
            loss.backward()

    times: list[list[float]] = [[], [], [], [], [], []]
    for _ in range(turns):
        known.reuses = 2  # The next one is not watched again.
        times[0].append(seconds(lambda: kept.loss_and_grads(model, guide)))
        times[1].append(seconds(known.guard.holds))
        times[2].append(seconds(lambda: watched.loss_and_grads(model, guide)))
        times[3].append(seconds(lambda: host.loss_and_grads(model, guide)))
    for _ in range(turns):
        times[4].append(seconds(under_modes))
        times[5].append(seconds(lambda: host.loss_and_grads(model, guide)))
    step, guard, watch, plain, modes, beside = map(statistics.median, times)
    return 1e3 * step, guard / step, (watch / step - 1) / 500, watch / plain, modes / beside


def main() -> None:
    """Print a table."""
    torch.set_num_threads(1)
    print(
        f"{'program':16}{'step, ms':>10}{'guard':>8}{'watching again':>16}{'watched / Trace_ELBO':>22}{'idle modes':>12}"
    )
    for name, model, guide in programs():
        step, guard, again, watched, modes = row(model, guide)
        print(f"{name:16}{step:10.2f}{guard:8.1%}{again:16.2%}{watched:22.2f}{modes:12.2f}")


if __name__ == "__main__":
    main()
