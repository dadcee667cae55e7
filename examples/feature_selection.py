"""Which three of ten measurements tell a malignant tumour from a benign one? A subset as a latent, against the sum over all 120.

z ~ Subset(3, θ) in the guide, and a logistic regression on the measurements that z chooses. SIMPLE and IMLE differentiate the cost at the
subset that was drawn and are biased (labelled so); the score function with two particles is not, and neither is the sum over all subsets.
Each trains the same program; the bound and the posterior are exact sums. The data are scikit-learn's (Street et al. 1993).

    python examples/feature_selection.py --backend pyro --out results/feature_selection.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import IMLE, SIMPLE, LeaveOneOut, LocalExpectation, ScoreFunction

CHOICES = {  # with as many particles
    "ScoreFunction(LeaveOneOut())": (ScoreFunction(LeaveOneOut()), 2),
    "SIMPLE()": (SIMPLE(), 1),
    "IMLE()": (IMLE(), 1),
    "LocalExpectation()": (LocalExpectation(), 1),
}


@story(steps=1000)
def main(backend, steps, seed, out):
    script = model_script("feature_selection")
    rows, others = script.load(script.OPTIONS, seed)
    k = int(script.OPTIONS["chosen"])
    program = getattr(script, f"{backend}_program")(script.OPTIONS, rows, seed)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for i, (name, (estimator, particles)) in enumerate(CHOICES.items()):
        seen = []
        params, _ = train(
            backend, program, rows, steps, seed, learning_rate=0.05, particles=particles, every=max(1, steps // 40),
            estimators={"chosen": estimator},
            at=lambda step, _, params, seen=seen: seen.append((step, script.exact(params, rows, k)[0] / len(rows))),
        )  # fmt: skip
        axes[0].plot(*zip(*seen, strict=True), color=COLOURS[i], label=name)
        bound, evidence, guide, posterior = script.exact(params, rows, k)
        best = script.subsets(k)[posterior.argmax()]
        right = accuracy(params, best, others)
        chosen = ", ".join(np.array(script.names())[best > 0])
        print(
            f"{name}: bound {bound:.1f}, log evidence {evidence:.1f} nats; {chosen}: {right:.1%} of other tumours right"
        )
        axes[1].plot(np.arange(10) + 0.15 * i, guide @ script.subsets(k), "o", color=COLOURS[i], label=name)
        axes[1].plot(np.arange(10) + 0.15 * i, posterior @ script.subsets(k), "_", color=COLOURS[i], markersize=9)
    print(f"all ten measurements, logistic regression: {with_all(rows, others):.1%} of other tumours right")
    axes[0].set(xlabel="step", ylabel="exact bound, nats / tumour")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set_xticks(range(10), script.names(), rotation=60, ha="right", fontsize=7)
    axes[1].set(ylabel="probability of being chosen\n(dots: guide, lines: posterior)")
    save(figure, out)


def accuracy(params, chosen, rows):
    """Return the share of tumours that the chosen measurements tell."""
    logits = rows[:, :10] @ (chosen * params["weights"]) + params["bias"]
    return ((logits > 0) == (rows[:, 10] > 0)).mean()


def with_all(rows, others):
    """Return the share that a regression on all measurements tells."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression().fit(rows[:, :10], rows[:, 10]).score(others[:, :10], others[:, 10])


if __name__ == "__main__":
    main()
