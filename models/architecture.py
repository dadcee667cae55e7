"""Architecture search: the shape of a small network as four categorical choices, and its validation score as the reward.

    width, second, activation, pixels ~ Categorical,  log factor = score(width, second, activation, pixels) / temperature

The score is the accuracy in percent on held-out digits, less one for every `weights_per_percent` weights. All networks of the space are
trained beforehand (scikit-learn's MLPClassifier), so that its best is known; the program only ever looks up those that it draws.
The ELBO is then E[score] / temperature + entropy - log(networks), and log(mean exp(score / temperature)) at best.
"""

import warnings
from functools import lru_cache

import numpy as np

OPTIONS = {
    "temperature": 0.5,  # percent points of score that a nat of entropy is worth
    "weights_per_percent": 2000,  # what a percent point of accuracy may cost
    "train_images": 400,
    "epochs": 30,
}
SPACE = {
    "width": (8, 16, 32, 64),  # units of the hidden layer
    "second": (0, 8, 16, 32),  # units of another one, or none
    "activation": ("identity", "logistic", "tanh", "relu"),
    "pixels": (4, 8),  # digits of 4 x 4 or of 8 x 8 pixels
}
SIZES = tuple(len(values) for values in SPACE.values())
DISCRETE = tuple(SPACE)
WHOLE_DATA = True


def load(options, seed):
    """Return the scores of all networks as one row, on the validation images and on the test images."""
    accuracies, weights = trained(int(options["train_images"]), int(options["epochs"]), seed)
    scores = 100 * accuracies - weights / options["weights_per_percent"]
    return scores[0].reshape(1, -1), scores[1].reshape(1, -1)


@lru_cache
def trained(train_images, epochs, seed):
    """Return the accuracies of all networks (2, *SIZES), on validation and test images, and their numbers of weights."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from tqdm import tqdm

    digits = load_digits()
    images, labels = digits.data / 16, digits.target
    small = images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(len(images), -1)
    first, rest = train_test_split(np.arange(len(images)), train_size=train_images, random_state=seed)
    parts = train_test_split(rest, test_size=0.5, random_state=seed)
    accuracies, weights = np.zeros((2, *SIZES)), np.zeros(SIZES, int)
    for place in tqdm(np.ndindex(*SIZES), total=weights.size, desc="all networks", mininterval=1.0):
        width, second, activation, pixels = (values[i] for values, i in zip(SPACE.values(), place, strict=True))
        x = small if pixels == 4 else images
        network = fitted(x[first], labels[first], (width, second) if second else (width,), activation, epochs, seed)
        accuracies[(slice(None), *place)] = [network.score(x[part], labels[part]) for part in parts]
        weights[place] = sum(a.size for a in [*network.coefs_, *network.intercepts_])
    return accuracies, weights


def fitted(x, labels, layers, activation, epochs, seed):
    """Return one network, after so many epochs."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier(
        layers, activation=activation, max_iter=epochs, batch_size=50, learning_rate_init=5e-3, random_state=seed
    )
    with warnings.catch_warnings():
        # The number of epochs is a setting, not a failure.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return network.fit(x, labels)


def program(ppl, dist, array, options):
    """Return model and guide of a row of scores, written once for both libraries."""
    uniform = {name: array(np.zeros(len(values))) for name, values in SPACE.items()}

    def model(scores):
        drawn = [ppl.sample(name, dist.Categorical(logits=uniform[name])) for name in SPACE]
        table = scores.reshape(SIZES)
        ppl.factor("score", table[tuple(drawn)] / options["temperature"])

    def guide(scores):
        for name in SPACE:
            ppl.sample(name, dist.Categorical(logits=ppl.param(name + "_logits", uniform[name])))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    return program(pyro, dist, lambda a: torch.tensor(a, dtype=torch.float32), options)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return program(numpyro, dist, lambda a: jnp.asarray(a, jnp.float32), options)
