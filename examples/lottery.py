"""The identity: the gradient of an expected reward from draws alone, in a lottery whose exact gradient is known.

∇ E_π[r] = E_π[(r_k − b) ∇ log π_k], for any b that does not look at the draw. In a softmax lottery it is π_j (r_j − E_π[r]), so that
both the mean and the variance of the estimate can be set beside their exact values; then the lottery is trained with and
without a baseline. --steps are those of the training.

    python examples/lottery.py --backend numpyro
"""

import matplotlib.pyplot as plt
import numpy as np
from _draws import gradient
from _story import COLOURS, model_script, save, story, train

from pplgrad import Constant, Expectation, LeaveOneOut, ScoreFunction

DRAWS = 10_000


def exact(theta, rewards, baseline):
    """Return E_π[r], its gradient, and the estimate's total variance, from all outcomes."""
    chances = np.exp(theta) / np.exp(theta).sum()
    mean = chances @ rewards
    rows = (rewards - baseline)[:, None] * (np.eye(len(theta)) - chances)
    return mean, chances * (rewards - mean), chances @ ((rows - chances @ rows) ** 2).sum(1)


@story(steps=300)
def main(backend, steps, seed, out):
    script = model_script("lottery")
    options = script.OPTIONS
    make = getattr(script, f"{backend}_program")
    rewards, theta = script.rewards(options["outcomes"]), script.initial(options)
    copies = np.tile(rewards, (DRAWS, 1))
    mean, wanted, _ = exact(theta, rewards, 0.0)

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    bars = np.arange(len(theta))
    for number, (name, b) in enumerate({"none": 0.0, "E[r]": mean}.items()):
        program = make(options, copies, seed, np.tile(theta, (DRAWS, 1)))
        choice = {"k": ScoreFunction(Constant(b))}
        draws = gradient(backend, program, copies, seed, estimators=choice, objective=Expectation())["logits"]
        error = draws.std(0) / np.sqrt(DRAWS)
        variance = draws.var(0).sum()
        print(
            f"baseline {name}: gradient {np.round(draws.mean(0), 3)}, exact {np.round(wanted, 3)}, "
            f"largest |z| {np.abs((draws.mean(0) - wanted) / error).max():.2f}; "
            f"variance {variance:.4g}, exact {exact(theta, rewards, b)[2]:.4g}"
        )
        colour = COLOURS[number]
        place = bars + 0.3 * (number - 0.5)
        axes[0].errorbar(place, draws.mean(0), 2 * error, fmt="o", color=colour, capsize=3, label=f"baseline {name}")
        axes[1].bar(number, variance, color=colour)
        axes[1].hlines(
            exact(theta, rewards, b)[2], number - 0.3, number + 0.3, "k", lw=3, label=None if number else "exact"
        )
    axes[0].hlines(wanted, bars - 0.35, bars + 0.35, "k", label="exact")
    axes[0].set(xlabel="outcome", ylabel="∂E[r]/∂θ, reward", xticks=bars, title=f"{DRAWS:,} draws, ± 2 standard errors")
    axes[1].set(ylabel="variance of a draw, reward²", yscale="log", xticks=[0, 1], title="total variance")
    axes[1].set_xticklabels(["no baseline", "baseline E[r]"])

    for number, (name, estimator) in enumerate(
        {"no baseline": ScoreFunction(), "leave-one-out": ScoreFunction(LeaveOneOut())}.items()
    ):
        program = make(options, rewards[None], seed)
        trained = train(
            backend,
            program,
            rewards[None],
            steps,
            seed,
            estimators={"k": estimator},
            learning_rate=0.03,
            particles=2,
            objective=Expectation(),
        )
        reached = exact(trained.params["logits"], rewards, 0.0)[0]
        print(f"{name}: E[r] after {steps} steps {reached:.3f}, best {rewards.max():.3f}")
        smooth = np.convolve(-trained.losses, np.ones(20) / 20, "valid") if steps > 20 else -trained.losses
        axes[2].plot(smooth, color=COLOURS[number], label=name)
    axes[2].axhline(rewards.max(), color="k", lw=1, label="best outcome")
    axes[2].set(xlabel="step, 2 draws each", ylabel="reward (mean of 20 steps)", title="training")
    for axis in axes:
        axis.legend(fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
