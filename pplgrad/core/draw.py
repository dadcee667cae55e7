"""The draw of one site as an estimator sees it, whatever the host's shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from pplgrad.core.alternatives import ElementValues, Values
from pplgrad.core.array_ops import Array, Ops, bounded, chosen, few_categories, is_possible
from pplgrad.core.mixtures import Mixture
from pplgrad.core.noise import Noise
from pplgrad.core.plates import Plate
from pplgrad.core.shapes import Shape, to_shape
from pplgrad.core.site_info import SiteInfo
from pplgrad.errors import EstimatorError


@dataclass(frozen=True)
class Finite:
    """A draw whose elements have finitely many values; B is the batch shape, N are the independent elements of the event.

    N is E for a Bernoulli with `to_event`, and nothing for a one-hot vector or a subset. What is not asked for is not computed.
    """

    index: Array
    """The numbers drawn, (particles, *B, *N)."""
    categories: int
    log_probs: Callable[[], Array]
    """The log probabilities of all values, with their gradient: (particles, *B, *N, categories)."""
    odds: Callable[[], Array] | None = None
    """The log odds of the second of two values, with their gradient, of the shape of `index`; ±∞ where one is impossible.

    None where the law does not have them as such.
    """
    uniform: Callable[[], Array] | None = None
    """The uniform numbers u by which a Bernoulli was drawn, of the shape of `index`: 1 where u < p. None where they are not known."""

    def mapped(self, change: Callable[[Array], Array]) -> Finite:
        """Return the draw with another order or shape of its leading dimensions."""

        def changed(part: Callable[[], Array] | None) -> Callable[[], Array] | None:
            return None if part is None else lambda: change(part())

        log_probs, odds, uniform = map(changed, (self.log_probs, self.odds, self.uniform))
        assert log_probs is not None
        return Finite(change(self.index), self.categories, log_probs, odds, uniform)


class HostDraw(Protocol):
    """What a plug-in tells of the draw at one site; B is the batch shape, E the event shape."""

    name: str
    value: Array
    """The value drawn, of shape (particles, *B, *E)."""
    event_dim: int
    is_vector: bool
    """Whether the value of one element is a vector: one-hot, a subset, a ranking."""

    def finite(self) -> Finite | None:
        """Return the draw as one among finitely many values of each element, or None if it is not."""

    def embed(self, index: Array) -> Array:
        """Return the values (particles, m, *B, *E) that category numbers (particles, m, *B, *N) stand for."""

    def again(self, count: int) -> tuple[Array, Array]:
        """Return `count` more draws, (particles, count, *B, *E), and their log q with its gradient, (particles, count, *B).

        `count` is what the site's estimator names as `num_resamples`.
        """

    def parameters(self) -> Mapping[str, Array] | None:
        """Return the parameters of a family of independent numbers, each (particles, *B, *E), by NumPyro's names.

        None for a family that no estimator asks for. Of a law of counts these are the parameters along which the derivative of its
        distribution function is known, or None: of a Poisson `rate`; of successes before so many `failures`, and among so many
        `trials`, that number, and `probs` or `logits` of a success. No gradient reaches the numbers of failures and trials.
        """

    def ranking(self) -> Array | None:
        """Return the logits (particles, *B, n) of a ranking or a permutation matrix, with their gradient; None for other distributions."""

    def counts(self, count: int) -> tuple[Array, Array, Array]:
        """Return the first of `count` consecutive counts around the mean, log q of each with its gradient, and log q of the draw.

        They have shape (particles, *B, *E), with the counts of the second in one more dimension behind. The first of them does not
        depend on the draw. Log q is −inf outside the support. `count` is what the site's estimator names as `num_counts`.
        """

    def throws(self) -> Array | None:
        """Return log p of the categories of a Multinomial, with its gradient, of the value's shape; None for other laws."""

    def mixture(self) -> Mixture | None:
        """Return the mixture that the value was drawn from, whose arrays have (particles, *B, *N) in front; None for other laws."""


