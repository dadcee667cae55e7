"""Energy-based models of digits at 4 x 4 pixels: the negative phase by the score identity, against the exact partition function.

p(x) = exp(-E(x)) / Z, and E_p[∇ log p] = 0 gives ∇ log Z = E_p[-∇E], the negative phase. A sampler q is trained beside the model, and
log mean_k w_k with w_k = exp(-E(x_k)) / q(x_k) bounds log Z (`IWAE`): its gradient is the negative phase from draws of q weighted by
w, and the sampler's, from ∇ log q, has the other particles as its baseline (`VIMCO`). With 65,536 states Z is a sum, so that all is
compared with what is exact: the negative phase, the likelihood of held-out digits, and the maximum of the lattice's likelihood.

    python examples/energy_based.py --backend numpyro --steps 3000 --out results/energy_based.png
"""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
from _story import COLOURS, model_script, save, story, train

from pplgrad import IWAE, VIMCO

COUNTS = (10, 30, 100, 300, 1000, 3000, 10_000)
STATES = np.array(list(product([0.0, 1.0], repeat=16)))
SIGNS = 2 * STATES - 1


class Machine:
    """A Boltzmann machine and its sampler, enumerated."""

    def __init__(self, script, energy, params):
        self.mask = script.neighbours(4) if energy == "lattice" else None
        self.params = {name: np.asarray(value, float) for name, value in params.items()}
        self.log_weights = script.negative_energy(self.params, np, STATES, self.mask)
        self.log_z = np.logaddexp.reduce(self.log_weights)
        self.p = np.exp(self.log_weights - self.log_z)
        logits = self.params["sampler_bias"] + SIGNS @ np.tril(self.params["sampler"], -1).T
        self.log_q = (STATES * logits - np.logaddexp(0, logits)).sum(-1)
        self.q = np.exp(self.log_q)
        self.bound = self.q @ (self.log_weights - self.log_q)

    def log_likelihood(self, x):
        """Return log p(x), a mean over the rows, in nats."""
        index = (x @ 2.0 ** np.arange(15, -1, -1)).astype(int)
        return (self.log_weights[index] - self.log_z).mean()

    def phase(self, weights):
        """Return the mean of -∇E under weights of the states."""
        if self.mask is not None:
            pairs = (SIGNS.T * weights) @ SIGNS
            return np.concatenate([weights @ STATES, pairs[self.mask > 0]])
        units = 1 / (1 + np.exp(-STATES @ self.params["weights"] - self.params["offsets"]))
        return np.concatenate([weights @ STATES, ((STATES.T * weights) @ units).ravel(), weights @ units])

    def error(self, weights):
        """Return the error of a negative phase, by the norm of the exact one."""
        exact = self.phase(self.p)
        return np.linalg.norm(self.phase(weights) - exact) / np.linalg.norm(exact)

    def sampled_error(self, count, weighted, rng):
        """Return that error for so many draws of the sampler, as they are or weighted by p / q."""
        drawn = rng.multinomial(count, self.q / self.q.sum()).astype(float)
        drawn *= np.exp(self.log_weights - self.log_q - self.log_z) if weighted else 1.0
        return self.error(drawn / drawn.sum())


def fitted(backend, energy, steps, seed):
    """Return a machine after training beside its sampler, with the train and the test digits."""
    script = model_script("boltzmann")
    options = {**script.OPTIONS, "energy": energy}
    data, held_out = script.load(options, seed)
    program = getattr(script, f"{backend}_program")(options, data, seed)
    settings = dict(learning_rate=0.01, particles=32, objective=IWAE())
    params, _ = train(
        backend, program, data, steps, seed, estimators=dict.fromkeys(script.DISCRETE, VIMCO()), **settings
    )
    pace = {name: 1.0 if name.startswith("sampler") else options["pace"] for name in params}
    params = {name: pace[name] * value for name, value in params.items()}
    return Machine(script, energy, params), data, held_out


