"""A compiled graph whose kernels a GPU starts together, as one CUDA graph: starting them one by one takes longer than they do.

What the kernels read has a place in memory that is part of the CUDA graph. An input that is found in its place is read there; one
that was ever found elsewhere (a new minibatch) is copied into a place of its own from then on. Results are copied out, since
the next run writes over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Replays:
    """Runs `compiled`, from a list of inputs to its outputs, as a CUDA graph; it must write into no input and use one GPU alone."""

    def __init__(self, compiled: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]) -> None:
        self._compiled = compiled
        self._graph: torch.cuda.CUDAGraph | None = None
        self._places: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._copied: list[int] = []
        self._outputs: Sequence[torch.Tensor] = ()
        self._refused = False

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the outputs, in memory of their own."""
        if not self._refused and not self._ready(inputs):
            try:
                self._capture(inputs)
            except RuntimeError:
                # A kernel that cannot be part of a CUDA graph: the same ones are started one by one.
                self._graph, self._outputs, self._refused = None, (), True
        return self._compiled(inputs) if self._graph is None else self._replay(inputs)

    def _ready(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Return whether there is a graph that reads or copies these inputs; note which have moved."""
        places = zip(inputs, self._addresses, strict=False)
        moved = {i for i, (x, address) in enumerate(places) if x.data_ptr() != address} - set(self._copied)
        self._copied = sorted({*self._copied, *moved})
        return self._graph is not None and not moved

    def _replay(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        with torch.cuda.device(inputs[0].device):
            if self._copied:
                torch._foreach_copy_(
                    [once(self._places[i]) for i in self._copied], [once(inputs[i]) for i in self._copied]
                )
            assert self._graph is not None
            self._graph.replay()
            outputs = [torch.empty_like(x) for x in self._outputs]
            torch._foreach_copy_(outputs, list(self._outputs))
        return outputs

    def _capture(self, inputs: Sequence[torch.Tensor]) -> None:
        self._graph, self._outputs = None, ()
        self._places = [place_for(x) if i in self._copied else x.detach() for i, x in enumerate(inputs)]
        self._addresses = [x.data_ptr() for x in self._places]
        device = inputs[0].device
        with torch.cuda.device(device):
            # What is done at a first call alone (loading kernels, taking memory) cannot be part of the graph.
            state, aside = torch.cuda.get_rng_state(device), torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._compiled(self._places)
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.set_rng_state(state, device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._outputs = self._compiled(self._places)
        self._graph = graph


def place_for(x: torch.Tensor) -> torch.Tensor:
    """Return a copy with the same strides, which the kernels were compiled for."""
    place = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    once(place).copy_(once(x))
    return place


def once(x: torch.Tensor) -> torch.Tensor:
    """Return the view of a tensor that has each of its numbers once, where it was expanded."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
