"""Which digit, and in what style: a discrete and a continuous latent of one autoencoder, an estimator each, no labels.

∇ E_q(k|x) E_q(s|x,k)[f] by the score function for the class k (leave-one-out over the particles), through s = μ + σ ε for the style
s. The decoder sees both, so that what one latent explains the other need not. The labels are only used at the end: for the
table of clusters against labels, and the adjusted Rand index, beside k-means.

    python examples/class_and_style.py --backend numpyro --steps 4000 --out results/class_and_style.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import model_script, save, story, train

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

CHOICE = {"k": ScoreFunction(LeaveOneOut()), "s": Reparam()}
OPTIONS = {"classes": 10, "style": 2, "hidden": 128}
STYLES = np.linspace(-2, 2, 7)


def clusters(params, x, center):
    """Return the most probable class of each image under the guide."""
    return np.argmax(np.tanh(2 * (x - center) @ params["encode_w"] + params["encode_b"]) @ params["class_w"], -1)


def decoded(params, classes, styles):
    """Return the probability of each pixel, for a class and a style a row."""
    h = params["decode_class"][classes] + styles @ params["decode_style"] + params["decode_hidden"]
    return 1 / (1 + np.exp(-(np.tanh(h) @ params["decode_w"] + params["decode_b"])))


def contingency(found, labels):
    """Return images by cluster and label, and the order of the clusters by the label that most of their images have."""
    table = np.zeros((OPTIONS["classes"], 10), int)
    np.add.at(table, (found, labels), 1)
    return table, np.argsort(table.argmax(1), kind="stable")


@story(steps=4000)
def main(backend, steps, seed, out):
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits
    from sklearn.metrics import adjusted_rand_score

    digits = load_digits()
    x, labels = (digits.data >= 8).astype(np.float32), digits.target
    program = getattr(model_script("mixed"), f"{backend}_program")(OPTIONS, x, seed)
    settings = dict(estimators=CHOICE, learning_rate=5e-3, particles=4, batch_size=100)
    params, losses = train(backend, program, x, steps, seed, **settings)
    mean = x.mean(0).clip(1e-3, 1 - 1e-3)
    alone = (x * np.log(mean) + (1 - x) * np.log(1 - mean)).sum(-1).mean()
    found = clusters(params, x, x.mean(0))
    table, order = contingency(found, labels)
    plain = KMeans(10, n_init=5, random_state=seed).fit_predict(x)
    print(f"ELBO per image: {-losses[-100:].mean() / 100:.2f} nats (independent pixels: {alone:.2f})")
    print(f"agreement with the labels (adjusted Rand index): {adjusted_rand_score(labels, found):.2f}")
    print(f"the same of k-means: {adjusted_rand_score(labels, plain):.2f}")
    styled = decoded(params, np.repeat(order, 7), np.tile(np.stack([STYLES, 0 * STYLES], -1), (10, 1))).reshape(
        10, 7, -1
    )
    print(f"standard deviation of a decoded pixel over styles, within a class: {styled.std(1).mean():.3f}")
    print(f"images whose cluster's most frequent label is theirs: {table.max(1).sum() / len(x):.0%}")
    draw(params, table[order] / table[order].sum(1, keepdims=True).clip(1), order, out)


def draw(params, table, order, out):
    figure, axes = plt.subplots(1, 3, figsize=(11, 5.2), width_ratios=(1.25, 1, 1))
    shown = axes[0].imshow(table, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(shown, ax=axes[0], label="share of the cluster's images")
    axes[0].set(xlabel="label", ylabel="cluster, by its most frequent label", title="clusters against labels")
    axes[0].set(xticks=range(10), yticks=range(len(order)))
    for dimension, axis in enumerate(axes[1:]):
        styles = np.zeros((len(order), len(STYLES), 2))
        styles[:, :, dimension] = STYLES
        images = decoded(params, np.repeat(order, len(STYLES)), styles.reshape(-1, 2))
        rows = np.pad(images.reshape(len(order), len(STYLES), 8, 8), ((0, 0), (0, 0), (1, 0), (1, 0)))
        axis.imshow(rows.transpose(0, 2, 1, 3).reshape(9 * len(order), -1), cmap="gray", vmin=0, vmax=1, aspect="auto")
        axis.set(yticks=9 * np.arange(len(order)) + 4.5, yticklabels=range(len(order)))
        axis.set(xticks=9 * np.arange(len(STYLES)) + 4.5, xticklabels=[f"{s:.1f}" for s in STYLES])
        axis.set(xlabel=f"style, dimension {dimension + 1} (the other is 0)", title="decoded images")
    save(figure, out)


if __name__ == "__main__":
    main()
