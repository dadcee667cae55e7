"""Baselines: what each leaves of the score function's variance, beside the closed forms.

x_i ~ N(μ, σ²) at twenty targets c_i, reward f_i = −(x_i − c_i)², estimate Σ_i (f_i − b_i) s_i with the score s_i = ∇ log q(x_i). No
baseline changes the mean, and the variance is a parabola in b, least at

    b* = E[f ‖s‖²] / E[‖s‖²]

which is not the mean reward: rewards count by the square of their score. With s for (μ, log σ) at σ = 1 it is −(d² + 13/3), and the
mean −(d² + 1), for each target; one constant for all takes the targets' mean of d². --steps are those in which baselines learn.

    python examples/baselines.py --backend numpyro
"""

import importlib

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story
from tqdm import tqdm

from pplgrad import (
    Constant,
    DecayingAverage,
    Expectation,
    FunctionBaseline,
    LeaveOneOut,
    NeuralBaseline,
    OptimalConstant,
    Reparam,
    ScoreFunction,
)

DRAWS = 4000


def exact(d, b):
    """Return the total variance of one draw of the gradient for (μ, log σ), summed over targets, at σ = 1."""
    e, weight = np.polynomial.hermite_e.hermegauss(32)
    weight = weight / weight.sum()
    left = -((d[:, None] + e) ** 2) - np.broadcast_to(b, d.shape)[:, None]
    estimates = np.stack([left * e, left * (e**2 - 1)])
    return float(((estimates**2) @ weight - (estimates @ weight) ** 2).sum())


def exact_pairs(d):
    """Return the same for leave-one-out with two draws a step, ½ (f_1 − f_2)(s_1 − s_2), times the draws."""
    e, weight = np.polynomial.hermite_e.hermegauss(32)
    weight = np.outer(weight, weight) / weight.sum() ** 2
    first, second = np.meshgrid(e, e, indexing="ij")
    total = 0.0
    for distance in d:
        gap = ((distance + second) ** 2 - (distance + first) ** 2) / 2
        for estimate in (gap * (first - second), gap * (first**2 - second**2)):
            total += (weight * estimate**2).sum() - (weight * estimate).sum() ** 2
    return float(2 * total)


def choices(mu, d):
    """Return each baseline with its particles and what it subtracts, None for the other draw's reward."""
    mean, optimal = -(d**2 + 1), -(d**2 + 13 / 3)
    return {
        "none": (None, 1, 0.0),
        "constant: mean": (Constant(float(mean.mean())), 1, mean.mean()),
        "average of the past": (DecayingAverage(0.99), 1, mean.mean()),
        "constant: optimal": (Constant(float(optimal.mean())), 1, optimal.mean()),
        "optimal, from the past": (OptimalConstant(decay=0.99), 1, optimal.mean()),
        "leave-one-out (2 draws)": (LeaveOneOut(), 2, None),
        "learned network": (NeuralBaseline(), 1, mean),
        "function: mean": (FunctionBaseline(lambda c: -((mu - c[:, 0]) ** 2) - 1), 1, mean),
        "function: optimal": (FunctionBaseline(lambda c: -((mu - c[:, 0]) ** 2) - 13 / 3), 1, optimal),
    }


@story(steps=2000)
def main(backend, steps, seed, out):
    plugin, script = importlib.import_module(f"pplgrad.{backend}"), model_script("quadratic")
    options = {**script.OPTIONS, "sigma": 1.0}
    targets, _ = script.load(options, seed)
    model, guide = getattr(script, f"{backend}_program")(options, targets, seed)
    d = options["mu"] - targets[:, 0]
    data = importlib.import_module({"pyro": "torch", "numpyro": "jax.numpy"}[backend]).asarray(
        targets.astype(np.float32)
    )
    trusted = plugin.TraceGrad_ELBO(estimators={"x": Reparam()}, objective=Expectation())

    names, found, formulas = [], [], []
    for name, (baseline, particles, b) in tqdm(choices(options["mu"], d).items(), desc="baselines"):
        check = plugin.check_gradients(
            model,
            guide,
            (data,),
            estimators={"x": ScoreFunction(baseline)},
            num_particles=particles,
            objective=Expectation(),
            reference=trusted,
            draws=DRAWS,
            warm_up=steps,
            seed=seed,
        )
        names.append(name)
        found.append(check.rows[0].variance * particles)
        formulas.append(exact_pairs(d) if b is None else exact(d, b))
        print(f"{name}: variance × draws {found[-1]:.0f}, closed form {formulas[-1]:.0f}; {check.status}")

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=[3, 2])
    places = np.arange(len(names))[::-1]
    axes[0].barh(places, found, color=COLOURS[0])
    for place, formula in zip(places, formulas, strict=True):
        axes[0].plot(
            [formula] * 2, [place - 0.4, place + 0.4], color="k", lw=2, label="closed form" if place == 8 else None
        )
    axes[0].set(yticks=places, yticklabels=names, xlabel="variance of the gradient × draws of x, reward²")
    axes[0].legend()
    grid = np.linspace(-14, 3, 60)
    axes[1].plot(grid, [exact(d, b) for b in grid], color=COLOURS[0])
    for number, (label, b) in enumerate(
        {"mean reward": -(d**2 + 1).mean(), "optimal": -(d**2 + 13 / 3).mean()}.items()
    ):
        axes[1].plot(b, exact(d, b), "o^"[number], color=COLOURS[number + 1], ms=8, label=label)
    axes[1].set(xlabel="one constant b for all targets, reward", ylabel="variance, reward²", title="closed form")
    axes[1].legend()
    save(figure, out)


if __name__ == "__main__":
    main()
