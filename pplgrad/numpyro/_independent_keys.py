"""Keys of sites and steps that do not wait for one another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpyro
from numpyro.infer.autoguide import AutoGuide
from numpyro.primitives import Messenger

from pplgrad.errors import ConfigurationError
from pplgrad.numpyro._compat import count_steps, is_scan, replace_bodies
from pplgrad.numpyro._compat_jax import reused

F = TypeVar("F", bound=Callable[..., Any])

_HOSTS = 2**32 - 1
"""The number under which a loop's host has its key; no body asks for so many."""


def independent_keys(fn: F) -> F:
    r"""Give each site, and each step of a `scan`, a key of its own that waits for no other.

    NumPyro's `seed` and `scan` split a key at each site and step, one after the other. Under `independent_keys` the n-th site has the key
    fold_in(k, n), and the n-th site in step t of a `scan` the key fold_in(fold_in(k', n), t), where k is one key of the handlers around and
    k' that of the loop. The draws have the same law, and are others than without it. Wrap a program's guide, and its model where that draws
    sites of its own. What elements a minibatch has (`plate(subsample_size=...)`) is left to the handlers around, since the particles of one
    bound share it. It works under all handlers and ELBOs, but for the objective `FIVO`, which takes the steps of a loop by itself and
    refuses it.

    Args:
        fn: a model or a guide. Wrap it before `config_estimators` does.

    Returns:
        The same program under other keys.

    Shapes:
        Any: nothing about sites, plates or steps changes.

    Raises:
        ConfigurationError: fn is an autoguide, whose methods would be lost.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> guide = independent_keys(lambda: numpyro.sample("z", dist.Bernoulli(0.5)))
        >>> numpyro.handlers.seed(guide, 0)().shape
        ()

    References:
        Salmon, Moraes, Dror and Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3": numbers by counters, which these keys are.
    """
    if isinstance(fn, AutoGuide):
        raise ConfigurationError(
            f"independent_keys cannot wrap {type(fn).__name__}, whose methods the wrapper does not have; use the autoguide as it is."
        )

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        key = numpyro.prng_key()
        if key is None:  # Nothing is drawn: all values are given.
            return fn(*args, **kwargs)
        with IndependentKeys(key):
            return fn(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


class IndependentKeys(Messenger):
    """Gives messages that ask for a key one by their number; and, in the body of a scan, by the number of the step."""

    def __init__(self, key: jax.Array) -> None:
        super().__init__()
        self._key = key
        self._met = 0
        # Around the body of a scan: the number of the step that runs.
        self._step: Any = None

    def process_message(self, msg: Any) -> None:
        if msg["type"] not in ("sample", "prng_key", "control_flow"):
            return
        if msg["kwargs"].get("rng_key") is not None or msg["value"] is not None:
            return
        key = jax.random.fold_in(reused(self._key), self._met)
        self._met += 1
        if self._step is not None:
            key = jax.random.fold_in(key, self._step)
        if msg["type"] == "control_flow" and is_scan(msg):
            IndependentKeys(key)._enter(msg)
            # What the host splits for itself is another branch: its first two keys would be those of the first two messages.
            key = jax.random.fold_in(reused(key), _HOSTS)
        msg["kwargs"]["rng_key"] = reused(key)

    def _enter(self, msg: Any) -> None:
        """Stand around the body of a scan's message, and let it count its steps."""
        replace_bodies(msg, self._around)
        count_steps(msg, self._begin)

    def _around(self, body: Callable) -> Callable:
        def step(carry: Any, x: Any) -> Any:
            with self:
                return body(carry, x)

        return step

    def _begin(self, number: Any) -> None:
        self._step, self._met = number, 0
