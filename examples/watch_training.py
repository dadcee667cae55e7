"""Watch a sigmoid belief network learn digits: what its gradient and its latents do while the loss falls.

The guide is q(z | x) = Bernoulli(W x + b), 200 latents, trained by the score function with a learned baseline. Every so many
steps a line shows the gradient's variance and signal-to-noise, how much of the cost's variance the baseline explains (it learns
which images cost more than others), and the latents' entropy: 200 log 2 = 139 nats if they say nothing of the image, 0 if they have
collapsed to one value. Run with `python examples/watch_training.py`; with `--tensorboard runs/` the curves go there as well.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "models"))

import numpy as np  # noqa: E402
import sbn  # noqa: E402

from pplgrad import DecayingAverage, NeuralBaseline, ScoreFunction, Watch  # noqa: E402

ESTIMATORS = {"z*": ScoreFunction(DecayingAverage(0.9) + NeuralBaseline())}


def show(record):
    """Print what was seen of a step."""
    site = record["sites"]["z1"]
    columns = record["loss"] / 100, site["gradient_variance"], site["signal_to_noise"]
    print("{:6d} {:10.2f} {:12.3g} {:8.2f}".format(record["step"], *columns), end=" ")
    print(f"{100 * site['explained_variance']:9.0f}% {site['entropy']:9.1f}", flush=True)


def train_pyro(x, options, steps, seed, watch):
    """Train in Pyro."""
    import pyro
    import torch
    from pyro.infer import SVI
    from pyro.optim import Adam

    from pplgrad.pyro import TraceGrad_ELBO, config_estimators

    pyro.set_rng_seed(seed)
    model, guide = sbn.pyro_program(options, x, seed)
    svi = SVI(model, config_estimators(guide, ESTIMATORS, watch=watch), Adam({"lr": 3e-3}), TraceGrad_ELBO())
    for batch in batches(x, steps, seed):
        svi.step(torch.from_numpy(batch))


def train_numpyro(x, options, steps, seed, watch):
    """Train in NumPyro, as one compiled loop."""
    import jax
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

    model, guide = sbn.numpyro_program(options, x, seed)
    svi = SVI(model, config_estimators(guide, ESTIMATORS, watch=watch), Adam(3e-3), TraceGrad_ELBO())
    data = jax.numpy.asarray(np.stack(list(batches(x, steps, seed))))
    state = svi.init(jax.random.key(seed), data[0])
    jax.jit(lambda state: jax.lax.scan(svi.update, state, data))(state)[1].block_until_ready()
    # What was told from inside the loop arrives in its own time.
    jax.effects_barrier()


def batches(x, steps, seed):
    """Yield batches of 100 images."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        yield x[rng.integers(0, len(x), 100)].astype(np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=["pyro", "numpyro"], default="numpyro")
    parser.add_argument("--steps", type=int, default=2001)
    parser.add_argument("--every", type=int, default=200, help="steps between two lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensorboard", type=Path, help="a folder for TensorBoard's event file")
    given = parser.parse_args()
    options = dict(sbn.OPTIONS)
    train, _ = sbn.load(options, given.seed)
    print("  step  loss/image     variance  signal/noise  explained  entropy")
    watch = Watch(show, tensorboard=given.tensorboard, every=given.every)
    {"pyro": train_pyro, "numpyro": train_numpyro}[given.backend](train, options, given.steps, given.seed, watch)


if __name__ == "__main__":
    main()
