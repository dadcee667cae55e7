"""Compiled steps: a training step recorded once, with its draws and its gradient, and then run without Python.

The first two steps of a program run as ever, and find its structure. The third is recorded while it runs
(`_compile/aten_recorder.py`), and what was recorded is given to a compiler. From then on a step is: look whether the program is the
same (`_compile/input_sources.py`), gather the tensors that it reads, run the graph, check that the loss is finite, add up gradients.
"""

from __future__ import annotations

import copy
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.poutine.runtime import am_i_wrapped
from torch.fx import GraphModule

from pplgrad.core.program import Program
from pplgrad.errors import CompileError, ConfigurationError, ImpossibleValueError, PplgradError
from pplgrad.pyro._baselines import state_name, store_states
from pplgrad.pyro._compat import (
    Graph,
    constraints,
    have_hooks,
    leaves_of,
    other_handlers,
    unconstrained,
)
from pplgrad.pyro._compile.aten_recorder import Captured, Recorder, writes_into_input
from pplgrad.pyro._compile.backends import compiled_graph, load_backend
from pplgrad.pyro._compile.input_sources import InputSources
from pplgrad.pyro._evaluation import Evaluation
from pplgrad.pyro._recording import reading_refused
from pplgrad.pyro._reuse.dependency_structure import Structure
from pplgrad.pyro._reuse.guards import Guard
from pplgrad.pyro._tracing.operations import tensors_in
from pplgrad.pyro._tracing.particle_trace import generators, restore

_PATIENCE = 4
"""Steps in a row after which a program whose structure is never known counts as one that always changes."""


class Stale(Exception):
    """What was recorded does not fit the parameters or tensors as they are now."""


class Hooked(Exception):
    """A function of the user's is to be called with a gradient, by autograd alone."""


@dataclass(frozen=True)
class Options:
    """How steps are compiled: the backend of torch.compile, what to do where that fails, how many graphs to make at most, CUDA graphs."""

    backend: str | Callable = "inductor"
    fallback: bool = False
    graphs: int = 8
    cuda_graph: bool = True

    @classmethod
    def of(cls, given: Any) -> Options | None:
        """Return what `TraceGrad_ELBO(compile=...)` asks for, or refuse it."""
        if given is False or given is None:
            return None
        if given is True:
            return cls()
        if given == "fallback":
            return cls(fallback=True)
        if isinstance(given, Mapping) and given.keys() <= cls.__dataclass_fields__.keys():
            return cls(**given)
        raise ConfigurationError(
            f'TraceGrad_ELBO(compile={given!r}): write True, "fallback", or a mapping with some of '
            f"{', '.join(cls.__dataclass_fields__)}."
        )


