"""Architecture search by the score function: four categorical choices of a small network, and the best one is known.

The search distribution is a guide with a site for each choice, the score is a `factor`, and what is climbed is

    E_q[score] + T H(q) <= T log Σ exp(score / T),

a closed form here, because all 128 networks were trained beforehand. Where a score costs hours nobody can do that, but this search would
be the same: it uses nothing but the scores of what it draws. Ends with the climb by estimator, and where the search ends.

    python examples/architecture_search.py --backend numpyro --steps 600 --out results/architecture_search.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import DecayingAverage, Expectation, LeaveOneOut, LocalExpectation, ScoreFunction

# The estimator and its particles, which give 8, 8, 8 and 11 networks a step.
ESTIMATORS = {
    "no baseline": (ScoreFunction(), 8),
    "decaying average": (ScoreFunction(DecayingAverage()), 8),
    "leave-one-out": (ScoreFunction(LeaveOneOut()), 8),
    "local expectation": (LocalExpectation(), 1),
}


def searched(backend, script, scores, estimator, particles, steps, seed):
    """Return the probability of each network after the search, and what the search reached at each step, in percent points."""
    temperature = script.OPTIONS["temperature"]
    program = getattr(script, f"{backend}_program")(script.OPTIONS, scores, seed)
    params, losses = train(
        backend,
        program,
        scores,
        steps,
        seed,
        estimators=dict.fromkeys(script.DISCRETE, estimator),
        learning_rate=0.03,
        particles=particles,
        objective=Expectation(entropy=1.0),
    )
    q = np.ones(())
    for name in script.SPACE:
        logits = params[name + "_logits"]
        q = q[..., None] * np.exp(logits - np.logaddexp.reduce(logits))
    return q, -losses * temperature


def named(script, place):
    """Return the network at a place of the table, in words."""
    width, second, activation, pixels = (values[i] for values, i in zip(script.SPACE.values(), place, strict=True))
    return f"{pixels} × {pixels} pixels, {width} {f'and {second} ' if second else ''}{activation} units"


@story(steps=600)
def main(backend, steps, seed, out):
    script = model_script("architecture")
    scores, tested = script.load(script.OPTIONS, seed)
    table, temperature = scores.reshape(script.SIZES), script.OPTIONS["temperature"]
    best = np.unravel_index(table.argmax(), table.shape)
    print(
        f"known best of {table.size}: {named(script, best)}; score {table[best]:.2f} (test {tested.reshape(table.shape)[best]:.2f})"
    )
    climbs = {}
    for name, (estimator, particles) in ESTIMATORS.items():
        q, climbs[name] = searched(backend, script, scores, estimator, particles, steps, seed)
        found = np.unravel_index(q.argmax(), q.shape)
        rank = (table > table[found]).sum() + 1
        print(
            f"{name}: rank {rank}, score {table[found]:.2f}, expected score {(q * table).sum():.2f}: {named(script, found)}"
        )
        if name == "leave-one-out":
            shown = q
    _, weights = script.trained(script.OPTIONS["train_images"], script.OPTIONS["epochs"], seed)
    draw(climbs, temperature * np.logaddexp.reduce(table.ravel() / temperature), table, weights, shown, best, out)


def draw(climbs, bound, table, weights, q, best, out):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for (name, climb), colour in zip(climbs.items(), COLOURS, strict=False):
        width = max(1, len(climb) // 30)
        left.plot(
            np.arange(width, len(climb) + 1),
            np.convolve(climb, np.ones(width) / width, "valid"),
            color=colour,
            label=name,
        )
    left.axhline(bound, color="black", linestyle="--", label="T log Σ exp(score / T)")
    left.set(xlabel="steps", ylabel="score + T × entropy, percent points", title="the climb (moving average)")
    left.legend(fontsize=8)
    right.scatter(weights, table, s=6, color="grey", label="every network")
    right.scatter(weights, table, s=500 * q, color=COLOURS[2], alpha=0.5, label="area: probability in the search")
    right.scatter(weights[best], table[best], marker="*", s=120, color=COLOURS[1], label="known best")
    right.set(xscale="log", xlabel="weights of the network", ylabel="score, percent points")
    right.set_xticks([300, 1000, 3000], ["300", "1,000", "3,000"])
    right.minorticks_off()
    right.set_title("where leave-one-out ends")
    legend = right.legend(fontsize=8, loc="lower right")
    legend.legend_handles[1].set_sizes([60])
    save(figure, out)


if __name__ == "__main__":
    main()
