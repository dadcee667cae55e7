"""Several processes of `torch.distributed` that each hold a part of the data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
import torch.distributed as distributed
from pyro.infer.elbo import ELBOModule

from pplgrad.core.off_policy import OffPolicy
from pplgrad.errors import ConfigurationError
from pplgrad.pyro._baselines import PREFIX, store_arrays, stored_arrays


@dataclass(frozen=True)
class TorchDataParallel:
    """`pplgrad.core.data_parallel.DataParallel` for a process group; without `exchanging` the others are taken to have what this one has."""

    group: Any
    count: int
    exchanging: bool = True

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes."""
        if not self.exchanging:
            return self.count * x
        total = x.detach().clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=self.group)
        return total


def data_parallel_of(process_group: Any) -> TorchDataParallel | None:
    """Return the processes of a group (True: all), or None if there is one alone."""
    if process_group is False:
        return None
    if not (distributed.is_available() and distributed.is_initialized()) or process_group is None:
        raise ConfigurationError(
            "TraceGrad_ELBO(process_group=...) needs a process group that is there already; call "
            "torch.distributed.init_process_group(...) before, and pass True for all of its processes."
        )
    group = distributed.group.WORLD if process_group is True else process_group
    count = distributed.get_world_size(group)
    return TorchDataParallel(group, count) if count > 1 else None


def refuse_own_gradients(peers: TorchDataParallel | None) -> None:
    """Refuse a step that would follow this process's gradient alone."""
    if peers is not None:
        raise ConfigurationError(
            "loss_and_grads (and so SVI.step) leaves this process's gradient alone, and the processes of "
            "process_group=... would drift apart; train DistributedDataParallel(elbo(model, guide).initialize(*args)) instead."
        )


class TraceGradModule(ELBOModule):
    """An `ELBOModule` that also holds the parameters of baselines and estimators, once `initialize` or the loss has been called.

    Running averages of baselines are in its `state_dict` too. Call `initialize` before `load_state_dict`, so that all that is learned is
    there to be loaded. The gradient of its output is the estimate. `torch.nn.parallel.DistributedDataParallel` takes the parameters when it is made. Call
    `initialize` before that, and give `TraceGrad_ELBO` the `process_group`.

    Raises:
        PplgradError: whatever `TraceGrad_ELBO` raises.

    Example:
        >>> import pyro.distributions as dist
        >>> from pplgrad import NeuralBaseline, ScoreFunction
        >>> from pplgrad.pyro import TraceGrad_ELBO
        >>> pyro.clear_param_store()
        >>> program = lambda: pyro.sample("z", dist.Bernoulli(0.5))
        >>> module = TraceGrad_ELBO(estimators={"z": ScoreFunction(NeuralBaseline())})(program, program)
        >>> len(list(module.parameters())), len(list(module.initialize().parameters()))
        (0, 1)

    References:
        The interface is that of Pyro's `ELBOModule`.
    """

    def initialize(self, *args: Any, **kwargs: Any) -> TraceGradModule:
        """Make all that is learned, from one run of the program that changes nothing else, and return the module."""
        with torch.random.fork_rng():
            self.elbo.diagnose(self.model, self.guide, *args, **kwargs)
        self._adopt()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss in nats, whose gradient is the estimate."""
        with self._followed():
            loss = super().forward(*args, **kwargs)
            self._adopt()
        return loss

    def get_extra_state(self) -> dict[str, Any]:
        """Return what `state_dict` holds beside parameters: running averages, the step of a `Watch`, and how far the program was known."""
        elbo = self.elbo
        sites = {key[0] for key in elbo._resolved}
        return {
            "averages": {
                name: x
                for name, x in stored_arrays().items()
                if any(name.startswith(f"{PREFIX}{site}.") for site in sites)
            },
            "watched_steps": None if elbo._watcher is None else elbo._watcher.steps,
            **elbo._known_so_far(self.model, self.guide),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put running averages and the rest where training goes on from them; `load_state_dict` calls this."""
        store_arrays(state["averages"])
        if self.elbo._watcher is not None and state["watched_steps"] is not None:
            self.elbo._watcher.steps = state["watched_steps"]
        self.elbo._resume(self.model, self.guide, state)

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Let the param store hold this module's own parameters: `fully_shard` puts others in their place while the loss is computed.

        Afterwards their memory is freed, and nobody may read them.
        """
        store, before = pyro.get_param_store(), {}
        own = {
            f"{PREFIX}{site}.{key}$$${name}": parameter
            for (site, key), network in self.elbo._networks.modules.items()
            for name, parameter in network.named_parameters()
        }
        own |= {full: self._parameters[name] for full, name in self._learned.items() if name in self._parameters}
        for full, parameter in own.items():
            if full in store and parameter is not (held := store[full].unconstrained()):  # type: ignore[attr-defined]
                before[full] = held
                store[full] = parameter
        try:
            yield
        finally:
            for full, held in before.items():
                store[full] = held

    @property
    def _learned(self) -> dict[str, str]:
        """The numbers that estimators learn: their names in the param store, and in this module."""
        return {
            f"{PREFIX}{site}.{name}": f"learned_{site}_{name}".replace(".", "_")
            for (site, *_), resolved in self.elbo._resolved.items()
            for name in resolved.estimator.learned(1, 2)
        }

    def _adopt(self) -> None:
        """Register networks of baselines, and numbers that estimators learn."""
        for (site, key), network in self.elbo._networks.modules.items():
            self.add_module(f"baseline_{site}_{key}".replace(".", "_"), network)
        store = pyro.get_param_store()
        objective = self.elbo.objective
        learned = objective.parameter if isinstance(objective, OffPolicy) else None
        if learned is not None and learned in store:
            number = store[learned].unconstrained()  # type: ignore[attr-defined]
            if isinstance(number, torch.nn.Parameter):  # Else the guide has made it, and its optimizer knows it.
                self.register_parameter(learned.replace(".", "_"), number)
        for full, name in self._learned.items():
            if full in store:
                self.register_parameter(name, store[full].unconstrained())  # type: ignore[attr-defined]
