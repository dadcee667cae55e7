"""A training that goes on in another process: what earlier steps have found of the program is found again before it is used.

A watched step, a step that reuses the structure, and a compiled step have the same law, and not the same bits: they add numbers in other
orders, and compiled steps draw in another way. A resumed training that began with a watched step would drift from the one that it goes on
with. So the first steps are rehearsed: they run at the present arguments, and everything that they have changed is put back.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import pyro
import torch

from pplgrad.core.program import Program
from pplgrad.pyro._baselines import Networks
from pplgrad.pyro._compat import unconstrained
from pplgrad.pyro._reuse.dependency_structure import Structures, Uses
from pplgrad.pyro._tracing.particle_trace import generators, restore

_MOST = 6
"""Steps after which a structure counts as one that is not found any more as it was."""


class Resumable(Protocol):
    """What is asked of an ELBO."""

    _structures: Structures
    _networks: Networks
    _compiler: Any
    _rehearsing: bool


def rehearse_if_resumed(elbo: Resumable, step: Callable, program: Program, settings: tuple) -> None:
    """Rehearse the steps of a program that were taken before the training was saved, if they were not yet."""
    if not elbo._structures.resumed:
        return
    uses = elbo._structures.waiting(program, settings)
    if uses is not None:
        with as_before(elbo, program, True):
            rehearse(elbo, step, program, settings, uses)


def rehearse(elbo: Resumable, step: Callable, program: Program, settings: tuple, uses: Uses) -> None:
    """Take steps until the program is known as far as it was. What they change is the caller's to put back."""
    compiler, elbo._rehearsing = elbo._compiler, True
    made = None if compiler is None else compiler.graphs_made
    try:
        if compiler is not None:
            compiler.graphs_made = 0  # What was compiled before is compiled again, and counts once.
        for _ in range(_MOST):
            step(program.model, program.guide, *program.args, **program.kwargs)
            known = elbo._structures.peek(program, settings)
            if known is None:
                break
            if uses.step == "stays eager":
                compiler.stays_eager.add(known.key)
            if known.reached(uses):
                break
        if known is not None:
            known.go_on(uses)
    finally:
        elbo._rehearsing = False
        if compiler is not None:
            compiler.graphs_made = made


@contextmanager
def as_before(elbo: Resumable, program: Program, params: bool) -> Iterator[None]:
    """Put back what steps change: random numbers, gradients, buffers of modules, and if `params` the param store."""
    numbers = random_state()
    store = {name: (leaf, leaf.detach().clone()) for name, leaf in unconstrained().items()}
    modules = modules_of(elbo, program)
    leaves = [*(leaf for leaf, _ in store.values()), *(p for module in modules.values() for p in module.parameters())]
    gradients = [(leaf, leaf.grad) for leaf in leaves]
    buffers = [(x, x.detach().clone()) for module in modules.values() for x in module.buffers()]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for name, leaf in unconstrained().items():
            if name not in store:
                leaf.grad = None
                if params:
                    del pyro.get_param_store()[name]
        for leaf, gradient in gradients:
            leaf.grad = gradient
        with torch.no_grad():
            for x, value in [*buffers, *(store.values() if params else ())]:
                x.copy_(value)
        set_random_state(numbers)


def modules_of(elbo: Resumable, program: Program) -> dict[str, torch.nn.Module]:
    """Return the modules whose buffers a step may change: the model, the guide, and networks of baselines."""
    found = {name: x for name, x in (("model", program.model), ("guide", program.guide))}
    found |= {f"baseline {site} {key}": x for (site, key), x in elbo._networks.modules.items()}
    return {name: x for name, x in found.items() if isinstance(x, torch.nn.Module)}


def random_state() -> dict[str, Any]:
    """Return the states of the random number generators of torch, NumPy and Python, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": generators(),
        "numpy": [kind, torch.tensor(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators into a state that `random_state` returned."""
    # A checkpoint that was loaded onto a GPU has the generators' states there too.
    restore({device: x.cpu() for device, x in state["torch"].items()})
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
