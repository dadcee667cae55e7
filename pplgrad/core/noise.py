"""The estimators' own randomness, beside the program's draws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pplgrad.core.array_ops import Array, Ops


class Noise(ABC):
    """Where an estimator draws its own noise for one site.

    Finite noise is asked for as `bernoulli` or `categorical`, so that a test can go through all of its outcomes.
    """

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    @abstractmethod
    def uniform(self, shape: tuple[int, ...], like: Array) -> Array:
        """Return uniform numbers in the open interval (0, 1), of the dtype and device of `like`."""

    def bernoulli(self, probs: Array) -> Array:
        """Return draws that are 1 with the given probabilities and else 0, of the dtype of `probs`."""
        drawn = self.uniform(tuple(probs.shape), probs) < probs
        return self.ops.xp.astype(drawn, probs.dtype)

    def categorical(self, log_probs: Array) -> Array:
        """Return category numbers drawn from normalised log probabilities along the last axis."""
        xp = self.ops.xp
        gumbel = -xp.log(-xp.log(self.uniform(tuple(log_probs.shape), log_probs)))
        return xp.argmax(log_probs + gumbel, axis=-1)


_REPLACED: ContextVar[Callable[[str, Ops], Noise] | None] = ContextVar("pplgrad_replaced_noise", default=None)


@contextmanager
def replaced_noise(make: Callable[[str, Ops], Noise]) -> Iterator[None]:
    """Give every site the noise that `make(site, ops)` returns, instead of the host's."""
    token = _REPLACED.set(make)
    try:
        yield
    finally:
        _REPLACED.reset(token)


def noise_for(site: str, ops: Ops, make: Callable[[str], Noise]) -> Noise:
    """Return the noise of a site: the host's, unless a test has replaced it."""
    replaced = _REPLACED.get()
    return make(site) if replaced is None else replaced(site, ops)
