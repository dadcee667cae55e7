"""Discrete autoencoders of digits, with Bernoulli and with categorical latents: ELBO by estimator, reconstructions, samples.

log p(x) >= E_q(z|x)[log p(x, z) - log q(z | x)], and z takes finitely many values: no gradient passes through it, and ∇ E_q comes from
∇ log q. All estimators get two evaluations of the program a step: two particles, or one and its antithetic partner. The ELBO
that is compared is that of held-out digits, in plain NumPy.

    python examples/discrete_vae.py --backend numpyro --steps 1500 --out results/discrete_vae.png
"""

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import DisARM, LeaveOneOut, ScoreFunction, StickBreakingDisARM

SCRIPTS = {"Bernoulli": "sbn", "categorical": "categorical"}
OPTIONS = {
    "Bernoulli": {"latents": 32, "nonlinear": True, "hidden": 64, "activation": "leaky", "binarize": "threshold"},
    "categorical": {"variables": 8, "categories": 16, "hidden": 64, "binarize": "threshold"},
}
# The estimator, and its particles.
PLAIN = {"score function": (ScoreFunction(), 2), "leave-one-out": (ScoreFunction(LeaveOneOut()), 2)}
ESTIMATORS = {
    "Bernoulli": {**PLAIN, "DisARM": (DisARM(), 1)},
    "categorical": {**PLAIN, "stick-breaking DisARM": (StickBreakingDisARM(), 1)},
}


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


class Autoencoder:
    """What a trained program says, in plain NumPy."""

    def __init__(self, kind, params, center, shape):
        self.kind, self.params, self.center, self.shape = kind, params, center, shape

    def network(self, name, h):
        for i in range(3):
            h = h @ self.params[f"{name}_w{i}"] + self.params[f"{name}_b{i}"]
            h = h if i == 2 else np.where(h > 0, h, 0.3 * h)
        return h

    def encoded(self, x):
        """Return the logits of q(z | x), of the latents' shape."""
        if self.kind == "Bernoulli":
            return self.network("encode1", 2 * (x - self.center))
        return self.network("encode", x - self.center).reshape(x.shape[:-1] + self.shape)

    def drawn(self, logits, rng):
        """Return latents: bits, or one-hot vectors."""
        if self.kind == "Bernoulli":
            return (rng.random(logits.shape) < sigmoid(logits)).astype(float)
        return np.eye(logits.shape[-1])[np.argmax(logits + rng.gumbel(size=logits.shape), -1)]

    def log_mass(self, logits, z):
        """Return log Π_d p(z_d), one for each datum."""
        if self.kind == "Bernoulli":
            return (z * logits - np.logaddexp(0, logits)).sum(-1)
        return (z * log_softmax(logits)).sum((-2, -1))

    def decoded(self, z):
        """Return the logits of the pixels."""
        if self.kind == "Bernoulli":
            return self.network("decode0", 2 * z - 1)
        return self.network("decode", z.reshape(z.shape[:-2] + (-1,)))

    def log_weight(self, x, z):
        """Return log p(x, z) - log q(z | x)."""
        pixels = self.decoded(z)
        seen = (x * pixels - np.logaddexp(0, pixels)).sum(-1)
        return seen + self.log_mass(self.params["prior"], z) - self.log_mass(self.encoded(x), z)

    def elbo(self, x, rng, draws=50):
        """Return the ELBO per datum, in nats."""
        logits = self.encoded(x)
        return float(np.mean([self.log_weight(x, self.drawn(logits, rng)).mean() for _ in range(draws)]))


def fitted(backend, kind, estimator, particles, data, steps, seed, options=None):
    """Return the autoencoder that training with one estimator leaves."""
    script = model_script(SCRIPTS[kind])
    options = {**script.OPTIONS, **OPTIONS[kind], **(options or {})}
    program = getattr(script, f"{backend}_program")(options, data, seed)
    estimators = dict.fromkeys(script.DISCRETE, estimator)
    params, _ = train(
        backend,
        program,
        data,
        steps,
        seed,
        estimators=estimators,
        learning_rate=3e-3,
        particles=particles,
        batch_size=100,
    )
    shape = (options["latents"],) if kind == "Bernoulli" else (options["variables"], options["categories"])
    return Autoencoder(kind, params, data.mean(0), shape)


@story(steps=1500)
def main(backend, steps, seed, out):
    script = model_script("sbn")
    data, held_out = script.load({**script.OPTIONS, "binarize": "threshold"}, seed)
    mean, rng = data.mean(0).clip(1e-3, 1 - 1e-3), np.random.default_rng(seed)
    alone = (held_out * np.log(mean) + (1 - held_out) * np.log(1 - mean)).sum(-1).mean()
    print(f"independent pixels: {alone:.2f} nats per held-out digit")
    bounds, best = {}, {}
    for kind, estimators in ESTIMATORS.items():
        for name, (estimator, particles) in estimators.items():
            found = fitted(backend, kind, estimator, particles, data, steps, seed)
            bounds[kind, name] = found.elbo(held_out, rng)
            print(f"{kind}, {name}: ELBO {bounds[kind, name]:.2f} nats per held-out digit")
            if bounds[kind, name] == max(value for (k, _), value in bounds.items() if k == kind):
                best[kind] = found
    draw(bounds, alone, best, held_out[:10], rng, out)


def draw(bounds, alone, best, x, rng, out):
    rows = [("digits", x)]
    for kind, found in best.items():
        rows.append((f"reconstructions, {kind}", sigmoid(found.decoded(found.drawn(found.encoded(x), rng)))))
    for kind, found in best.items():
        prior = np.broadcast_to(found.params["prior"], (len(x), *found.shape))
        rows.append((f"samples, {kind}", sigmoid(found.decoded(found.drawn(prior, rng)))))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1, 1.15))
    for i, ((kind, _), value) in enumerate(bounds.items()):
        left.barh(-i, value - alone, color=COLOURS[0] if kind == "Bernoulli" else COLOURS[1])
        left.annotate(f" {value:.2f}", (value - alone, -i), va="center", fontsize=8)
    left.set(yticks=[-i for i in range(len(bounds))], yticklabels=[f"{name}\n({kind})" for kind, name in bounds])
    left.margins(x=0.15)
    left.set(xlabel="ELBO above independent pixels, nats / digit", title="held-out digits (numbers: the ELBO)")
    tiles = np.pad(np.stack([r for _, r in rows]).reshape(len(rows), len(x), 8, 8), ((0, 0), (0, 0), (1, 0), (1, 0)))
    right.imshow(tiles.transpose(0, 2, 1, 3).reshape(9 * len(rows), -1), cmap="gray", vmin=0, vmax=1)
    right.set(xticks=[], yticks=9 * np.arange(len(rows)) + 4.5, yticklabels=[name for name, _ in rows])
    right.set(title="with the best estimator of each")
    save(figure, out)


if __name__ == "__main__":
    main()
