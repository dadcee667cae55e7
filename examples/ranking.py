"""Gradient estimators of a sigmoid belief network with one to three layers, ranked at equal evaluations of the program.

var[g] at the same parameters and on the same batch, as the trace of the covariance of the guide's gradient per datum. With L layers all
take 1 + L evaluations: as particles of the whole program under

    g = 1/K Σ_k (f(z_k) - b) ∇ log q(z_k),  b: none, a decaying average, that and a network (NVIL), the other particles' mean,

or as one particle and another draw in each layer: an independent one, an antithetic one (ARM), or that with its noise integrated out
(DisARM). Published: none > average > network (Mnih and Gregor 2014), ARM > DisARM and two draws > DisARM (Dong, Mnih and Tucker
2020). Where there are several layers, particles of the whole program do better than another draw in each.

    python examples/ranking.py --backend pyro --steps 200 --out results/ranking.png
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
    "two draws a layer": (ScoreFunction(samples=2), False),
    "ARM": (ARM(), False),
    "DisARM": (DisARM(), False),
}
OPTIONS = {"latents": 40, "layers": 1}


def ranked(backend, options, steps, seed, draws=100, size=50, estimators=ESTIMATORS):
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
    for name, (estimator, several) in estimators.items():
        check = plug_in.check_gradients(
            *program,
            (batch,),
            estimators={"z*": estimator},
            num_particles=1 + options["layers"] if several else 1,
            reference=reference,
            draws=draws,
            warm_up=100 if estimator.keeps_state else 0,
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


@story(steps=200, backends=("pyro", "numpyro"))
def main(backend, steps, seed, out):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for layers, axis in enumerate(axes, 1):
        found = ranked(backend, {**OPTIONS, "layers": layers}, steps, seed)
        axis.barh(list(found), list(found.values()), color=[COLOURS[1]] * 4 + [COLOURS[0]] * 3)
        axis.set(xscale="log", xlabel="variance of the guide's gradient, nats²")
        axis.set_title(f"{layers} layer{'s' * (layers > 1)}, {1 + layers} evaluations")
        axis.set_xlim(min(found.values()) / 3, max(found.values()) * 8)
        for place, value in enumerate(found.values()):
            axis.annotate(f" {value:,.0f}", (value, place), va="center", fontsize=8)
    axes[0].invert_yaxis()
    save(figure, out)


if __name__ == "__main__":
    main()
