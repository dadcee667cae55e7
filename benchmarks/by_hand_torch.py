"""The works in plain PyTorch, as one who needs no library would write them: same draws, same gradient as `TraceGrad_ELBO`.

Each function returns (loss, surrogate): the negative bound, and a scalar whose gradient is the score function's estimate of the
bound's: every cost is charged to the draws before it and to no other, and the gradient of -log q itself, which has mean zero, is left
out. Particles are the first dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import softplus

from benchmarks.works import Work

Tensors = dict[str, torch.Tensor]
Drawn = tuple[torch.Tensor, torch.Tensor]


def estimate(work: Work, params: Tensors, data: Tensors, draws: Tensors | None = None) -> Drawn:
    """Return the loss and the surrogate of a work, on given draws by site or on fresh ones."""
    return {"sbn": _sbn, "plate": _plate}.get(work.kind, _chain)(work, params, data, draws)


def tensors(data: dict, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return arrays as tensors, with what the hand-written versions compute of them once."""
    found = {name: torch.tensor(value, dtype=dtype) for name, value in data.items()}
    if "train" in found:
        found["centred"] = 2.0 * (found["x"] - found.pop("train").mean(0))
    return found


def eager_step(work: Work, params: Tensors, data: Tensors) -> Callable[[], float]:
    """Return one step of Adam."""
    optimizer = torch.optim.Adam(list(params.values()), lr=1e-6, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss, surrogate = estimate(work, params, data)
        surrogate.backward()
        optimizer.step()
        return loss.item()

    return step


def compiled_step(work: Work, params: Tensors, data: Tensors) -> Callable[[], float]:
    """Return one step of Adam, its loss and its gradient compiled."""
    optimizer = torch.optim.Adam(list(params.values()), lr=1e-6, fused=True)
    # On a CPU inductor's own random numbers are slower than torch's; on a GPU starting kernels one by one is slower than they are.
    on_gpu = next(iter(params.values())).is_cuda
    options = {"triton.cudagraphs": True} if on_gpu else {"fallback_random": True}
    for x in (*params.values(), *data.values()) if on_gpu else ():
        torch._dynamo.mark_static_address(x)  # Else all of them are copied at every step.
    compiled = torch.compile(lambda params, data: estimate(work, params, data), fullgraph=True, options=options)

    def step() -> float:
        optimizer.zero_grad()
        loss, surrogate = compiled(params, data)
        surrogate.backward()
        optimizer.step()
        return loss.item()

    return step


def _log_bernoulli(logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return value * logits - softplus(logits)


def _sbn(work: Work, p: Tensors, data: Tensors, draws: Tensors | None) -> Drawn:
    def layer(name: str, h: torch.Tensor) -> torch.Tensor:
        return h @ p[f"{name}_w0"] + p[f"{name}_b0"]

    h, signs, log_q = data["centred"], [], []
    for i in range(1, work.layers + 1):
        logits = layer(f"encode{i}", h)
        if draws is None:
            probabilities = torch.sigmoid(logits.detach())
            z = torch.bernoulli(probabilities.expand(work.particles, *probabilities.shape[-2:]))
        else:
            z = draws[f"z{i}"]
        log_q.append(_log_bernoulli(logits, z).sum(-1))
        h = 2.0 * z - 1.0
        signs.append((z, h))
    # Costs in the order of the guide's draws: cost i depends on draws 0 to i, and on no later one.
    costs = [_log_bernoulli(layer("decode0", signs[0][1]), data["x"]).sum(-1) - log_q[0].detach()]
    for i in range(1, work.layers):
        costs.append(_log_bernoulli(layer(f"decode{i}", signs[i][1]), signs[i - 1][0]).sum(-1) - log_q[i].detach())
    costs[-1] = costs[-1] + _log_bernoulli(p["prior"], signs[-1][0]).sum(-1)
    total = torch.stack(costs).sum(0)
    surrogate, downstream = total, total.detach()
    for cost, score in zip(costs, log_q, strict=True):
        surrogate = surrogate + score * downstream
        downstream = downstream - cost.detach()
    return -total.detach().mean(0).sum(), -surrogate.mean(0).sum()


def _chain(work: Work, params: Tensors, data: Tensors, draws: Tensors | None) -> Drawn:
    p, q = params["p"], params["q"]
    z = _sampled(work, q.detach()) if draws is None else torch.stack([draws[f"z{t}"] for t in range(work.size)], -1)
    before = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], -1)
    log_q = _log_bernoulli(q[0] + q[1] * before, z)
    log_x = -0.5 * (data["x"] - p[2] * z) ** 2 - 0.5 * math.log(2.0 * math.pi)
    costs = _log_bernoulli(p[0] + p[1] * before, z) + log_x - log_q.detach()
    downstream = costs.detach().flip(-1).cumsum(-1).flip(-1)
    return -downstream[:, 0].mean(), -(costs + log_q * downstream).sum(-1).mean()


def _sampled(work: Work, q: torch.Tensor) -> torch.Tensor:
    """Return a chain, drawn one site after the other from numbers that are drawn at once."""
    uniform = torch.rand(work.size, work.particles, dtype=q.dtype)
    after_zero, after_one = uniform < torch.sigmoid(q[0]), uniform < torch.sigmoid(q[0] + q[1])
    z, found = after_zero[0], []
    found.append(z)
    for zero, one in zip(after_zero[1:].unbind(), after_one[1:].unbind(), strict=True):
        z = torch.where(z, one, zero)
        found.append(z)
    return torch.stack(found, -1).to(q.dtype)


def _plate(work: Work, p: Tensors, data: Tensors, draws: Tensors | None) -> Drawn:
    x = data["x"]
    logits = p["intercept"] + p["slope"] * x
    if draws is None:
        z = torch.bernoulli(torch.sigmoid(logits.detach()).expand(work.particles, *x.shape))
    else:
        z = draws["z"]
    log_q = _log_bernoulli(logits, z)
    log_x = -0.5 * (x - p["mean"] * z) ** 2 - 0.5 * math.log(2.0 * math.pi)
    costs = _log_bernoulli(p["prior"], z) + log_x - log_q.detach()
    signal = costs.detach()
    return -signal.mean(0).sum(), -(costs + log_q * signal).mean(0).sum()
