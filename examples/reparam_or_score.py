"""Reparameterization against the score function: both closed-form variances, over σ and over the distance from the target.

x ~ N(μ, σ²), cost f(x) = (x − c)², d = μ − c. One draw of each estimate of ∂E[f]/∂μ = 2d and ∂E[f]/∂log σ = 2σ² has variance

    score function    d⁴/σ² + 14 d² + 15 σ²        2 d⁴ + 60 d² σ² + 74 σ⁴
    reparameterized   4 σ²                         4 d² σ² + 8 σ⁴

(moments of a normal up to the eighth). The score function knows only what f is worth, so that a cost far from zero costs variance,
and a narrow q makes it worse; the other needs f's derivative. Dots are measured, lines the formulas.

    python examples/reparam_or_score.py --backend pyro
"""

import matplotlib.pyplot as plt
import numpy as np
from _draws import gradient
from _story import COLOURS, model_script, save, story, train

from pplgrad import Expectation, Reparam, ScoreFunction

DRAWS = 4000
ESTIMATORS = {"score function": ScoreFunction(), "reparameterization": Reparam()}


def variances(name, d, sigma):
    """Return the closed-form variances of one draw, for μ and for log σ."""
    if name == "score function":
        return d**4 / sigma**2 + 14 * d**2 + 15 * sigma**2, 2 * d**4 + 60 * d**2 * sigma**2 + 74 * sigma**4
    return 4 * sigma**2 + 0 * d, 4 * d**2 * sigma**2 + 8 * sigma**4


def measured(backend, script, d, sigma, seed, estimator):
    """Return draws of the gradient of E[f] at each (d, σ): two arrays (points, draws)."""
    repeat = {"mu": np.repeat(d, DRAWS), "log_sigma": np.log(np.repeat(sigma, DRAWS))}
    targets = np.zeros((len(repeat["mu"]), 1))
    program = getattr(script, f"{backend}_program")(script.OPTIONS, targets, seed, repeat)
    found = gradient(backend, program, targets, seed, estimators={"x": estimator}, objective=Expectation())
    return tuple(-found[name].reshape(-1, DRAWS) for name in repeat)


@story(steps=300)
def main(backend, steps, seed, out):
    script = model_script("quadratic")
    grid = np.geomspace(0.1, 4.0, 9)
    sweeps = {
        "σ (at d = 1)": (grid, np.ones(len(grid)), grid),
        "distance d from the target (at σ = 1)": (grid, grid, np.ones(len(grid))),
    }
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 3.7))
    worst = 0.0
    for axis, (label, (shown, d, sigma)) in zip(axes, sweeps.items(), strict=False):
        for colour, (name, estimator) in zip(COLOURS, ESTIMATORS.items(), strict=False):
            draws, exact = measured(backend, script, d, sigma, seed, estimator), variances(name, d, sigma)
            for parameter, line, found, formula in zip(("μ", "log σ"), ("-", "--"), draws, exact, strict=True):
                axis.plot(shown, formula, line, color=colour, label=f"{name}, {parameter}")
                axis.plot(shown, found.var(1), "o", color=colour, ms=4, mfc="none" if line == "--" else None)
                worst = max(worst, np.abs(found.var(1) / formula - 1).max())
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="variance of one draw")
    axes[0].legend(fontsize=7)
    at_one = {name: [float(v) for v in variances(name, np.array(1.0), np.array(1.0))] for name in ESTIMATORS}
    print(f"variance for (μ, log σ) at d = σ = 1: {at_one}")
    print(f"largest relative difference of measured and exact variance, {DRAWS:,} draws a point: {worst:.3f}")

    target, start = np.zeros((1, 1)), {"mu": np.array(3.0), "log_sigma": np.array(0.0)}
    for colour, (name, estimator) in zip(COLOURS, ESTIMATORS.items(), strict=False):
        program = getattr(script, f"{backend}_program")(script.OPTIONS, target, seed, start)
        choice = {"estimators": {"x": estimator}, "objective": Expectation(), "learning_rate": 0.03}
        trained = train(backend, program, target, steps, seed, **choice)
        d, sigma = abs(float(trained.params["mu"])), float(np.exp(trained.params["log_sigma"]))
        print(f"{name}: after {steps} steps |d| = {d:.3f}, σ = {sigma:.3f}")
        smooth = np.convolve(trained.losses, np.ones(20) / 20, "valid") if steps > 20 else trained.losses
        axes[2].plot(smooth, color=colour, label=name)
    axes[2].set(
        yscale="log",
        xlabel="step, one draw each",
        ylabel="cost (x − c)², mean of 20 steps",
        title="training from d = 3, σ = 1",
    )
    axes[2].legend(fontsize=8)
    save(figure, out)


if __name__ == "__main__":
    main()
