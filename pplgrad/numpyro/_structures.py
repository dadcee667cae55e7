"""Distributions over subsets and rankings, for NumPyro."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from numpyro.distributions import Distribution, constraints
from numpyro.distributions.util import validate_sample

from pplgrad.core import structures
from pplgrad.numpyro._array_ops import OPS, JaxNoise, ours


class _Counted(constraints.Constraint):
    """A constraint on a vector, with a number of entries."""

    event_dim = 1

    def __init__(self, count: int) -> None:
        self.count = count

    def tree_flatten(self) -> Any:
        return (), ((), {"count": self.count})

    def eq(self, other: object, static: bool = False) -> bool:
        return type(self) is type(other) and self.count == other.count  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((type(self), self.count))


class _LogWeights(_Counted):
    """Log weights of which at least `count` are above −inf."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return ((x < jnp.inf) & ~jnp.isnan(x)).all(-1) & ((x > -jnp.inf).sum(-1) >= self.count)

    def feasible_like(self, prototype: jax.Array) -> jax.Array:
        return jnp.zeros_like(prototype)


class _Subsets(_Counted):
    """Exactly `count` entries are 1, and the others 0."""

    is_discrete = True

    def __call__(self, x: jax.Array) -> jax.Array:
        return ((x == 0) | (x == 1)).all(-1) & (x.sum(-1) == self.count)

    def feasible_like(self, prototype: jax.Array) -> jax.Array:
        return jnp.zeros_like(prototype).at[..., : self.count].set(1)


class _Rankings(_Counted):
    """Each of the integers 0 to `count` − 1 once."""

    is_discrete = True

    def __call__(self, x: jax.Array) -> jax.Array:
        return (jnp.sort(x, axis=-1) == jnp.arange(self.count)).all(-1)

    def feasible_like(self, prototype: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.arange(self.count, dtype=prototype.dtype), prototype.shape)


class _Permutations(_Counted):
    """Permutation matrices: one 1 in each row and in each column, and else 0."""

    is_discrete = True
    event_dim = 2

    def __call__(self, x: jax.Array) -> jax.Array:
        return ((x == 0) | (x == 1)).all((-1, -2)) & (x.sum(-1) == 1).all(-1) & (x.sum(-2) == 1).all(-1)

    def feasible_like(self, prototype: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.eye(self.count, dtype=prototype.dtype), prototype.shape)


