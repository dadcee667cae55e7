"""What one evaluation of the objective yields, and the checks of it that read its numbers: all in one go, at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pplgrad.core.sites import Run
from pplgrad.engine.checks import impossible_branch, impossible_cost
from pplgrad.engine.surrogate import Estimate
from pplgrad.pyro._array_ops import OPS
from pplgrad.pyro._baselines import PyroBaselines
from pplgrad.pyro._tracing.particle_trace import Traces


@dataclass
class Evaluation:
    """An estimate, the runs that it was made from, and the host of its baselines."""

    result: Estimate
    traced: list[Traces]
    runs: list[Run]
    host: PyroBaselines | None

    @property
    def loss(self) -> torch.Tensor:
        """The scalar whose gradient is added to the parameters'."""
        return self._with_baselines(-self.result.surrogate)

    @property
    def guarded_loss(self) -> torch.Tensor:
        """The same for whoever may differentiate it twice, which it refuses where that would be wrong."""
        return self._with_baselines(-self.result.guarded_surrogate(OPS))

    def _with_baselines(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.result.baseline_loss is None else loss + self.result.baseline_loss

    def numbers(self) -> torch.Tensor:
        """Return the objective, and for each output of a learned baseline whether it is finite, in one vector."""
        value = self.result.value
        fine = list(self.result.finite.values())
        if fine:
            value = torch.where(torch.stack(fine).all(), value, torch.nan)
        flags = [] if self.host is None else [flag for *_, flag in self.host.outputs]
        return torch.stack([value, *(flag.to(value.dtype) for flag in flags)])

    def checked(self, numbers: Sequence[float]) -> float:
        """Return the objective, given the numbers; raise the error that names the site if something is not finite."""
        value, *flags = numbers
        if self.host is not None:
            self.host.refuse_infinite(flags)
        if not math.isfinite(value):
            for traces, run in zip(self.traced, self.runs, strict=True):
                check_costs(math.nan, traces, run)
            for name, fine in self.result.finite.items():
                if not fine:
                    raise impossible_branch(name)
        return value


def objective_of(traces: Traces, run: Run) -> float:
    """Return a run's value of an objective that is a sum of costs."""
    models = len(traces.model_sites)
    return float(sum(cost.sum() for cost in run.costs[:models]) - sum(cost.sum() for cost in run.costs[models:]))


def check_costs(total: float, traces: Traces, run: Run) -> None:
    """Raise an error that names the first site whose cost is NaN or infinite."""
    if math.isfinite(total):
        return
    names = [(name, "model") for name, _ in traces.model_sites] + [(name, "guide") for name, _ in traces.guide_sites]
    for (name, side), cost in zip(names, run.costs, strict=True):
        if not torch.isfinite(cost).all():
            raise impossible_cost(name, side, bool(torch.isnan(cost).any()), traces.estimators.get(name))
