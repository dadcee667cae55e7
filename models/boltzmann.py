"""Energy-based model of small digits: a Boltzmann machine whose negative phase comes from a sampler that is trained beside it.

    p(x) = exp(-E(x)) / Z,   ∇ log p(x) = -∇E(x) + E_p[∇E],   since E_p[∇ log p] = 0,
    log Z >= E_q[-E(x) - log q(x)],   q(x) = Π_i q(x_i | x_1, ..., x_{i-1})

The guide is the sampler q, whose gradient is the score function's; the energy climbs the data's term and descends the bound on log Z, by
a sign that is turned in its gradient. Under `IWAE()` the negative phase is weighted by p / q. The data's term is a mean, and has the
value zero: the ELBO is the bound on log Z for the energy as it is, whatever the number of data. At 4 x 4 pixels Z is a sum of 65,536
terms. Energies: a lattice (fields, and couplings of neighbours), or a restricted machine (hidden units, summed out).
"""

import numpy as np

OPTIONS = {
    "side": 4,  # pixels of a side: 4 or 2
    "energy": "restricted",  # or "lattice"
    "hidden": 16,  # units of the restricted machine
    "pace": 0.2,  # of the energy's learning, beside the sampler's
}
DISCRETE = ("x*",)
WHOLE_DATA = True


def load(options, seed):
    """Return the binary pixels of the train and the test digits, made small by means of blocks."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if options["side"] not in (2, 4):
        raise ValueError(f"side is 2 or 4; got {options['side']}.")
    if options["energy"] not in ("restricted", "lattice"):
        raise ValueError(f"energy is 'restricted' or 'lattice'; got '{options['energy']}'.")
    side, images = options["side"], load_digits().images
    blocks = images.reshape(-1, side, 8 // side, side, 8 // side).mean((2, 4)).reshape(len(images), -1)
    train, test = train_test_split((blocks >= 6).astype(float), test_size=297, random_state=seed)
    return train, test


def neighbours(side):
    """Return which pairs of pixels are coupled, each once."""
    row, column = np.divmod(np.arange(side**2), side)
    distance = np.abs(row[:, None] - row) + np.abs(column[:, None] - column)
    return np.triu(distance == 1).astype(float)


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries."""
    rng = np.random.default_rng(seed)
    n, hidden, mean = train.shape[1], int(options["hidden"]), np.clip(train.mean(0), 0.01, 0.99)
    log_odds = np.log(mean / (1 - mean))
    energy = {"fields": log_odds}
    if options["energy"] == "lattice":
        energy["couplings"] = np.zeros((n, n))
    else:
        energy |= {"weights": 0.1 * rng.normal(size=(n, hidden)), "offsets": np.zeros(hidden)}
    return energy, {"sampler": np.zeros((n, n)), "sampler_bias": log_odds}


def negative_energy(params, xp, x, mask):
    """Return -E(x), for pixels in the last dimension."""
    if mask is not None:
        signs = 2.0 * x - 1.0
        return x @ params["fields"] + (signs * (signs @ (params["couplings"] * mask))).sum(-1)
    zero = xp.zeros_like(x[..., :1])
    return x @ params["fields"] + xp.logaddexp(x @ params["weights"] + params["offsets"], zero).sum(-1)


def program(ppl, dist, xp, array, constant, options, train, seed):
    """Return model and guide, written once for both libraries."""
    energy, sampler = ({name: array(a) for name, a in start.items()} for start in initial(options, train, seed))
    mask = array(neighbours(options["side"])) if options["energy"] == "lattice" else None
    n, fair, pace = train.shape[1], array(0.0), options["pace"]

    def model(data):
        params = {name: pace * ppl.param(name, value / pace) for name, value in energy.items()}
        turned = {name: 2 * constant(value) - value for name, value in params.items()}
        positive = negative_energy(params, xp, data, mask).mean()
        ppl.factor("data", positive - constant(positive))
        x = xp.stack([ppl.sample(f"x{i}", dist.Bernoulli(logits=fair)) for i in range(n)], -1)
        # The model's pixels are fair coins, whose density is taken out again.
        ppl.factor("negative", negative_energy(turned, xp, x, mask) + n * np.log(2))

    def guide(data):
        params = {name: ppl.param(name, value) for name, value in sampler.items()}
        drawn = []
        for i in range(n):
            logits = params["sampler_bias"][i]
            if drawn:
                logits = logits + (2.0 * xp.stack(drawn, -1) - 1.0) @ params["sampler"][i, :i]
            drawn.append(ppl.sample(f"x{i}", dist.Bernoulli(logits=logits)))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    def array(a):
        return torch.tensor(a, dtype=torch.float32)

    return program(pyro, dist, torch, array, torch.Tensor.detach, options, train, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def array(a):
        return jnp.asarray(a, jnp.float32)

    return program(numpyro, dist, jnp, array, jax.lax.stop_gradient, options, train, seed)
