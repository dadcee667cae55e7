"""Six estimators of the belief network's one layer in plain JAX, as one who needs no library would write them.

What by_hand_estimators_torch.py says holds here too. Particles are the first dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from benchmarks import by_hand_jax
from benchmarks.by_hand_jax import Arrays, Drawn, _log_bernoulli
from benchmarks.works import Work

TEMPERATURE = 0.5


class Network:
    """The network at some parameters and images: log q's logits, and the cost of values."""

    def __init__(self, work: Work, params: Arrays, data: Arrays) -> None:
        self.params, self.data = params, data
        self.logits = data["centred"] @ params["encode1_w0"] + params["encode1_b0"]
        self.fixed = stop_gradient(self.logits)
        self.shape = (work.particles, *self.logits.shape)

    def log_joint(self, z: jax.Array, params: Arrays) -> jax.Array:
        """Return log p(x, z), linear in z's own density between 0 and 1."""
        pixels = (2.0 * z - 1.0) @ params["decode0_w0"] + params["decode0_b0"]
        return _log_bernoulli(pixels, self.data["x"]).sum(-1) + _log_bernoulli(params["prior"], z).sum(-1)

    def cost(self, z: jax.Array) -> jax.Array:
        """Return log p(x, z) - log q(z), with gradient to the model's parameters and to z."""
        return self.log_joint(z, self.params) - _log_bernoulli(self.fixed, z).sum(-1)

    def fixed_cost(self, z: jax.Array) -> jax.Array:
        """Return the same with gradient to z alone."""
        return self.log_joint(z, stop_gradient(self.params)) - _log_bernoulli(self.fixed, z).sum(-1)

    def uniform(self, key: jax.Array) -> jax.Array:
        """Return noise for each particle and latent, off zero and one."""
        about = jnp.finfo(self.fixed.dtype)
        return jax.random.uniform(key, self.shape, self.fixed.dtype, minval=about.tiny)

    def draw(self, key: jax.Array) -> jax.Array:
        """Return draws of the latents."""
        return jax.random.bernoulli(key, jax.nn.sigmoid(self.fixed), self.shape).astype(self.fixed.dtype)


def _summed(cost: jax.Array, estimate: jax.Array | float) -> Drawn:
    """Return loss and surrogate of costs, and of the terms of the estimator, (particles, images)."""
    return -stop_gradient(cost).mean(0).sum(), -(cost + estimate).mean(0).sum()


def _logit(u: jax.Array) -> jax.Array:
    return jnp.log(u) - jnp.log1p(-u)


def score(net: Network, key: jax.Array) -> Drawn:
    """The score function."""
    z = net.draw(key)
    cost = net.cost(z)
    return _summed(cost, _log_bernoulli(net.logits, z).sum(-1) * stop_gradient(cost))


def leave_one_out(net: Network, key: jax.Array) -> Drawn:
    """The score function with the mean cost of the other particles as the baseline."""
    z = net.draw(key)
    cost = net.cost(z)
    fixed, others = stop_gradient(cost), net.shape[0] - 1
    left = fixed - (fixed.sum(0) - fixed) / others
    return _summed(cost, _log_bernoulli(net.logits, z).sum(-1) * left)


def disarm(net: Network, key: jax.Array) -> Drawn:
    """DisARM (Dong, Mnih and Tucker 2020, equation 4)."""
    probs, u = jax.nn.sigmoid(net.fixed), net.uniform(key)
    z, partner = (u < probs).astype(u.dtype), (1 - u < probs).astype(u.dtype)
    cost = net.cost(z)
    difference = stop_gradient(cost - net.cost(partner))[..., None]
    apart = 0.5 * difference * (z - partner) * jax.nn.sigmoid(jnp.abs(net.fixed))
    return _summed(cost, (net.logits * apart).sum(-1))


def gumbel_softmax(net: Network, key: jax.Array) -> Drawn:
    """The relaxation (Jang et al. 2017), whose objective is differentiated in all that it depends on."""
    z = jax.nn.sigmoid((net.logits + _logit(net.uniform(key))) / TEMPERATURE)
    return _summed(net.log_joint(z, net.params) - _log_bernoulli(net.logits, z).sum(-1), 0.0)


def rebar(net: Network, key: jax.Array) -> Drawn:
    """REBAR (Tucker et al. 2017, equation 9) at a fixed temperature and a scale of 1, with common random numbers (section 3.2)."""
    probs, u = jax.nn.sigmoid(net.logits), net.uniform(key)
    about = jnp.finfo(u.dtype)
    perturbed = net.logits + _logit(u)
    z = stop_gradient((perturbed > 0).astype(u.dtype))
    up = jax.nn.sigmoid(-net.fixed)  # Above it u gives 1.
    v = jnp.clip(jnp.where(z > 0, (u - up) / (1 - up), u / up), about.tiny, 1 - about.eps)
    within = jnp.clip(jnp.where(z > 0, 1 - probs + v * probs, v * (1 - probs)), about.tiny, 1 - about.eps)
    given = net.logits + _logit(within)
    soft_at = stop_gradient(jax.nn.sigmoid(perturbed / TEMPERATURE))
    soft, back = jax.vjp(net.fixed_cost, soft_at)
    slope = stop_gradient(back(jnp.ones_like(soft))[0])
    moved = jax.nn.sigmoid(perturbed / TEMPERATURE) - jax.nn.sigmoid(given / TEMPERATURE)
    cost = net.cost(z)
    left = stop_gradient(cost - soft)
    return _summed(cost, _log_bernoulli(net.logits, z).sum(-1) * left + (slope * moved).sum(-1))


def local_expectation(net: Network, key: jax.Array) -> Drawn:
    """Every latent summed out by itself: the program at each flip."""
    z = net.draw(key)
    cost = net.cost(z)
    flips = jnp.eye(z.shape[-1], dtype=bool)[:, None, None, :]
    flipped = stop_gradient(net.cost(jnp.where(flips, 1 - z, z)))
    up = jnp.moveaxis(flipped - stop_gradient(cost), 0, -1) * (1 - 2 * z)
    return _summed(cost, (jax.nn.sigmoid(net.logits) * up).sum(-1))


BY_HAND: dict[str, Callable[[Network, jax.Array], Drawn]] = {
    "ScoreFunction()": score,
    "ScoreFunction(baseline=LeaveOneOut())": leave_one_out,
    "DisARM()": disarm,
    "GumbelSoftmax()": gumbel_softmax,
    "REBAR(learn=False)": rebar,
    "LocalExpectation()": local_expectation,
}
"""The hand-written versions, by the estimator in pplgrad's words."""


def update(text: str, work: Work) -> tuple[Callable, Callable]:
    """Return `start(params, key)`, which gives a state, and `step(state, data)`, which gives the next one and the loss."""
    return by_hand_jax.update(work, lambda params, data, key: BY_HAND[text](Network(work, params, data), key))
