"""`TraceGrad_ELBO` for Pyro."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import Trace_ELBO

from pplgrad.configuration import (
    EstimatorMapping,
    Resolved,
)
from pplgrad.core.estimator import Estimator
from pplgrad.core.filtering import FIVO
from pplgrad.core.objectives import ELBO, MultiSample, Objective
from pplgrad.core.program import Program
from pplgrad.core.sites import Run
from pplgrad.engine.checks import checked_objective, checked_parallel
from pplgrad.engine.closed_forms import ClosedForms
from pplgrad.engine.description import Description, ShowsSettings, describe
from pplgrad.engine.layout import Layout
from pplgrad.engine.signals import Bounds
from pplgrad.engine.surrogate import averaged
from pplgrad.errors import ConfigurationError
from pplgrad.monitoring.watch import Watcher
from pplgrad.pyro._array_ops import OPS, attach
from pplgrad.pyro._baselines import Networks, store_states
from pplgrad.pyro._compat import settings
from pplgrad.pyro._diagnostics.measuring import measured
from pplgrad.pyro._distributed import TorchDataParallel, TraceGradModule, data_parallel_of, refuse_own_gradients
from pplgrad.pyro._distributions import family
from pplgrad.pyro._evaluation import Evaluation, check_costs, objective_of
from pplgrad.pyro._rerun.monitoring import monitor
from pplgrad.pyro._resuming import rehearse_if_resumed
from pplgrad.pyro._reuse.arguments import Identity
from pplgrad.pyro._reuse.dependency_structure import Structure, Structures
from pplgrad.pyro._running import Runner, vectorized_or_sequential
from pplgrad.pyro._tracing.marginal_sites import summed_sites
from pplgrad.pyro._tracing.particle_trace import Traces
from pplgrad.pyro._tracing.proposals import log_normalizer
from pplgrad.pyro._tracing.provenance import Provenance

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from pplgrad.diagnostics.choosing import Choice


class TraceGrad_ELBO(ShowsSettings, Runner, Trace_ELBO):
    r"""The evidence lower bound (ELBO), with a gradient estimator for each latent site of the guide.

    Estimates ∇ E_q[Σ log p − Σ log q], in nats. A cost is a log density, scaled and masked. Each cost is part of the downstream
    cost of the sites that it depends on, which provenance tracking finds. The score of a site is neither scaled nor masked. Costs are
    reduced to the site's plates.

    Provenance tracking also detects programs that mix particles under `vectorize_particles=True`. Their particles run one by one, with a
    warning. An estimator that runs the program again is refused if the program computes something else the second time.

    Args:
        estimators: mapping from site names and glob patterns to estimators. It overrides the guide's `infer` and wrappers.
        objective: the objective that is estimated in place of the ELBO, such as `IWAE()`. Default: `ELBO()`.
        higher_order: True makes derivatives of every order correct, for `ScoreFunction`, `LocalExpectation` and `Reparam` (Foerster et
            al., 2018). With False (the default), a second derivative that would be wrong raises.
        closed_form: mapping from site names and glob patterns to "kl" (the closed-form divergence of guide from model replaces the sampled
            densities) or "entropy" (the same for the guide's entropy). It overrides the site's `infer={"closed_form": ...}`.
        max_parallel: the maximal number of rows (particles × alternatives) that run at once under `vectorize_particles=True`, where
            estimators run the program at other values. It bounds memory. Draws that follow the site are made anew in each row, with and
            without a maximum. Relaxed branches run at once. Default: None, no maximum.
        process_group: a group of processes (True: all) that each draw their part of the subsampled plates, and whose gradients
            `DistributedDataParallel` averages around `elbo(model, guide)`. Baselines see the costs, and learn from the draws, of all
            processes. Default: False.
        compile: True compiles training steps (`SVI.step`, `loss_and_grads`). Two steps run eagerly. The third is recorded with its draws
            and compiled by torch's inductor. Later steps make new draws, repeatable after `pyro.set_rng_seed`. A step with other shapes,
            arguments or Python state is recorded again, up to `graphs` recordings; after that such steps run eagerly, with a warning. A
            program whose Python state cannot be compared also runs eagerly, with a warning. "fallback" runs what cannot be compiled
            eagerly, with a warning. A mapping sets `backend` (of `torch.compile`; "eager" runs the recorded operations), `fallback`,
            `graphs` (8) and `cuda_graph` (True). Values are validated in eager steps only. `loss` and `differentiable_loss` stay eager.
            Default: False.
        reuse_structure: True (the default) reuses the dependencies that a tracked step has found, and follows branches that change one element
            of a site from the draw instead of running them, while all Python state that the program reads is known to be unchanged. A program that reads what cannot be compared (a generator, a file, an extension's object) is
            tracked at every step. False tracks every step. A reused structure is checked at its 2nd, 4th, 8th, ... and then every 500th
            use. A difference raises; with "warn" it warns, and every later step is tracked.

        The other arguments are those of `pyro.infer.ELBO`.

    Shapes:
        Any plates. With `vectorize_particles=True` the particles run in a plate to the left of all others. The loss is in nats.

    Raises:
        ConfigurationError: a specification does not fit.
        EstimatorError: an estimator does not fit its site.
        BaselineError: a baseline does not fit its site.
        ProgramError: guide and model do not match, or a reused structure differs.
        CompileError: a step cannot be compiled.
        ImpossibleValueError: a cost is NaN or infinite.

        The message names the site. Neither the param store nor the optimizer has changed.

    Example:
        >>> from pplgrad import LeaveOneOut, ScoreFunction
        >>> elbo = TraceGrad_ELBO(num_particles=4, estimators={"z": ScoreFunction(LeaveOneOut())})
        >>> elbo.num_particles
        4

    References:
        Schulman, Heess, Weber and Abbeel (2015), theorem 1.
        Ranganath, Gerrish and Blei (2014).
        Foerster et al. (2018), for `higher_order`.
    """

    def __init__(
        self,
        num_particles: int = 1,
        max_plate_nesting: float = math.inf,
        max_iarange_nesting: int | None = None,
        vectorize_particles: bool = False,
        strict_enumeration_warning: bool = True,
        ignore_jit_warnings: bool = False,
        jit_options: dict[str, Any] | None = None,
        retain_graph: bool | None = None,
        tail_adaptive_beta: float = -1.0,
        *,
        estimators: Mapping[str, Estimator] | None = None,
        objective: Objective = ELBO(),  # noqa: B008
        higher_order: bool = False,
        closed_form: Mapping[str, str] | None = None,
        max_parallel: int | None = None,
        process_group: bool | ProcessGroup = False,
        compile: bool | str | Mapping[str, Any] = False,
        reuse_structure: bool | str = True,
    ) -> None:
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            max_iarange_nesting=max_iarange_nesting,
            vectorize_particles=vectorize_particles,
            strict_enumeration_warning=strict_enumeration_warning,
            ignore_jit_warnings=ignore_jit_warnings,
            jit_options=jit_options,
            retain_graph=retain_graph,
            tail_adaptive_beta=tail_adaptive_beta,
        )
        self.objective = checked_objective(objective, num_particles, higher_order)
        self.higher_order = higher_order
        self.max_parallel = checked_parallel(max_parallel, num_particles if vectorize_particles else 1)
        if max_parallel is not None and not vectorize_particles:
            raise ConfigurationError(
                f"TraceGrad_ELBO(max_parallel={max_parallel}): without vectorize_particles=True branches run one by one, and there is "
                "nothing to limit; drop it, or pass vectorize_particles=True."
            )
        self._closed = ClosedForms.of(closed_form, self.objective)
        self._mapping = EstimatorMapping.of(estimators, "TraceGrad_ELBO(estimators=...)")
        self._arguments = {"estimators": self._mapping.estimators or None, "closed_form": self._closed.kinds or None}
        self._arguments |= {"process_group": process_group, "compile": compile, "reuse_structure": reuse_structure}
        self._networks = Networks()
        self._structures = Structures(reuse_structure, self._mapping.estimators.values())
        self._resolved: dict[Any, Resolved] = {}
        self._watcher: Watcher | None = None
        self._rehearsing = False
        self._peers = data_parallel_of(process_group)
        self._compiler = _compiler_of(compile)

    def __call__(self, model: torch.nn.Module, guide: torch.nn.Module) -> TraceGradModule:
        """Return a module that computes the loss. Its parameters include those of learned baselines."""
        return TraceGradModule(model, guide, self)

    def loss(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the negative ELBO, or of the negative `objective`, in nats and without a gradient."""
        combined = isinstance(self.objective, MultiSample)
        # Particles that run together are looked at, as in a training step; one by one there is nothing to find.
        together = self.vectorize_particles and self.num_particles > 1
        program = Program(model, guide, args, kwargs)
        rehearse_if_resumed(self, self.loss, program, ())
        if isinstance(self.objective, FIVO):
            with torch.no_grad():
                return -float(self._filtered(program, self.objective)[0])
        sums = any(found.estimator.enumerates for found in self._resolved.values())
        known = self._structures.find(program) if together or combined or sums else None
        value = self._bound if combined else self._mean_loss
        found = vectorized_or_sequential(known, lambda: value(program, known))
        if found is None:  # What is summed over is known now.
            known = self._structures.find(program)
            found = vectorized_or_sequential(known, lambda: self._mean_loss(program, known))
        assert found is not None
        return found

    def _mean_loss(self, program: Program, known: Structure | None) -> float | None:
        """Return the mean of the particles' losses; None where sums ask for a structure that is not given."""
        total = 0.0
        with torch.no_grad():
            for traces, provenance in self._runs(program, known):
                run = self._record(traces, provenance, program, True)
                if known is None and any(estimator.enumerates for estimator in traces.estimators.values()):
                    return None
                shown = run
                if known is not None:
                    layout = self._laid_out(program, traces, run, provenance, known)
                    host = self._branches(program, traces, layout, run, provenance)
                    _, shown = averaged(OPS, layout, run, host, self.higher_order, {})
                objective = objective_of(traces, shown)
                check_costs(objective, traces, run)
                total += objective
        return -total / self.num_particles

    def _laid_out(
        self,
        program: Program,
        traces: Traces,
        run: Run,
        provenance: Provenance | None,
        known: Structure,
    ) -> Layout:
        """Return the layout of a run whose particles stay apart, or raise `ParticlesInteract`."""
        layout = known.layout(traces, run, provenance, self.objective)
        if provenance is not None and traces.particles > 1:
            self._branches(program, traces, layout, run, provenance).refuse_particles_that_meet(provenance)
        return layout

    def _bound(self, program: Program, known: Structure | None) -> float:
        """Return the negative of a bound that combines particles, without a gradient."""
        assert known is not None
        runs, traced = [], []
        with torch.no_grad():
            for traces, provenance in self._runs(program, known):
                run = self._record(traces, provenance, program)
                runs.append((self._laid_out(program, traces, run, provenance, known), run))
                traced.append(traces)
            assert isinstance(self.objective, MultiSample)
            learned = log_normalizer(self.objective, runs[0][1].costs)
            value = float(Bounds(OPS, runs, self.objective, log_normalizer=learned).value)
        for traces, (_, run) in zip(traced, runs, strict=True):
            check_costs(value, traces, run)
        return -value

    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """Return the loss in nats, and add its gradient estimate to the parameters' gradients."""
        refuse_own_gradients(self._peers)
        program = Program(model, guide, args, kwargs)
        rehearse_if_resumed(self, self.loss_and_grads, program, self._settings())
        if isinstance(self.objective, FIVO):
            value, surrogate = self._filtered(program, self.objective)
            if surrogate.requires_grad:
                (-surrogate).backward(retain_graph=self.retain_graph)
            return -float(value)
        if self._compiler is not None and torch.is_grad_enabled():
            return self._compiler.step(_EagerSteps(self), program)
        return self._eager_step(program)

    def _eager_step(self, program: Program, known: Structure | None = None) -> float:
        evaluation, value = self._step(program, known)
        if known is not None and self._compiler is not None:
            self._compiler.refuse(known)
        loss = evaluation.loss
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        self._watch(program)
        store_states(evaluation.result.states)
        return -value

    def differentiable_loss(
        self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the loss in nats as a tensor whose gradient is the estimate."""
        program = Program(model, guide, args, kwargs)
        rehearse_if_resumed(self, self.differentiable_loss, program, ())
        if isinstance(self.objective, FIVO):
            value, surrogate = self._filtered(program, self.objective)
            return attach(-value, -surrogate)
        evaluation, _ = self._step(program)
        self._watch(program)
        store_states(evaluation.result.states)
        return attach(-evaluation.result.value, evaluation.guarded_loss)

    def _watch(self, program: Program) -> None:
        """Count a training step, and look at it if the guide's watch says so."""
        watcher = self._watcher
        if watcher is None or self._rehearsing:
            return
        if watcher.due(watcher.steps):
            resolved = {key[0]: found.estimator for key, found in self._resolved.items()}
            monitor(
                watcher,
                lambda record: self._checked_estimate(program, record, peers=self._silent())[0].result,
                program,
                resolved,
            )
        watcher.steps += 1

    def diagnose(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run one step without changing anything, and raise the error that names the site if something is wrong."""
        if isinstance(self.objective, FIVO):
            self._filtered(Program(model, guide, args, kwargs), self.objective)
            return
        self._checked_estimate(Program(model, guide, args, kwargs), peers=self._silent())

    def _silent(self) -> TorchDataParallel | None:
        """Return the processes for what this one may do without the others."""
        return None if self._peers is None else replace(self._peers, exchanging=False)

    def describe(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Description:
        """Describe what this ELBO does at each latent site, and why. Nothing is changed.

        Args:
            model: the model.
            guide: the guide.
            args: positional arguments of the program.
            kwargs: keyword arguments of the program.

        Returns:
            A description with a row for each latent site. `print` shows it as a table.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> program = lambda: pyro.sample("z", dist.Bernoulli(0.5))
            >>> TraceGrad_ELBO(num_particles=2).describe(program, program).rows[0]["baseline"]
            'LeaveOneOut()'
        """
        store = pyro.get_param_store()
        before = set(store.keys())
        seen = Structure()
        try:
            with torch.random.fork_rng():
                program = Program(model, guide, args, kwargs)
                traces, provenance = next(self._runs(program, seen))
                run = self._record(traces, provenance, program)
                layout = seen.layout(traces, run, provenance, self.objective)
                host = self._branches(program, traces, layout, run)
                families = {name: family(traces.guide.nodes[name]["fn"]) for name in traces.estimators}
                reasons = {key[0]: found.reason for key, found in self._resolved.items()}
                return describe(OPS, layout, run, host, families, reasons, summed_sites(traces.model))
        finally:
            for name in [name for name in store.keys() if name not in before]:
                del store[name]

    def measure(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
        """Choose estimators by measurement for the sites under `Auto(measure=True)`, at the present parameters.

        The first training step does this by itself. Another call measures again.

        Args:
            model: the model.
            guide: the guide.
            args: positional arguments of the program.
            kwargs: keyword arguments of the program.

        Returns:
            The `Choice`. `print` shows what was measured.

        Raises:
            ConfigurationError: no site has such an `Auto`.

        Example:
            >>> import pyro, pyro.distributions as dist, torch
            >>> from pplgrad import Auto
            >>> pyro.clear_param_store()
            >>> program = lambda: pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))
            >>> elbo = TraceGrad_ELBO(estimators={"z": Auto(measure=True, seconds=0.2)})
            >>> elbo.measure(program, program).estimators["z"] == elbo._mapping.estimators["z"].measured["z"]
            True
        """
        self.describe(model, guide, *args, **kwargs)
        found = {key[0]: resolved for key, resolved in self._resolved.items()}
        choice = measured(self._uncompiled(), Program(model, guide, args, kwargs), found)
        self._resolved.clear()
        self._structures = self._structures.empty_copy(self._mapping.estimators.values())
        return choice

    def with_estimators(self, estimators: Mapping[str, Estimator]) -> TraceGrad_ELBO:
        """Return the same ELBO with another mapping of estimators, and with nothing learned yet."""
        other = copy.copy(self)
        other._mapping = EstimatorMapping.of(estimators, "TraceGrad_ELBO(estimators=...)")
        other._networks, other._resolved = Networks(), {}
        other._structures = self._structures.empty_copy(other._mapping.estimators.values())
        other._compiler = None if self._compiler is None else self._compiler.empty_copy()
        return other

    def __copy__(self) -> TraceGrad_ELBO:
        """Return an ELBO that shares everything with this one."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Return what is to be pickled: what was chosen, without what was found of programs, which is found again."""
        state = dict(self.__dict__)
        state |= {
            "_networks": Networks(),
            "_structures": self._structures.empty_copy(self._mapping.estimators.values()),
            "_resolved": {},
            "_watcher": None,
        }
        state["_compiler"] = None if self._compiler is None else self._compiler.empty_copy()
        return state

    def _settings(self) -> tuple:
        """Return what beside the arguments decides a training step, as structures are known by it."""
        if self._compiler is None:
            return ()
        return (*settings(), self.num_particles, self.vectorize_particles, Identity(id(self.objective)))

    def _known_so_far(self, model: Any, guide: Any) -> dict[str, Any]:
        """Return in plain data how far a program is known, for a training that goes on in another process."""
        compiler = self._compiler
        known = self._structures.state(model, guide, () if compiler is None else compiler.stays_eager)
        return {"structures": known, "graphs": 0 if compiler is None else compiler.graphs_made}

    def _resume(self, model: Any, guide: Any, state: Mapping[str, Any]) -> None:
        """Find again what was known of a program, when it is next asked for."""
        self._structures.resume(model, guide, state["structures"])
        if self._compiler is not None:
            self._compiler.graphs_made = state["graphs"]

    def _uncompiled(self) -> TraceGrad_ELBO:
        """Return an ELBO that shares everything with this one, and does not compile."""
        other = copy.copy(self)
        other._compiler = None
        return other

    def _step(self, program: Program, known: Structure | None = None) -> tuple[Evaluation, float]:
        """Return the estimate of a training step; the first one measures what an `Auto(measure=True)` is to choose from."""
        result = self._checked_estimate(program, None, known, self._peers)
        if any(x.measuring and key[0] not in x.measuring.measured for key, x in self._resolved.items()):
            if self._peers is not None:
                raise ConfigurationError(
                    "Auto(measure=True) would choose in each process of process_group=... by itself; measure in one process before, "
                    "and give all of them the estimators of its choice."
                )
            self.measure(program.model, program.guide, *program.args, **program.kwargs)
            result = self._checked_estimate(program, None)
        return result


def _compiler_of(given: Any) -> Any:
    """Return what takes the steps (`_compile/compiled_step.py`), or None if they are not to be compiled."""
    if given is False or given is None:
        return None
    from pplgrad.pyro._compile.compiled_step import Compiler  # Only where it is wanted: it is large.

    return Compiler.of(given)


class _EagerSteps:
    """An ELBO's own steps, as the compiler asks for them (`_compile.compiled_step.EagerSteps`)."""

    def __init__(self, elbo: TraceGrad_ELBO) -> None:
        self._elbo = elbo

    def structure(self, program: Program) -> Structure:
        return self._elbo._structures.find(program, self._elbo._settings())

    def take(self, program: Program, known: Structure) -> float:
        return self._elbo._eager_step(program, known)

    def evaluate(self, program: Program, known: Structure) -> Evaluation:
        return self._elbo._evaluate(program, None, known)

    def check(self, program: Program, known: Structure) -> None:
        self._elbo._checked_estimate(program, None, known)

    def watch(self, program: Program) -> None:
        self._elbo._watch(program)

    def reads(self) -> tuple:
        estimators = [found.estimator for found in self._elbo._resolved.values()]
        return self._elbo.objective, estimators, self.networks()

    def networks(self) -> list:
        return self._elbo._networks.touched()
