"""What pplgrad needs to know of Pyro's distributions beyond their `log_prob`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import distributions
from pyro.distributions import Delta, ExpandedDistribution, Independent, MaskedDistribution
from pyro.distributions import Distribution as PyroDistribution
from torch.distributions import Distribution
from torch.distributions import Independent as TorchIndependent
from torch.distributions import TransformedDistribution as TorchTransformed
from torch.distributions.constraints import Constraint
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pplgrad.core.structures import LAWS
from pplgrad.engine.support import Classes, Support
from pplgrad.errors import BaselineError
from pplgrad.pyro._structures import PermutationMatrix, PlackettLuce, Structured, Subset, log_probs_of_all

_PLAIN_SCORE_PARTS = {
    PyroDistribution.score_parts,
    MaskedDistribution.score_parts,
    ExpandedDistribution.score_parts,
}


def is_discrete(fn: Any) -> bool:
    """Return whether a distribution's support is discrete; False where it does not say."""
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def _is_constant(x: torch.Tensor) -> float | None:
    return (
        x.reshape(-1)[0].item() if x.numel() and not x.requires_grad and bool((x == x.reshape(-1)[0]).all()) else None
    )


_SUPPORT = Support(
    Classes(
        Distribution,
        (TorchIndependent, ExpandedDistribution, MaskedDistribution),
        TorchTransformed,
        Delta,
        Constraint,
        lambda x: isinstance(x, torch.Tensor),
        _is_constant,
    )
)


def moves(fn: Any) -> bool:
    """Return whether gradient flows to the bounds of a distribution's support."""
    return any(x.requires_grad for x in _SUPPORT.arrays(fn))


def unmasked(fn: Any) -> Any:
    """Return the distribution that the value was drawn from, without the masks that `mask` wrapped around it."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, TorchIndependent):
        base = unmasked(fn.base_dist)
        return fn if base is fn.base_dist else Independent(base, fn.reinterpreted_batch_ndims)
    return fn


def mask_of(fn: Any) -> Any:
    """Return which elements the masks leave that `mask` wrapped around a distribution, or None."""
    mask = None
    while isinstance(fn, MaskedDistribution):
        mask, fn = fn._mask if mask is None else mask & fn._mask, fn.base_dist
    return mask


def counted_parts(fn: Any) -> tuple[Any, torch.Tensor] | None:
    """Return the distribution of one element and its values, as numbers also where they are one-hot vectors, or None.

    Of vectors that are one joint value, such as subsets, the values are rows.
    """
    base = fn
    while isinstance(base, TorchIndependent):
        base = base.base_dist
    if is_one_hot(base):
        count = base.event_shape[0]
        device = base.logits.device if hasattr(base, "logits") else None
        return base, torch.arange(count, device=device)
    parts = finite_parts(base)
    return None if parts is None or (parts[0].event_shape and not is_structured(base)) else parts


def is_one_hot(fn: Any) -> bool:
    """Return whether the values of one element are one-hot vectors."""
    return isinstance(innermost(fn), torch.distributions.OneHotCategorical)


def is_structured(fn: Any) -> bool:
    """Return whether the values of one element are vectors that are one joint value, and not independent numbers."""
    return isinstance(innermost(fn), Structured)


def is_subset(fn: Any) -> bool:
    """Return whether a distribution is over subsets of k items."""
    return isinstance(innermost(unmasked(fn)), Subset)


def is_vector(fn: Any) -> bool:
    """Return whether the value of one element is a vector."""
    return is_one_hot(fn) or is_structured(fn)


def values_of(base: Any, support: torch.Tensor, index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return the values of a distribution's elements with these numbers."""
    if is_one_hot(base):
        return torch.nn.functional.one_hot(index, len(support)).to(like.dtype)
    if type(innermost(base)).enumerate_support in _FROM_ZERO:
        return index.to(support.dtype)  # Many times faster than numbers taken from a table, or found in it.
    return support[index]


_FROM_ZERO = {torch.distributions.Bernoulli.enumerate_support, torch.distributions.Categorical.enumerate_support}
"""What lists the values 0, 1, 2 and so on."""


