"""How many animals live where every visit overlooks some? A count without a known end by the GO gradient, against exact sums.

N_i ~ Poisson(abundance) at place i, and each visit sees Binomial(N_i, detection) of them (an N-mixture model, Royle 2004). The guide draws
the animals that no visit saw, z_i ~ Poisson(rate_i). ∂/∂rate E_q[f(z)] = E_q[f(z + 1) − f(z)] needs one more evaluation of f, as the score
function with two particles does; a local expectation sums over 16 counts. The exact evidence and posterior are sums over the number of
animals. The data are simulated.

    python examples/n_mixture.py --backend pyro --out results/n_mixture.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, gradient_variances, model_script, save, story, train

from pplgrad import CountDifference, LeaveOneOut, LocalExpectation, ScoreFunction

CHOICES = {  # with as many particles
    "ScoreFunction(LeaveOneOut())": (ScoreFunction(LeaveOneOut()), 2),
    "CountDifference()": (CountDifference(), 1),
    "LocalExpectation(head=16)": (LocalExpectation(head=16), 1),
}


def expit(x):
    return 1 / (1 + np.exp(-x))


@story(steps=2000)
def main(backend, steps, seed, out):
    script = model_script("n_mixture")
    animals, counts = script.simulate(script.OPTIONS, seed)
    program = getattr(script, f"{backend}_program")(script.OPTIONS, counts, seed)
    best = script.most_likely(counts)
    chosen, _ = CHOICES["CountDifference()"]
    learned, losses = train(backend, program, counts, steps, seed, estimators={"unseen": chosen}, learning_rate=0.02)
    highest, bound = script.posterior(best, counts)[0].mean(), -losses[-len(losses) // 5 :].mean() / len(counts)
    print(f"bound {bound:.3f} nats / place, log evidence {highest:.3f} at most")
    print(
        f"abundance {np.exp(learned['log_abundance']):.2f} (most likely {np.exp(best['log_abundance']):.2f}), "
        f"detection {expit(learned['detection_logit']):.3f} (most likely {expit(best['detection_logit']):.3f})"
    )
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(3, 2))
    for i, (when, params) in enumerate((("before training", script.START), ("after training", learned))):
        for j, (name, (estimator, particles)) in enumerate(CHOICES.items()):
            options = {"estimators": {"unseen": estimator}, "particles": particles}
            spread = gradient_variances(backend, program, counts, params, **options)["log_rate"]
            print(f"{when}, {name}, {particles} particle{'s' * (particles > 1)}: gradient variance {spread:.3g}")
            axes[0].barh(j + 0.4 * i, spread, 0.35, color=COLOURS[i], label=when if j == 0 else None)
    axes[0].set(xlabel="variance of the guide's gradient", yticks=np.arange(3) + 0.2)
    axes[0].set_yticklabels(CHOICES)
    exact = script.posterior(learned, counts)[1] @ np.arange(100)
    axes[1].plot([0, animals.max()], [0, animals.max()], color="0.8", zorder=0)
    axes[1].scatter(exact, counts.max(-1) + script.guide_rates(learned, counts), s=8, label="guide's mean")
    axes[1].scatter(exact, counts.max(-1), s=8, label="largest count")
    axes[1].set(xlabel="exact posterior mean", ylabel="animals at a place")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
