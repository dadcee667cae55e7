"""Natural gradient and trust region: steps to a target against the plain gradient, with a metric made of the same scores.

A softmax lottery that starts on its worst outcomes. From N draws with scores s_i = ∇ log π(k_i):

    gradient g = 1/N Σ r_i s_i        Fisher metric F = 1/N Σ s_i s_iᵀ  (exactly diag(π) − π πᵀ)

    plain         θ ← θ + α g
    natural       θ ← θ + α F⁻¹ g
    trust region  θ ← θ + √(2δ / gᵀF⁻¹g) F⁻¹ g, so that KL(π_old ‖ π_new) ≈ δ

Plain and natural take the best α of a grid. Each draw has logits of its own, so that one gradient of the plate gives every
draw's; with all rewards 1 the same draws give the scores. --steps is how long each may take.

    python examples/natural_gradient.py --backend pyro
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story
from tqdm import tqdm

from pplgrad import Expectation, ScoreFunction

DRAWS, OUTCOMES, DAMPING, DELTA = 500, 8, 1e-3, 0.05
HALFWAY, TARGET = 0.8, 0.95
REWARDS = np.linspace(0.0, 1.0, OUTCOMES)
START = np.linspace(2.0, -2.0, OUTCOMES)
RATES = {"plain": (0.5, 2.0, 8.0, 32.0), "natural": (0.25, 0.5, 1.0, 2.0)}


def sampler(backend, script):
    """Return a function from θ, rewards and a seed to each draw's r s, (draws, outcomes); a seed fixes the draws."""
    make, options = getattr(script, f"{backend}_program"), {**script.OPTIONS, "outcomes": OUTCOMES}
    model, guide = make(options, None, 0, np.zeros((DRAWS, OUTCOMES)))
    choice = {"estimators": {"k": ScoreFunction()}, "objective": Expectation()}
    if backend == "pyro":
        import pyro
        import torch

        from pplgrad.pyro import TraceGrad_ELBO

        elbo = TraceGrad_ELBO(**choice)

        def draw(theta, rewards, seed):
            pyro.clear_param_store()
            pyro.set_rng_seed(seed)
            logits = pyro.param("logits", torch.tensor(np.tile(theta, (DRAWS, 1)), dtype=torch.float32))
            elbo.loss_and_grads(model, guide, torch.tensor(np.tile(rewards, (DRAWS, 1)), dtype=torch.float32))
            return -logits.grad.numpy()

        draw(START, REWARDS, 0)  # the first run of a program is watched, which may take further random numbers
        return draw
    import jax

    from pplgrad.numpyro import TraceGrad_ELBO

    elbo = TraceGrad_ELBO(**choice)
    found = jax.jit(jax.grad(lambda logits, x, key: elbo.loss(key, {"logits": logits}, model, guide, x)))

    def draw(theta, rewards, seed):
        logits, x = (np.tile(row, (DRAWS, 1)).astype(np.float32) for row in (theta, rewards))
        return -np.asarray(found(logits, x, jax.random.key(seed)))

    return draw


def chances(theta):
    """Return π."""
    return np.exp(theta - theta.max()) / np.exp(theta - theta.max()).sum()


def climb(draw, rule, rate, steps, seed):
    """Return E[r] before each step until the target is reached, and the exact KL of each step."""
    theta, means, moved = START.copy(), [], []
    for step in range(steps):
        before = chances(theta)
        means.append(before @ REWARDS)
        if means[-1] >= TARGET:
            break
        g = draw(theta, REWARDS, seed + step).mean(0)
        if rule == "plain":
            theta = theta + rate * g
        else:
            scores = draw(theta, np.ones(OUTCOMES), seed + step)
            natural = np.linalg.solve(scores.T @ scores / DRAWS + DAMPING * np.eye(OUTCOMES), g)
            theta = theta + (np.sqrt(2 * DELTA / (g @ natural)) if rule == "trust region" else rate) * natural
        moved.append(before @ np.log(before / chances(theta)))
    return np.array(means), np.array(moved)


def reached(means, goal):
    """Return the number of steps after which E[r] was at a goal, None if never."""
    there = np.flatnonzero(means >= goal)
    return int(there[0]) if len(there) else None


def _order(means):
    """Sort the runs that arrive by their steps, before the others, by how far they got."""
    arrived = reached(means, TARGET)
    return (1, -means[-1]) if arrived is None else (0, arrived)


@story(steps=500)
def main(backend, steps, seed, out):
    draw = sampler(backend, model_script("lottery"))
    wanted = [(rule, rate) for rule, rates in RATES.items() for rate in rates] + [("trust region", None)]
    runs = {each: climb(draw, *each, steps, seed) for each in tqdm(wanted, desc="climbs")}
    best = {rule: min((r for r in runs if r[0] == rule), key=lambda r: _order(runs[r][0])) for rule, _ in wanted}

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.7))
    for colour, (rule, which) in zip(COLOURS, best.items(), strict=False):
        means, moved = runs[which]
        label = rule if which[1] is None else f"{rule}, α = {which[1]:g}"
        axes[0].plot(1 + np.arange(len(means)), means, color=colour, label=label)
        axes[1].plot(1 + np.arange(len(moved)), moved, ".-", color=colour, label=label)
        when = {goal: reached(means, goal) for goal in (HALFWAY, TARGET)}
        words = ", ".join(
            f"{goal} after {n if n is not None else f'more than {steps}'} steps" for goal, n in when.items()
        )
        print(f"{label}: E[r] from {means[0]:.3f} to {words}; KL of a step {moved.min():.4f} to {moved.max():.4f}")
        rates = [r for r in runs if r[0] == rule]
        for goal, style in ((HALFWAY, "o-"), (TARGET, "^--")):
            found = [(r[1], n) for r in rates if (n := reached(runs[r][0], goal)) is not None]
            if found and rule == "trust region":
                axes[2].axhline(found[0][1], color=colour, ls=style[1:], label=f"{rule}, δ = {DELTA}, to {goal}")
            elif found:
                axes[2].plot(*zip(*found, strict=True), style, color=colour, label=f"{rule}, to {goal}")
    axes[0].axhline(TARGET, color="k", lw=1, ls=":")
    axes[0].set(xlabel="gradient", ylabel="E[r]", xscale="log", title="best rate of each")
    axes[1].axhline(DELTA, color="k", lw=1, ls=":")
    axes[1].set(xlabel="step", ylabel="KL of the step, nats", xscale="log", yscale="log", title="dotted: δ")
    axes[2].set(
        xlabel="rate α", ylabel="steps to E[r] = 0.8, 0.95", xscale="log", yscale="log", title="those that arrive"
    )
    for axis in axes:
        axis.legend(fontsize=7)
    save(figure, out)


if __name__ == "__main__":
    main()
