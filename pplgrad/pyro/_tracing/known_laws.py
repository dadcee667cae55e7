"""Constructors of common distributions: a watched step does not watch them, since what they hold is known.

Such a distribution holds its arguments, seen through other shapes, and tensors made of numbers. The exemption is closed-world: for these very
classes, made by the hosts' own code, of plain tensors and numbers. Where the program may catch the error of a check, the check steers it, and is watched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from operator import is_
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import COERCIONS

from pplgrad.pyro._compat import WithoutDispatch, WithoutFunctions, is_hidden, is_wrapped, only_ours
from pplgrad.pyro._tracing.argument_checks import only_one
from pplgrad.pyro._tracing.callers import may_be_caught
from pplgrad.pyro._tracing.watchers import Watcher

_PARAMETERS: dict[Any, tuple[str, str]] = {dist.Bernoulli: ("probs", "logits"), dist.Normal: ("loc", "scale")}
_HOSTS = {dist.Bernoulli: torch.distributions.Bernoulli, dist.Normal: torch.distributions.Normal}
_METHODS = {law: (law.__init__, law.__new__, law.__setattr__, law.__getattribute__) for law in _PARAMETERS}  # type: ignore[misc]
_CODE = {
    law: [
        (vars(where).get, name, vars(where).get(name))
        for where, names in (
            (law, parameters),
            (_HOSTS[law], parameters),
            (sys.modules[_HOSTS[law].__module__], ["broadcast_all"]),
            (torch, ["broadcast_tensors", "tensor"]),
        )
        for name in names
    ]
    for law, parameters in _PARAMETERS.items()
}
"""What makes such a distribution: another function in the place of one of these is not known."""
_CONSTRAINTS = {law: list(law.arg_constraints.values()) for law in _PARAMETERS}
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_NUMBERS = {int, float, bool, type(None)}


def unwatched_constructors(watching: Callable[[], Sequence[Watcher]]) -> Callable[[Callable], Callable]:
    """Return a wrapper of what makes Pyro's distributions, which makes the known ones where nobody watches."""

    def wrapper(make: Callable) -> Callable:
        @wraps(make)
        def made(cls: Any, *args: Any, **kwargs: Any) -> Any:
            names = _PARAMETERS.get(cls)
            watcher = None if is_hidden() else only_one(watching())
            if names is None or watcher is None:
                return make(cls, *args, **kwargs)
            tensors, numbers = [], False
            for x in (*args, *kwargs.values()):
                kind = type(x)
                if kind in _TENSORS and not is_wrapped(x):
                    tensors.append(x)
                elif kind not in _NUMBERS:
                    return make(cls, *args, **kwargs)
                else:
                    numbers |= kind is not bool and x is not None
            if not only_ours(1) or not _is_as_known(cls):
                return make(cls, *args, **kwargs)
            with WithoutFunctions():
                bits = watcher.read(tensors, True)
            if bits is None or (bits and may_be_caught()):
                return make(cls, *args, **kwargs)
            try:
                with WithoutFunctions(), WithoutDispatch():
                    law = make(cls, *args, **kwargs)
            except Exception:
                watcher.escape(bits)  # Whoever catches it knows something of what was checked.
                raise
            if numbers:
                with WithoutFunctions():
                    for name in names:
                        if isinstance(x := vars(law).get(name), torch.Tensor):
                            watcher.result(x, (), 0)
            return law

        return made

    return wrapper


def _is_as_known(cls: Any) -> bool:
    """Return whether a distribution is made and checked by the hosts' code alone."""
    make, new, put, get = _METHODS[cls]
    if not (cls.__init__ is make and cls.__new__ is new and cls.__setattr__ is put and cls.__getattribute__ is get):
        return False
    for find, name, known in _CODE[cls]:
        if find(name) is not known:
            return False
    constraints = cls.arg_constraints
    if type(constraints) is not dict or len(constraints) != len(_CONSTRAINTS[cls]):
        return False
    return not COERCIONS and all(map(is_, constraints.values(), _CONSTRAINTS[cls]))
