"""What the stories share: the options of the command line, model scripts, training in either library, pictures."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import matplotlib
import numpy as np

from pplgrad import ELBO
from pplgrad.lab.palette import COLOURS as COLOURS

matplotlib.use("Agg")
ROOT = Path(__file__).parents[1]


def story(steps: int, backends: tuple[str, ...] = ("numpyro", "pyro")) -> Callable:
    """Make a command of a function (backend, steps, seed, out): the first backend is the default.

    With one backend or none the function is (steps, seed, out). What the script shows is its help.
    """

    def decorate(function: Callable) -> Callable:
        script = Path(function.__globals__["__file__"])
        options = [
            click.option("--steps", default=steps, show_default=True, type=click.IntRange(1), help="Training steps."),
            click.option("--seed", default=0, show_default=True, type=int),
            click.option(
                "--out",
                default=Path("results") / f"{script.stem}.png",
                show_default=True,
                type=click.Path(path_type=Path),
                help="Where the picture goes.",
            ),
        ]
        if len(backends) > 1:
            kinds = click.Choice(list(backends))
            options.insert(0, click.option("--backend", type=kinds, default=backends[0], show_default=True))
        for option in reversed(options):
            function = option(function)
        return click.command(help=function.__globals__["__doc__"])(function)

    return decorate


def model_script(name: str) -> ModuleType:
    """Return a module of models/, where scripts may import their neighbours."""
    folder = ROOT / "models"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Trained(NamedTuple):
    """What training leaves: the parameters by name, and the loss of each step."""

    params: dict[str, np.ndarray]
    losses: np.ndarray


def train(
    backend: str,
    program: tuple[Callable, Callable],
    data: np.ndarray,
    steps: int,
    seed: int,
    *,
    estimators: dict | None = None,
    learning_rate: float = 0.01,
    particles: int = 1,
    objective: Any = None,
    batch_size: int | None = None,
    every: int | None = None,
    at: Callable[[int, float, dict[str, np.ndarray]], None] = lambda step, seconds, params: None,
) -> Trained:
    """Train (model, guide) with Adam, on all data at every step or on random batches.

    After the first step, and then every so many steps, `at` gets their number, the seconds that those after the first one took (which finds
    the structure or compiles), and the parameters.
    """
    fit = {"pyro": _train_pyro, "numpyro": _train_numpyro}[backend]
    data = np.asarray(data)
    data = data.astype(np.float32) if data.dtype == np.float64 else data
    batches = _batches(data, batch_size, steps, seed)
    objective = ELBO() if objective is None else objective
    return fit(program, batches, seed, estimators or {}, learning_rate, particles, objective, _Looks(every, at))


class _Looks:
    """Calls `at` on the way of a training run, with a clock that stands still meanwhile."""

    def __init__(self, every: int | None, at: Callable) -> None:
        self.every, self.at = every, at
        self.steps, self.seconds, self.since = 0, 0.0, 0.0

    def stepped(self, params: Callable[[], dict[str, np.ndarray]]) -> None:
        """Count a step; `params` returns the parameters after it."""
        self.steps += 1
        if self.every is None or (self.steps > 1 and self.steps % self.every):
            return
        found = params()  # which waits for the step
        self.seconds += time.perf_counter() - self.since if self.steps > 1 else 0.0
        self.at(self.steps, self.seconds, found)
        self.since = time.perf_counter()


def _batches(data: np.ndarray, size: int | None, steps: int, seed: int) -> Iterator[np.ndarray]:
    from tqdm import trange

    rng = np.random.default_rng(seed)
    for _ in trange(steps, desc="training", mininterval=1.0):
        yield data if size is None else data[rng.choice(len(data), size, replace=False)]


def _train_pyro(program, batches, seed, estimators, learning_rate, particles, objective, looks) -> Trained:
    import pyro
    import torch
    from pyro.infer import SVI

    from pplgrad.pyro import TraceGrad_ELBO, config_estimators

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide = program
    elbo = TraceGrad_ELBO(particles, vectorize_particles=particles > 1, objective=objective)
    svi = SVI(model, config_estimators(guide, estimators), pyro.optim.Adam({"lr": learning_rate}), elbo)

    def params():
        return {name: x.detach().numpy().copy() for name, x in pyro.get_param_store().items()}

    losses = []
    for batch in batches:
        losses.append(svi.step(torch.as_tensor(batch)))
        looks.stepped(params)
    return Trained(params(), np.array(losses))


def _train_numpyro(program, batches, seed, estimators, learning_rate, particles, objective, looks) -> Trained:
    import jax
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    model, guide = program
    svi = SVI(
        model, config_estimators(guide, estimators), Adam(learning_rate), TraceGrad_ELBO(particles, objective=objective)
    )
    update, state, losses = jax.jit(svi.update), None, []

    def params():
        return {name: np.asarray(x) for name, x in svi.get_params(state).items()}

    for batch in batches:
        if state is None:
            state = svi.init(jax.random.key(seed), batch)
        state, loss = update(state, batch)
        losses.append(loss)
        looks.stepped(params)
    return Trained(params(), np.array(losses))


def gradient_variances(
    backend: str,
    program: tuple[Callable, Callable],
    data: np.ndarray,
    params: dict[str, np.ndarray],
    *,
    estimators: dict,
    particles: int = 1,
    objective: Any = None,
    draws: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """Return, for each parameter, the trace of the covariance of its gradient at given (unconstrained) parameters, from many draws."""
    from pplgrad.core.program import Program

    objective = ELBO() if objective is None else objective
    if backend == "pyro":
        import pyro
        import torch

        from pplgrad.pyro import TraceGrad_ELBO, config_estimators
        from pplgrad.pyro.diagnostics import Gradients

        pyro.clear_param_store()
        for name, value in params.items():
            pyro.get_param_store()[name] = torch.as_tensor(value, dtype=torch.float32).clone()
        elbo = TraceGrad_ELBO(particles, vectorize_particles=particles > 1, objective=objective)
        batch, given = torch.as_tensor(data, dtype=torch.float32), ()
    else:
        import jax.numpy as jnp

        from pplgrad.numpyro import TraceGrad_ELBO, config_estimators
        from pplgrad.numpyro.diagnostics import Gradients

        elbo, batch, given = (
            TraceGrad_ELBO(particles, objective=objective),
            jnp.asarray(data, jnp.float32),
            ({n: jnp.asarray(x, jnp.float32) for n, x in params.items()},),
        )
    model, guide = program
    found = Gradients(Program(model, config_estimators(guide, estimators), (batch,), {}), *given, seed=seed)
    with found if backend == "pyro" else nullcontext():
        gradients = np.concatenate(list(found.draws(elbo)(draws, seed)))
        return {name: float(gradients[:, where].var(0).sum()) for name, where in found.blocks.items()}


def save(figure: Any, out: Path) -> None:
    """Write a picture, making its folder, and say where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"written: {out}")
