"""A messenger that follows a program into the bodies of NumPyro's `scan` and `cond`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from numpyro.primitives import Messenger

from pplgrad.numpyro._compat import (
    control_flow_kind,
    count_steps,
    is_handed_out,
    renamed,
    replace_bodies,
    scopes_inside,
)


@dataclass(frozen=True)
class Flow:
    """Where a site was drawn: in the body of a scan (perhaps one that runs in reverse), or in a branch of `cond`.

    `number` is that of the outermost scan or `cond` around it among those of the program.
    """

    scanned: bool
    reverse: bool = False
    number: int = field(default=0, compare=False)


class FlowMessenger(Messenger):
    """Stands around a program, and a copy of it around each body of the program's control flow.

    NumPyro runs a body under a block and hands its sites out again afterwards, stacked over time for a scan. A body
    does not see the `scope` handlers around it: `name_of` gives a site's name as it is for the outermost copy.
    `flows` says, by that name, where each site inside control flow was drawn; all copies share it.
    """

    changes_draws = False
    """Whether `changed` is filled: NumPyro notes what a body draws before this messenger, inside of it, can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.flows: dict[str, Flow] = {}
        self._parent: FlowMessenger | None = None
        self._flow: Flow | None = None
        self._scopes: list[Any] = []
        self._met = 0
        # Around the body of a scan: the number of the step that runs, if it is asked for.
        self.step: Any = None
        # What was changed of sites after they were drawn: the value, and the distribution if it is another one.
        self.changed: dict[str, tuple[Any, Any]] = {}
        # For each site drawn in a body directly below: whether that body is a scan's.
        self._below: dict[str, bool] = {}

    def copy(self) -> FlowMessenger:
        """Return a messenger that does the same and shares what it records."""
        raise NotImplementedError

    def process_site(self, msg: Any) -> None:
        """Act on a message that is not control flow, before its site is drawn."""

    def enter_bodies(self, msg: Any, inner: FlowMessenger) -> None:
        """Act on a control-flow message whose bodies `inner` already stands around."""

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "control_flow":
            inner = self.copy()
            inner.flows, inner._parent = self.flows, self
            inner._flow = Flow(*control_flow_kind(msg), self._met if self._flow is None else self._flow.number)
            self._met += 1
            inner._scopes = scopes_inside(self)
            replace_bodies(msg, inner._around)
            self.enter_bodies(msg, inner)
            return
        if msg["type"] == "sample":
            self._record(msg["name"])
        self.process_site(msg)

    @property
    def inside(self) -> bool:
        """Whether this messenger stands around a body."""
        return self._flow is not None

    @property
    def nested(self) -> bool:
        """Whether this messenger stands around the body of a scan in the body of another one."""
        return self._scans() > 1

    def _scans(self) -> int:
        around = 0 if self._parent is None else self._parent._scans()
        return around + (self._flow is not None and self._flow.scanned)

    @property
    def running_step(self) -> Any:
        """The number of the scan's step that runs, if it is asked for; None outside of all scans."""
        return self.step if self.step is not None or self._parent is None else self._parent.running_step

    @property
    def runs_in_reverse(self) -> bool:
        """Whether the scan around runs from the last step to the first."""
        if self._flow is not None and self._flow.scanned:
            return self._flow.reverse
        return self._parent is not None and self._parent.runs_in_reverse

    def count_steps(self, msg: Any) -> None:
        """Let a scan's message, whose body this messenger stands around already, tell the number of the step."""

        def note(number: Any) -> None:
            self.step = number

        count_steps(msg, note)

    @property
    def number(self) -> int | None:
        """The number of the outermost scan or `cond` around, None outside of all."""
        return None if self._flow is None else self._flow.number

    def name_of(self, name: str) -> str:
        """Return the name of a site as the outermost copy sees it."""
        if self._parent is None:
            return name
        return self._parent.name_of(renamed(name, self._scopes))

    def is_stacked(self, msg: Any) -> bool:
        """Return whether a site comes out of a scan, after its steps were seen one by one."""
        return is_handed_out(msg) and self._below.get(msg["name"], False)

    def _record(self, name: str) -> None:
        if self._parent is None or self._flow is None:
            return
        self._parent._below[renamed(name, self._scopes)] = self._flow.scanned
        outside = self.name_of(name)
        # A scan counts wherever it stands, since its steps are a dimension of the site's values.
        if self._flow.scanned or outside not in self.flows:
            self.flows[outside] = self._flow

    def _around(self, body: Callable) -> Callable:
        def wrapped(*args: Any) -> Any:
            self.changed = {}
            with self:
                out = body(*args)
            if not self.changes_draws:
                return out
            if self._flow is not None and self._flow.scanned:
                carry, y = out
                return carry, (y, self.changed)
            return out, self.changed

        return wrapped