@dataclass
class Source:
    """Where a tensor is found at each step: an argument's number, a parameter's name, or a read of what holds it."""

    tensor: torch.Tensor | None
    argument: int | None = None
    name: str | None = None
    read: Callable[[], Any] | None = None

    def __post_init__(self) -> None:
        x = self.tensor
        assert x is not None
        self.kind = (x.shape, x.dtype, x.device, x.requires_grad)
        self.stride = x.stride()

    def forget(self) -> None:
        """Let go of the tensor, unless it is a constant: it will be found again."""
        if self.argument is not None or self.name is not None or self.read is not None:
            self.tensor = None

    def find(self, arguments: Sequence[torch.Tensor], params: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the tensor as it is now, or raise if it is of another kind."""
        found: Any
        if self.argument is not None:
            found = arguments[self.argument]
        elif self.name is not None:
            found = params.get(self.name)
        else:
            found = self.tensor if self.read is None else self.read()
        if not isinstance(found, torch.Tensor):
            raise Stale
        if (found.shape, found.dtype, found.device, found.requires_grad) != self.kind:
            raise Stale
        if found.stride() != self.stride:
            if self.argument is None or found.requires_grad:
                raise Stale
            found = torch.empty_strided(found.shape, self.stride, dtype=found.dtype, device=found.device).copy_(found)
        return found


class Sources:
    """Finds where the tensors that a step read come from: arguments, the param store, or what the program can reach."""

    def __init__(self, guard: InputSources, program: Program) -> None:
        self._found: dict[int, list[Source]] = {}
        self.twins: list[tuple[Source, Source]] = []
        for i, tensor in enumerate(tensors_in((program.args, program.kwargs))):
            self._add(Source(tensor, argument=i))
        for name, tensor in unconstrained().items():
            self._add(Source(tensor, name=name))
        for tensor, read in guard.held:
            self._add(Source(tensor, read=read))

    def _add(self, source: Source) -> None:
        self._found.setdefault(id(source.tensor), []).append(source)

    def of(self, captured: Captured) -> Source:
        """Return where a tensor comes from; two places that hold the same one must go on to do so."""
        tensor = captured.tensor
        if captured.constant:
            return Source(tensor)
        sources = self._found.get(id(tensor))
        if sources is None:
            raise CompileError(
                f"The step cannot be compiled, because the tensor of shape {tuple(tensor.shape)} that is read at "
                f"{captured.line} cannot be found again at the next step; pass it as an argument, or hold it in a variable or "
                "an attribute that the program reads."
            )
        if tensor.grad_fn is not None:
            raise CompileError(
                f"The step cannot be compiled, because the tensor that is read at {captured.line} requires a gradient through "
                "what was computed before the step; detach it, or compute it inside the program."
            )
        first, *others = sources
        # A tensor may be both an input and a leaf that gets a gradient.
        sources[1:] = []
        self.twins += [(first, other) for other in others]
        return first


@dataclass
class CompiledStep:
    """A graph with where its inputs come from and where its outputs go; `plain` is the graph as it was recorded."""

    graph: Graph
    plain: Graph
    writes: bool
    sources: list[Source]
    leaves: list[Source]
    twins: list[tuple[Source, Source]]
    states: list[str]
    params: list[str]
    constraints: dict[str, Any] = field(default_factory=constraints)
    known: dict[str, torch.Tensor] = field(default_factory=unconstrained)
    shared: list[bool] | None = None

    def inputs(self, arguments: Sequence[torch.Tensor], params: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return what the graph computes from, as it is now."""
        return [source.find(arguments, params) for source in self.sources]

    def run(self, program: Program) -> float | None:
        """Take a step and return the objective, or None, with nothing changed, if something is not finite."""
        arguments, params = tensors_in((program.args, program.kwargs)), unconstrained()
        inputs = self.inputs(arguments, params)
        leaves = [source.find(arguments, params) for source in self.leaves]
        if have_hooks(leaves):
            raise Hooked
        for first, second in self.twins:
            if first.find(arguments, params) is not second.find(arguments, params):
                raise Stale
        self._check_constraints(params)
        with torch.no_grad():
            numbers, *others = self.graph(inputs)
            value, *finite = numbers.tolist()
            if not math.isfinite(value) or not all(finite):
                return None
            if self.shared is None:
                self.shared = _shared(others[: len(leaves)], inputs)
            for leaf, gradient, shared in zip(leaves, others, self.shared, strict=False):
                if leaf.grad is None:
                    leaf.grad = _laid_out(gradient, leaf, shared)
                else:
                    leaf.grad.add_(gradient)
            if self.states:
                torch._foreach_copy_([params[name] for name in self.states], list(others[len(leaves) :]))
        if am_i_wrapped():
            for name in self.params:
                # SVI learns in this way which parameters the step has.
                pyro.param(name)
        return value

    def _check_constraints(self, params: Mapping[str, torch.Tensor]) -> None:
        """Refuse a parameter that was put into the store anew, under another constraint."""
        if all(params.get(name) is self.known.get(name) for name in self.params):
            return
        now = constraints()
        if any(name not in params or now[name] is not self.constraints[name] for name in self.params):
            raise Stale
        self.known = dict(params)


def _laid_out(gradient: torch.Tensor, leaf: torch.Tensor, shared: bool) -> torch.Tensor:
    """Return a gradient that is laid out like its leaf, in memory of its own: autograd, which may add to it later, wants both."""
    if gradient.stride() != leaf.stride():
        return torch.empty_like(leaf).copy_(gradient)
    return gradient.clone() if shared else gradient


def _shared(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[bool]:
    """Return which outputs have memory in common with one before them or with an input: a graph gives equal ones once."""
    taken = {x.untyped_storage().data_ptr() for x in inputs}
    result = []
    for output in outputs:
        where = output.untyped_storage().data_ptr()
        result.append(where in taken)
        taken.add(where)
    return result


def _other_generators() -> tuple:
    """Return the states of the generators of Python and NumPy that everybody draws from."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), kind, keys.tobytes(), rest  # type: ignore[union-attr]


class EagerSteps(Protocol):
    """What the compiler asks of an ELBO: the steps that it would take by itself."""

    def structure(self, program: Program) -> Structure:
        """Return what is known of the program under the present settings."""

    def take(self, program: Program, known: Structure) -> float:
        """Take a step: add the gradient to the parameters' gradients, keep the baselines' state, return the loss."""

    def evaluate(self, program: Program, known: Structure) -> Evaluation:
        """Run the program and return the estimate; nothing is checked, added or kept."""

    def check(self, program: Program, known: Structure) -> None:
        """Run the program, and raise the error that names the site if something is wrong."""

    def watch(self, program: Program) -> None:
        """Count a step that was taken, and look at it if the guide's watch says so."""

    def reads(self) -> tuple:
        """Return the objects beside the program that a step reads."""

    def networks(self) -> list:
        """Return the networks of baselines that are the user's, or that are not as the ELBO made them."""


class Compiler:
    """Takes an ELBO's training steps: eagerly at first, then compiled."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.graphs_made = 0
        self._waits: dict[Any, int] = {}
        self.stays_eager: set[Any] = set()
        self._warned: set[str] = set()

    @classmethod
    def of(cls, given: Any) -> Compiler | None:
        """Return what takes the steps, or None if they are not to be compiled."""
        options = Options.of(given)
        return None if options is None else cls(options)

    def empty_copy(self) -> Compiler:
        """Return another that has compiled nothing yet."""
        return Compiler(self.options)

    def step(self, eager: EagerSteps, program: Program) -> float:
        """Add the gradient estimate to the parameters' gradients, and return the loss."""
        known = eager.structure(program)
        try:
            if known.key in self.stays_eager:
                return eager.take(program, known)
            handlers = other_handlers()
            if handlers:
                raise CompileError(
                    f"A compiled step cannot run under the handler {handlers[0]} around it; put it around model and guide."
                )
            if known.compiled is not None and known.watching_again:
                if known.compiled.writes:
                    # A second run would write twice (statistics of batches, say): this step is the one that is watched.
                    return eager.take(program, known)
                self._rewatch(eager, known, program)
            if known.compiled is not None and known.known:
                return self._run(eager, known, program)
            if known.known and self.graphs_made >= self.options.graphs:
                self._warn(
                    f"TraceGrad_ELBO(compile=...) has compiled {self.graphs_made} graphs, one for each kind of arguments and state of the "
                    "program, and takes other steps eagerly; give batches the same size, pass numbers that change as tensors, "
                    "or raise compile={'graphs': ...}."
                )
                return eager.take(program, known)
            if known.known and have_hooks(tensors_in((program.args, program.kwargs)) + [*unconstrained().values()]):
                return eager.take(program, known)
            if known.known:
                return self._record(eager, known, program)
            if not known.watching_again:
                self._count_unknown(known)
            return eager.take(program, known)
        except CompileError as error:
            # Pyro adds a table of shapes to errors that pass its trace.
            message = str(error).splitlines()[0]
            if not self.options.fallback:
                raise CompileError(message) from error
            self._warn(f"{message} This ELBO's steps go on eagerly.")
            self.stays_eager.add(known.key)
            return eager.take(program, known)

    def refuse(self, known: Structure) -> None:
        """Refuse a program that was seen to read a tensor's value."""
        if known.read_at is not None and known.key not in self.stays_eager:
            error = reading_refused(known.read_at)
            if not self.options.fallback:
                raise error
            self._warn(f"{error} This ELBO's steps go on eagerly.")
            self.stays_eager.add(known.key)

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, UserWarning, stacklevel=5)

    def _count_unknown(self, known: Structure) -> None:
        """Count steps whose structure is not known yet, and give up on a program that never stays the same."""
        load_backend(self.options.backend)
        if not known.reusable and known.read_at is None and known.guard is None and (why := Guard.reason(*known.roots)):
            self._stay_eager(known, why)
            return
        if len(self._waits) > 4 * self.options.graphs:
            self._waits.clear()
            self._warn(
                "TraceGrad_ELBO(compile=...) sees arguments of another kind at almost every step, and takes such steps eagerly; "
                "give batches the same size, and pass numbers that change as tensors."
            )
        count = self._waits[known.key] = self._waits.get(known.key, 0) + 1
        if count > _PATIENCE:
            raise CompileError(
                "The step cannot be compiled, because the program reads or changes Python state that is different at every "
                "step (a counter, an iterator, a random number generator of Python or NumPy), or its sites do; keep the "
                'state in a tensor, or use compile=False (compile="fallback" does so by itself).'
            )

    def _rewatch(self, eager: EagerSteps, known: Structure, program: Program) -> None:
        """Watch a step beside the compiled one, at the same draws, and refuse a program that is not the one that was recorded.

        Nothing is stored, and the generators are put back: the compiled step that follows starts from the same state.
        """
        start, before = time.process_time(), generators()
        step, arguments = known.compiled, tensors_in((program.args, program.kwargs))
        with torch.random.fork_rng():
            evaluation = eager.evaluate(program, known)
            value = evaluation.checked(evaluation.numbers().tolist())
            if known.compiled is step and evaluation.traced[0].apart is False:
                restore(before)
                with suppress(Stale), torch.no_grad():
                    known.compare_values(value, float(step.plain(*step.inputs(arguments, unconstrained()))[0][0]))
        restore(before)
        known.looked(time.process_time() - start)

    def _stay_eager(self, known: Structure, why: str) -> None:
        """Take a program's steps eagerly from here on, which is right whatever it reads, and say so once."""
        self._warn(
            f"TraceGrad_ELBO(compile=...) takes this program's steps eagerly, because it reads {why}, which cannot be watched: a "
            "compiled step would keep what it was; pass numbers that change as tensors, and draw with torch."
        )
        self.stays_eager.add(known.key)

    def _run(self, eager: EagerSteps, known: Structure, program: Program) -> float:
        try:
            value = known.compiled.run(program)
        except Hooked:
            return eager.take(program, known)
        except Stale:
            if all(name in unconstrained() for name in known.compiled.params):
                known.compiled = None
            return eager.take(program, known)
        if value is None:
            self._explain(eager, known, program)
        eager.watch(program)
        return -value

    def _explain(self, eager: EagerSteps, known: Structure, program: Program) -> None:
        """Raise the error that names the site, if an eager step has it too, or one that says how to look for it."""
        eager.check(program, known)
        raise ImpossibleValueError(
            "The loss of a compiled step is NaN or infinite, at draws that an eager step did not repeat; nothing was changed: "
            "elbo.diagnose(model, guide, ...) runs a step eagerly, and names the site if it meets such a draw."
        )

    def _record(self, eager: EagerSteps, known: Structure, program: Program) -> float:
        """Take a step eagerly, record it, and compile what was recorded."""
        recorder = Recorder()
        # The graph is to cast the parameters as they will be, not to find those of an earlier step cast.
        torch.clear_autocast_cache()
        moving = _other_generators()
        with poutine.trace(param_only=True) as seen, pyro.validation_enabled(False), recorder:
            evaluation = eager.evaluate(program, known)
            loss = evaluation.loss
            leaves = leaves_of(loss)
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
            pairs = [(x, g.clone()) for x, g in zip(leaves, gradients, strict=True) if g is not None]
            numbers = evaluation.numbers()
            states = {
                state_name(*key, name): value
                for key, arrays in evaluation.result.states.items()
                for name, value in arrays.items()
            }
        value = evaluation.checked(numbers.tolist())
        if moving != _other_generators():
            self._stay_eager(known, "random numbers of Python or NumPy")
        elif known.known:
            # Else this run had other sites than the known ones: its gradient is right, and the next step watches.
            names = [str(name) for name in seen.trace.nodes]
            outputs = [numbers, *(gradient for _, gradient in pairs), *states.values()]
            step = self._compiled(eager, known, program, recorder, outputs, [leaf for leaf, _ in pairs])
            if step is not None:
                step.states, step.params = list(states), names
            known.compiled = step
            self._waits.pop(known.key, None)
        with torch.no_grad():
            for leaf, gradient in pairs:
                leaf.grad = _laid_out(gradient, leaf, True) if leaf.grad is None else leaf.grad.add_(gradient)
        eager.watch(program)
        store_states(evaluation.result.states)
        return -value

    def _compiled(
        self,
        eager: EagerSteps,
        known: Structure,
        program: Program,
        recorder: Recorder,
        outputs: list[torch.Tensor],
        leaves: list[torch.Tensor],
    ) -> CompiledStep | None:
        """Compile what was recorded, or return None if the step reads what cannot be watched."""
        graph, captured = recorder.graph_of(outputs)
        roots = (*known.roots, *eager.reads())
        guard = InputSources.of(*roots)
        if guard is None:
            self._stay_eager(known, InputSources.reason(*roots))
            return None
        assert isinstance(guard, InputSources)
        networks = eager.networks()
        guard.also(lambda: all(x is y for x, y in zip(eager.networks(), networks, strict=True)))
        sources = Sources(guard, program)
        inputs = [sources.of(x) for x in captured]
        plain, written = (
            GraphModule(torch.nn.Module(), copy.deepcopy(graph.graph)),
            any(map(writes_into_input, graph.graph.nodes)),
        )
        line = "the end of the step"
        ends = [sources.of(Captured(leaf, captured[0].node, line, False)) for leaf in leaves]
        try:
            compiled = compiled_graph(graph, [x.tensor for x in inputs], self.options.backend, self.options.cuda_graph)
        except PplgradError:
            raise
        except Exception as error:
            raise CompileError(
                f"The step cannot be compiled, because the backend {self.options.backend!r} failed: "
                f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
            ) from error
        self.graphs_made += 1
        known.guard, known.met = guard, guard.meets(tensors_in((program.args, program.kwargs)))
        guard.held.clear()
        for source in (*inputs, *ends, *(source for pair in sources.twins for source in pair)):
            source.forget()
        return CompiledStep(compiled, plain, written, inputs, ends, sources.twins, [], [])
