"""A mixture with as many components as the data ask for: a Dirichlet process, truncated, on the wines or the irises.

    v_k ~ Beta(1, α),  weight_k = v_k Π_{j<k} (1 − v_j),  means_k ~ N(0, 2² I),
    scales_k ~ LogNormal(log 1/2, 1/2),  k_i ~ Categorical(weight),  x_i | k_i ~ N(means[k_i], diag(scales[k_i]²))

Assignments are discrete; sticks, means and scales continuous. The guide assigns by a quadratic function of the measurements, which is what the
posterior given means and sticks is. All data share the latents, so that every step sees the whole train set.
"""

import numpy as np

OPTIONS = {
    "components": 8,  # the truncation: components that may be used
    "alpha": 1.0,  # concentration: small for few components
    "data": "wine",  # or "iris", standardised
    "dimensions": 2,  # principal components that are kept
}
DISCRETE = ("k",)
WHOLE_DATA = True


def load(options, seed):
    """Return the standardised measurements, split into train and test."""
    from sklearn.model_selection import train_test_split

    return train_test_split(measurements(options)[0], test_size=0.2, random_state=seed)


def measurements(options):
    """Return the principal components of all standardised measurements, and the kind of each (cultivar or species)."""
    from sklearn import datasets
    from sklearn.decomposition import PCA

    if options["data"] not in ("iris", "wine"):
        raise ValueError(f"data is 'iris' or 'wine'; got '{options['data']}'.")
    data, kinds = getattr(datasets, f"load_{options['data']}")(return_X_y=True)
    standard = (data - data.mean(0)) / data.std(0)
    return PCA(int(options["dimensions"])).fit_transform(standard), kinds


def initial(options, train, seed):
    """Return the initial parameters as NumPy arrays, the same for both libraries: wide components that share all data."""
    rng = np.random.default_rng(seed)
    n, d = int(options["components"]), train.shape[1]
    means = 0.5 * train[rng.choice(len(train), n, replace=False)]
    return {
        "means_loc": means,
        "means_log_scale": np.full((n, d), -2.0),
        "scales_loc": np.zeros((n, d)),
        "scales_log_scale": np.full((n, d), -2.0),
        # As many data for each stick as if all components had the same share.
        "stick_logs": np.log(np.stack([np.full(n - 1, 10.0), 10.0 * np.arange(n - 1, 0, -1)])),
        "assign": np.concatenate([0.5 * means.T, np.zeros((d + 1, n))]),
    }


def assignment_logits(xp, x, assign):
    """Return the guide's logits of the components: linear in the measurements and their squares."""
    d = x.shape[1]
    return x @ assign[:d] + x**2 @ assign[d : 2 * d] + assign[-1]


def program(ppl, dist, xp, array, options, train, seed):
    """Return model and guide, written once for both libraries."""
    start = {name: array(value) for name, value in initial(options, train, seed).items()}
    n, d = start["means_loc"].shape
    ones = array(np.ones(n - 1))

    def param(name):
        return ppl.param(name, start[name])

    def log_weights(v):
        """Return log v_k + Σ_{j<k} log(1 − v_j), where the last component takes what is left."""
        v = v.clip(1e-6, 1 - 1e-6)
        none = 0 * v[..., :1]
        return xp.concatenate([xp.log(v), none], -1) + xp.concatenate([none, xp.cumsum(xp.log1p(-v), -1)], -1)

    def model(x):
        v = ppl.sample("v", dist.Beta(ones, float(options["alpha"]) * ones).to_event(1))
        means = ppl.sample("means", dist.Normal(array(np.zeros((n, d))), 2.0).to_event(2))
        scales = ppl.sample("scales", dist.LogNormal(array(np.full((n, d), np.log(0.5))), 0.5).to_event(2))
        with ppl.plate("data", x.shape[0]):
            k = ppl.sample("k", dist.Categorical(logits=log_weights(v)))
            chosen = 1.0 * (k[..., None] == xp.arange(n))
            loc, scale = ((chosen[..., None, :] @ of)[..., 0, :] for of in (means, scales))
            ppl.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

    def guide(x):
        sticks = xp.exp(param("stick_logs"))
        ppl.sample("v", dist.Beta(sticks[0], sticks[1]).to_event(1))
        ppl.sample("means", dist.Normal(param("means_loc"), xp.exp(param("means_log_scale"))).to_event(2))
        ppl.sample("scales", dist.LogNormal(param("scales_loc"), xp.exp(param("scales_log_scale"))).to_event(2))
        with ppl.plate("data", x.shape[0]):
            ppl.sample("k", dist.Categorical(logits=assignment_logits(xp, x, param("assign"))))

    return model, guide


def pyro_program(options, train, seed):
    """Return model and guide for Pyro."""
    import pyro
    import pyro.distributions as dist
    import torch

    return program(pyro, dist, torch, lambda a: torch.tensor(a, dtype=torch.float32), options, train, seed)


def numpyro_program(options, train, seed):
    """Return model and guide for NumPyro."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    return program(numpyro, dist, jnp, lambda a: jnp.asarray(a, jnp.float32), options, train, seed)
