"""Hard attention: one glimpse, drawn and learned by the score function, against soft attention at equal evaluations.

Each scene has nine windows, one with a whole digit and eight with halves of digits. The attention sees them at 2 x 2 pixels and

    hard:  draws a place, ∇ E_q(place)[log p(label | window at place)] by the score function, two glimpses a scene and step;
    soft:  averages the network's hidden units over all places by the same attention, nine evaluations a scene and step.

Both have the same parameters, and get the same number of evaluations of the network. Trained, the hard one looks once, at the most probable
place. Ends with accuracy on new scenes against evaluations, and the places that are looked at.

    python examples/hard_attention.py --backend pyro --steps 400 --out results/hard_attention.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import Expectation, LeaveOneOut, LocalExpectation, ScoreFunction

# The kind of attention, estimators, particles, and evaluations of the network for each scene and step.
KINDS = {
    "hard, leave-one-out": ("hard", {"place": ScoreFunction(LeaveOneOut())}, 2, 2),
    "hard, local expectation": ("hard", {"place": LocalExpectation()}, 1, 9),
    "soft": ("soft", {}, 1, 9),
}


def trained(backend, kind, data, evaluations, seed):
    """Return the parameters that so many evaluations a scene leave, in batches of 100."""
    script = model_script("attention")
    attention, estimators, particles, per_step = KINDS[kind]
    program = getattr(script, f"{backend}_program")({**script.OPTIONS, "attention": attention}, data, seed)
    settings = dict(learning_rate=0.01, particles=particles, batch_size=100, objective=Expectation())
    return train(
        backend, program, data, max(1, evaluations // per_step), seed, estimators=estimators, **settings
    ).params


def judged(kind, params, scenes):
    """Return the most probable label of each scene, and the place that the attention prefers."""
    script = model_script("attention")
    windows, _ = script.split(scenes)
    logits = script.attention(params, np, windows)
    place = logits.argmax(-1)
    if KINDS[kind][0] == "hard":
        seen = script.features(params, np, windows[np.arange(len(windows)), place])
    else:
        weights = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
        seen = (weights[..., None] * script.features(params, np, windows)).sum(-2)
    return script.labels_of(params, seen).argmax(-1), place


@story(steps=400, backends=("pyro", "numpyro"))
def main(backend, steps, seed, out):
    script = model_script("attention")
    data, new = script.load(script.OPTIONS, seed)
    windows, labels = script.split(new)
    whole = script.whole(windows)
    budgets = [2 * steps // part for part in (8, 4, 2, 1)]
    accuracy, places = {}, {}
    for kind in KINDS:
        for budget in budgets:
            found, places[kind] = judged(kind, trained(backend, kind, data, budget, seed), new)
            accuracy.setdefault(kind, []).append((found == labels).mean())
            print(
                f"{budget} evaluations, {kind}: accuracy {accuracy[kind][-1]:.3f}, "
                f"prefers the whole digit in {(places[kind] == whole).mean():.1%} of the scenes"
            )
    draw(budgets, accuracy, windows[:12], places["hard, leave-one-out"], out)


def draw(budgets, accuracy, windows, places, out):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(1, 1))
    for (kind, values), colour in zip(accuracy.items(), COLOURS, strict=False):
        left.plot(budgets, values, marker="o", color=colour, label=kind)
    left.set(xscale="log", xlabel="evaluations of the network a scene of the batch", ylabel="accuracy on new scenes")
    left.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    left.minorticks_off()
    left.set_ylim(0, 1.02)
    left.legend(loc="lower right")
    shown = np.ones((3 * 30, 4 * 30))
    for i, scene in enumerate(windows):
        row, column = divmod(i, 4)
        for place, window in enumerate(scene):
            y, x = 30 * row + 2 + 9 * (place // 3), 30 * column + 2 + 9 * (place % 3)
            shown[y : y + 8, x : x + 8] = window.reshape(8, 8)
            if place == places[i]:
                right.add_patch(plt.Rectangle((x - 1, y - 1), 9, 9, fill=False, color=COLOURS[1], linewidth=2))
    right.imshow(shown, cmap="gray", vmin=0, vmax=1)
    right.set(xticks=[], yticks=[], title="new scenes, and where hard attention looks")
    save(figure, out)


if __name__ == "__main__":
    main()
