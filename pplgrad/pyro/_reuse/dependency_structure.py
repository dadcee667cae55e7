"""The dependency structure of a program: found by provenance once, and used again while the program is the same.

That it is the same is what a guard says (`_reuse/guards.py`). As a second line a structure that is reused is found anew every now and then,
and compared with what is used: a difference is a fault of the guard, or of a program that hides its state from it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pplgrad.core.estimator import Estimator
from pplgrad.core.objectives import Objective
from pplgrad.core.program import Program
from pplgrad.core.sites import CostSpec, Run, SiteSpec
from pplgrad.engine.layout import Layout
from pplgrad.errors import ConfigurationError, ProgramError
from pplgrad.pyro._reuse.guards import Guard, arguments_kind
from pplgrad.pyro._reuse.reads import which_are_one_of
from pplgrad.pyro._tracing.differentiability import lost_paths
from pplgrad.pyro._tracing.operations import tensors_in
from pplgrad.pyro._tracing.particle_trace import Traces, specify
from pplgrad.pyro._tracing.provenance import Provenance

_KEPT = 32
_EVERY = 500
"""From here on so many steps lie between two that are watched again; before, their number doubles."""
_SURELY = 16
"""Up to here compiled steps are looked at like others; later ones as long as that takes no more than a `_SHARE` of the process's time.

