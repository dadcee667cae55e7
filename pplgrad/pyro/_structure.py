"""The dependency structure of a program: found by provenance once, and used again while the program is the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pplgrad.engine.layout import Layout
from pplgrad.engine.program import Run
from pplgrad.objectives import Objective
from pplgrad.pyro._guards import Guard, arguments_kind
from pplgrad.pyro._program import Traces, specify
from pplgrad.pyro._provenance import Provenance

_KEPT = 32


@dataclass
class Structure:
    """What is known of a program for one kind of arguments; `following` says whether this step watches it.

    `read_at` is the line where a tensor's value left the tensors, `compiled` the step recorded under this structure.
    """

    following: bool = True
    reusable: bool = True
    hidden_draws: bool = False
    read_at: str | None = None
    misused: dict[str, str] = field(default_factory=dict)
    signature: tuple | None = None
    found: Layout | None = None
    guard: Guard | None = None
    roots: tuple = field(default_factory=tuple)
    key: Any = None
    compiled: Any = None

    @property
    def known(self) -> bool:
        """Whether the structure was found in earlier steps and holds for this one."""
        return self.reusable and not self.following and self.found is not None

    def layout(self, traces: Traces, run: Run, provenance: Provenance | None, objective: Objective) -> Layout:
        """Return the layout of a run: found anew where it was watched, else the known one if it still fits.

        A run that was not watched and turns out to have another structure is laid out as if everything read
        all that was drawn before it, which is unbiased for any program; the next step watches again.
        """
        if provenance is None:
            traces.hidden_draws = self.hidden_draws
            if traces.signature() == self.signature:
                assert self.found is not None
                return self.found
            self.following, self.found = True, None
            return Layout.build(*specify(run, traces, None), objective)
        self.hidden_draws |= traces.hidden_draws
        self.misused.update(provenance.misused)
        layout = Layout.build(*specify(run, traces, provenance), objective)
        signature = traces.signature()
        self.read_at = self.read_at or provenance.read_at
        if provenance.read_at or (self.found is not None and signature != self.signature):
            # Values leave the tensors, or looped particles differ: the structure may differ at every run.
            self.reusable = False
        self.found, self.signature = layout, signature
        return layout


class Structures:
    """The structures of the programs that an ELBO has seen, by kind of arguments."""

    def __init__(self) -> None:
        self._known: OrderedDict[Any, Structure] = OrderedDict()

    def find(self, model: Callable, guide: Callable, args: tuple, kwargs: dict, settings: tuple = ()) -> Structure:
        """Return what is known of the program under these settings, or a new structure that this step is to find."""
        objects: list[Any] = []
        try:
            key = (id(model), id(guide), arguments_kind(args, objects), arguments_kind(kwargs, objects), settings)
            hash(key)
        except TypeError:
            return Structure()
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            if not known.reusable:
                known.following, known.found = True, None
                return known
            if known.found is not None:
                if known.guard is None:
                    # The first run may have built things lazily: the state is looked at after it.
                    known.guard = Guard.of(*known.roots)
                    known.reusable = known.guard is not None
                    known.following, known.found = True, None
                    return known
                if known.guard.holds():
                    known.following = False
                    return known
        fresh = Structure(roots=(model, guide, *objects), key=key)
        self._known[key] = fresh
        self._known.move_to_end(key)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return fresh
