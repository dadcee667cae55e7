"""Distributions over subsets and rankings, for Pyro."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch.distributions import constraints

from pplgrad.core import structures
from pplgrad.pyro._array_ops import OPS, TorchNoise


class _Counted(constraints.Constraint):
    """A constraint on a vector, with a number of entries."""

    event_dim = 1

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__()


class _LogWeights(_Counted):
    """Log weights of which at least `count` are above −inf."""

    def __repr__(self) -> str:
        return f"that no entry is NaN or +inf and at least {self.count} in each row are above -inf"

    def check(self, value: torch.Tensor) -> torch.Tensor:
        return (value < torch.inf).all(-1) & ((value > -torch.inf).sum(-1) >= self.count)


class _Finite(constraints.Constraint):
    """Finite numbers: torch's real ones include the infinite."""

    event_dim = 1

    def __repr__(self) -> str:
        return "that all entries are finite"

    def check(self, value: torch.Tensor) -> torch.Tensor:
        return value.isfinite().all(-1)


class _Subsets(_Counted):
    """Exactly `count` entries are 1, and the others 0."""

    is_discrete = True

    def check(self, value: torch.Tensor) -> torch.Tensor:
        return ((value == 0) | (value == 1)).all(-1) & (value.sum(-1) == self.count)


class _Rankings(_Counted):
    """Each of the integers 0 to `count` − 1 once."""

    is_discrete = True

    def check(self, value: torch.Tensor) -> torch.Tensor:
        return (value.sort(-1).values == torch.arange(self.count, device=value.device)).all(-1)


class _Permutations(constraints.Constraint):
    """Permutation matrices: one 1 in each row and in each column, and else 0."""

    is_discrete = True
    event_dim = 2

    def check(self, value: torch.Tensor) -> torch.Tensor:
        return (
            ((value == 0) | (value == 1)).all(-1).all(-1) & (value.sum(-1) == 1).all(-1) & (value.sum(-2) == 1).all(-1)
        )


