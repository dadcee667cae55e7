"""A Pyro program as an assessment asks for it: draws with their densities, replicated data and simulations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.poutine.util import prune_subsample_sites

from pplgrad.assessment.assessing import Plan
from pplgrad.assessment.calibration import Simulation
from pplgrad.assessment.draws import Draws, Values
from pplgrad.assessment.simulating import places, refuse_factors, refuse_not_simulated, refuse_unread, renewed
from pplgrad.core.program import Program
from pplgrad.engine.layout import Layout
from pplgrad.errors import ProgramError
from pplgrad.pyro._compat import unconstrained
from pplgrad.pyro._diagnostics.weighted_draws import element_density, log_joint, log_weights, weighted_draws
from pplgrad.pyro._distributions import innermost, unmasked
from pplgrad.pyro._posterior import summed_posterior
from pplgrad.pyro._rerun.enumeration import Fixed
from pplgrad.pyro._tracing.particle_trace import samples_of

_LOOKS = 3
"""Simulations of which it is seen whether they are the model's, and whether the guide reads them."""


class AssessedProgram:
    """A program at the parameters in the param store; a context that leaves everything as it was."""

    def __init__(self, program: Program, plates: tuple[str, ...] | None, seed: int) -> None:
        self.program, self._plates, self._seed = program, plates, seed
        self._layout: Layout | None = None
        self._draws: Draws | None = None

    def __enter__(self) -> AssessedProgram:
        self._kept = _kept()
        self._kept.__enter__()
        torch.manual_seed(self._seed)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._kept.__exit__(kind, error, where)

    @torch.no_grad()
    def draws(self, count: int) -> Draws:
        """Return draws of the guide: a weight for each element of the plates, or one where a latent is shared by them."""
        for plates in (self._plates, ()):
            try:
                self._draws, self._layout, self._devices = weighted_draws(self.program, plates, count)
                return self._draws
            except ProgramError:
                if self._plates is not None or plates == ():
                    raise
        raise AssertionError

    @torch.no_grad()
    def log_joint(self, values: Values) -> np.ndarray:
        """Return log p of each element of the plates at given values of all latents."""
        assert self._layout is not None and self._draws is not None
        return log_joint(self.program, self._layout, self._draws, self._tensors(values))

    @torch.no_grad()
    def replicates(self, draws: Draws, count: int) -> dict[str, np.ndarray]:
        """Return data that the model draws with the guide's latents, and with summed sites from their posterior given these."""
        model, guide, args, kwargs = self.program
        rows: dict[str, list[np.ndarray]] = {name: [] for name in draws.observed}
        for i in range(count):
            values = self._tensors({name: latent.values[i] for name, latent in draws.latents.items()})
            if draws.summed:
                found = summed_posterior(model, guide, *args, draws=True, **kwargs)
                values = {name: x[0, 0] for name, x in found.items()}
            with Fixed(values):
                trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
            for name in rows:
                rows[name].append(trace.nodes[name]["value"].detach().cpu().numpy())
        return {
            name: np.stack(x) for name, x in rows.items() if all(y.shape == draws.observed[name].value.shape for y in x)
        }

    def _tensors(self, values: Values) -> dict[str, torch.Tensor]:
        return {name: torch.as_tensor(np.asarray(x), device=self._devices[name]) for name, x in values.items()}

    @torch.no_grad()
    def simulations(self, draws: Draws, plan: Plan) -> Iterator[Simulation]:
        """Yield latents of the model, and draws of the guide for the data that the model drew with them."""
        model, guide, args, kwargs = self.program
        names = [name for name, latent in draws.latents.items() if not latent.auxiliary]
        real = {name: site.value for name, site in draws.observed.items()}
        where = places(args, kwargs, real) if plan.dream is None else None
        changes: list[bool] = []
        for number in range(plan.simulations):
            drawn = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
            refuse_factors([n for n, site in _observed(drawn) if isinstance(innermost(unmasked(site["fn"])), Unit)])
            data = {name: drawn.nodes[name]["value"] for name in real}
            new_args, new_kwargs = renewed(args, kwargs, data, where, plan.dream, _cast)
            truth = {name: drawn.nodes[name]["value"] for name in names}
            if number < _LOOKS:
                _refuse_not_simulated(model, drawn, new_args, new_kwargs, list(real))
            with _kept(fork=False):
                fitted = guide
                if plan.refit is not None:
                    with torch.enable_grad():
                        fitted = plan.refit(*new_args, **new_kwargs) or guide
                elif number < _LOOKS:
                    changes.append(_reads_its_data(guide, args, kwargs, new_args, new_kwargs))
                    if number == _LOOKS - 1:
                        refuse_unread(changes)
                traces = [poutine.trace(fitted).get_trace(*new_args, **new_kwargs) for _ in range(plan.rank_draws)]
                with Fixed(truth):
                    at_truth = poutine.trace(fitted).get_trace(*new_args, **new_kwargs)
                weights = self._weights(Program(model, fitted, new_args, new_kwargs), draws, [at_truth, *traces])
            with_density = [name for name in names if not draws.latents[name].point]
            yield Simulation(
                {name: x.detach().cpu().numpy() for name, x in truth.items()},
                {name: np.stack([trace.nodes[name]["value"].cpu().numpy() for trace in traces]) for name in names},
                {name: _log_q(at_truth, name) for name in with_density},
                {name: np.stack([_log_q(trace, name) for trace in traces]) for name in with_density},
                None if weights is None else weights[0],
                None if weights is None else weights[1:],
            )

    def _weights(self, program: Program, draws: Draws, traces: list[Any]) -> np.ndarray | None:
        """Return the log weights of traces of the guide, a row each; None where the model does not draw all of its latents."""
        if not draws.made_by_model:
            return None
        assert self._layout is not None
        return np.stack([log_weights(program, self._layout, trace) for trace in traces])


