"""Which measurements predict diabetes? Bernoulli inclusions by the score function, weights by reparameterization, against enumeration.

gamma_j ~ Bernoulli(1/2), w_j ~ N(0, 0.5²), y ~ N(Σ_j x_j gamma_j w_j, 0.7²). The posterior of the ten inclusions is a sum over 1,024
subsets, p(gamma | y) ∝ p(gamma) ∫ p(y | gamma, w) p(w) dw. A guide that draws the weights from their normal posterior given the
inclusions comes down to it; one whose weights are independent does not, with the same estimators: the gap is the guide's.

    python examples/spike_slab.py --backend pyro --out results/spike_slab.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train
from scipy.special import logsumexp

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

CHOICE = {"gamma_*": ScoreFunction(LeaveOneOut()), "w": Reparam()}


@story(steps=1500)
def main(backend, steps, seed, out):
    from sklearn.datasets import load_diabetes

    script = model_script("spike_slab")
    data = script.standardised(script.OPTIONS)
    joint, gamma = script.exact_log_joint(script.OPTIONS, data), script.subsets(data.shape[1] - 1)
    evidence = logsumexp(joint)
    shown = {"exact": np.exp(joint - evidence) @ gamma}
    print(f"log evidence by enumeration: {evidence:.3f} nats")
    for weights in ("conditional", "paired"):
        options = {**script.OPTIONS, "weights": weights}
        program = getattr(script, f"{backend}_program")(options, data, seed)
        params, losses = train(backend, program, data, steps, seed, estimators=CHOICE, learning_rate=0.03, particles=16)
        log_q = script.guide_log_prob(params)
        shown[weights] = np.exp(log_q) @ gamma
        off = np.abs(shown[weights] - shown["exact"]).max()
        print(f"{weights}: bound {-losses[-len(losses) // 5 :].mean():.3f} nats, inclusions off by at most {off:.3f}")

    figure, axis = plt.subplots(figsize=(8, 3.6))
    labels = ["enumeration of 1,024 subsets", "weights given the inclusions", "weights independent"]
    for i, (name, label) in enumerate(zip(shown, labels, strict=True)):
        axis.bar(
            np.arange(gamma.shape[1]) + 0.27 * (i - 1), shown[name], 0.25, color=COLOURS[(6, 0, 4)[i]], label=label
        )
    axis.set_xticks(range(gamma.shape[1]), load_diabetes().feature_names)
    axis.set(xlabel="measurement", ylabel="posterior probability of inclusion", ylim=(0, 1.02))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=3, frameon=False)
    save(figure, out)


if __name__ == "__main__":
    main()
