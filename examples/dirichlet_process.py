"""How many kinds of wine are there? A Dirichlet process mixture finds out, beside scikit-learn's.

v_k ~ Beta(1, 1), weight_k = v_k Π_{j<k} (1 − v_j), k_i ~ Categorical(weight), x_i ~ N(means[k_i], diag(scales[k_i]²)), truncated at 8
components. Assignments are estimated by the score function, sticks, means and scales by reparameterization; what is not
needed stays empty. 178 wines, the first two principal components of 13 measurements.

    python examples/dirichlet_process.py --backend pyro --out results/dirichlet_process.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train
from matplotlib.patches import Ellipse

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

CHOICE = {"k": ScoreFunction(LeaveOneOut()), "*": Reparam()}


@story(steps=500)
def main(backend, steps, seed, out):
    from sklearn.metrics import adjusted_rand_score
    from sklearn.mixture import BayesianGaussianMixture

    script = model_script("dirichlet_process")
    data, kinds = script.measurements(script.OPTIONS)
    program = getattr(script, f"{backend}_program")(script.OPTIONS, data, seed)
    params, _ = train(backend, program, data, steps, seed, estimators=CHOICE, learning_rate=0.05, particles=8)
    peer = BayesianGaussianMixture(
        n_components=script.OPTIONS["components"],
        covariance_type="diag",
        weight_concentration_prior=script.OPTIONS["alpha"],
        n_init=3,
        max_iter=1000,
        random_state=seed,
    ).fit(data)
    fits = {
        "Dirichlet process, gradients": (
            np.argmax(script.assignment_logits(np, data, params["assign"]), -1),
            params["means_loc"],
            np.exp(params["scales_loc"]),
        ),
        "scikit-learn's, variational Bayes": (peer.predict(data), peer.means_, np.sqrt(peer.covariances_)),
    }
    for name, (found, _, _) in fits.items():
        sizes = np.sort(np.bincount(found, minlength=1))[::-1]
        score = adjusted_rand_score(kinds, found)
        print(
            f"{name}: components of {sizes[sizes > 0].tolist()} wines, adjusted Rand index with the cultivars {score:.2f}"
        )

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharey=True)
    for axis, (name, (found, means, scales)) in zip(axes, fits.items(), strict=False):
        for colour, k in enumerate(sorted(set(found), key=lambda k: means[k][0])):
            axis.scatter(*data[found == k].T, s=10, color=COLOURS[colour % len(COLOURS)])
            axis.add_patch(Ellipse(means[k], *(4 * scales[k]), fill=False, lw=1.5, color="0.2"))
        axis.set_title(name, fontsize=10)
    order = np.argsort([data[kinds == k, 0].mean() for k in range(3)])
    for colour, k in enumerate(order):
        axes[2].scatter(*data[kinds == k].T, s=10, color=COLOURS[colour])
    axes[2].set_title("cultivars", fontsize=10)
    for axis in axes:
        axis.set_xlabel("first principal component")
    axes[0].set_ylabel("second principal component")
    save(figure, out)


if __name__ == "__main__":
    main()
