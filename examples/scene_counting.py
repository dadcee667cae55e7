"""Attend, infer, repeat: counting objects, under the ELBO and under the importance-weighted bound.

    ELBO: E[log w],   IWAE: E[log 1/K Σ_k w_k] for each scene,   w = p(x, present, where, what) / q(present, where, what | x)

Whether there is one more object, and where, are discrete sites (score function; VIMCO under the bound of several samples), what it looks
like is reparameterized. Under Pyro, its own RenyiELBO trains the same program for comparison: it gives discrete sites no
score term. Ends with the objects found in new scenes, and with the numbers of objects against the true ones.

    python examples/scene_counting.py --backend pyro --steps 150 --out results/scene_counting.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, story, train

from pplgrad import ELBO, IWAE, VIMCO, LeaveOneOut, ScoreFunction

PARTICLES, BATCH = 4, 32
DISCRETE = {"ELBO": ScoreFunction(LeaveOneOut()), "IWAE": VIMCO()}
OBJECTIVES = {"ELBO": ELBO(), "IWAE": IWAE()}


def trained(backend, objective, steps, seed, given=()):
    """Return the parameters after training under an objective, and the bound of each step, in nats a scene."""
    script = model_script("scenes")
    options = {**script.OPTIONS, **dict(given)}
    (data, _), _ = script.scenes(options, seed)
    program = getattr(script, f"{backend}_program")(options, data, seed)
    estimators = dict.fromkeys(script.DISCRETE, DISCRETE[objective])
    settings = dict(estimators=estimators, objective=OBJECTIVES[objective], particles=PARTICLES, batch_size=BATCH)
    params, losses = train(backend, program, data, steps, seed, **settings)
    return params, -losses / BATCH


def trained_by_pyro(steps, seed):
    """Return the parameters after training with Pyro's own RenyiELBO, and the bound of each step, in nats a scene."""
    import pyro
    import torch
    from pyro.infer import SVI, RenyiELBO
    from tqdm import trange

    script = model_script("scenes")
    (data, _), _ = script.scenes(script.OPTIONS, seed)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    elbo = RenyiELBO(alpha=0.0, num_particles=PARTICLES, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(*script.pyro_program(script.OPTIONS, data, seed), pyro.optim.Adam({"lr": 0.01}), elbo)
    rng, x = np.random.default_rng(seed), torch.tensor(data, dtype=torch.float32)
    losses = [svi.step(x[rng.choice(len(x), BATCH, replace=False)]) for _ in trange(steps, desc="training")]
    return {name: value.detach().numpy() for name, value in pyro.get_param_store().items()}, -np.array(losses) / BATCH


def counted(params, seed, given=()):
    """Return new scenes, their true numbers of objects, and the numbers, canvases and places that the guide finds."""
    script = model_script("scenes")
    options = {**script.OPTIONS, **dict(given)}
    _, (scenes, truth) = script.scenes(options, seed)
    return scenes, truth, *script.looked(params, scenes, options)


@story(steps=150, backends=("pyro", "numpyro"))
def main(backend, steps, seed, out):
    results = {name: trained(backend, name, steps, seed) for name in OBJECTIVES}
    if backend == "pyro":
        results["Pyro's RenyiELBO"] = trained_by_pyro(steps, seed)
    for name, (params, _) in results.items():
        _, truth, found, *_ = counted(params, seed)
        print(
            f"{name}: {np.mean(found == truth):.1%} of new scenes counted right (chance: {np.bincount(truth).max() / len(truth):.1%})"
        )

    picture(results, seed, out)


def picture(results, seed, out):
    """Draw scenes with what was found in them, the bounds in training, and tables of numbers of objects."""
    # Two grids of different widths, which only the constrained layout can arrange.
    figure = plt.figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 3))
    scenes, truth, found, canvases, _ = counted(results["IWAE"][0], seed)
    axes = above.subplots(2, 10)
    shown = np.argsort(truth, kind="stable")[np.linspace(0, len(truth) - 1, 10).astype(int)]
    for column, index in zip(axes.T, shown, strict=True):
        for axis, image in zip(column, (scenes[index], canvases[index]), strict=True):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        column[0].set_title(f"{truth[index]} there", fontsize=8)
        column[1].set_title(f"{found[index]} found", fontsize=8)
    axes[0, 0].set_ylabel("scene")
    axes[1, 0].set_ylabel("IWAE")

    left, *rest = below.subplots(1, 1 + len(results), width_ratios=(2.2, *[1] * len(results)))
    for (name, (_, bound)), colour in zip(results.items(), COLOURS, strict=False):
        left.plot(bound, color=colour, label=name, linewidth=0.9)
    left.set(xlabel="training step", ylabel="bound, nats / scene", ylim=(-100, None))
    left.legend(fontsize=8)
    for axis, (name, (params, _)) in zip(rest, results.items(), strict=True):
        _, truth, found, *_ = counted(params, seed)
        table = np.zeros((4, 4), int)
        np.add.at(table, (truth, found), 1)
        axis.imshow(table, cmap="Blues", vmax=table.sum(1).max() * 1.5)
        for i, j in np.argwhere(table):
            axis.text(j, i, table[i, j], ha="center", va="center", fontsize=8)
        axis.set_title(name, fontsize=9)
        axis.set(xlabel="found", ylabel="there", xticks=range(4), yticks=range(4))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