def number_of(base: Any, support: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the values of a distribution's elements."""
    if is_one_hot(base):
        return value.argmax(-1)
    if is_structured(base):
        same = (support.reshape(len(support), *(1,) * (value.dim() - 1), -1) == value).all(-1)
    elif type(innermost(base)).enumerate_support in _FROM_ZERO:
        return value.to(torch.int64)
    elif len(support) == 2:
        return (value == support[1]).to(torch.int64)
    else:
        same = support.reshape(-1, *(1,) * value.dim()) == value
    return same.to(torch.int8).argmax(0)


def every_log_prob(base: Any, support: torch.Tensor) -> torch.Tensor:
    """Return the log probabilities of an element's values, (*batch, categories), −inf where the sampler never draws one."""
    if isinstance(base, ExpandedDistribution):
        return every_log_prob(base.base_dist, support).expand(*base.batch_shape, -1)
    if isinstance(base, Structured):
        return log_probs_of_all(base)
    law = type(base).log_prob
    if law in _NORMALISED:
        # Normalised once, where `log_prob` would take a row of all categories for every value.
        found = base.logits
    else:
        listed = support.reshape(-1, *(1,) * len(base.batch_shape))
        found = base.log_prob(listed).expand(len(support), *base.batch_shape).movedim(0, -1)
    return _never_drawn(base, support, found)


def is_bernoulli(base: Any) -> bool:
    """Return whether an element's law is the host's Bernoulli."""
    return type(innermost(base)) in (distributions.Bernoulli, torch.distributions.Bernoulli)


def log_odds(base: Any) -> torch.Tensor:
    """Return the log odds of 1 of a Bernoulli, of its batch shape, infinite where the sampler always draws the same."""
    if isinstance(base, ExpandedDistribution):
        return log_odds(base.base_dist).expand(base.batch_shape)
    if base._param is not base.__dict__.get("probs"):
        return base.logits
    probs = base.probs.detach()
    return torch.where(probs == 0, -torch.inf, torch.where(probs == 1, torch.inf, base.logits))


_NORMALISED = {
    distributions.Categorical.log_prob,
    torch.distributions.Categorical.log_prob,
    distributions.OneHotCategorical.log_prob,
    torch.distributions.OneHotCategorical.log_prob,
}


def _never_drawn(base: Any, support: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Return log probabilities with −inf where torch gives an impossible value a very small probability."""
    inner = getattr(base, "_categorical", base)
    if getattr(inner, "_param", None) is None or inner._param is not inner.__dict__.get("probs"):
        return log_probs
    probs = inner.probs.detach()
    if isinstance(inner, torch.distributions.Categorical):
        never = probs == 0
    elif isinstance(inner, (torch.distributions.Bernoulli, torch.distributions.Binomial)):
        count = inner.total_count[..., None] if isinstance(inner, torch.distributions.Binomial) else 1
        never = ((probs[..., None] == 0) & (support > 0)) | ((probs[..., None] == 1) & (support < count))
    else:
        return log_probs
    return torch.where(never, -torch.inf, log_probs)


def finite_parts(fn: Any) -> tuple[Any, torch.Tensor] | None:
    """Return the distribution of one element and its values, (categories, *event), or None if they are not finite."""
    base = fn
    while isinstance(base, TorchIndependent):
        base = base.base_dist
    if not getattr(base, "has_enumerate_support", False):
        return None
    try:
        with _constants_may_be_read():
            support = base.enumerate_support(expand=False)
    except NotImplementedError:
        return None
    return base, support.reshape(support.shape[0], *base.event_shape)


@contextmanager
def _constants_may_be_read() -> Iterator[None]:
    """Let a support be listed whose size stands in a tensor: our reading of it is none by the program, unless it is drawn."""
    watching: Any = _get_current_dispatch_mode()
    before = (getattr(watching, "read_at", None), getattr(watching, "escaped_ever", None))
    yield
    if hasattr(watching, "read_at") and watching.escaped_ever == before[1]:
        watching.read_at = before[0]


_PARAMETERS = {"Normal": ("loc", "scale"), "Poisson": ("rate",), "Gamma": ("concentration", "rate")}


def innermost(fn: Any) -> Any:
    """Return the distribution of one element, before `to_event` and `expand`."""
    while isinstance(fn, (TorchIndependent, ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def family(fn: Any) -> str:
    """Return the name of a distribution's family, as `pyro.distributions` calls it.

    A class of the user's own that has the name of one of ours is another family: its name is given with its module's.
    """
    kind = type(innermost(unmasked(fn)))
    ours = issubclass(kind, Structured) or kind.__name__ not in LAWS
    return kind.__name__ if ours else f"{kind.__module__}.{kind.__qualname__}"


def elements(fn: Any, plates: Collection[int]) -> int:
    """Return the number of independent elements in an event and in the batch dimensions without a plate."""
    batch = fn.batch_shape
    loose = [size for i, size in enumerate(batch) if i - len(batch) not in plates]
    event = fn.event_shape[: len(fn.event_shape) - len(innermost(fn).event_shape)]
    return math.prod([*loose, *event])


def is_relaxable(fn: Any) -> bool:
    """Return whether a distribution is extended to weights of its categories."""
    return family(fn) in ("Bernoulli", "OneHotCategorical")


def parameters(fn: Any) -> dict[str, torch.Tensor] | None:
    """Return the parameters of a family of independent numbers, as `HostDraw.parameters` has them; None for others."""
    base, name = innermost(fn), family(fn)
    found: dict[str, torch.Tensor] | None = _count_parameters(base)
    if name in _PARAMETERS and type(base) is getattr(distributions, name):
        found = {key: getattr(base, key) for key in _PARAMETERS[name]}
    return None if found is None else {key: x.expand(fn.shape()) for key, x in found.items()}


def ranking_logits(fn: Any) -> torch.Tensor | None:
    """Return the logits (*batch, *event) of a distribution over rankings, None for others."""
    base = innermost(unmasked(fn))
    if not isinstance(base, PlackettLuce):
        return None
    shape = fn.shape()
    return base.logits.expand(shape[: len(shape) - base.event_axes] + base.logits.shape[-1:])


def is_matrix(fn: Any) -> bool:
    """Return whether a distribution is over permutation matrices, whose rows may be weights too."""
    return isinstance(innermost(unmasked(fn)), PermutationMatrix)


def _count_parameters(base: Any) -> dict[str, torch.Tensor] | None:
    """Return the parameters of a law of counts whose distribution function has a known derivative along all that carry gradient."""
    kind = type(base)
    if kind is distributions.Geometric:
        given = "probs" if "probs" in base.__dict__ else "logits"
        chance = 1 - base.probs if given == "probs" else -base.logits
        return {"failures": torch.ones_like(chance), given: chance}
    if kind is distributions.GammaPoisson:
        found = {"failures": base.concentration, "logits": -base.rate.log()}
    elif kind in (distributions.NegativeBinomial, distributions.Binomial):
        given = "probs" if "probs" in base.__dict__ else "logits"
        of = "trials" if kind is distributions.Binomial else "failures"
        found = {of: base.total_count, given: getattr(base, given)}
    else:
        return None
    return None if next(iter(found.values())).requires_grad else found


def _count_support(fn: Any) -> tuple[Any, Any] | None:
    """Return the law of one element and its support, if its values are whole numbers from one that is known on, 0 or more."""
    base = fn
    while isinstance(base, TorchIndependent):
        base = base.base_dist
    if base.event_shape or isinstance(innermost(base), torch.distributions.Categorical):
        return None
    try:
        support = base.support
    except (NotImplementedError, AttributeError):
        return None
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    least = getattr(support, "lower_bound", None)
    known = isinstance(least, (int, float)) and least >= 0
    return (base, support) if known and support.is_discrete else None


def is_count(fn: Any) -> bool:
    """Return whether each element is a whole number, 0 or more, of a law that is not a choice among categories."""
    return _count_support(unmasked(fn)) is not None


def counts(fn: Any, value: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return consecutive counts around the mean, as `HostDraw.counts` has them, without the particles' dimension."""
    found = _count_support(fn)
    assert found is not None
    base, support = found
    try:
        mean = base.mean.detach()
    except (NotImplementedError, AttributeError):
        mean = torch.zeros((), device=value.device)
    first = torch.where(torch.isfinite(mean), (mean - count // 2).floor(), 0.0)
    if hasattr(support, "upper_bound"):
        first = torch.minimum(first, torch.as_tensor(support.upper_bound + 1 - count, device=value.device))
    first = first.clamp(min=support.lower_bound).to(value.dtype).expand(value.shape)
    listed = first + torch.arange(count, device=value.device).reshape(-1, *(1,) * value.dim()).to(value.dtype)
    inside = support.check(listed)
    log_probs = base.log_prob(torch.where(inside, listed, value))
    log_probs = torch.where(inside, log_probs, -torch.inf).movedim(0, -1)
    return first, log_probs, base.log_prob(value)


def throws(fn: Any, value: torch.Tensor) -> torch.Tensor | None:
    """Return log p of the categories of a Multinomial, of the value's shape, or None for other laws."""
    base = innermost(fn)
    if not isinstance(base, torch.distributions.Multinomial) or family(fn) != "Multinomial":
        return None
    never = base.probs.detach() == 0  # Torch's logits give it a very small probability.
    return torch.where(never, -torch.inf, torch.log_softmax(base.logits, -1)).expand(value.shape)


def categories(fn: Any) -> int | None:
    """Return the number of values of one element, or None if there are not finitely many."""
    parts = counted_parts(unmasked(fn))
    return None if parts is None else len(parts[1])


def partly_reparameterized(fn: Any) -> bool:
    """Return whether the sampler's gradient needs a correction by a score term (rejection samplers)."""
    while True:
        if type(fn).score_parts not in _PLAIN_SCORE_PARTS:
            return True
        if not hasattr(fn, "base_dist") or not hasattr(type(fn.base_dist), "score_parts"):
            return False
        fn = fn.base_dist


def is_drawn_from_prior(site: Any) -> bool:
    """Return whether the model may draw a site that the guide does not: its gradient is that along the draw, and whole."""
    return has_path(site["fn"])


def has_path(fn: Any) -> bool:
    """Return whether the gradient along a draw is the whole gradient."""
    return bool(fn.has_rsample) and not is_discrete(fn) and not partly_reparameterized(fn)


def score_squared(name: str, fn: Any, value: torch.Tensor) -> torch.Tensor:
    """Return the squared gradient of log q with respect to the distribution's parameters, summed over them.

    A distribution with logits is differentiated with respect to its logits, so that a categorical's score is
    one-hot(value) − softmax. The result has the distribution's batch shape.
    """
    inner = fn
    while isinstance(inner, (TorchIndependent, ExpandedDistribution)):
        inner = (
            inner.base_dist.expand(inner.batch_shape) if isinstance(inner, ExpandedDistribution) else inner.base_dist
        )
    names = getattr(inner, "arg_constraints", {})
    chosen = ["logits"] if "logits" in names else [n for n in names if isinstance(inner.__dict__.get(n), torch.Tensor)]
    extra = {n: getattr(inner, n) for n in ("total_count",) if n in names}
    try:
        with torch.enable_grad():
            leaves = {n: getattr(inner, n).detach().clone().requires_grad_() for n in chosen if n not in extra}
            rebuilt = type(inner)(**leaves, **extra, validate_args=False)
            gradients = torch.autograd.grad(rebuilt.log_prob(value.detach()).sum(), list(leaves.values()))
    except (TypeError, RuntimeError, ValueError) as error:
        raise BaselineError(
            f"OptimalConstant at site '{name}' needs the gradient of {type(inner).__name__} with respect to its "
            "parameters, which cannot be taken; use DecayingAverage() there."
        ) from error
    batch = len(fn.batch_shape)
    return sum((g**2).reshape(*g.shape[:batch], -1).sum(-1) for g in gradients)  # type: ignore[return-value]
