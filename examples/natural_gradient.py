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

DRAWS, OUTCOMES, DAMPING, DELTA, TARGET = 500, 8, 1e-3, 0.05, 0.95
REWARDS = np.linspace(0.0, 1.0, OUTCOMES)
START = np.linspace(3.0, -3.0, OUTCOMES)
RATES = {"plain": (1.0, 2.0, 4.0, 8.0, 16.0), "natural": (0.25, 0.5, 1.0, 2.0)}


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


@story(steps=300)
def main(backend, steps, seed, out):
    draw = sampler(backend, model_script("lottery"))
    wanted = [(rule, rate) for rule, rates in RATES.items() for rate in rates] + [("trust region", None)]
    runs = {each: climb(draw, *each, steps, seed) for each in tqdm(wanted, desc="climbs")}
    best = {rule: min((r for r in runs if r[0] == rule), key=lambda r: len(runs[r][0])) for rule, _ in wanted}

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.7))
    for colour, (rule, which) in zip(COLOURS, best.items(), strict=False):
        means, moved = runs[which]
        label = rule if which[1] is None else f"{rule}, α = {which[1]:g}"
        axes[0].plot(means, color=colour, label=label)
        axes[1].plot(moved, ".-", color=colour, label=label)
        reached = f"{len(means) - 1} steps" if means[-1] >= TARGET else f"not reached in {steps} steps"
        print(
            f"{label}: E[r] from {means[0]:.3f} to {TARGET}: {reached}; KL of a step {moved.min():.4f} to {moved.max():.4f}"
        )
        rates = [r for r in runs if r[0] == rule]
        if len(rates) > 1:
            axes[2].plot([r[1] for r in rates], [len(runs[r][0]) - 1 for r in rates], "o-", color=colour, label=rule)
        else:
            axes[2].axhline(len(means) - 1, color=colour, label=f"{rule}, δ = {DELTA}")
    axes[0].axhline(TARGET, color="k", lw=1, ls=":")
    axes[0].set(xlabel="step", ylabel="E[r]", xscale="symlog", title="best rate of each")
    axes[1].axhline(DELTA, color="k", lw=1, ls=":")
    axes[1].set(xlabel="step", ylabel="KL of the step, nats", xscale="symlog", yscale="log", title="dotted: δ")
    axes[2].set(xlabel="rate α", ylabel=f"steps to E[r] = {TARGET} (at most {steps})", xscale="log", yscale="log")
    for axis in axes:
        axis.legend(fontsize=7)
    save(figure, out)


if __name__ == "__main__":
    main()
