"""Assignments of a mixture summed out, beside a sampled spread: what the sum is worth, in bound, time and variance.

log Σ_k prior_k N(x_i; means[k], spread²) takes the place of log p(x_i, k_i) − log q(k_i | x_i) for drawn assignments k_i. The continuous means
(reparameterized) and the discrete spread (score function) are drawn in both. With assignments summed out no q(k_i | x_i) has to be
learned, which the bound would have to pay for, and no draw of them is in the gradients of the rest. The iris measurements, three components.

    python examples/summed_mixture.py --out results/summed_mixture.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, gradient_variances, model_script, save, story, train
from scipy.special import softmax

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

CHOICE = {"which_*": ScoreFunction(LeaveOneOut()), "means": Reparam()}
COMMON = {"means_loc": "means", "prior": "prior", "spread": "spread"}
PARTICLES = 4
DRAWS = 200  # of each gradient


def trained(backend, script, assignments, data, test, steps, seed):
    """Return the program, the parameters, and a row for each look: steps, seconds, and the program's own bound per test datum."""
    options = {**script.OPTIONS, "assignments": assignments}
    program = getattr(script, f"{backend}_program")(options, data, seed)
    looks = []

    def look(step, seconds, params):
        # The sampled program is trained by its own bound, and judged by it.
        looks.append((step, seconds, script.bounds(params, test, np.random.default_rng(seed))[-1]))

    settings = dict(estimators=CHOICE, learning_rate=0.03, particles=PARTICLES, every=max(1, steps // 40), at=look)
    fit = train(backend, program, data, steps, seed, **settings)
    return program, fit.params, np.array(looks)


@story(steps=800)
def main(backend, steps, seed, out):
    script = model_script("summed_mixture")
    data, test = script.load(script.OPTIONS, seed)
    runs = {kind: trained(backend, script, kind, data, test, steps, seed) for kind in ("summed", "sampled")}
    for kind, (_, params, looks) in runs.items():
        each = script.bounds(params, test, np.random.default_rng(seed))
        summed_here = f", and {each[0]:.3f} with its assignments summed at last" if len(each) > 1 else ""
        milliseconds = 1e3 * looks[-1, 1] / max(looks[-1, 0] - 1, 1)
        print(
            f"{kind}: {looks[-1, 2]:.3f} nats per test datum{summed_here}; {milliseconds:.2f} ms / step; "
            f"spread {script.SPREADS[params['spread'].argmax()]} with q = {softmax(params['spread']).max():.2f}"
        )
    places = {
        "the start": script.initial(script.OPTIONS, data, seed),
        "the end of the sampled program's training": runs["sampled"][1],
    }
    for place, params in places.items():
        variances = {
            kind: gradient_variances(
                backend, program, data, params, estimators=CHOICE, particles=PARTICLES, draws=DRAWS, seed=seed
            )
            for kind, (program, _, _) in runs.items()
        }
        for name in COMMON:
            one, other = (variances[kind][name] for kind in ("sampled", "summed"))
            print(f"gradient variance of {name} at {place}: sampled {one:.4g}, summed {other:.4g} nats²")
    picture(runs, variances, out)


def picture(runs, variances, out):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6))
    for (kind, (_, _, looks)), colour in zip(runs.items(), COLOURS, strict=False):
        axes[0].plot(looks[:, 0], looks[:, 2], color=colour, label=f"assignments {kind}")
        axes[1].plot(looks[:, 1], looks[:, 2], color=colour)
    low, high = min(looks[len(looks) // 10, 2] for *_, looks in runs.values()), runs["summed"][2][:, 2].max()
    for axis, name in zip(axes, ("step", "seconds after the first step"), strict=False):
        axis.set(xlabel=name, ylabel="bound, nats per test datum", ylim=(low - 0.5, high + 0.5))
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    for i, found in enumerate(variances.values()):
        axes[2].bar(np.arange(len(COMMON)) + 0.4 * i, [found[name] for name in COMMON], 0.38, color=COLOURS[i])
    axes[2].set_xticks(np.arange(len(COMMON)) + 0.2, COMMON.values())
    axes[2].set(yscale="log", ylabel="gradient variance, nats²", xlabel="parameters")
    save(figure, out)


if __name__ == "__main__":
    main()
