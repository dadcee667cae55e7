"""A training in a process of its own, which is killed or not: `python -m tests.killed BACKEND HOW FOLDER STEPS KILL`.

Every fourth step it saves all that it needs, and each step it writes its loss; before step KILL it is killed, as by a machine that fails.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from pplgrad import REBAR, DecayingAverage, EarlyStopping, NeuralBaseline, ScoreFunction, Watch
from tests.resuming import DATA, program

EVERY = 4
ESTIMATORS = {
    "z_1": ScoreFunction(DecayingAverage(per_element=True) + NeuralBaseline(hidden=(4,))),
    "z_2": REBAR(),
}


def write(path, make):
    """Write a file whole, or not at all."""
    make(part := path.with_suffix(".part"))
    os.replace(part, path)


def in_pyro(how, folder, steps, kill):
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI
    from pyro.optim import Adam

    from pplgrad.pyro import (
        TraceGrad_ELBO,
        config_estimators,
        load_training_state,
        split_optimizer,
        training_state,
    )

    torch.set_default_dtype(torch.float64)
    options = {
        "eager": {},
        "particles": {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1},
        "compiled": {"compile": True},
    }[how]
    pyro.set_rng_seed(int.from_bytes(os.urandom(4)) if (folder / "last.pt").exists() else 0)
    x = torch.tensor(DATA)
    model, guide = program(pyro, dist, torch.as_tensor, torch.exp)
    guide = config_estimators(guide, ESTIMATORS, watch=Watch(lambda record: None, every=3, draws=2))
    svi = SVI(model, guide, split_optimizer(Adam({"lr": 0.05}), Adam({"lr": 0.1})), TraceGrad_ELBO(**options))
    stopping, first = EarlyStopping(3), 0
    if (folder / "last.pt").exists():
        saved = torch.load(folder / "last.pt", weights_only=True)
        load_training_state(svi, saved["training"], x)
        stopping.load_state_dict(saved["stopping"])
        first = saved["step"]
    for step in range(first, steps):
        if step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        tell(folder, step, svi.step(x))
        if (step + 1) % EVERY == 0:
            stopping.update(-svi.evaluate_loss(x))
            saved = {"training": training_state(svi), "stopping": stopping.state_dict(), "step": step + 1}
            write(folder / "last.pt", lambda part, saved=saved: torch.save(saved, part))
    tell(folder, "best", stopping.best)


def in_numpyro(how, folder, steps, kill):
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import orbax.checkpoint as ocp
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from pplgrad.numpyro import TraceGrad_ELBO, config_estimators, split_optimizer

    jax.config.update("jax_enable_x64", True)
    options = {"eager": {}, "particles": {"num_particles": 3}}[how]
    x = jnp.asarray(DATA)
    model, guide = program(numpyro, dist, jnp.asarray, jnp.exp)
    guide = config_estimators(guide, ESTIMATORS, watch=Watch(lambda record: None, every=3, draws=2))
    svi = SVI(model, guide, split_optimizer(Adam(0.05), Adam(0.1)), TraceGrad_ELBO(**options))
    chunk = jax.jit(lambda state: jax.lax.scan(lambda s, _: svi.update(s, x), state, length=EVERY))
    with ocp.CheckpointManager((folder / "orbax").resolve()) as manager:
        seed = int.from_bytes(os.urandom(3)) if manager.latest_step() else 0
        state, first = svi.init(jax.random.key(seed), x), manager.latest_step() or 0
        if first:
            state = manager.restore(first, args=ocp.args.StandardRestore(jax.eval_shape(lambda: state)))
        for begin in range(first, steps, EVERY):
            state, losses = chunk(state)
            for number, loss in enumerate(losses):
                if begin + number == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
                tell(folder, begin + number, float(loss))
            manager.save(begin + EVERY, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()


def tell(folder, step, value):
    with open(folder / "losses.txt", "a") as file:
        file.write(f"{step} {float(np.float64(value)).hex()}\n")


if __name__ == "__main__":
    backend, how, folder, steps, kill = sys.argv[1:]
    {"pyro": in_pyro, "numpyro": in_numpyro}[backend](how, Path(folder), int(steps), int(kill))