class Structured(TorchDistribution):
    """A distribution over vectors that are one joint value, and not independent elements; `logits` has shape (*batch, n)."""

    event_axes = 1
    logits: torch.Tensor
    _narrow: torch.Tensor
    """The logits before they were expanded: what belongs to them alone is computed once."""

    def _start(self, logits: Any, validate_args: bool | None) -> None:
        logits = torch.as_tensor(logits)
        self.logits = logits if logits.is_floating_point() else logits.to(torch.get_default_dtype())
        if self.logits.dim() == 0:
            raise ValueError(f"{type(self).__name__} takes logits of shape (*batch, n), and was given a number.")
        self._narrow = self.logits
        super().__init__(self.logits.shape[:-1], self.logits.shape[-1:] * self.event_axes, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """Return the distribution with its batch dimensions expanded to `batch_shape`."""
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.__dict__.update({name: x for name, x in self.__dict__.items() if name in ("k", "arg_constraints")})
        new.logits, new._narrow = self.logits.expand(*batch_shape, -1), self._narrow
        TorchDistribution.__init__(new, torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether there are few enough values to list them."""
        return self.listed() is not None

    def listed(self) -> Any:
        """Return all values, (values, n), or None if they are too many."""
        raise NotImplementedError

    def _whole(self, log_prob: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return log_prob.expand(torch.broadcast_shapes(self.batch_shape, value.shape[: -self.event_axes]))

    def _dtype(self) -> torch.dtype:
        return self.logits.dtype

    def enumerate_support(self, expand: bool = True) -> torch.Tensor:
        """Return all values, of shape (values, *batch, n), with 1 for each batch dimension unless `expand`."""
        found = structures.few(self.listed(), type(self).__name__, self.event_shape[0])
        listed = torch.as_tensor(found, dtype=self._dtype()).to(self.logits.device)
        listed = listed.reshape(len(found), *(1,) * len(self.batch_shape), -1)
        return listed.expand(-1, *self.batch_shape, -1) if expand else listed


class Subset(Structured):
    r"""A distribution over the subsets of k of n items, as binary vectors with k ones.

    The law of n independent Bernoulli draws given that k of them are 1: log p(z) = Σ_i z_i θ_i − log e_k(exp θ), where θ are the logits
    and e_k is the sum over all subsets of k items of the product of their weights (the elementary symmetric polynomial). Density, exact
    marginals and exact draws take O(n k) operations.

    Args:
        k: how many items are chosen, an integer from 1 to n.
        logits: the log weights of the items, in nats. A logit may be −inf if at least k are finite: that item is never chosen.
        validate_args: as in Pyro's distributions.

    Shapes:
        `logits` has shape (*batch, n). A draw has the same shape and k ones in each row. `mean` is the probability of each item,
        (*batch, n). A row is one value out of C(n, k), and not n independent elements: `LocalExpectation`, `SumAndSample`,
        `UnorderedSet` and `Enumerate` sum over all rows where there are at most 4096.

    Raises:
        ValueError: k is not an integer from 1 to n; fewer than k logits are above −inf (under validation).
        NotImplementedError: from `enumerate_support`, if there are more than 4096 values.

    Example:
        >>> import torch
        >>> float(Subset(2, torch.zeros(4)).sample().sum())
        2.0

    References:
        Ahmed, Zeng, Niepert and Van den Broeck (2023), section 3.
        Chen, Dempster and Liu (1994), for the recursion.
    """

    arg_constraints = {"logits": _LogWeights(1)}

    def __init__(self, k: int, logits: Any, *, validate_args: bool | None = None) -> None:
        shape = torch.as_tensor(logits).shape
        n = shape[-1] if shape else 0
        self.k = structures.subset_size(k, n)
        self.arg_constraints = {"logits": _LogWeights(k)}
        self._start(logits, validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return _Subsets(self.k)

    @property
    def mean(self) -> torch.Tensor:
        """The exact probability that each item is chosen, of shape (*batch, n)."""
        return structures.subset_marginals(OPS, self._narrow, self.k).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> torch.Tensor:
        """The variance of each entry."""
        mean = self.mean
        return mean * (1 - mean)

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        with torch.no_grad():
            logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
            return structures.subset_draw(OPS, TorchNoise(), logits, self.k)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._whole(structures.subset_log_prob(OPS, self._narrow, self.k, value), value)

    def listed(self) -> Any:
        """Return all values, (values, n), or None if they are too many."""
        return structures.subsets(self.event_shape[0], self.k)


class PlackettLuce(Structured):
    r"""A distribution over the rankings of n items, drawn without replacement in proportion to their weights.

    log p(π) = Σ_i [θ_π_i − log Σ_{j ≥ i} exp θ_π_j], where θ are the logits and π_1 is the item in front. A draw is the order of the
    logits plus Gumbel noise.

    Args:
        logits: the log weights of the items, in nats, all finite.
        validate_args: as in Pyro's distributions.

    Shapes:
        `logits` has shape (*batch, n). A draw has the same shape: the numbers of the items, each once, the most preferred first. A
        ranking is one value out of n!, and not n independent elements: `LocalExpectation`, `SumAndSample`, `UnorderedSet` and
        `Enumerate` sum over all rankings of up to 6 items.

    Raises:
        ValueError: the logits are not finite (under validation).
        NotImplementedError: from `enumerate_support`, for more than 6 items.

    Example:
        >>> import torch
        >>> sorted(PlackettLuce(torch.zeros(3)).sample().tolist())
        [0, 1, 2]

    References:
        Plackett (1975). Yellott (1977), for the draws.
    """

    arg_constraints = {"logits": _Finite()}

    def __init__(self, logits: Any, *, validate_args: bool | None = None) -> None:
        self._start(logits, validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> Any:
        return _Rankings(self.event_shape[0])

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        with torch.no_grad():
            logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
            return structures.ranking_draw(OPS, TorchNoise(), logits)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._whole(structures.ranking_log_prob(OPS, self._narrow, value), value)

    def listed(self) -> Any:
        """Return all values, (values, n), or None if they are too many."""
        return structures.permutations(self.event_shape[0])

    def _dtype(self) -> torch.dtype:
        return torch.long


class PermutationMatrix(PlackettLuce):
    r"""The distribution `PlackettLuce` over permutation matrices, in which a cost may be evaluated at weights too.

    log p(P) = Σ_i [(P θ)_i − log Σ_{m ≥ i} exp (P θ)_m]. Row i of a draw P has its one at the item in place i, so that P x are the entries
    of x in the order drawn. Under `REBAR` and `RELAX` a cost is evaluated at rows of weights too.

    Args:
        logits: the log weights of the items, in nats, all finite.
        validate_args: as in Pyro's distributions.

    Shapes:
        `logits` has shape (*batch, n), a draw (*batch, n, n), of the type of the logits. The values are not listed: `PlackettLuce` is
        what `LocalExpectation` and other sums need.

    Raises:
        ValueError: the logits are not finite (under validation).
        NotImplementedError: from `enumerate_support`.

    Example:
        >>> import torch
        >>> PermutationMatrix(torch.zeros(3)).sample().sum(-2).tolist()
        [1.0, 1.0, 1.0]

    References:
        Gadetsky, Struminsky, Robinson, Quadrianto and Vetrov (2020), section 3.
    """

    event_axes = 2

    @constraints.dependent_property(is_discrete=True, event_dim=2)
    def support(self) -> Any:
        return _Permutations()

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        with torch.no_grad():
            shape = (*sample_shape, *self.batch_shape, self.event_shape[-1])
            order = structures.ranking_draw(OPS, TorchNoise(), self.logits.expand(shape))
            return structures.as_matrix(OPS, order, self.logits)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._whole(structures.matrix_log_prob(OPS, self._narrow, value), value)

    def listed(self) -> Any:
        """Return None: the values are not listed."""
        return None


def log_probs_of_all(base: Structured) -> torch.Tensor:
    """Return the log probabilities of all values, (*batch, values)."""
    values = base.enumerate_support(expand=False)
    return base.log_prob(values).expand(len(values), *base.batch_shape).movedim(0, -1)