class Structured(Distribution):
    """A distribution over vectors that are one joint value, and not independent elements; `logits` has shape (*batch, n)."""

    pytree_data_fields = ("logits",)
    event_axes = 1

    def _start(self, logits: Any, validate_args: bool | None) -> None:
        logits = jnp.asarray(logits)
        self.logits = logits if jnp.issubdtype(logits.dtype, jnp.inexact) else logits.astype(float)
        if self.logits.ndim == 0:
            raise ValueError(f"{type(self).__name__} takes logits of shape (*batch, n), and was given a number.")
        super().__init__(self.logits.shape[:-1], self.logits.shape[-1:] * self.event_axes, validate_args=validate_args)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether there are few enough values to list them."""
        return self.listed() is not None

    def listed(self) -> Any:
        """Return all values, (values, n), or None if they are too many."""
        raise NotImplementedError

    def _dtype(self) -> Any:
        return self.logits.dtype

    def enumerate_support(self, expand: bool = True) -> jax.Array:
        """Return all values, of shape (values, *batch, n), with 1 for each batch dimension unless `expand`."""
        found = structures.few(self.listed(), type(self).__name__, self.event_shape[0])
        shape = self.batch_shape if expand else (1,) * len(self.batch_shape)
        listed = jnp.asarray(found, dtype=self._dtype()).reshape(len(found), *(1,) * len(self.batch_shape), -1)
        return jnp.broadcast_to(listed, (len(found), *shape, *self.event_shape))


class Subset(Structured):
    r"""A distribution over the subsets of k of n items, as binary vectors with k ones.

    The law of n independent Bernoulli draws given that k of them are 1: log p(z) = Σ_i z_i θ_i − log e_k(exp θ), where θ are the logits
    and e_k is the sum over all subsets of k items of the product of their weights (the elementary symmetric polynomial). Density, exact
    marginals and exact draws take O(n k) operations.

    Args:
        k: how many items are chosen, an integer from 1 to n.
        logits: the log weights of the items, in nats. A logit may be −inf if at least k are finite: that item is never chosen.
        validate_args: as in NumPyro's distributions.

    Shapes:
        `logits` has shape (*batch, n). A draw has the same shape and k ones in each row. `mean` is the probability of each item,
        (*batch, n). A row is one value out of C(n, k), and not n independent elements: `LocalExpectation`, `SumAndSample`,
        `UnorderedSet` and `Enumerate` sum over all rows where there are at most 4096.

    Raises:
        ValueError: k is not an integer from 1 to n; fewer than k logits are above −inf (under validation).
        NotImplementedError: from `enumerate_support`, if there are more than 4096 values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> float(Subset(2, jnp.zeros(4)).sample(jax.random.key(0)).sum())
        2.0

    References:
        Ahmed, Zeng, Niepert and Van den Broeck (2023), section 3.
        Chen, Dempster and Liu (1994), for the recursion.
    """

    arg_constraints = {"logits": _LogWeights(1)}
    pytree_aux_fields = ("k",)

    def __init__(self, k: int, logits: Any, *, validate_args: bool | None = None) -> None:
        n = jnp.shape(logits)[-1] if jnp.ndim(logits) else 0
        self.k = structures.subset_size(k, n)
        self.arg_constraints = {"logits": _LogWeights(k)}
        self._start(logits, validate_args)

    def validate_args(self, strict: bool = True) -> None:
        try:
            super().validate_args(strict)
        except ValueError as error:
            raise ValueError(
                f"Subset(k={self.k}): the logits have a row with NaN, with +inf, or with fewer than {self.k} of its "
                f"{self.event_shape[0]} entries above -inf; choose fewer items, or give more of them a finite logit."
            ) from error

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return _Subsets(self.k)

    @property
    @ours
    def mean(self) -> jax.Array:
        """The exact probability that each item is chosen, of shape (*batch, n)."""
        return structures.subset_marginals(OPS, self.logits, self.k)

    @property
    def variance(self) -> jax.Array:
        """The variance of each entry."""
        return self.mean * (1 - self.mean)

    @ours
    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        logits = jnp.broadcast_to(self.logits, (*sample_shape, *self.logits.shape))
        return structures.subset_draw(OPS, JaxNoise(key), logits, self.k)

    @ours
    @validate_sample
    def log_prob(self, value: jax.Array) -> jax.Array:
        return structures.subset_log_prob(OPS, self.logits, self.k, value)

    def listed(self) -> Any:
        """Return all values, (values, n), or None if they are too many."""
        return structures.subsets(self.event_shape[0], self.k)


class PlackettLuce(Structured):
    r"""A distribution over the rankings of n items, drawn without replacement in proportion to their weights.

    log p(π) = Σ_i [θ_π_i − log Σ_{j ≥ i} exp θ_π_j], where θ are the logits and π_1 is the item in front. A draw is the order of the
    logits plus Gumbel noise.

    Args:
        logits: the log weights of the items, in nats, all finite.
        validate_args: as in NumPyro's distributions.

    Shapes:
        `logits` has shape (*batch, n). A draw has the same shape: the numbers of the items, each once, the most preferred first. A
        ranking is one value out of n!, and not n independent elements: `LocalExpectation`, `SumAndSample`, `UnorderedSet` and
        `Enumerate` sum over all rankings of up to 6 items.

    Raises:
        ValueError: the logits are not finite (under validation).
        NotImplementedError: from `enumerate_support`, for more than 6 items.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sorted(PlackettLuce(jnp.zeros(3)).sample(jax.random.key(0)).tolist())
        [0, 1, 2]

    References:
        Plackett (1975). Yellott (1977), for the draws.
    """

    arg_constraints = {"logits": constraints.real_vector}

    def __init__(self, logits: Any, *, validate_args: bool | None = None) -> None:
        self._start(logits, validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return _Rankings(self.event_shape[0])

    @ours
    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        logits = jnp.broadcast_to(self.logits, (*sample_shape, *self.logits.shape))
        return structures.ranking_draw(OPS, JaxNoise(key), logits)

    @ours
    @validate_sample
    def log_prob(self, value: jax.Array) -> jax.Array:
        return structures.ranking_log_prob(OPS, self.logits, value)

    def listed(self) -> Any:
        """Return all values, (values, n), or None if they are too many."""
        return structures.permutations(self.event_shape[0])

    def _dtype(self) -> Any:
        return jnp.zeros((), int).dtype


class PermutationMatrix(PlackettLuce):
    r"""The distribution `PlackettLuce` over permutation matrices, in which a cost may be evaluated at weights too.

    log p(P) = Σ_i [(P θ)_i − log Σ_{m ≥ i} exp (P θ)_m]. Row i of a draw P has its one at the item in place i, so that P x are the entries
    of x in the order drawn. Under `REBAR` and `RELAX` a cost is evaluated at rows of weights too.

    Args:
        logits: the log weights of the items, in nats, all finite.
        validate_args: as in NumPyro's distributions.

    Shapes:
        `logits` has shape (*batch, n), a draw (*batch, n, n), of the type of the logits. The values are not listed: `PlackettLuce` is
        what `LocalExpectation` and other sums need.

    Raises:
        ValueError: the logits are not finite (under validation).
        NotImplementedError: from `enumerate_support`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> PermutationMatrix(jnp.zeros(3)).sample(jax.random.key(0)).sum(-2).tolist()
        [1.0, 1.0, 1.0]

    References:
        Gadetsky, Struminsky, Robinson, Quadrianto and Vetrov (2020), section 3.
    """

    event_axes = 2

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> Any:
        return _Permutations(self.event_shape[0])

    @ours
    def sample(self, key: jax.Array, sample_shape: tuple[int, ...] = ()) -> jax.Array:
        logits = jnp.broadcast_to(self.logits, (*sample_shape, *self.logits.shape))
        return structures.as_matrix(OPS, structures.ranking_draw(OPS, JaxNoise(key), logits), logits)

    @ours
    @validate_sample
    def log_prob(self, value: jax.Array) -> jax.Array:
        return structures.matrix_log_prob(OPS, self.logits, value)

    def listed(self) -> Any:
        """Return None: the values are not listed."""
        return None


def log_probs_of_all(base: Structured) -> jax.Array:
    """Return the log probabilities of all values, (*batch, values)."""
    values = base.enumerate_support(expand=False)
    return jnp.moveaxis(jnp.broadcast_to(base.log_prob(values), (len(values), *base.batch_shape)), 0, -1)
