"""Sites that are summed out beside TraceEnum_ELBO: `make bench-marginal`.

Each program has one sampled discrete site `w` in the guide (under the estimators named here, under the plain score function in TraceEnum_ELBO),
and discrete sites of the model that are summed out. Steps (the loss and its gradient) take turns in one process for each library; a ratio is the
median over turns. The first four steps hold what is done once: watching, tracing, compiling. `variance` is the trace of the covariance of the guide's gradient.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import numpy as np

SUM = {"enumerate": "parallel"}
X = np.random.RandomState(0).randn(2000).astype(np.float32)

Program = tuple[str, Callable[[], None], Callable[[], None], int]
"""A name, a model, a guide, and how many dimensions plates take."""


def pyro_programs() -> Iterator[Program]:
    """Yield programs of Pyro's."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro import poutine
    from pyro.ops.indexing import Vindex

    x = torch.tensor(X)

    def guide() -> None:
        pyro.sample("w", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    def start(states: int) -> tuple[Any, Any, Any]:
        w = pyro.sample("w", dist.Bernoulli(0.4))
        move = pyro.param("t", 2 * torch.eye(states))
        return w, move, pyro.param("m", torch.linspace(-2.0, 2.0, states)) + 0.3 * w[..., None]

    def mixture() -> None:
        _, _, mean = start(8)
        weights = pyro.param("b", torch.zeros(8))
        with pyro.plate("data", 1000):
            k = pyro.sample("k", dist.Categorical(logits=weights), infer=SUM)
            pyro.sample("x", dist.Normal(Vindex(mean)[..., k], 1.0), obs=x[:1000])

    yield "mixture, K=8, N=1000", mixture, guide, 1

    def hmm() -> None:
        _, move, mean = start(16)
        k: Any = 0
        for t in pyro.markov(range(50)):
            k = pyro.sample(f"k{t}", dist.Categorical(logits=Vindex(move)[k]), infer=SUM)
            pyro.sample(f"x{t}", dist.Normal(Vindex(mean)[..., k], 1.0), obs=x[t])

    yield "HMM, K=16, T=50", hmm, guide, 0
    rows, length = x[:600].reshape(20, 30), torch.arange(11, 31)

    def plated() -> None:
        _, move, mean = start(8)
        with pyro.plate("sequences", 20):
            k: Any = 0
            for t in pyro.markov(range(30)):
                with poutine.mask(mask=t < length):
                    k = pyro.sample(f"k{t}", dist.Categorical(logits=Vindex(move)[k]), infer=SUM)
                    pyro.sample(f"x{t}", dist.Normal(Vindex(mean)[..., k], 1.0), obs=rows[:, t])

    yield "20 masked HMMs, K=8, T=30", plated, guide, 1

    def factorial() -> None:
        w, move, mean = start(4)
        first: Any = 0
        second: Any = 0
        for t in pyro.markov(range(20)):
            first = pyro.sample(f"k{t}", dist.Categorical(logits=Vindex(move)[first]), infer=SUM)
            second = pyro.sample(f"j{t}", dist.Categorical(logits=Vindex(move)[second]), infer=SUM)
            loc = Vindex(mean)[..., first] - Vindex(mean)[..., second]
            pyro.sample(f"x{t}", dist.Normal(loc, 1.0), obs=x[t])

    yield "factorial HMM, 2 x K=4, T=20", factorial, guide, 0


def numpyro_programs() -> Iterator[Program]:
    """Yield programs of NumPyro's."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan

    x = jnp.asarray(X)

    def guide() -> None:
        numpyro.sample("w", dist.Bernoulli(logits=numpyro.param("a", 0.3)))

    def start(states: int) -> tuple[Any, Any, Any]:
        w = numpyro.sample("w", dist.Bernoulli(0.4))
        move = numpyro.param("t", 2 * jnp.eye(states))
        return w, move, numpyro.param("m", jnp.linspace(-2.0, 2.0, states)) + 0.3 * w

    def mixture() -> None:
        _, _, mean = start(8)
        weights = numpyro.param("b", jnp.zeros(8))
        with numpyro.plate("data", 1000):
            k = numpyro.sample("k", dist.Categorical(logits=weights), infer=SUM)
            numpyro.sample("x", dist.Normal(mean[k], 1.0), obs=x[:1000])

    yield "mixture, K=8, N=1000", mixture, guide, 1

    def tree() -> None:
        w, _, mean = start(4)
        logits = numpyro.param("b", jnp.zeros((4, 4)))
        with numpyro.plate("groups", 50, dim=-2):
            g = numpyro.sample("g", dist.Categorical(logits=jnp.zeros(4)), infer=SUM)
            with numpyro.plate("data", 40, dim=-1):
                k = numpyro.sample("k", dist.Categorical(logits=logits[g]), infer=SUM)
                numpyro.sample("x", dist.Normal(mean[k], 1.0), obs=x.reshape(50, 40))

    yield "tree in two plates, K=4", tree, guide, 2

    def hmm() -> None:
        _, move, mean = start(16)

        def body(before: Any, x: Any) -> Any:
            k = numpyro.sample("k", dist.Categorical(logits=move[before]), infer=SUM)
            numpyro.sample("x", dist.Normal(mean[k], 1.0), obs=x)
            return k, None

        scan(body, 0, x[:50])

    yield "HMM in scan, K=16, T=50", hmm, guide, 0


Step = Callable[[], np.ndarray]


def estimators() -> dict[str, Any]:
    """Return pplgrad's contestants."""
    from pplgrad import DecayingAverage, LocalExpectation, ScoreFunction

    return {"average": ScoreFunction(DecayingAverage()), "LocalExpectation": LocalExpectation()}


def pyro_steps(model: Callable, guide: Callable, nesting: int, compiled: bool) -> Iterator[tuple[str, Step]]:
    """Yield contestants; a step returns the gradient with respect to the guide's parameter."""
    import pyro
    import torch
    from pyro.infer import TraceEnum_ELBO

    from pplgrad.pyro import TraceGrad_ELBO

    torch.set_num_threads(1)
    elbos: dict[str, Any] = {"TraceEnum_ELBO": TraceEnum_ELBO(max_plate_nesting=nesting)}
    for short, estimator in estimators().items():
        elbos[short] = TraceGrad_ELBO(max_plate_nesting=nesting, estimators={"w": estimator})
        if compiled:
            elbos[f"{short}, compiled"] = TraceGrad_ELBO(
                max_plate_nesting=nesting, estimators={"w": estimator}, compile=True
            )
    pyro.clear_param_store()
    for name, elbo in elbos.items():

        def step(elbo: Any = elbo) -> np.ndarray:
            for _, x in pyro.get_param_store().named_parameters():
                x.grad = None
            elbo.loss_and_grads(model, guide)
            return pyro.param("a").grad.detach().numpy().copy()

        yield name, step


def numpyro_steps(model: Callable, guide: Callable, nesting: int, compiled: bool) -> Iterator[tuple[str, Step]]:
    """Yield contestants; a step returns the gradient with respect to the guide's parameter."""
    import jax
    from numpyro.infer import SVI, TraceEnum_ELBO
    from numpyro.optim import SGD

    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    elbos: dict[str, Any] = {"TraceEnum_ELBO": TraceEnum_ELBO(max_plate_nesting=nesting)}
    elbos |= {short: TraceGrad_ELBO(estimators={"w": estimator}) for short, estimator in estimators().items()}
    for name, elbo in elbos.items():
        svi = SVI(model, guide if name == "TraceEnum_ELBO" else config_estimators(guide, {}), SGD(0.0), elbo)
        state = svi.init(jax.random.key(0))
        held, keys = [state.mutable_state], iter(range(10**9))

        def loss(params: Any, mutable: Any, key: Any, elbo: Any = elbo, svi: Any = svi) -> Any:
            if not mutable:
                return elbo.loss(key, params, svi.model, svi.guide), mutable
            found = elbo.loss_with_mutable_state(key, {**params, **mutable}, svi.model, svi.guide)
            return found["loss"], found["mutable_state"]

        derived = jax.jit(jax.grad(loss, has_aux=True))
        params = svi.get_params(state)

        def step(derived: Any = derived, params: Any = params, keys: Any = keys, held: Any = held) -> np.ndarray:
            found, held[0] = derived(params, held[0], jax.random.key(next(keys)))
            return np.asarray(found["a"])

        yield name, step


def measured(programs: Iterator[Program], steps: Callable, compiled: bool, turns: int, draws: int) -> None:
    """Print a line for each contestant of each program."""
    for name, model, guide, nesting in programs:
        first: dict[str, float] = {}
        running: dict[str, Step] = {}
        for contestant, step in steps(model, guide, nesting, compiled):
            begin = time.perf_counter()
            try:
                step()
            except Exception as error:  # noqa: BLE001  What fails is part of the table, whatever it is.
                print(
                    f"{name:30}{contestant:28}fails: {type(error).__name__}: {str(error).splitlines()[0][:60]}",
                    flush=True,
                )
                continue
            for _ in range(3):  # A compiled step of Pyro's is recorded at the third.
                step()
            first[contestant] = time.perf_counter() - begin
            running[contestant] = step
        times: dict[str, list[float]] = {contestant: [] for contestant in running}
        for _ in range(turns):
            for contestant, step in running.items():
                begin = time.perf_counter()
                for _ in range(5):
                    step()
                times[contestant].append((time.perf_counter() - begin) / 5)
        for contestant, step in running.items():
            against = times.get("TraceEnum_ELBO", times[contestant])
            ratio = statistics.median(a / b for a, b in zip(times[contestant], against, strict=True))
            variance = float(np.var([step() for _ in range(draws)], 0).sum())
            milliseconds = 1e3 * statistics.median(times[contestant])
            print(
                f"{name:30}{contestant:28}{first[contestant]:10.2f}{milliseconds:10.3f}{ratio:10.2f}{variance:12.3g}",
                flush=True,
            )


def main() -> None:
    """Print a table for each library, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", choices=("pyro", "numpyro"))
    parser.add_argument(
        "--compile", action="store_true", help="compiled steps of Pyro too, which take minutes to compile"
    )
    parser.add_argument("--turns", type=int, default=30, help="turns of five steps")
    parser.add_argument("--draws", type=int, default=400, help="gradients behind a variance")
    given = parser.parse_args()
    if given.host is None:
        for host in ("pyro", "numpyro"):
            again = [*sys.argv[1:], "--host", host]
            subprocess.run([sys.executable, "-m", "benchmarks.marginal", *again], check=True)
        return
    print(f"{given.host:30}{'':28}{'first, s':>10}{'step, ms':>10}{'ratio':>10}{'variance':>12}", flush=True)
    if given.host == "pyro":
        measured(pyro_programs(), pyro_steps, given.compile, given.turns, given.draws)
    else:
        measured(numpyro_programs(), numpyro_steps, False, given.turns, given.draws)


if __name__ == "__main__":
    main()
