"""What compiled steps and optimizers use of torch and Pyro that is private there, or differs between versions: all of it is here.

`tests/pyro/test_compile_refusals.py` tests each function by itself, so that a new version that breaks one is seen at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch.fx import GraphModule

from pplgrad.pyro import _narrow
from pplgrad.pyro._apart import take_apart
from pplgrad.pyro._recording import drawn
from pplgrad.pyro._replays import Replays

_ANY_SIZE = 1_000_000
_MANY = 256
"""The numbers in a draw from which on it is quicker to call torch's generator than to compute them in a kernel, one by one."""
_THREADS = 4
"""The threads that together compute them as quickly as the generator, which is called by one."""

Graph = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def compiled_graph(
    graph: GraphModule, inputs: Sequence[torch.Tensor], backend: str | Callable, replay: bool = True
) -> Graph:
    """Return a graph compiled by one of torch.compile's backends, from a list of inputs to its outputs.

    With `replay`, inductor's kernels are started as one CUDA graph where all of them are on one GPU. The graph is given to the backend
    as it is: Dynamo, which would trace it once more and check it at every call, is left out.
    """
    with torch.no_grad():
        inputs = [x.detach() for x in inputs]
        if backend == "eager":
            return lambda given: graph(*given)
        if backend == "inductor":
            from torch._inductor.compile_fx import compile_fx

            # A small step's kernels take less time than Python needs to call them one by one.
            in_one_call = all(x.device.type == "cpu" for x in inputs)
            on_one_gpu = graph.meta.get("on_one_gpu", False)
            compiled = compile_fx(
                graph, inputs, config_patches=_for_cpu(graph) if in_one_call else {"cpp_wrapper": False}
            )
            if replay and on_one_gpu:
                return Replays(lambda given: compiled(*given))
        else:
            from torch._dynamo.backends.registry import lookup_backend

            compiled = lookup_backend(backend)(graph, inputs)
        return lambda given: compiled(*given)


def load_backend(backend: str | Callable) -> None:
    """Import what compiles, before a program is watched: it registers classes under abstract ones, which may decide what a program does."""
    if backend == "inductor":
        import torch._inductor.compile_fx  # noqa: F401


def _for_cpu(graph: GraphModule) -> dict[str, Any]:
    """Prepare a graph for the inductor on a CPU, and return the options to compile it with."""
    options: dict[str, Any] = {"cpp_wrapper": True}
    if take_apart(graph):
        # What is computed in one kernel needs no arrays between.
        options["max_fusion_size"] = _ANY_SIZE
    sizes = [size for node in graph.graph.nodes if (size := drawn(node))]
    if sum(sizes) > _MANY * len(sizes) and torch.get_num_threads() < _THREADS:
        options["fallback_random"] = True
    if _narrowing() is not None and torch._inductor.config.post_grad_custom_pre_pass is None:
        options["post_grad_custom_pre_pass"] = _narrowing()
    return options


@cache
def _narrowing() -> Any:
    """Return the inductor's pass that lets it compute nothing twice, or None if the inductor is one without such passes."""
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    except ImportError:
        return None

    class Narrowing(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            _narrow.narrow(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((_narrow.__file__,))

    return Narrowing()


def leaves_of(loss: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors to whose gradients `loss.backward()` would add."""
    found: dict[int, torch.Tensor] = {}
    seen: set[Any] = set()
    ahead = [loss.grad_fn]
    while ahead:
        function = ahead.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            found.setdefault(id(function.variable), function.variable)
        ahead += [after for after, _ in function.next_functions]
    return list(found.values())


def other_handlers() -> list[str]:
    """Return the names of Pyro's handlers around a step, except those that only look at its parameters."""
    return [
        type(handler).__name__
        for handler in _PYRO_STACK
        if not (isinstance(handler, BlockMessenger) or (isinstance(handler, TraceMessenger) and handler.param_only))
    ]


class _Kept(dict):
    """The tensors of the param store, of which `named_parameters` shows those alone that are parameters, not state of a baseline.

    The store reads, saves, loads and copies all of them by its other methods, which look at names one by one or copy the dict whole.
    """

    state: frozenset[str] = frozenset()

    def items(self) -> Any:
        if self.state.isdisjoint(self):
            return super().items()
        return {name: x for name, x in super().items() if name not in self.state}.items()

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def hide_state(names: Iterable[str]) -> None:
    """Let `named_parameters` of the param store leave out some names, which get no gradient."""
    store = pyro.get_param_store()
    held = store._params
    if not isinstance(held, _Kept):
        if type(held) is not dict:
            return  # A store of somebody else's: it shows what it shows.
        held = store._params = _Kept(held)
    if not held.state.issuperset(names):
        held.state = held.state | frozenset(names)


def unconstrained() -> dict[str, torch.Tensor]:
    """Return the leaves of the param store by name, state of baselines included."""
    return dict(pyro.get_param_store()._params)


def constraints() -> dict[str, Any]:
    """Return the constraints of the param store by name."""
    # The public `get_state` takes from the parameters what SVI finds their unconstrained values by.
    return dict(pyro.get_param_store()._constraints)


def loaded_state(optimizer: PyroOptim) -> dict:
    """Return the state that an optimizer was given for parameters that it has not met yet."""
    return dict(optimizer._state_waiting_to_be_consumed)


def settings() -> tuple:
    """Return torch's settings that decide what an operation computes."""
    return (
        torch.get_default_dtype(),
        *(
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ),
    )
