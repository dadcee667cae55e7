"""Gaussian mixture on the iris measurements: discrete assignments by the score function, means by reparameterization.

∇ E_q[f] = E_q[f ∇ log q(k)] for the assignments, and through x = μ + σ ε for the means; each site has its own estimator,
and nothing else of the program knows. Ends with a picture of the components beside the species.

    python examples/mixture_iris.py --backend pyro --steps 400 --out results/iris.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import model_script, save, story, train

from pplgrad import LeaveOneOut, Reparam, ScoreFunction

CHOICE = {"k": ScoreFunction(LeaveOneOut()), "means": Reparam()}


@story(steps=400)
def main(backend, steps, seed, out):
    from sklearn.datasets import load_iris
    from sklearn.metrics import adjusted_rand_score

    iris = load_iris()
    data = (iris.data - iris.data.mean(0)) / iris.data.std(0)
    script = model_script("mixture")
    program = getattr(script, f"{backend}_program")(script.OPTIONS, data, seed)
    params, _ = train(backend, program, data, steps, seed, estimators=CHOICE, learning_rate=0.03, particles=4)
    found = np.argmax(data @ params["assign_w"] + params["assign_b"], -1)
    print(f"agreement with the species (adjusted Rand index): {adjusted_rand_score(iris.target, found):.2f}")

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True)
    for axis, colours, title in zip(axes, (found, iris.target), ("components", "species"), strict=True):
        axis.scatter(iris.data[:, 2], iris.data[:, 3], c=colours, cmap="cividis", s=14)
        axis.set_title(title)
        axis.set_xlabel("petal length, cm")
    axes[0].set_ylabel("petal width, cm")
    save(figure, out)


if __name__ == "__main__":
    main()
