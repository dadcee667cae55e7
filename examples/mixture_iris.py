"""Gaussian mixture on the iris measurements: discrete assignments by the score function, means by reparameterization.

∇ E_q[f] = E_q[f ∇ log q(k)] for the assignments, and through x = μ + σ ε for the means; each site has its own estimator,
and nothing else of the program knows. Ends with a picture of the components beside the species.

    python examples/mixture_iris.py --backend pyro --steps 400 --out results/iris.png
"""

import importlib.util
from pathlib import Path

import click
import matplotlib
import numpy as np

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

matplotlib.use("Agg")
PATH = Path(__file__).parents[1] / "models" / "mixture.py"
CHOICE = {"k": ScoreFunction(LeaveOneOut()), "means": Reparam()}


def mixture():
    """Return the module models/mixture.py."""
    spec = importlib.util.spec_from_file_location("mixture", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_pyro(module, data, steps, seed):
    """Return the assignment logits' weights after training in Pyro."""
    import pyro
    import torch
    from pyro.infer import SVI
    from tqdm import trange

    from pplgrad.pyro import TraceGrad_ELBO, config_estimators

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide = module.pyro_program(module.OPTIONS, data, seed)
    elbo = TraceGrad_ELBO(4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, config_estimators(guide, CHOICE), pyro.optim.Adam({"lr": 0.03}), elbo)
    x = torch.tensor(data, dtype=torch.float32)
    for _ in trange(steps):
        svi.step(x)
    return {name: value.detach().numpy() for name, value in pyro.get_param_store().items()}


def train_numpyro(module, data, steps, seed):
    """Return the assignment logits' weights after training in NumPyro."""
    import jax
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    model, guide = module.numpyro_program(module.OPTIONS, data, seed)
    svi = SVI(model, config_estimators(guide, CHOICE), Adam(0.03), TraceGrad_ELBO(4))
    return svi.run(jax.random.key(seed), steps, np.asarray(data, np.float32)).params


@click.command()
@click.option("--backend", type=click.Choice(["pyro", "numpyro"]), default="pyro", show_default=True)
@click.option("--steps", default=400, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("results/iris.png"), show_default=True)
def main(backend, steps, seed, out):
    """Train, print the agreement with the species, and draw it."""
    import matplotlib.pyplot as plt
    from sklearn.datasets import load_iris
    from sklearn.metrics import adjusted_rand_score

    iris = load_iris()
    data = (iris.data - iris.data.mean(0)) / iris.data.std(0)
    train = {"pyro": train_pyro, "numpyro": train_numpyro}[backend]
    params = train(mixture(), data, steps, seed)
    found = np.argmax(data @ np.asarray(params["assign_w"]) + np.asarray(params["assign_b"]), -1)
    print(f"agreement with the species (adjusted Rand index): {adjusted_rand_score(iris.target, found):.2f}")

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    for axis, colours, title in zip(axes, (found, iris.target), ("components", "species"), strict=True):
        axis.scatter(iris.data[:, 2], iris.data[:, 3], c=colours, cmap="cividis", s=14)
        axis.set_title(title)
        axis.set_xlabel("petal length, cm")
    axes[0].set_ylabel("petal width, cm")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