def best_lattice(data, mask):
    """Return the parameters at the maximum of the lattice's likelihood, by exact gradients."""
    from scipy.optimize import minimize

    upper = np.argwhere(mask > 0)
    features = np.concatenate([STATES, SIGNS[:, upper[:, 0]] * SIGNS[:, upper[:, 1]]], 1)
    index = (data @ 2.0 ** np.arange(15, -1, -1)).astype(int)
    seen = features[index].mean(0)

    def loss(theta):
        log_weights = features @ theta
        log_z = np.logaddexp.reduce(log_weights)
        return log_z - seen @ theta, np.exp(log_weights - log_z) @ features - seen

    theta = minimize(loss, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B").x
    couplings = np.zeros_like(mask)
    couplings[mask > 0] = theta[16:]
    return {"fields": theta[:16], "couplings": couplings, "sampler": np.zeros((16, 16)), "sampler_bias": np.zeros(16)}


@story(steps=3000)
def main(backend, steps, seed, out):
    machines, rng = {}, np.random.default_rng(seed)
    for energy in ("lattice", "restricted"):
        machine, data, held_out = fitted(backend, energy, steps, seed)
        machines[energy] = machine
        print(f"{energy}: log Z = {machine.log_z:.3f} nats, the sampler's bound {machine.bound:.3f}")
        print(f"{energy}: error of the negative phase under the sampler {machine.error(machine.q):.1%} of its norm")
        print(f"{energy}: log likelihood {machine.log_likelihood(held_out):.3f} nats per held-out digit")
    best = Machine(model_script("boltzmann"), "lattice", best_lattice(data, machines["lattice"].mask))
    print(f"lattice at the exact maximum: log likelihood {best.log_likelihood(held_out):.3f} nats per held-out digit")
    mean = data.mean(0).clip(1e-3, 1 - 1e-3)
    alone = (held_out * np.log(mean) + (1 - held_out) * np.log(1 - mean)).sum(-1).mean()
    print(f"independent pixels: log likelihood {alone:.3f} nats per held-out digit")
    bars = {
        "independent pixels": alone,
        "lattice": machines["lattice"].log_likelihood(held_out),
        "lattice, exact maximum": best.log_likelihood(held_out),
        "restricted": machines["restricted"].log_likelihood(held_out),
    }
    draw(machines, bars, held_out, rng, out)


def draw(machines, bars, x, rng, out):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.8))
    for i, (energy, machine) in enumerate(machines.items()):
        for weighted, style in ((False, "-"), (True, "--")):
            errors = [np.mean([machine.sampled_error(n, weighted, rng) for _ in range(10)]) for n in COUNTS]
            words = f"{energy}, {'weighted by p / q' if weighted else 'as drawn'}"
            left.plot(COUNTS, errors, style, marker="o", markersize=3, color=COLOURS[i], label=words)
    left.set(xscale="log", yscale="log", xlabel="draws of the sampler", ylabel="error / norm of the exact one")
    left.set_title("negative phase")
    left.legend(fontsize=7)
    alone = bars["independent pixels"]
    models = {name: value for name, value in bars.items() if name != "independent pixels"}
    names = [name.replace(", ", ",\n") for name in models]
    middle.barh(names, [value - alone for value in models.values()], color=[COLOURS[0], COLOURS[5], COLOURS[1]])
    for place, value in enumerate(models.values()):
        middle.annotate(f" {value:.2f}", (value - alone, place), va="center", fontsize=8)
    middle.invert_yaxis()
    middle.margins(x=0.25)
    middle.set(xlabel=f"log likelihood above independent pixels\n({alone:.2f}), nats / digit", title="held-out digits")
    rows = [("digits", x[rng.choice(len(x), 21, replace=False)])]
    for energy, machine in machines.items():
        rows.append((energy, STATES[rng.choice(len(STATES), 21, p=machine.p / machine.p.sum())]))
    shape = ((0, 0), (0, 0), (0, 0), (1, 0), (1, 0))
    tiles = np.pad(np.stack([r for _, r in rows]).reshape(3, 3, 7, 4, 4), shape, constant_values=0.5)
    tiles = np.pad(tiles.transpose(0, 1, 3, 2, 4).reshape(3, 15, 35), ((0, 0), (2, 0), (0, 0)), constant_values=1.0)
    right.imshow(tiles.reshape(51, 35), cmap="gray", vmin=0, vmax=1)
    right.set(xticks=[], yticks=17 * np.arange(3) + 9.5, yticklabels=[name for name, _ in rows])
    right.set_title("samples of p")
    save(figure, out)


if __name__ == "__main__":
    main()
