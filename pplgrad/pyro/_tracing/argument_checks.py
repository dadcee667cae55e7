"""The hosts' checks of arguments and values: a watched step does not watch them, since they keep what they read to themselves.

They are about half of the operations of a small program. The exemption is closed-world: it holds for distributions of torch and Pyro themselves
that hold plain tensors and numbers alone. A check whose failure the program may catch steers the program, and is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from typing import Any, Protocol, TypeVar

import torch

from pplgrad.pyro import _compat
from pplgrad.pyro._compat import NoMode, is_hidden, unwrapped
from pplgrad.pyro._recording import is_recording
from pplgrad.pyro._tracing.callers import may_be_caught

_PLAIN = {type(None), bool, int, float, str, torch.Size}
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_HOSTS = ("torch.distributions.", "pyro.distributions.", "collections.abc", "typing", "builtins")


Seer = TypeVar("Seer")


class Watcher(Protocol):
    """What watches operations, and knows which draws tensors were computed from."""

    def of_these(self, tensors: Iterable[torch.Tensor]) -> int:
        """Return what tensors read, as bits."""

    def escape(self, bits: int) -> None:
        """Note that everything from here on may read these draws."""


def unwatched_checks(watching: Callable[[], Sequence[Watcher]]) -> Callable[[Callable], Callable]:
    """Return a wrapper of a method that checks a distribution, which runs it where nobody watches, if it may."""

    def wrapper(method: Callable) -> Callable:
        @wraps(method)
        def check(law: Any, *args: Any, **kwargs: Any) -> Any:
            if is_hidden():
                return method(law, *args, **kwargs)  # Whoever hid it knows what it reads.
            watcher = only_one(watching())
            held = (*vars(law).values(), *args, *kwargs.values())
            if (
                watcher is None
                or not _compat.exempting
                or not _is_the_hosts(law)
                or not all(type(x) in _PLAIN or is_plain_tensor(x) for x in held)
            ):
                return method(law, *args, **kwargs)
            bits = watcher.of_these(x for x in held if type(x) in _TENSORS)
            if bits and may_be_caught():
                return method(law, *args, **kwargs)
            try:
                with NoMode():
                    return method(law, *args, **kwargs)
            except Exception:
                watcher.escape(bits)  # Whoever catches it knows something of what was checked.
                raise

        return check

    return wrapper


def only_one(watchers: Sequence[Seer]) -> Seer | None:
    """Return who watches, if it can be told what was computed where no mode saw it: one alone, and no step is recorded."""
    return watchers[0] if len(watchers) == 1 and not is_recording() else None


def is_plain_tensor(x: Any) -> bool:
    """Return whether something is a tensor of no subclass, outside of `torch.vmap` and `torch.func`."""
    return type(x) in _TENSORS and unwrapped(x) is x


def _is_the_hosts(law: Any) -> bool:
    """Return whether all code that a check of a distribution runs is the hosts'."""
    kind: Any = type(law)
    kinds: list[Any] = [type(c) for c in _constraints(law)]
    return _is_hosts(kind) and all(map(_is_hosts, kinds))


def _constraints(law: Any) -> Iterable[Any]:
    found = law.arg_constraints
    return found.values() if isinstance(found, dict) else ()


@cache
def _is_hosts(kind: Any) -> bool:
    return all(base.__module__.startswith(_HOSTS) for base in kind.__mro__)
