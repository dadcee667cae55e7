"""Gradient estimators of a sigmoid belief network with one to three layers, ranked at equal evaluations of the program.

var[g] at the same parameters and on the same batch, as the trace of the covariance of the guide's gradient per datum. With L layers the
antithetic estimators take 1 + L evaluations (the draw, and a partner for each layer), and the score function gets 1 + L particles, under

    g = 1/K Σ_k (f(z_k) - b) ∇ log q(z_k),  b: none, a decaying average, that and a network (NVIL), the other particles' mean.

The published order: none > average > network (Mnih and Gregor 2014), ARM > DisARM and leave-one-out > DisARM (Dong, Mnih and Tucker
2020, where DisARM is ARM with its noise integrated out, so that its variance is never larger).

    python examples/ranking.py --backend numpyro --steps 500 --out results/ranking.png
"""

import importlib

import matplotlib.pyplot as plt
from _story import COLOURS, model_script, save, story, train

from pplgrad import ARM, DecayingAverage, DisARM, LeaveOneOut, NeuralBaseline, ScoreFunction

# The estimator, and whether it takes particles for its evaluations.
ESTIMATORS = {
    "none": (ScoreFunction(), True),
    "average": (ScoreFunction(DecayingAverage()), True),
    "network": (ScoreFunction(DecayingAverage() + NeuralBaseline()), True),
    "leave-one-out": (ScoreFunction(LeaveOneOut()), True),
    "ARM": (ARM(), False),
    "DisARM": (DisARM(), False),
}
OPTIONS = {"latents": 50, "layers": 1}


def ranked(backend, options, steps, seed, draws=100, size=50):
    """Return each estimator's variance in nats² per datum, after training by leave-one-out."""
    script = model_script("sbn")
    options = {**script.OPTIONS, **options}
    data, _ = script.load(options, seed)
    program = getattr(script, f"{backend}_program")(options, data, seed)
    plug_in = importlib.import_module(f"pplgrad.{backend}")
    settings = dict(learning_rate=3e-3, particles=2, batch_size=size)
    found = train(backend, program, data, steps, seed, estimators={"z*": ScoreFunction(LeaveOneOut())}, **settings)
    batch, given = as_batch(backend, data[:size]), {} if backend == "pyro" else {"params": found.params}
    reference = plug_in.TraceGrad_ELBO(2, estimators={"z*": ScoreFunction(LeaveOneOut())})
    result = {}
    for name, (estimator, several) in ESTIMATORS.items():
        check = plug_in.check_gradients(
            *program,
            (batch,),
            estimators={"z*": estimator},
            num_particles=1 + options["layers"] if several else 1,
            reference=reference,
            draws=draws,
            seed=seed,
            **given,
        )
        if check.status == "biased":
            raise SystemExit(f"{name} is biased: {check}")
        # A site's row holds the parameters that its density in the guide reads.
        result[name] = sum(row.variance for row in check.rows if row.kind == "site") / size**2
        print(f"{options['layers']} layers, {name}: {result[name]:.4g} nats²")
    return result


def as_batch(backend, rows):
    """Return rows as an array of the library."""
    if backend == "pyro":
        import torch

        return torch.tensor(rows, dtype=torch.float32)
    import jax.numpy as jnp

    return jnp.asarray(rows, jnp.float32)


@story(steps=500)
def main(backend, steps, seed, out):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for layers, axis in enumerate(axes, 1):
        found = ranked(backend, {**OPTIONS, "layers": layers}, steps, seed)
        axis.barh(list(found), list(found.values()), color=[COLOURS[1]] * 4 + [COLOURS[0]] * 2)
        axis.set(xscale="log", xlabel="variance of the guide's gradient, nats²")
        axis.set_title(f"{layers} layer{'s' * (layers > 1)}, {1 + layers} evaluations")
        axis.margins(x=0.15)
        for place, value in enumerate(found.values()):
            axis.annotate(f" {value:.3g}", (value, place), va="center", fontsize=8)
    axes[0].invert_yaxis()
    save(figure, out)


if __name__ == "__main__":
    main()
