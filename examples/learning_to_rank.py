"""Learning to rank with a policy over whole orders: the gain of an order has no derivative, and its expectation has one.

∇ E_π[NDCG(r)], r ~ Plackett-Luce: the score function with two particles, the same with a network on the perturbed logits as its control
variate (RELAX without the cost: Gadetsky et al. 2020), REBAR at permutation matrices, and the exact sum over all 120 orders of five
patients. A linear policy is trained on groups of five patients (scikit-learn's diabetes data), and compared on other groups with least
squares and with a random order.

    python examples/learning_to_rank.py --backend pyro --out results/learning_to_rank.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, gradient_variances, model_script, save, story, train

from pplgrad import REBAR, RELAX, Expectation, LeaveOneOut, LocalExpectation, ScoreFunction

CHOICES = {  # with as many particles
    "ScoreFunction()": (ScoreFunction(), 1),
    "ScoreFunction(LeaveOneOut())": (ScoreFunction(LeaveOneOut()), 2),
    "RELAX(through_cost=False)": (RELAX(through_cost=False), 1),
    "REBAR()": (REBAR(), 1),
    "LocalExpectation()": (LocalExpectation(), 1),
}


@story(steps=1000)
def main(backend, steps, seed, out):
    script = model_script("learning_to_rank")
    groups, others = script.load(script.OPTIONS, seed)
    make = getattr(script, f"{backend}_program")
    programs = {
        name: make({**script.OPTIONS, "ranking": "matrix" if name == "REBAR()" else "numbers"}, groups, seed)
        for name in CHOICES
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    found = {}
    for i, (name, (estimator, particles)) in enumerate(CHOICES.items()):
        seen = []
        options = {"estimators": {"ranking": estimator}, "particles": particles, "objective": Expectation()}
        found[name] = train(
            backend, programs[name], groups, steps, seed, learning_rate=0.02, every=max(1, steps // 30), **options,
            at=lambda step, _, params, seen=seen: seen.append((step, expected_gain(script, params, others))),
        ).params  # fmt: skip
        axes[0].plot(*zip(*seen, strict=True), color=COLOURS[i], label=name)
    x, gains = script.parts(groups)
    fitted = np.linalg.lstsq(x.reshape(-1, 10), np.log1p(gains).reshape(-1), rcond=None)[0]
    x, gains = script.parts(others)
    rng = np.random.default_rng(seed)
    orders = {
        "best policy's order": x @ found["LocalExpectation()"]["weights"],
        "least squares": x @ fitted,
        "random order": rng.normal(size=(200, *gains.shape)),
    }
    for name, scores in orders.items():
        print(f"NDCG of the {name} on other groups: {script.ndcg(scores, gains).mean():.3f}")
    for i, (name, (estimator, particles)) in enumerate(CHOICES.items()):
        options = {"estimators": {"ranking": estimator}, "particles": particles, "objective": Expectation()}
        spread = gradient_variances(backend, programs[name], groups, found[name], **options)["weights"]
        print(f"{name}, {particles} particle{'s' * (particles > 1)}: gradient variance {spread:.3g}")
        if not isinstance(estimator, LocalExpectation):  # A sum over all orders has none.
            axes[1].barh(i, spread, color=COLOURS[i])
    axes[0].set(xlabel="step", ylabel="expected NDCG on other groups")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set(xlabel="variance of the gradient, after training", xscale="log", yticks=range(4))
    axes[1].set_yticklabels(list(CHOICES)[:4])
    save(figure, out)


def expected_gain(script, params, groups, draws=200):
    """Return the mean reward of the policy, from orders of perturbed scores."""
    x, gains = script.parts(groups)
    gumbel = np.random.default_rng(0).gumbel(size=(draws, *gains.shape))
    return script.ndcg(x @ params["weights"] + gumbel, gains).mean()


if __name__ == "__main__":
    main()
