"""Two devices train a sigmoid belief network as one: the images of a batch are split over a mesh, and `jit` does the rest.

    ∇ Σ_i (f_i − b(x_i) − c) log q(z_i),   i in the images of all devices,

with a network b and a decaying average c, is one program for all devices: XLA puts the sums over images, and the average, together
from those of each device. In the end the gradient on two devices is compared with that on one, for the same key. Here the two devices
are this machine's CPU twice; on several machines `jax.distributed.initialize()` comes first.

    python examples/sharded_numpyro.py --steps 300
"""

import os
import time

import click

# Before JAX is imported; where there are real devices it changes nothing.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import numpy as np
from _story import model_script
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpyro.infer import SVI
from numpyro.optim import Adam

from pplgrad import DecayingAverage, NeuralBaseline, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO, config_estimators

BATCH = 100
CHOICE = {"z1": ScoreFunction(DecayingAverage(0.9) + NeuralBaseline())}


@click.command(help=__doc__)
@click.option("--steps", default=300, show_default=True, type=click.IntRange(1), help="Training steps.")
@click.option("--seed", default=0, show_default=True, type=int)
def main(steps, seed):
    mesh = jax.make_mesh((jax.device_count(),), ("images",), axis_types=(AxisType.Auto,))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("images"))
    script = model_script("sbn")
    pixels, _ = script.load(script.OPTIONS, seed)
    pixels = pixels.astype(np.float32)
    model, guide = script.numpyro_program(script.OPTIONS, pixels, seed)
    svi = SVI(model, config_estimators(guide, CHOICE), Adam(0.01), TraceGrad_ELBO())
    update, rng = jax.jit(svi.update), np.random.default_rng(seed)

    def batch():
        return pixels[rng.choice(len(pixels), BATCH, replace=False)]

    # Parameters, optimizer and averages on every device, images on one each.
    state = jax.device_put(svi.init(jax.random.key(seed), batch()), everywhere)
    begun = time.perf_counter()
    for step in range(steps):
        state, loss = update(state, jax.device_put(batch(), split))
        if step == 0:
            jax.block_until_ready(loss)
            begun = time.perf_counter()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            print(f"step {step:5}  ELBO {-float(loss) / BATCH:7.2f} nats per image")
    print(f"{1e3 * (time.perf_counter() - begun) / max(1, steps - 1):.1f} ms a step on {mesh.size} devices")
    compare(svi, state, batch(), split, seed)


def compare(svi, state, images, split, seed):
    """Compute the gradient and the new averages of one batch on one device and on all."""
    params, averages, key = svi.get_params(state), state.mutable_state, jax.random.key(seed)

    @jax.jit
    def gradient(params, averages, images):
        def loss(params):
            found = svi.loss.loss_with_mutable_state(key, params | averages, svi.model, svi.guide, images)
            return found["loss"], found["mutable_state"]

        return jax.grad(loss, has_aux=True)(params)

    together = gradient(params, averages, jax.device_put(images, split))
    one = jax.device_put((params, averages), jax.devices()[0])
    alone = gradient(*one, jax.device_put(images, jax.devices()[0]))
    for (path, expected), found in zip(jax.tree.leaves_with_path(alone), jax.tree.leaves(together), strict=True):
        name = ".".join(str(getattr(part, "key", getattr(part, "idx", part))) for part in path[1:])
        size = float(jnp.linalg.norm(expected))
        apart = float(np.linalg.norm(np.asarray(found) - np.asarray(expected))) / size
        print(f"{name:28} {size:10.4g}, on {len(found.sharding.device_set)} devices off by {apart:.0e} of it")


if __name__ == "__main__":
    main()