That is what it computes, not what it waits for: a program that steps now and then would be looked at each time.
"""
_SHARE = 0.02


@dataclass(frozen=True)
class Uses:
    """How far a structure was known when a training was saved (0: not; 1: found; 2: guarded), how often it was used and watched anew.

    `step` says how its steps were taken: "eager", "compiled", or "stays eager" where nothing is to be compiled any more.
    """

    stage: int = 0
    reuses: int = 0
    watched: int = 0
    step: str = "eager"


@dataclass
class Structure:
    """What is known of a program for one kind of arguments; `following` says whether this step watches it.

    `read_at` is the line where a tensor's value left the tensors, `compiled` the step recorded under this structure, `reuses`
    the number of steps that used it, `watched` how often it was watched anew, `apart` whether particles and branches run one by one, because they meet in one run.
    """

    following: bool = True
    reusable: bool = True
    hidden_draws: bool = False
    read_at: str | None = None
    misused: dict[str, str] = field(default_factory=dict)
    cut: dict[str, str] = field(default_factory=dict)
    lost: dict[str, tuple[str, str]] = field(default_factory=dict)
    signature: tuple | None = None
    found: Layout | None = None
    guard: Guard | None = None
    roots: tuple = field(default_factory=tuple)
    key: Any = None
    met: tuple | None = None
    compiled: Any = None
    reuses: int = 0
    watched: int = 0
    apart: bool = False
    watching_again: bool = False
    warns: bool = False
    since: float = field(default_factory=time.process_time)
    looking: float = 0.0
    built: Layout | None = None
    """The last layout, which `watch` does not forget: a program that is always watched has the same one, as a rule."""

    @property
    def second_run_due(self) -> bool:
        """Whether a watched step is to be compared with a second run. Where a program is watched at every step, only some are."""
        return self.watched & (self.watched - 1) == 0 or self.watched % _EVERY == 0

    @property
    def known(self) -> bool:
        """Whether the structure was found in earlier steps and holds for this one."""
        return self.reusable and not self.following and self.found is not None

    def reuse(self) -> None:
        """Use the structure for this step, or watch the program again if it is time to."""
        self.reuses += 1
        due = self.reuses & (self.reuses - 1) == 0 if self.reuses < _EVERY else self.reuses % _EVERY == 0
        if self.compiled is not None and self.reuses > _SURELY:
            # Watching takes hundreds of compiled steps' time. What is looked at in the place of a step, with other draws, may not depend on time.
            seldom = self.reuses & (self.reuses - 1) == 0
            due = seldom if self.compiled.writes else due and self._has_time()
        self.watching_again = self.following = self.reuses >= 2 and due
        self.hidden_draws &= not self.following

    def _has_time(self) -> bool:
        now = time.process_time()
        if now < self.since:  # A forked process counts from zero again.
            self.since, self.looking = now, 0.0
            return True
        return self.looking < _SHARE * (now - self.since)

    def looked(self, seconds: float) -> None:
        """Note that a compiled step was looked at beside the step that follows now."""
        self.looking += seconds
        self.following = self.watching_again = False

    def watch(self) -> None:
        """Find the structure anew in this step."""
        self.watched += 1
        self.following, self.watching_again, self.found, self.hidden_draws = True, False, None, False

    def uses(self, stays_eager: bool) -> Uses:
        """Return how far the structure is known and how often it was used."""
        stage = 0 if self.found is None else 1 + (self.guard is not None)
        step = "stays eager" if stays_eager else "eager" if self.compiled is None else "compiled"
        return Uses(stage, self.reuses, self.watched, step)

    def reached(self, uses: Uses) -> bool:
        """Whether this is known as far as a structure that was used so often."""
        now = self.uses(False)
        compiled = now.step == "compiled" or uses.step != "compiled"
        return compiled and now.stage >= uses.stage and now.reuses >= min(1, uses.reuses)

    def go_on(self, uses: Uses) -> None:
        """Count on from the numbers of a structure that was used before."""
        self.reuses, self.watched = uses.reuses, uses.watched
        if uses.step != "compiled":
            self.compiled = None

    def run_sequentially(self, message: str) -> None:
        """Run particles and branches one by one from here on, and say so."""
        self.apart, self.compiled = True, None
        self.watch()
        warnings.warn(message, UserWarning, stacklevel=6)

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
            return self._built(*specify(run, traces, None), objective)
        self.hidden_draws |= traces.hidden_draws
        self.misused.update(provenance.misused)
        self.cut.update(provenance.cut(run.costs))
        self.lost.update(lost_paths(traces, run, provenance))
        layout = self._built(*specify(run, traces, None if traces.unseen else provenance), objective)
        signature = traces.signature()
        if traces.unseen or provenance.unfollowed_at:
            # Something came by a way that cannot be followed: charged to all that was drawn before, and looked at once more.
            self.following, self.found = True, None
            return layout
        if self.watching_again:
            self._compare(layout, signature, provenance)
        self.read_at = self.read_at or provenance.read_at
        if provenance.read_at or (self.found is not None and signature != self.signature):
            # Values leave the tensors, or looped particles differ: the structure may differ at every run.
            self.reusable = False
        self.found, self.signature = layout, signature
        return layout

    def _built(self, sites: Sequence[SiteSpec], costs: Sequence[CostSpec], objective: Objective) -> Layout:
        """Return the layout of sites and costs: the last one if it is of the same. A structure has one objective alone (`settings`)."""
        if self.built is None or (self.built.sites, self.built.costs) != (sites, costs):
            self.built = Layout.build(sites, costs, objective)
        return self.built

    def _compare(self, layout: Layout, signature: tuple, provenance: Provenance) -> None:
        """Say that the program changed where the guard saw nothing; nothing of this step has been stored yet."""
        assert self.found is not None
        changed = _difference(self.found, layout)
        if changed is None and provenance.read_at is not None:
            changed = f"Python reads the value of a tensor at {provenance.read_at} now, and did not before"
        if changed is None and signature != self.signature:
            changed = "the kinds, shapes or plates of its sites are others now"
        if changed is not None:
            self._say(changed)

    def compare_values(self, now: float, recorded: float) -> None:
        """Say that a program computes another loss than what was recorded of it does from the same draws."""
        if math.isfinite(now) and not math.isclose(now, recorded, rel_tol=1e-3, abs_tol=1e-3):
            self._say(f"its loss is {-now:.6g} now, where the step that was recorded computes {-recorded:.6g}")

    def _say(self, changed: str) -> None:
        self.reusable, self.compiled = False, None
        message = (
            f"The program is not the one whose structure was reused for {self.reuses} steps: {changed}. It reads Python state that "
            "changed in a way that cannot be watched (an attribute of an extension's object, a file, another process); pass it as "
            "an argument, or use TraceGrad_ELBO(reuse_structure=False), which watches every step."
        )
        if not self.warns:
            raise ProgramError(message)
        warnings.warn(f"{message} From here on every step is watched.", UserWarning, stacklevel=2)


def _difference(before: Layout, now: Layout) -> str | None:
    """Return in which site two structures of a program differ, in words."""
    for old, new in zip([*before.sites, *before.costs], [*now.sites, *now.costs], strict=False):
        if old != new:
            return _described(old, new)
    if len(before.sites) != len(now.sites) or len(before.costs) != len(now.costs):
        return "it has other sites now"
    return None


def _described(old: Any, new: Any) -> str:
    if old.name != new.name:
        return f"site '{new.name}' stands where site '{old.name}' stood"
    if old.reads != new.reads:
        return f"site '{old.name}' reads {_listed(new.reads)} now, and read {_listed(old.reads)} before"
    return f"site '{old.name}' has other plates or another estimator now"


def _listed(names: Sequence[str] | Any) -> str:
    return ", ".join(f"'{name}'" for name in names) or "no draw"


def _in_words(key: tuple) -> str:
    """Return the kind of a program's arguments, and the settings, in words that are the same in every process."""
    return repr(key[2:])