def _log_q(trace: Any, name: str) -> np.ndarray:
    site = trace.nodes[name]
    return element_density(site["fn"], site["value"])


@contextmanager
def _kept(fork: bool = True) -> Iterator[None]:
    """Put the param store back afterwards, and the random generator too if `fork`."""
    store = pyro.get_param_store()
    before = {name: (leaf, leaf.detach().clone(), leaf.grad) for name, leaf in unconstrained().items()}
    generator = torch.random.fork_rng(enabled=fork)
    generator.__enter__()
    try:
        yield
    finally:
        generator.__exit__(None, None, None)
        for name in [name for name in unconstrained() if name not in before]:
            del store[name]
        for leaf, value, gradient in before.values():
            with torch.no_grad():
                if not torch.equal(leaf, value):
                    leaf.copy_(value)
            leaf.grad = gradient


def _observed(trace: Any) -> list[tuple[str, Any]]:
    return [(n, s) for n, s in samples_of(trace) if s["infer"].get("was_observed") or s["is_observed"]]


def _cast(drawn: torch.Tensor, like: Any) -> Any:
    return drawn.to(like.dtype) if isinstance(like, torch.Tensor) else drawn.detach().cpu().numpy()


def _refuse_not_simulated(model: Callable, drawn: Any, args: tuple, kwargs: dict, names: list[str]) -> None:
    observed = {n for n, _ in _observed(drawn)}
    values = {
        n: s["value"]
        for n, s in samples_of(drawn)
        if n not in observed and not isinstance(innermost(unmasked(s["fn"])), Delta)
    }
    with Fixed(values):
        again = poutine.trace(model).get_trace(*args, **kwargs)
    same = all(torch.equal(torch.as_tensor(again.nodes[n]["value"]), drawn.nodes[n]["value"]) for n in names)
    refuse_not_simulated(_log_density(drawn), _log_density(again) if same else float("nan"), names)


def _reads_its_data(guide: Callable, args: tuple, kwargs: Mapping, new_args: tuple, new_kwargs: Mapping) -> bool:
    """Return whether the guide's density at a draw differs between two data sets."""
    drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    with Fixed({name: site["value"] for name, site in samples_of(drawn) if not site["is_observed"]}):
        again = poutine.trace(guide).get_trace(*new_args, **new_kwargs)
    return _log_density(drawn) != _log_density(again)


def _log_density(trace: Any) -> float:
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    return sum(float(site["log_prob_sum"]) for _, site in samples_of(trace))
