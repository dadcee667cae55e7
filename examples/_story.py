"""What the stories share: the options of the command line, model scripts, training in either library, pictures."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import matplotlib
import numpy as np

from pplgrad import ELBO

matplotlib.use("Agg")
ROOT = Path(__file__).parents[1]
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


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
) -> Trained:
    """Train (model, guide) with Adam, on all data at every step or on random batches."""
    fit = {"pyro": _train_pyro, "numpyro": _train_numpyro}[backend]
    data = np.asarray(data)
    data = data.astype(np.float32) if data.dtype == np.float64 else data
    batches = _batches(data, batch_size, steps, seed)
    return fit(
        program, batches, seed, estimators or {}, learning_rate, particles, ELBO() if objective is None else objective
    )


def _batches(data: np.ndarray, size: int | None, steps: int, seed: int) -> Iterator[np.ndarray]:
    from tqdm import trange

    rng = np.random.default_rng(seed)
    for _ in trange(steps, desc="training", mininterval=1.0):
        yield data if size is None else data[rng.choice(len(data), size, replace=False)]


def _train_pyro(program, batches, seed, estimators, learning_rate, particles, objective) -> Trained:
    import pyro
    import torch
    from pyro.infer import SVI

    from pplgrad.pyro import TraceGrad_ELBO, config_estimators

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide = program
    elbo = TraceGrad_ELBO(particles, vectorize_particles=particles > 1, objective=objective)
    svi = SVI(model, config_estimators(guide, estimators), pyro.optim.Adam({"lr": learning_rate}), elbo)
    losses = [svi.step(torch.as_tensor(batch)) for batch in batches]
    return Trained({name: x.detach().numpy() for name, x in pyro.get_param_store().items()}, np.array(losses))


def _train_numpyro(program, batches, seed, estimators, learning_rate, particles, objective) -> Trained:
    import jax
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    model, guide = program
    svi = SVI(
        model, config_estimators(guide, estimators), Adam(learning_rate), TraceGrad_ELBO(particles, objective=objective)
    )
    update, state, losses = jax.jit(svi.update), None, []
    for batch in batches:
        if state is None:
            state = svi.init(jax.random.key(seed), batch)
        state, loss = update(state, batch)
        losses.append(loss)
    return Trained({name: np.asarray(x) for name, x in svi.get_params(state).items()}, np.array(losses))


def save(figure: Any, out: Path) -> None:
    """Write a picture, making its folder, and say where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"written: {out}")