class Draw:
    """The draw of one site as estimators see it: (particles, *plates, elements).

    Elements are independent given the parents, and share their downstream cost: the entries of an event, of a batch
    dimension that no plate declares, and of a plate that a cost downstream does not have.
    """

    def __init__(
        self,
        ops: Ops,
        host: HostDraw,
        plates: Sequence[Plate],
        shape: Shape,
        noise: Noise,
        score: Array,
        learned: Callable[[str, Any], Array],
        starts: Callable[[int, int], Mapping[str, Any]],
        differentiable: bool = False,
    ) -> None:
        self.ops = ops
        self.name = host.name
        self.noise = noise
        self.score = to_shape(ops, score, shape)
        """log q of the draw, with its gradient: (particles, *plates)."""
        self.differentiable = differentiable
        """Whether branches can be differentiated along other values of the site: no site that follows has a score."""
        self._learned = learned
        self._starts = starts
        self._host = host
        self._plates = plates
        self._shape = shape

    @cached_property
    def learned(self) -> Mapping[str, Array]:
        """Return what the estimator learns at the site, by name."""
        count = self._host.value.shape[-1] ** self._element_dims if self.is_ranking else self.categories
        starts = self._starts(self.event_elements, count)
        return {name: self._learned(name, start) for name, start in starts.items()}

    @property
    def site(self) -> SiteInfo:
        """Return what is known of the site by now: with all elements that share their cost, and nothing else for granted."""
        if not self.is_finite:
            return SiteInfo(self.name, "its distribution", False, True, 1)
        # Other vectors that are one value, such as subsets, are in general not as long as they are many.
        is_weights = self._host.is_vector and self._host.value.shape[-1] == self.categories
        return SiteInfo(
            self.name,
            "OneHotCategorical" if is_weights else "its distribution",
            has_rsample=False,
            is_discrete=True,
            particles=1,
            categories=self.categories,
            relaxable=is_weights,
            elements=self.index.shape[-1],
        )

    @cached_property
    def _mixture(self) -> Mixture | None:
        return self._host.mixture()

    @cached_property
    def _throws(self) -> Array | None:
        return self._host.throws()

    @property
    def is_thrown(self) -> bool:
        """Return whether an element is the counts of a Multinomial."""
        return self._throws is not None

    @property
    def throws(self) -> Array:
        """Return log p of the categories of a Multinomial, with its gradient: (particles, *plates, elements, categories)."""
        if self._throws is None:
            raise EstimatorError(f"Site '{self.name}' is no Multinomial.")
        return self._axes.gather(self.ops.xp, self._throws, 1)

    @property
    def _element_dims(self) -> int:
        """The number of dimensions of the value of one element."""
        if self.is_matrix:
            return 2
        if self._host.is_vector or self.is_thrown:
            return 1
        return 0 if self._mixture is None else self._mixture.event_dim

    @cached_property
    def mixture(self) -> Mixture:
        """Return the mixture that each element was drawn from: its arrays have (particles, *plates, elements) in front."""
        if self._mixture is None:
            raise EstimatorError(f"Site '{self.name}' is not a mixture whose components are known.")
        return self._mixture.mapped(lambda x, behind: self._axes.gather(self.ops.xp, x, 1))

    @property
    def event_elements(self) -> int:
        """Return the number of elements of the event, the last of the elements; those of loose dimensions come before."""
        shape, batch = self._host.value.shape, len(self._host.value.shape) - self._host.event_dim
        return math.prod(shape[batch : len(shape) - self._element_dims])

    @property
    def is_finite(self) -> bool:
        """Return whether every element has finitely many values."""
        return self._listed is not None

    @cached_property
    def _listed(self) -> Finite | None:
        return self._host.finite()

    @property
    def _finite(self) -> Finite:
        if self._listed is None:
            raise EstimatorError(f"Site '{self.name}' does not have finitely many values.")
        return self._listed

    @cached_property
    def _axes(self) -> _Axes:
        value = self._host.value
        shape = tuple(value.shape[1 : len(value.shape) - self._element_dims])
        events = len(shape) - (len(value.shape) - 1 - self._host.event_dim)
        return _Axes.of(shape, self._plates, self._shape, events)

    @property
    def categories(self) -> int:
        """Return how many values each element has."""
        return self._finite.categories

    @cached_property
    def log_probs(self) -> Array:
        """Return log q of every category, with its gradient, of shape (particles, *plates, elements, categories).

        That of an impossible category is a constant far below all others, whose exponential is 0.
        """
        return bounded(self.ops.xp, self._axes.gather(self.ops.xp, self._finite.log_probs(), 1))

    @cached_property
    def possible(self) -> Array:
        """Return whether each category can be drawn, (particles, *plates, elements, categories)."""
        return is_possible(self.ops.xp, self.log_probs)

    def where_possible(self, x: Array) -> Array:
        """Return numbers of the categories, (particles, m, *plates, elements, categories), with 0 for impossible ones.

        Both are 0 where a pair with known log odds has one possible value: what is moved along either comes to nothing.
        """
        if self._odds is None:
            return self.ops.xp.where(self.possible[:, None], x, self.ops.xp.zeros_like(x))
        certain = self._are_certain
        return x if certain is None else self.ops.xp.where(certain[:, None, ..., None], self.ops.xp.zeros_like(x), x)

    @cached_property
    def index(self) -> Array:
        """Return the number of the category drawn, of shape (particles, *plates, elements)."""
        return self._axes.gather(self.ops.xp, self._finite.index, 1)

    @cached_property
    def _ranked(self) -> Array | None:
        return self._host.ranking()

    @property
    def is_ranking(self) -> bool:
        """Return whether every element is a ranking."""
        return self._ranked is not None

    @property
    def is_matrix(self) -> bool:
        """Return whether every element is a ranking that is drawn as a permutation matrix."""
        return self._ranked is not None and len(self._host.value.shape) > len(self._ranked.shape)

    @cached_property
    def ranking_logits(self) -> Array:
        """Return the logits of the items that are ranked, with their gradient: (particles, *plates, elements, n)."""
        assert self._ranked is not None
        return self._axes.gather(self.ops.xp, self._ranked, 1)

    @cached_property
    def ranking(self) -> Array:
        """Return the rankings drawn, (particles, *plates, elements, n)."""
        value = self._host.value
        return self._axes.gather(self.ops.xp, self.ops.xp.argmax(value, axis=-1) if self.is_matrix else value, 1)

    @cached_property
    def logits(self) -> Array:
        """Return the log odds of the second of two categories, with their gradient: (particles, *plates, elements).

        Where one of the two is impossible nothing is left to estimate: the log odds there are the constant 0, so that what
        they multiply counts for nothing.
        """
        if self.categories != 2:
            raise EstimatorError(f"Site '{self.name}' is not binary any more; it has {self.categories} values.")
        xp = self.ops.xp
        if self._odds is not None:
            certain = self._are_certain
            return self._odds if certain is None else xp.where(certain, xp.zeros_like(self._odds), self._odds)
        both = self.possible[..., 0] & self.possible[..., 1]
        return xp.where(both, self.odds, xp.zeros_like(self.odds))

    @property
    def odds(self) -> Array:
        """Return the same, very large or infinite where one of the two is impossible."""
        if self._odds is not None:
            return self._odds
        first, second = self.ops.xp.unstack(self.log_probs, axis=-1)
        return second - first

    @cached_property
    def _odds(self) -> Array | None:
        """The log odds of the second of two values, ±∞ where one is impossible, if the law has them as such."""
        odds = self._finite.odds
        return None if odds is None else self._axes.gather(self.ops.xp, odds(), 1)

    @cached_property
    def _are_certain(self) -> Array | None:
        """Whether elements with known log odds have one possible value; None if none of them is known to."""
        assert self._odds is not None
        return None if self.ops.known_finite(self._odds) else ~self.ops.xp.isfinite(self._odds)

    def uniform(self, probs: Array) -> Array | None:
        """Return the uniform numbers by which binary elements were drawn, given the probabilities of 1, or None if they are not known.

        They lie below p where the draw is 1. One that does not, because something else has put the value there, is moved to the right side of p.
        """
        if self._finite.uniform is None:
            return None
        xp, is_one = self.ops.xp, self.index == 1
        u = self._axes.gather(xp, self._finite.uniform(), 1)
        u = xp.clip(u, min=xp.finfo(u.dtype).tiny)
        moved = xp.where(is_one, probs * (u - probs) / (1 - probs), probs + (1 - probs) * u / probs)
        return xp.where((u < probs) == is_one, u, moved)

    def embed(self, index: Array) -> Array:
        """Return the site's values at category numbers (particles, m, *plates, elements).

        An element whose category is impossible keeps the draw's: the program never runs at a value that the site cannot take,
        where a cost may be infinite or undefined. Whatever the estimator makes of that cost is multiplied by probability 0.
        """
        own = self.index[:, None]
        if self._odds is None:
            index = self.ops.xp.where(self._of_category(self.possible, index), index, own)
        elif self._are_certain is not None:
            index = self.ops.xp.where(self._are_certain[:, None], own, index)
        return self._host.embed(self._axes.scatter(self.ops.xp, index, 2))

    def changed_one_by_one(self, others: Array) -> Values:
        """Return alternatives of the site in which one element takes one of its other values: number e · m + j gives element e its value j.

        `others` has shape (particles, m, *plates, elements), with the dimensions of an element's value behind.
        """
        xp, behind, each = self.ops.xp, self._element_dims, others.shape[1]
        own = self._axes.gather(xp, self._host.value, 1)[:, None]

        def at(numbers: Array) -> Array:
            here = self.is_element(numbers // each)
            here = xp.reshape(here, (*here.shape, *(1,) * behind))
            taken = others if each == 1 else xp.take(others, numbers % each, axis=1)
            return self._axes.scatter(xp, xp.where(here, taken, own), 2, behind)

        every = ElementValues(self._axes.scatter(xp, others, 2, behind), self._axes.elements)
        return Values(math.prod(self._axes.elements_shape) * each, at, elements=every)

    def embed_each(self, index: Array) -> Array:
        """Return the values of elements at category numbers, both (particles, m, *plates, elements), an element's own dimensions behind."""
        return self._axes.gather(self.ops.xp, self.embed(index), 2)

    def numbered(self, index: Array) -> Array:
        """Return category numbers (particles, m, *plates, elements), impossible ones among them, as (particles, m, *B, *N)."""
        return self._axes.scatter(self.ops.xp, index, 2)

    def embed_weights(self, weights: Array) -> Array:
        """Return the site's relaxed values for weights (particles, m, *plates, elements, categories)."""
        placed = self._axes.scatter(self.ops.xp, weights, 2, behind=1)
        if self.is_matrix:
            return self.ops.xp.reshape(placed, (*placed.shape[:-1], *self._host.value.shape[-2:]))
        return placed if self._host.is_vector else placed[..., 1]

    @property
    def value(self) -> Array:
        """Return the numbers drawn, (particles, *plates, elements), of a family of independent numbers."""
        return self._axes.gather(self.ops.xp, self._host.value, 1)

    def is_element(self, numbers: Array) -> Array:
        """Return whether each element is the one of that number, (1, len(numbers), *plates, elements), with plates of size 1."""
        sizes = self._axes.shape
        elements = math.prod(self._axes.sizes) // math.prod(sizes)
        places = self.ops.arange(elements, self._host.value)
        return self.ops.xp.reshape(numbers[:, None] == places, (1, -1, *(1 for _ in sizes), elements))

    def of_elements(self, x: Array) -> Array:
        """Return an array of the shape of the site's value, (particles, *B, *E), by elements: (particles, *plates, elements, ...)."""
        return self._axes.gather(self.ops.xp, self.ops.xp.reshape(x, self._host.value.shape), 1)

    def place(self, value: Array) -> Array:
        """Return the site's values for numbers (particles, m, *plates, elements): undo `value`.

        Of a mixture or a Multinomial these are the values of elements, with their own dimensions behind.
        """
        return self._axes.scatter(self.ops.xp, value, 2, 0 if self._host.is_vector else self._element_dims)

    @cached_property
    def parameters(self) -> Mapping[str, Array]:
        """Return the parameters of a family of independent numbers, with their gradient: (particles, *plates, elements)."""
        found = self._host.parameters()
        if found is None:
            raise EstimatorError(f"Site '{self.name}' is of a family whose parameters are not known.")
        return {name: self._axes.gather(self.ops.xp, x, 1) for name, x in found.items()}

    @property
    def has_parameters(self) -> bool:
        """Return whether `parameters` are known."""
        return self._host.parameters() is not None

    def counts(self, count: int) -> tuple[Array, Array, Array]:
        """Return the first of `count` consecutive counts around the mean, their log q, and log q of the draw, element by element.

        Shapes: (particles, *plates, elements), with the counts of the second in one more dimension behind. Both logarithms carry
        gradient; that of an impossible count is a constant far below all others, whose exponential is 0.
        """
        xp = self.ops.xp
        first, log_probs, own = (self._axes.gather(xp, x, 1) for x in self._host.counts(count))
        return self.ops.stop_gradient(first), bounded(xp, log_probs), own

    def again(self, count: int) -> tuple[Array, Array]:
        """Return `count` more draws of the site at the same parents, and their log q with its gradient.

        The draws have shape (particles, count, *B, *E), as alternatives have; log q has (particles, count, *plates).
        """
        xp = self.ops.xp
        if self.is_finite:
            index = self.again_index(count)
            return self.embed(index), xp.sum(self.log_q(index), axis=-1)
        values, log_q = self._host.again(count)
        flat = to_shape(self.ops, xp.reshape(log_q, (-1, *log_q.shape[2:])), self._shape)
        return values, xp.reshape(flat, (*log_q.shape[:2], *flat.shape[1:]))

    def log_q(self, index: Array) -> Array:
        """Return log q of category numbers, with its gradient: both of shape (particles, m, *plates, elements)."""
        return self._of_category(self.log_probs, index)

    def _of_category(self, table: Array, index: Array) -> Array:
        """Return what a table of all categories, (particles, *plates, elements, categories), has for numbers (particles, m, ...)."""
        xp = self.ops.xp
        few = few_categories(xp, table[:, None])
        if few is not None:
            return chosen(xp, few, index)
        # The m alternatives stand where the categories do, so that no category is repeated for each of them.
        return xp.moveaxis(xp.take_along_axis(table, xp.moveaxis(index, 1, -1), axis=-1), -1, 1)

    def one_hot(self, index: Array) -> Array:
        """Return category numbers as weights of the categories, in one more dimension behind."""
        numbers = self.ops.arange(self.log_probs.shape[-1], index)
        return self.ops.xp.astype(index[..., None] == numbers, self.log_probs.dtype)

    def again_index(self, count: int) -> Array:
        """Return category numbers of `count` more draws, (particles, count, *plates, elements)."""
        fixed = self.ops.stop_gradient(self.log_probs)[:, None]
        wanted = (fixed.shape[0], count, *fixed.shape[2:])
        return self.noise.categorical(self.ops.xp.broadcast_to(fixed, wanted))


@dataclass(frozen=True)
class _Axes:
    """How a site's own dimensions are split into those of its plates and one of elements."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    elements: tuple[int, ...]
    """The dimensions of the elements, which `order` has at its end."""

    @property
    def elements_shape(self) -> tuple[int, ...]:
        """Return the sizes of the elements' dimensions."""
        return tuple(self.sizes[axis] for axis in self.elements)

    @classmethod
    def of(cls, sizes: tuple[int, ...], plates: Sequence[Plate], shape: tuple[int, ...], events: int) -> _Axes:
        batch = len(sizes) - events
        kept = sorted(batch + plate.dim for plate in plates)
        rest = [axis for axis in range(len(sizes)) if axis not in kept]
        return cls((*kept, *rest), sizes, shape, tuple(rest))

    def gather(self, xp: Any, x: Array, lead: int) -> Array:
        """Bring the dimensions after the first `lead` ones to (*plates, elements); further ones stay behind."""
        count = len(self.sizes)
        tail = range(lead + count, len(x.shape))
        moved = xp.permute_dims(x, (*range(lead), *(lead + axis for axis in self.order), *tail))
        return xp.reshape(moved, (*x.shape[:lead], *self.shape, -1, *(x.shape[axis] for axis in tail)))

    def scatter(self, xp: Any, x: Array, lead: int, behind: int = 0) -> Array:
        """Undo `gather`, with `behind` further dimensions at the end."""
        tail = tuple(x.shape[len(x.shape) - behind :])
        moved = xp.reshape(x, (*x.shape[:lead], *(self.sizes[axis] for axis in self.order), *tail))
        back = sorted(range(len(self.order)), key=lambda i: self.order[i])
        count = len(self.order)
        order = (*range(lead), *(lead + axis for axis in back), *range(lead + count, lead + count + behind))
        return xp.permute_dims(moved, order)
