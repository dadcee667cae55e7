"""Off-policy: a policy's gradient from decisions that others made, right with known propensities, wrong with a hidden cause.

∇ E_π[r] = E_β[r w ∇ log π_θ(a | x)] with w = π_θ(a | x) / β(a | x, u): the score function with importance weights. Doctors who
see a patient's health u give the worst arm to the healthiest. Whoever knows their propensities β(a | x, u) learns the best
policy from the log; whoever takes them for β(a | x) learns that the worst arm heals. Every gradient's bias is known in closed
form, since patients have two kinds of health and three arms. --steps are those of the training.

    python examples/off_policy.py --backend numpyro
"""

import matplotlib.pyplot as plt
import numpy as np
from _draws import gradient
from _story import COLOURS, model_script, save, story, train

from pplgrad import Expectation, LeaveOneOut, ScoreFunction

DRAWS = 2000
NAMES = {"own": "own decisions", "known": "logged, β(a | x, u) known", "hidden": "logged, u hidden"}


def exact(script, options, contexts, theta):
    """Return E[r] under π_θ as the source would have it, and its gradient, summed over contexts, from all outcomes."""
    logged, value, slope = script.behaviour(options), 0.0, np.zeros_like(theta)
    for (x,) in contexts:
        logits = theta @ np.array([1.0, x])
        chances = np.exp(logits) / np.exp(logits).sum()
        # E[u | a] under the log, where u is hidden; else ½, whatever a.
        health = logged[1] / logged.sum(0) if options["source"] == "hidden" else np.full(3, 0.5)
        rewards = script.MEANS + script.SLOPES * x + script.HEALTH * health
        value += chances @ rewards
        slope += np.outer(chances * (rewards - chances @ rewards), [1.0, x])
    return value, slope


@story(steps=400)
def main(backend, steps, seed, out):
    script = model_script("offpolicy")
    make = getattr(script, f"{backend}_program")
    contexts, _ = script.load(script.OPTIONS, seed)
    theta, n = script.initial(), len(contexts)
    copies = np.repeat(contexts, DRAWS, 0)
    score = {"u": ScoreFunction(LeaveOneOut()), "a": ScoreFunction(LeaveOneOut())}

    def draws(options):
        """Return draws of the whole gradient, (draws, arms, 2)."""
        program = make(options, copies, seed, np.tile(theta, (len(copies), 1, 1)))
        found = gradient(backend, program, copies, seed, estimators=score, objective=Expectation(), particles=2)
        return found["theta"].reshape(n, DRAWS, 3, 2).sum(0)

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    truth = exact(script, {**script.OPTIONS, "source": "own"}, contexts, theta)[1]
    for number, (source, name) in enumerate(NAMES.items()):
        found = draws({**script.OPTIONS, "source": source})
        error = found.std(0) / np.sqrt(DRAWS)
        wanted = exact(script, {**script.OPTIONS, "source": source}, contexts, theta)[1]
        print(
            f"{name}: against the policy's gradient largest |z| {np.abs((found.mean(0) - truth) / error).max():.1f}, "
            f"against its own closed form {np.abs((found.mean(0) - wanted) / error).max():.1f}"
        )
        place = np.arange(3) + 0.2 * (number - 1)
        axes[0].errorbar(place, found.mean(0)[:, 0], 2 * error[:, 0], fmt="o", color=COLOURS[number], label=name)
    axes[0].hlines(truth[:, 0], np.arange(3) - 0.4, np.arange(3) + 0.4, "k", label="exact, of the policy")
    axes[0].set(
        xticks=range(3),
        xlabel="arm",
        ylabel="∂E[r]/∂intercept, reward",
        ylim=(-0.9, 1.25),
        title="gradient, ± 2 standard errors",
    )
    axes[0].legend(fontsize=7)

    strengths = np.linspace(0.0, 2.0, 5)
    for number, source in enumerate(("known", "hidden"), 1):
        both = [{**script.OPTIONS, "source": source, "confounding": float(strength)} for strength in strengths]
        closed = [np.linalg.norm(exact(script, options, contexts, theta)[1] - truth) for options in both]
        means = [draws(options).mean(0) for options in both]
        axes[1].plot(strengths, closed, color=COLOURS[number], label=NAMES[source])
        axes[1].plot(strengths, [np.linalg.norm(mean - truth) for mean in means], "o", color=COLOURS[number])
    axes[1].set(
        xlabel="confounding (log odds of the arm by u)", ylabel="‖bias‖, reward", title="lines exact, dots measured"
    )
    axes[1].legend(fontsize=7)

    own = {**script.OPTIONS, "source": "own"}
    best = sum((script.MEANS + script.SLOPES * x).max() + script.HEALTH / 2 for (x,) in contexts) / n
    for number, (source, name) in enumerate(NAMES.items()):
        program = make({**script.OPTIONS, "source": source}, contexts, seed)
        choice = {"estimators": score, "objective": Expectation(), "learning_rate": 0.05, "particles": 4}
        learned = train(backend, program, contexts, steps, seed, **choice).params["theta"]
        value = exact(script, own, contexts, learned)[0] / n
        print(f"{name}: true reward of the learned policy {value:.3f}, best {best:.3f}")
        axes[2].bar(number, value, color=COLOURS[number])
    axes[2].axhline(best, color="k", lw=1, label="best policy")
    axes[2].axhline(exact(script, own, contexts, theta)[0] / n, color="k", lw=1, ls=":", label="fair policy")
    axes[2].set(xticks=range(3), ylabel="true E[r] of the learned policy", ylim=(0.35, None))
    axes[2].set_xticklabels(["own", "β known", "u hidden"])
    axes[2].legend(fontsize=7, loc="lower left")
    save(figure, out)


if __name__ == "__main__":
    main()