class Structures:
    """The structures of the programs that an ELBO has seen, by kind of arguments.

    `reuse` is the ELBO's `reuse_structure`; `estimators` are its own, whose baselines may call the user's functions.
    """

    def __init__(self, reuse: bool | str = True, estimators: Iterable[Estimator] = ()) -> None:
        if reuse not in (True, False, "warn"):
            raise ConfigurationError(
                f"TraceGrad_ELBO(reuse_structure={reuse!r}): write True, False (watch every step), or 'warn' (a warning, and not an "
                "error, where a reused structure turns out to be another)."
            )
        self.reuse = reuse
        self._estimators = tuple(estimators)
        self._known: OrderedDict[Any, Structure] = OrderedDict()
        self._unfollowed: dict[tuple[int, int], set[str]] = {}
        self.resumed: dict[tuple[int, int, str], Uses] = {}
        """What was known, when a training was saved, of kinds of arguments that were not met since."""

    def unfollowed(self, program: Program) -> set[str] | None:
        """Return the sites of a program whose branches have turned out to need a run of their own; None where all have one."""
        if self.reuse is False:
            return None
        if len(self._unfollowed) > _KEPT:  # Programs that are made anew at every step.
            self._unfollowed.clear()
        return self._unfollowed.setdefault((id(program.model), id(program.guide)), set())

    def empty_copy(self, estimators: Iterable[Estimator]) -> Structures:
        """Return what knows of no program yet, for an ELBO with these estimators."""
        return Structures(self.reuse, estimators)

    def state(self, model: Any, guide: Any, eager: Collection[Any]) -> dict[str, Any]:
        """Return in plain data how often each structure of a program was used; `eager` are the keys of those that stay eager."""
        where = (id(model), id(guide))
        uses = {key[2]: found for key, found in self.resumed.items() if key[:2] == where}
        uses |= {_in_words(key): x.uses(key in eager) for key, x in self._known.items() if key[:2] == where}
        return {
            "uses": {words: asdict(found) for words, found in uses.items()},
            "unfollowed": sorted(self._unfollowed.get(where, ())),
        }

    def resume(self, model: Any, guide: Any, state: Mapping[str, Any]) -> None:
        """Forget what is known of a program; what was known when a training was saved is found again before it is used."""
        where = (id(model), id(guide))
        self._known = OrderedDict((key, x) for key, x in self._known.items() if key[:2] != where)
        self.resumed = {key: x for key, x in self.resumed.items() if key[:2] != where}
        self.resumed |= {(*where, words): Uses(**found) for words, found in state["uses"].items()}
        self._unfollowed[where] = set(state["unfollowed"])

    def forget(self, program: Program, settings: tuple = ()) -> None:
        """Forget what is known of a program for this kind of arguments."""
        self._known.pop(self._key(program, settings, []), None)

    def waiting(self, program: Program, settings: tuple = ()) -> Uses | None:
        """Return what was known of a program before it was resumed, if it was not met since."""
        if not self.resumed or (key := self._key(program, settings, [])) is None:
            return None
        return self.resumed.pop((*key[:2], _in_words(key)), None)

    def peek(self, program: Program, settings: tuple = ()) -> Structure | None:
        """Return what is known of a program, without using it."""
        return self._known.get(self._key(program, settings, []))

    @staticmethod
    def _key(program: Program, settings: tuple, objects: list[Any]) -> Any:
        """Return by what a program's structure is known, or None where its arguments cannot be told apart."""
        try:
            kinds = (arguments_kind(program.args, objects), arguments_kind(program.kwargs, objects))
            tensors = tensors_in((program.args, program.kwargs))
            key = (id(program.model), id(program.guide), *kinds, which_are_one_of(tensors), settings)
            hash(key)
        except TypeError:
            return None
        return key

    def find(self, program: Program, settings: tuple = ()) -> Structure:
        """Return what is known of the program under these settings, or a new structure that this step is to find."""
        objects: list[Any] = []
        key = self._key(program, settings, objects)
        if key is None:
            return Structure(reusable=False)
        tensors = tensors_in((program.args, program.kwargs))
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            if not known.reusable:
                known.watch()
                return known
            if known.found is not None:
                if known.guard is None:
                    # The first run may have built things lazily: the state is looked at after it.
                    known.guard = Guard.of(*known.roots)
                    known.reusable = known.guard is not None
                    known.met = None if known.guard is None else known.guard.meets(tensors)
                    known.watch()
                    return known
                if known.guard.holds() and known.guard.meets(tensors) == known.met:
                    known.reuse()
                    return known
        fresh = Structure(
            roots=(program.model, program.guide, *self._estimators, *objects),
            key=key,
            reusable=self.reuse is not False,
            warns=self.reuse == "warn",
        )
        if known is not None:
            fresh.apart = known.apart
            if not known.reuses:
                # A program that changes at every step: it counts on.
                fresh.watched = known.watched + 1
        self._known[key] = fresh
        self._known.move_to_end(key)
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return fresh
