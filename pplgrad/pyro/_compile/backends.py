"""A recorded graph given to one of torch.compile's backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.fx import GraphModule

from pplgrad.pyro._compat import Graph, inductor, inductor_pass, load_inductor, registered_backend, takes_a_pass
from pplgrad.pyro._compile import broadcast_sinking
from pplgrad.pyro._compile.aten_recorder import drawn
from pplgrad.pyro._compile.cuda_graphs import Replays
from pplgrad.pyro._compile.scalarization import scalarize

_ANY_SIZE = 1_000_000
_MANY = 256
"""The numbers in a draw from which on it is quicker to call torch's generator than to compute them in a kernel, one by one."""
_THREADS = 4
"""The threads that together compute them as quickly as the generator, which is called by one."""


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
            # A small step's kernels take less time than Python needs to call them one by one.
            in_one_call = all(x.device.type == "cpu" for x in inputs)
            on_one_gpu = graph.meta.get("on_one_gpu", False)
            compiled = inductor(graph, inputs, _for_cpu(graph) if in_one_call else {"cpp_wrapper": False})
            if replay and on_one_gpu:
                return Replays(lambda given: compiled(*given))
        else:
            compiled = registered_backend(backend)(graph, inputs)
        return lambda given: compiled(*given)


def load_backend(backend: str | Callable) -> None:
    """Import what compiles, before a program is watched: it registers classes under abstract ones, which may decide what a program does."""
    if backend == "inductor":
        load_inductor()


def _for_cpu(graph: GraphModule) -> dict[str, Any]:
    """Prepare a graph for the inductor on a CPU, and return the options to compile it with."""
    options: dict[str, Any] = {"cpp_wrapper": True}
    if scalarize(graph):
        # What is computed in one kernel needs no arrays between.
        options["max_fusion_size"] = _ANY_SIZE
    sizes = [size for node in graph.graph.nodes if (size := drawn(node))]
    if sum(sizes) > _MANY * len(sizes) and torch.get_num_threads() < _THREADS:
        options["fallback_random"] = True
    if _sinking_pass() is not None and takes_a_pass():
        options["post_grad_custom_pre_pass"] = _sinking_pass()
    return options


@cache
def _sinking_pass() -> Any:
    """Return the inductor's pass that lets it compute nothing twice, or None if the inductor is one without such passes."""
    return inductor_pass(lambda graph: broadcast_sinking.sink_broadcasts(graph), broadcast_sinking.__file__)
