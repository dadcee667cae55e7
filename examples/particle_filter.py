"""How close do particles come to the evidence of a long series? A particle filter's bound beside the importance-weighted one.

log p(y) of a linear Gaussian state-space model is known from the Kalman filter. IWAE weighs whole paths: log 1/K Σ_k p(y, z_k) / q(z_k | y), whose gap
grows with the length of the series. FIVO resamples the particles from step to step, E log Π_t mean_k w_t^k (Maddison et al. 2017, Naesseth et al.
2018, Le et al. 2018). First both bounds and their gradients at the same parameters and K, then a training run under each: the evidence of the model
that each has learned, which no bound tells, and the time of a step. The data are simulated.

    python examples/particle_filter.py --out results/particle_filter.png
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import FIVO, IWAE

PARTICLES, FILTERS = 8, 2  # K, and the bounds that are averaged: each is a baseline of the other
DRAWS = 400
SIZES = (2, 4, 8, 16, 32)
SERIES = {"series": 1, "length": 60}
OBJECTIVES = {
    "IWAE": lambda k: IWAE(k, plates=()),
    "FIVO, score kept": lambda k: FIVO(k),
    "FIVO, score dropped": lambda k: FIVO(k, resampling_gradient="drop"),
    "FIVO, stop-gradient weights": lambda k: FIVO(k, resampling_gradient="stop-gradient"),
    "FIVO, systematic, dropped": lambda k: FIVO(k, "systematic", resampling_gradient="drop"),
    "FIVO, below K / 2, dropped": lambda k: FIVO(k, threshold=0.5, resampling_gradient="drop"),
}
SHOWN = {"IWAE": "IWAE", "FIVO, score dropped": "FIVO, multinomial", "FIVO, systematic, dropped": "FIVO, systematic"}
TRAINED = ("IWAE", "FIVO, score kept", "FIVO, score dropped", "FIVO, stop-gradient weights")


def draws_numpyro(program, params, y, objective, particles, draws, seed):
    """Return the losses and gradients of many draws, (draws,) and (draws, parameters), and the milliseconds of one."""
    import jax
    import jax.numpy as jnp

    from pplgrad.numpyro import TraceGrad_ELBO

    elbo, (model, guide) = TraceGrad_ELBO(particles, objective=objective), program
    params = {name: jnp.asarray(x, jnp.float32) for name, x in params.items()}

    def one(key):
        return jax.value_and_grad(lambda p: elbo.loss(key, p, model, guide, jnp.asarray(y, jnp.float32)))(params)

    keys, step = list(jax.random.split(jax.random.key(seed), draws)), jax.jit(one)
    jax.block_until_ready(step(keys[0]))
    began, rows = time.perf_counter(), []
    for key in keys:
        rows.append(jax.block_until_ready(step(key)))
    return _stacked([(loss, [g[name] for name in sorted(g)]) for loss, g in rows], began)


def draws_pyro(program, params, y, objective, particles, draws, seed):
    """Do the same in Pyro."""
    import pyro
    import torch

    from pplgrad.pyro import TraceGrad_ELBO

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    for name, value in params.items():
        pyro.get_param_store()[name] = torch.tensor(float(value))
    elbo = TraceGrad_ELBO(particles, vectorize_particles=True, max_plate_nesting=1, objective=objective)
    y, rows = torch.tensor(y, dtype=torch.float32), []
    elbo.loss_and_grads(*program, y)
    began = time.perf_counter()
    for _ in range(draws):
        loss = elbo.differentiable_loss(*program, y)
        leaves = [pyro.param(name).unconstrained() for name in sorted(params)]
        rows.append((loss.item(), torch.autograd.grad(loss, leaves)))
    return _stacked(rows, began)


def _stacked(rows, began):
    milliseconds = 1000 * (time.perf_counter() - began) / len(rows)
    losses = np.array([float(loss) for loss, _ in rows])
    return losses, np.array([[float(g) for g in slopes] for _, slopes in rows]), milliseconds


@story(steps=1000)
def main(backend, steps, seed, out):
    script = model_script("state_space")
    options = {**script.OPTIONS, **SERIES}
    y = script.simulate(options, seed)
    program = getattr(script, f"{backend}_program")(options, y, seed)
    sample = {"numpyro": draws_numpyro, "pyro": draws_pyro}[backend]
    exact = float(script.log_evidence(options, script.START, y)[0])
    print(
        f"at the start: log evidence {exact:.3f} by the Kalman filter; {FILTERS} × {PARTICLES} particles, {DRAWS} draws"
    )
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for number, (name, make) in enumerate(OBJECTIVES.items()):
        given = program, script.START, y
        losses, gradients, milliseconds = sample(*given, make(PARTICLES), FILTERS * PARTICLES, DRAWS, seed)
        bound, variance = -losses.mean(), gradients.var(0).sum()
        print(
            f"{name}: bound {bound:.3f} ± {losses.std() / np.sqrt(DRAWS):.3f}, gradient variance {variance:.4g}, "
            f"{milliseconds:.3g} ms, variance × ms {variance * milliseconds:.3g}"
        )
        if name in SHOWN:
            gaps = [exact + sample(*given, make(k), FILTERS * k, DRAWS // 4, seed)[0].mean() for k in SIZES]
            axes[0].plot(SIZES, gaps, "o-", color=COLOURS[number], label=SHOWN[name])
    axes[0].set(xscale="log", yscale="log", xlabel="particles of one bound", ylabel="log evidence − bound, nats")
    axes[0].set_xticks(SIZES, map(str, SIZES))
    axes[0].xaxis.minorticks_off()
    best = script.most_likely(options, y)
    highest = float(script.log_evidence(options, best, y)[0])
    print(f"highest log evidence {highest:.3f}, at decay {best['decay']:.3f} and move {np.exp(best['log_move']):.3f}")
    for name in TRAINED:
        curve = []

        def look(step, seconds, params, curve=curve):
            curve.append((step, float(script.log_evidence(options, params, y)[0])))

        options_of_training = {"particles": FILTERS * PARTICLES, "objective": OBJECTIVES[name](PARTICLES)}
        run = train(
            backend,
            program,
            y,
            steps,
            seed,
            learning_rate=0.02,
            every=max(1, steps // 50),
            at=look,
            **options_of_training,
        )
        reached, bound = (
            float(script.log_evidence(options, run.params, y)[0]),
            -run.losses[-max(1, steps // 5) :].mean(),
        )
        print(f"trained under {name}: bound {bound:.3f}, log evidence {reached:.3f}, decay {run.params['decay']:.3f}")
        colour = COLOURS[list(OBJECTIVES).index(name)]
        axes[1].plot(*np.array(curve).T, color=colour, label=name)
    axes[1].axhline(highest, color="0.6", linewidth=1, label="highest")
    axes[1].set(xlabel="steps", ylabel="log evidence of the learned model", ylim=(highest - 3, highest + 0.3))
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
