"""A few labels and many digits: labels are summed out where they are missing, and the style is sampled.

Σ_labelled log p(x, y | s, b) + Σ_unlabelled log Σ_y p(x, y | s, b), with a style of eight numbers s (reparameterized) and eight bits b
(DisARM) for each image. The guide has no classifier: p(y | x) is the model's own posterior. It is compared with the same model
trained on the labelled images alone, and with logistic regression on these.

    python examples/semi_supervised.py --backend numpyro --steps 1000 --out results/semi_supervised.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import DisARM, Reparam

CHOICE = {"style": Reparam(), "strokes": DisARM()}
OPTIONS = {}
LABELS = (20, 50, 100, 300)


def accuracy(script, params, center, rows, seed):
    """Return the share of images whose most probable digit is their label."""
    found = script.label_probabilities(params, center, rows[:, 1:], np.random.default_rng(seed))
    return float(np.mean(found.argmax(-1) == rows[:, 0]))


def compared(backend, script, labels, steps, seed):
    """Return accuracies on the test images by what learned from so many labels, and the parameters learned from all images."""
    from sklearn.linear_model import LogisticRegression

    options = {**script.OPTIONS, **OPTIONS, "labels": labels}
    data, _ = script.load(options, seed)
    test = script.split(seed)[1]
    labelled = np.unique(data[data[:, 0] >= 0], axis=0)
    center = data[:, 1:].mean(0)
    program, found = getattr(script, f"{backend}_program")(options, data, seed), {}
    settings = dict(estimators=CHOICE, learning_rate=5e-3)
    for name, rows in (("all images", data), ("labelled images alone", labelled)):
        params, _ = train(backend, program, rows, steps, seed, **settings, batch_size=min(100, len(rows)))
        found[name] = accuracy(script, params, center, test, seed), params
    plain = LogisticRegression(max_iter=2000).fit(labelled[:, 1:], labelled[:, 0])
    shares = {name: share for name, (share, _) in found.items()}
    return shares | {"logistic regression": plain.score(test[:, 1:], test[:, 0])}, (found["all images"][1], center)


@story(steps=1000)
def main(backend, steps, seed, out):
    script, table = model_script("semi_supervised"), []
    for labels in LABELS:
        shares, learned = compared(backend, script, labels, steps, seed)
        table.append(shares)
        print(f"{labels} labels: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
        if labels == LABELS[min(1, len(LABELS) - 1)]:
            shown = labels, learned
    picture(script, table, shown, seed, out)


def picture(script, table, shown, seed, out):
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), width_ratios=(1, 1.1))
    for (name, colour), marker in zip(zip(table[0], COLOURS, strict=False), "os^", strict=True):
        axes[0].plot(LABELS, [row[name] for row in table], marker=marker, color=colour, label=name)
    axes[0].set(xscale="log", xlabel="labels among 1,500 images", ylabel="test images with the right digit")
    axes[0].set_xticks(LABELS, LABELS)
    axes[0].minorticks_off()
    axes[0].legend(frameon=False)
    labels, (params, center) = shown
    test = script.split(seed)[1][:8]
    loc, _, logits = script.encoded(params, center, test[:, 1:])
    drawn = [script.decoded(params, np.full(len(test), y), loc, (logits > 0) * 1.0) for y in range(script.CLASSES)]
    images = np.stack([test[:, 1:], *(1 / (1 + np.exp(-x)) for x in drawn)], 1).reshape(len(test), -1, 8, 8)
    tiles = np.pad(images, ((0, 0), (0, 0), (1, 0), (1, 0))).transpose(0, 2, 1, 3)
    axes[1].imshow(tiles.reshape(9 * len(test), -1), cmap="gray", vmin=0, vmax=1)
    axes[1].set_xticks(9 * np.arange(script.CLASSES + 1) + 4.5, ["image", *range(script.CLASSES)])
    axes[1].set(yticks=[], xlabel=f"its style with every digit ({labels} labels)")
    save(figure, out)


if __name__ == "__main__":
    main()
