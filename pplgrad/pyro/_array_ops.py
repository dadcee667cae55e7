"""The engine's array operations on torch tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from pplgrad.core.noise import Noise
from pplgrad.errors import EstimatorError
from pplgrad.pyro._compat import nothing_looks_on
from pplgrad.pyro._recording import is_recording


def placed(values: Any, dtype: torch.dtype | None, device: torch.device) -> torch.Tensor:
    """Return numbers as a tensor on a device, without waiting for what the device has still to do."""
    x = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type != "cuda" or is_recording():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class TorchOps:
    """`pplgrad.core.array_ops.Ops` for torch."""

    xp: Any = xp

    def stop_gradient(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()

    def stack(self, arrays: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        return torch.stack(list(arrays), dim=axis)

    def contract(self, weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        flat = values.reshape(values.shape[0], -1)
        return torch.mm(weights, flat).reshape(weights.shape[0], *values.shape[1:])

    def constant(self, values: Any, like: torch.Tensor) -> torch.Tensor:
        return placed(values, like.dtype, like.device)

    def take(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x[index]

    def rows(self, x: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        return x[placed(index, None, x.device)]

    def index_add(self, x: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return x.index_add(0, index, values)

    def value_and_grad(self, function: Callable[[list], list], points: list) -> tuple[list, list]:
        goes_on = any(point.requires_grad for point in points)
        with torch.enable_grad():
            points = [point if point.requires_grad else point.detach().requires_grad_() for point in points]
            outputs = function(points)
            total = sum(x.sum() for x in outputs)
            if total.requires_grad:
                slopes = torch.autograd.grad(total, points, create_graph=goes_on, materialize_grads=True)
            else:  # No output depends on any point.
                slopes = [torch.zeros_like(point) for point in points]
        # The program's own parameters must get no gradient from here: what goes on is the slope along the points alone.
        return [x.detach() for x in outputs], list(slopes)

    def transposed(self, function: Callable[[list], list], inputs: list, outputs: list) -> list:
        with torch.enable_grad():
            points = [torch.zeros_like(x).requires_grad_() for x in inputs]
            values = function(points)
        return list(torch.autograd.grad(values, points, outputs, create_graph=True, materialize_grads=True))

    def first_order_only(self, x: torch.Tensor, message: str) -> torch.Tensor:
        return _FirstOrderOnly.apply(x, message)

    def with_slope(self, x: torch.Tensor, value: torch.Tensor, slope: Callable, kept: torch.Tensor) -> torch.Tensor:
        return _WithSlope.apply(x, value.detach(), slope, kept.detach())

    def only(self, loss: torch.Tensor, learned: list) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return loss
        slopes = torch.autograd.grad(loss, learned, retain_graph=True)
        moved = sum((slope * (x - x.detach())).sum() for slope, x in zip(slopes, learned, strict=True))
        return loss.detach() + moved

    def normal_cdf(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.erfc(-(0.5**0.5) * x)  # torch's own is 0 in the lower tail of float32.

    def arange(self, n: int, like: torch.Tensor) -> torch.Tensor:
        return torch.arange(n, device=like.device)

    def softplus(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(x, threshold=80.0)  # Above 20, torch's own limit, float64 is not exact.

    def sigmoid(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x)

    def bernoulli_log_prob(self, weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits, weights = torch.broadcast_tensors(logits, weights)
        if logits.dtype != weights.dtype:  # The result would have the weights' type.
            widest = torch.promote_types(logits.dtype, weights.dtype)
            logits, weights = logits.to(widest), weights.to(widest)
        return -torch.nn.functional.binary_cross_entropy_with_logits(logits, weights, reduction="none")

    def known_finite(self, x: torch.Tensor) -> bool:
        if x.device.type != "cpu" or is_recording() or not nothing_looks_on():
            return False
        return math.isfinite(x.detach().sum().item())  # That of finite numbers may overflow: it is not known then.


OPS = TorchOps()


class TorchNoise(Noise):
    """Noise from torch's global generator."""

    def __init__(self) -> None:
        super().__init__(OPS)

    def uniform(self, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        tiny = torch.finfo(like.dtype).tiny
        return torch.rand(shape, dtype=like.dtype, device=like.device).clamp_(min=tiny)


class _FirstOrderOnly(torch.autograd.Function):
    """Identity; what would differentiate its gradient runs the backward pass with gradients enabled."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, message: str) -> torch.Tensor:
        ctx.message = message
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        if torch.is_grad_enabled():
            raise EstimatorError(ctx.message)
        return gradients[0], None


class _WithSlope(torch.autograd.Function):
    """A value whose gradient goes on to another tensor by a rule of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor, slope: Callable, kept: torch.Tensor) -> torch.Tensor:
        ctx.slope = slope
        ctx.save_for_backward(value, kept)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        value, kept = ctx.saved_tensors
        return ctx.slope(gradients[0], kept, value), None, None, None


class _Attach(torch.autograd.Function):
    """The value of one scalar with the gradient of another; no infinity is ever subtracted from itself."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradients[0]


def attach(value: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
    """Return `value` with the gradient of `surrogate`."""
    return _Attach.apply(value.detach(), surrogate)
