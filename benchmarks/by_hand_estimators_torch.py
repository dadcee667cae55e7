"""Six estimators of the belief network's one layer in plain PyTorch, as one who needs no library would write them.

The gradient estimate of each has the law of `TraceGrad_ELBO`'s with the estimator of that name. As in by_hand_torch.py a function returns
(loss, surrogate), particles are the first dimension, and the gradient of -log q itself, which has mean zero, is left out of estimates
that are unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.by_hand_torch import Drawn, Tensors, _log_bernoulli
from benchmarks.works import Work

TEMPERATURE = 0.5


class Network:
    """The network at some parameters and images: log q's logits, and the cost of values."""

    def __init__(self, work: Work, params: Tensors, data: Tensors) -> None:
        self.params, self.data = params, data
        self.logits = data["centred"] @ params["encode1_w0"] + params["encode1_b0"]
        self.fixed = self.logits.detach()
        self.shape = (work.particles, *self.logits.shape)

    def log_joint(self, z: torch.Tensor, params: Tensors) -> torch.Tensor:
        """Return log p(x, z), linear in z's own density between 0 and 1."""
        pixels = (2.0 * z - 1.0) @ params["decode0_w0"] + params["decode0_b0"]
        return _log_bernoulli(pixels, self.data["x"]).sum(-1) + _log_bernoulli(params["prior"], z).sum(-1)

    def cost(self, z: torch.Tensor) -> torch.Tensor:
        """Return log p(x, z) - log q(z), with gradient to the model's parameters and to z."""
        return self.log_joint(z, self.params) - _log_bernoulli(self.fixed, z).sum(-1)

    def fixed_cost(self, z: torch.Tensor) -> torch.Tensor:
        """Return the same with gradient to z alone."""
        constants = {name: x.detach() for name, x in self.params.items()}
        return self.log_joint(z, constants) - _log_bernoulli(self.fixed, z).sum(-1)

    def uniform(self) -> torch.Tensor:
        """Return noise for each particle and latent, off zero and one."""
        tiny = torch.finfo(self.fixed.dtype).tiny
        return torch.rand(self.shape, dtype=self.fixed.dtype).clamp_(tiny, 1 - torch.finfo(self.fixed.dtype).eps)

    def draw(self) -> torch.Tensor:
        """Return draws of the latents."""
        return torch.bernoulli(torch.sigmoid(self.fixed).expand(self.shape))


def _summed(cost: torch.Tensor, estimate: torch.Tensor) -> Drawn:
    """Return loss and surrogate of costs, and of the terms of the estimator, (particles, images)."""
    return -cost.detach().mean(0).sum(), -(cost + estimate).mean(0).sum()


def score(net: Network) -> Drawn:
    """The score function."""
    z = net.draw()
    cost = net.cost(z)
    return _summed(cost, _log_bernoulli(net.logits, z).sum(-1) * cost.detach())


def leave_one_out(net: Network) -> Drawn:
    """The score function with the mean cost of the other particles as the baseline."""
    z = net.draw()
    cost = net.cost(z)
    fixed, others = cost.detach(), net.shape[0] - 1
    left = fixed - (fixed.sum(0) - fixed) / others
    return _summed(cost, _log_bernoulli(net.logits, z).sum(-1) * left)


def disarm(net: Network) -> Drawn:
    """DisARM (Dong, Mnih and Tucker 2020, equation 4)."""
    probs, u = torch.sigmoid(net.fixed), net.uniform()
    z, partner = (u < probs).to(u.dtype), (1 - u < probs).to(u.dtype)
    cost = net.cost(z)
    with torch.no_grad():
        apart = 0.5 * (cost - net.cost(partner))[..., None] * (z - partner) * torch.sigmoid(net.fixed.abs())
    return _summed(cost, (net.logits * apart).sum(-1))


def gumbel_softmax(net: Network) -> Drawn:
    """The relaxation (Jang et al. 2017), whose objective is differentiated in all that it depends on."""
    z = torch.sigmoid((net.logits + torch.logit(net.uniform())) / TEMPERATURE)
    cost = net.log_joint(z, net.params) - _log_bernoulli(net.logits, z).sum(-1)
    return _summed(cost, torch.zeros_like(cost))


def rebar(net: Network) -> Drawn:
    """REBAR (Tucker et al. 2017, equation 9) at a fixed temperature and a scale of 1, with common random numbers (section 3.2)."""
    probs, u = torch.sigmoid(net.logits), net.uniform()
    tiny, eps = torch.finfo(u.dtype).tiny, torch.finfo(u.dtype).eps
    perturbed = net.logits + torch.logit(u)
    z = (perturbed > 0).to(u.dtype).detach()
    up = torch.sigmoid(-net.fixed)  # Above it u gives 1.
    v = torch.where(z > 0, (u - up) / (1 - up), u / up).clamp(tiny, 1 - eps)
    given = net.logits + torch.logit(torch.where(z > 0, 1 - probs + v * probs, v * (1 - probs)).clamp(tiny, 1 - eps))
    cost, soft_at = net.cost(z), torch.sigmoid(perturbed.detach() / TEMPERATURE).requires_grad_()
    soft = net.fixed_cost(soft_at)
    (slope,) = torch.autograd.grad(soft.sum(), soft_at)
    moved = torch.sigmoid(perturbed / TEMPERATURE) - torch.sigmoid(given / TEMPERATURE)
    left = (cost - soft).detach()
    return _summed(cost, _log_bernoulli(net.logits, z).sum(-1) * left + (slope * moved).sum(-1))


def local_expectation(net: Network) -> Drawn:
    """Every latent summed out by itself: the program at each flip."""
    z = net.draw()
    cost = net.cost(z)
    with torch.no_grad():
        n = z.shape[-1]
        flips = torch.eye(n, dtype=torch.bool)[:, None, None, :]
        flipped = net.cost(torch.where(flips, 1 - z, z))
        up = torch.movedim(flipped - cost, 0, -1) * (1 - 2 * z)
    return _summed(cost, (torch.sigmoid(net.logits) * up).sum(-1))


BY_HAND: dict[str, Callable[[Network], Drawn]] = {
    "ScoreFunction()": score,
    "ScoreFunction(baseline=LeaveOneOut())": leave_one_out,
    "DisARM()": disarm,
    "GumbelSoftmax()": gumbel_softmax,
    "REBAR(learn=False)": rebar,
    "LocalExpectation()": local_expectation,
}
"""The hand-written versions, by the estimator in pplgrad's words."""


def eager_step(text: str, work: Work, params: Tensors, data: Tensors) -> Callable[[], float]:
    """Return one step of Adam."""
    return partial(
        _step, BY_HAND[text], work, params, data, torch.optim.Adam(list(params.values()), lr=1e-6, fused=True)
    )


def _step(
    estimate: Callable[[Network], Drawn], work: Work, params: Tensors, data: Tensors, optimizer: torch.optim.Optimizer
) -> float:
    optimizer.zero_grad()
    loss, surrogate = estimate(Network(work, params, data))
    surrogate.backward()
    optimizer.step()
    return loss.item()
