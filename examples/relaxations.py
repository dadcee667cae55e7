"""Relaxations: bias against temperature, measured, and where training with the biased gradient ends.

A choice z of three numbers v = (0, ½, 1) is to come close to t = 0.2: reward −(v·z − t)², best at z = 0. A relaxation puts
softmax((log π + g)/τ) (Gumbel-softmax), or the gradient of a softmax (straight-through and relatives), in the place of z. Its
gradient is that of another objective: bias = ‖E[estimate] − ∇E[reward]‖, which is exact at 0 for ReinMax at τ = 1, because
the reward is quadratic in z. --steps are those of the training.

    python examples/relaxations.py --backend numpyro
"""

import matplotlib.pyplot as plt
import numpy as np
from _draws import gradient
from _story import COLOURS, model_script, save, story, train

from pplgrad import (
    Expectation,
    GappedStraightThrough,
    GumbelSoftmax,
    LeaveOneOut,
    ReinMax,
    ScoreFunction,
    StraightThrough,
)

DRAWS = 10_000
TARGET = 0.2
TEMPERATURES = np.geomspace(0.1, 3.0, 8)


def temperature(x):
    """Return each row's temperature: the second column of the data."""
    return x[:, 1:]


ESTIMATORS = {
    "Gumbel-softmax": GumbelSoftmax(temperature),
    "its straight-through": GumbelSoftmax(temperature, hard=True),
    "straight-through (no τ)": StraightThrough(),
    "gapped straight-through": GappedStraightThrough(temperature),
    "ReinMax": ReinMax(temperature),
    "score function (no τ)": ScoreFunction(LeaveOneOut()),
}


def expected(theta, values):
    """Return E[reward] and its gradient in closed form; θ has the numbers last."""
    chances = np.exp(theta - theta.max(-1, keepdims=True))
    chances = chances / chances.sum(-1, keepdims=True)
    rewards = -((values - TARGET) ** 2)
    mean = (chances * rewards).sum(-1)
    return mean, chances * (rewards - mean[..., None])


def rows(each):
    """Return data (target, temperature), `each` rows at every temperature."""
    return np.stack([np.full(each * len(TEMPERATURES), TARGET), np.repeat(TEMPERATURES, each)], 1)


@story(steps=400)
def main(backend, steps, seed, out):
    script = model_script("choice")
    options = script.OPTIONS
    theta, values = script.initial(options), np.linspace(0.0, 1.0, options["numbers"])
    _, wanted = expected(theta, values)
    make, scale = getattr(script, f"{backend}_program"), np.linalg.norm(wanted)

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    for number, (name, estimator) in enumerate(ESTIMATORS.items()):
        particles, colour = (2 if name.startswith("score") else 1), COLOURS[number]
        choice = {"estimators": {"z": estimator}, "objective": Expectation(), "particles": particles}
        data = rows(DRAWS)
        program = make(options, data, seed, np.tile(theta, (len(data), 1)))
        draws = gradient(backend, program, data, seed, **choice)["logits"].reshape(len(TEMPERATURES), DRAWS, -1)
        variance = draws.var(1).sum(-1)
        # The squared norm of a mean's error is too large by the mean's own variance.
        bias = np.sqrt(np.maximum(((draws.mean(1) - wanted) ** 2).sum(-1) - variance / DRAWS, 0.0))
        error = np.sqrt(variance / DRAWS)

        data = rows(20)
        program = make(options, data, seed, np.tile(theta, (len(data), 1)))
        trained = train(backend, program, data, steps, seed, learning_rate=0.03, **choice).params["logits"]
        reached = expected(trained, values)[0].reshape(len(TEMPERATURES), -1).mean(1)
        axes[0].errorbar(TEMPERATURES, bias / scale, 2 * error / scale, fmt="o-", ms=4, color=colour, label=name)
        axes[1].plot(TEMPERATURES, variance * particles, "o-", ms=4, color=colour)
        axes[2].plot(TEMPERATURES, reached, "o-", ms=4, color=colour)
        for which in (0, len(TEMPERATURES) - 1):
            print(
                f"{name}, τ = {TEMPERATURES[which]:.2f}: bias {bias[which] / scale:.3f} ± {error[which] / scale:.3f} of the "
                f"gradient, variance × draws {variance[which] * particles:.4f}, reward reached {reached[which]:.4f}"
            )
    best = -float(((values - TARGET) ** 2).min())
    print(f"best reward {best:.4f}")
    axes[2].axhline(best, color="k", lw=1, ls=":")
    axes[2].text(TEMPERATURES[0], best, "best choice", va="bottom", fontsize=8)
    axes[0].set(ylabel="‖bias‖ / ‖gradient‖", ylim=(-0.05, 1.6))
    axes[1].set(ylabel="variance × draws, reward²", yscale="log")
    axes[2].set(ylabel=f"E[reward] after {steps} steps")
    for axis in axes:
        axis.set(xscale="log", xlabel="temperature τ")
    axes[0].legend(fontsize=7)
    save(figure, out)


if __name__ == "__main__":
    main()
