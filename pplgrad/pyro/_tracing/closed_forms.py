"""Divergences and entropies of Pyro's distributions in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributions import kl_divergence

from pplgrad.engine.closed_forms import no_closed_form
from pplgrad.errors import ProgramError
from pplgrad.pyro._distributions import counted_parts, family, unmasked
from pplgrad.pyro._tracing.marginal_sites import InComponent
from pplgrad.pyro._tracing.relaxations import Extended, extension


def closed_form(name: str, kind: str, guide: Any, model: Any) -> torch.Tensor:
    """Return the divergence of a site's guide from its model, or minus the guide's entropy: what stands for log q − log p."""
    q = guide["fn"]
    if kind == "entropy":
        found = _finite(q, None)
        if found is not None:
            return found
        try:
            return -q.entropy()
        except NotImplementedError as error:
            raise no_closed_form(name, kind, [family(q)], "Pyro knows none") from error
    p = model["fn"]
    if isinstance(p, InComponent):
        raise no_closed_form(name, kind, [family(q)], "its density in the model reads a site that is summed out")
    if not (_same(guide["scale"], model["scale"]) and _same(guide["mask"], model["mask"])):
        raise ProgramError(
            f"Site '{name}' is scaled or masked differently in guide and model, so that its densities are no divergence; drop it "
            "from closed_form."
        )
    if unmasked(q) is not q or unmasked(p) is not p:
        raise no_closed_form(name, kind, [family(q), family(p)], "a distribution is masked")
    found = _finite(q, p)
    if found is not None:
        return found
    if _folds(q) != _folds(p) or (_folds(q) and family(q) != family(p)):
        raise no_closed_form(name, kind, [family(q), family(p)], "a transform of one is not one-to-one")
    if _folds(q) and family(q) not in ("HalfNormal", "HalfCauchy"):
        raise no_closed_form(name, kind, [family(q), family(p)], "its transform is not one-to-one")
    try:
        return kl_divergence(q, p)
    except NotImplementedError as error:
        raise no_closed_form(name, kind, [family(q), family(p)], "torch knows none") from error


def _finite(q: Any, p: Any) -> torch.Tensor | None:
    """Return the sum over all values, or None if there are not finitely many or the two differ in them."""
    wide = [None if fn is None else extension(fn) for fn in (q, p)]
    if wide[0] is None or (p is not None and wide[1] is None):
        return None
    guide: Extended = wide[0]
    log_q = guide.categories()
    log_p = torch.zeros_like(log_q) if wide[1] is None else wide[1].categories()
    if log_q.shape[-1] != log_p.shape[-1] or not _same_values(q, p):
        return None
    possible = log_q > -torch.inf
    # Cut twice: the derivative of what is not chosen must be finite as well.
    safe, prior = torch.where(possible, log_q, 0.0), torch.where(possible, log_p, 0.0)
    term = torch.where(possible, safe.exp() * (safe - prior), torch.zeros_like(safe + prior)).sum(-1)
    events = guide.event_dim - len(guide.element_shape)
    return term.sum(tuple(range(-events, 0))) if events else term


def _folds(fn: Any) -> bool:
    """Return whether values of a base distribution fall together: torch compares the bases alone, whose divergence is larger."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return any(not transform.bijective for transform in getattr(fn, "transforms", ()))


def _same_values(q: Any, p: Any) -> bool:
    """Return whether two distributions have the same values in the same order."""
    if p is None:
        return True
    values = [counted_parts(unmasked(fn)) for fn in (q, p)]
    first, second = (None if found is None else found[1] for found in values)
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and bool((first == second).all())


def _same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        if first is None or second is None:
            return False
        return torch.equal(*torch.broadcast_tensors(torch.as_tensor(first), torch.as_tensor(second)))
    return bool(first == second)
