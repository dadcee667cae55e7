"""A site drawn in the body of a compiled loop: to its estimator each step is a site of its own, which takes other values alone.

The steps stand with the particles: what has (particles, steps, ...) on the host's side has (particles * steps, ...) here. A step may take
another value while the steps before it keep theirs, and the steps after it are drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pplgrad.core.alternatives import Values
from pplgrad.core.array_ops import Array, Ops
from pplgrad.core.draw import Finite, HostDraw
from pplgrad.core.mixtures import Mixture
from pplgrad.core.plates import Plate
from pplgrad.core.shapes import aligned, plate_shape


@dataclass(frozen=True)
class LoopSteps:
    """The steps of a loop in which a site is drawn, `count` for each of the `particles`.

    `counted` says whether the site's costs have a dimension of the steps; the site's other plates span `ndim` dimensions.
    """

    ops: Ops
    particles: int
    count: int
    counted: bool
    ndim: int

    @classmethod
    def of(cls, ops: Ops, plates: Sequence[Plate], group: Sequence[Plate], particles: int) -> LoopSteps | None:
        """Return the steps of a site in these plates, whose costs are reduced to those of its `group`; None outside of loops."""
        time = next((plate for plate in plates if plate.time), None)
        if time is None:
            return None
        ndim = len(plate_shape([plate for plate in group if not plate.time]))
        return cls(ops, particles, time.size, time in group, ndim)

    def merged(self, x: Array, at: int = 1) -> Array:
        """Return an array (particles, ..., steps, ...) as (particles * steps, ...), whose steps are in dimension `at`."""
        xp = self.ops.xp
        x = x if at == 1 else xp.moveaxis(x, at, 1)
        return xp.reshape(x, (-1, *x.shape[2:]))

    def at_draw(self, signal: Array) -> Array:
        """Return the signal of the draw, (particles, *plates), as that of each step, (particles * steps, *plates)."""
        if self.counted:
            return aligned(self.ops, self.merged(signal), 1, self.ndim)
        return self.merged(self.ops.xp.broadcast_to(signal[:, None], (self.particles, self.count, *signal.shape[1:])))

    def in_branches(self, signal: Array) -> Array:
        """Return the signal in all branches, (particles, steps * m, *plates), as that in each step's, (particles * steps, m, *plates).

        Where the steps are among the plates, a branch counts with what follows its own step.
        """
        xp, count = self.ops.xp, self.count
        found = xp.reshape(signal, (self.particles, count, -1, *signal.shape[2:]))
        if self.counted:
            own = xp.reshape(self.ops.arange(count, signal), (1, count, 1, 1, *(1,) * (len(found.shape) - 4)))
            found = xp.take_along_axis(found, xp.broadcast_to(own, (*found.shape[:3], 1, *found.shape[4:])), axis=3)[
                :, :, :, 0
            ]
        return aligned(self.ops, xp.reshape(found, (self.particles * count, *found.shape[2:])), 2, self.ndim)

    def branches(self, values: Values) -> Values:
        """Return the m alternatives of each step, (particles * steps, m, ...), as those of the site: number n is of step n // m."""
        xp, m = self.ops.xp, values.count

        def at(numbers: Array) -> Array:
            every = values.at(self.ops.arange(m, numbers))
            return xp.reshape(every, (self.particles, self.count * m, *every.shape[2:]))[:, numbers]

        return replace(values, count=self.count * m, at=at, per_step=m, elements=None)


class StepDraw:
    """`HostDraw` of a site in a loop: the draw of each step."""

    def __init__(self, host: HostDraw, steps: LoopSteps) -> None:
        self._host = host
        self._steps = steps
        self.name, self.event_dim, self.is_vector = host.name, host.event_dim, host.is_vector
        self.value = steps.merged(host.value)

    def finite(self) -> Finite | None:
        """Return the numbers drawn, and how probable each was."""
        found = self._host.finite()
        return None if found is None else found.mapped(self._steps.merged)

    def embed(self, index: Array) -> Array:
        """Return the values that category numbers stand for."""
        return self._host.embed(index)

    def again(self, count: int) -> tuple[Array, Array]:
        """Return further draws of each step after the same steps before it, and their log q."""
        values, log_q = self._host.again(count)
        return self._steps.merged(values, 2), self._steps.merged(log_q, 2)

    def parameters(self) -> Mapping[str, Array] | None:
        """Return the parameters of the site's family, where its draws are independent numbers."""
        found = self._host.parameters()
        return None if found is None else {name: self._steps.merged(x) for name, x in found.items()}

    def ranking(self) -> Array | None:
        """Return the logits of a ranking."""
        found = self._host.ranking()
        return None if found is None else self._steps.merged(found)

    def counts(self, count: int) -> tuple[Array, Array, Array]:
        """Return the consecutive counts around the mean, their log q, and log q of the draw."""
        first, log_probs, own = self._host.counts(count)
        return self._steps.merged(first), self._steps.merged(log_probs), self._steps.merged(own)

    def throws(self) -> Array | None:
        """Return log p of the categories of a Multinomial in each step."""
        found = self._host.throws()
        return None if found is None else self._steps.merged(found)

    def mixture(self) -> Mixture | None:
        """Return the mixture that each step was drawn from."""
        found = self._host.mixture()
        return None if found is None else found.mapped(lambda x, behind: self._steps.merged(x))
