"""What pplgrad uses of NumPyro beyond its documented interface, in one place; what of JAX is in `_compat_jax.py`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.distributions import (
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
)
from numpyro.handlers import replay, scope
from numpyro.optim import _NumPyroOptim
from numpyro.primitives import _PYRO_STACK, apply_stack
from numpyro.util import _validate_model, check_model_guide_match

from pplgrad.errors import ProgramError

NumPyroOptim = _NumPyroOptim
"""What every optimizer of NumPyro is one of."""


def leaves_of(fn: Any) -> list[Any]:
    """Return the arrays that a distribution declares; none if a transform of the user's own declares nothing."""
    try:
        return jax.tree.leaves(fn)
    except NotImplementedError:
        return []


def unmasked(fn: Any) -> Any:
    """Return the distribution that a value was drawn from, without the masks wrapped around it."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, Independent):
        base = unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        base = unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.expand(fn.batch_shape)
    return fn


def written_name(name: str, names: Collection[str]) -> str | None:
    """Return the name of the site with `obs_mask` of which a site is the part that is not observed, or None; `names` are those of all sites."""
    whole = name.removesuffix("_unobserved")
    return whole if whole != name and {whole, f"{whole}_observed"} <= set(names) else None


def mask_of(fn: Any) -> Any:
    """Return the mask in which a distribution stands, of the shape of its batch or broadcasting with it; None without one."""
    inside = mask_of(fn.base_dist) if isinstance(fn, (MaskedDistribution, Independent, ExpandedDistribution)) else None
    if not isinstance(fn, MaskedDistribution):
        return inside
    return fn._mask if inside is None else jnp.logical_and(fn._mask, inside)


def marked_mutable(name: str, value: Any, mark: Any) -> Any:
    """Register mutable state like `numpyro.primitives.mutable`, with a mark that handlers leave alone."""
    if not _PYRO_STACK:
        return value
    message = {
        "type": "mutable",
        "name": name,
        "fn": lambda x, *args, **kwargs: x,
        "args": (value,),
        "kwargs": {},
        "value": value,
        "pplgrad": mark,
    }
    return apply_stack(message)["value"]


def is_handed_out(site: Any) -> bool:
    """Return whether a message is of a site drawn in the body of control flow, handed out of it afterwards."""
    return bool(site.get("_control_flow_done"))


def is_scan(msg: Any) -> bool:
    """Return whether a control-flow message is a scan's; else it is a `cond`."""
    return msg["fn"] is not cond_wrapper


def control_flow_kind(msg: Any) -> tuple[bool, bool]:
    """Return whether a control-flow message is a scan's, and whether it runs in reverse."""
    return is_scan(msg), is_scan(msg) and bool(msg["args"][4])


def replace_bodies(msg: Any, wrap: Callable[[Callable], Callable]) -> None:
    """Wrap the body of a scan's message, or the branches of a `cond`."""
    if msg["fn"] is cond_wrapper:
        predicate, true, false, operand = msg["args"]
        msg["args"] = (predicate, wrap(true), wrap(false), operand)
    else:
        body, *rest = msg["args"]
        msg["args"] = (wrap(body), *rest)


def count_steps(msg: Any, note: Callable[[Any], None]) -> None:
    """Let a scan's message tell the number of each step before its body runs: its place in what the scan hands out."""
    body, init, xs, length, reverse = msg["args"]
    count = length if xs is None or not jax.tree.leaves(xs) else jax.tree.leaves(xs)[0].shape[0]

    def numbered(carry: Any, row: Any) -> Any:
        x, number = row
        note(number)
        return body(carry, x)

    msg["args"] = (numbered, init, (xs, jnp.arange(count)), length, reverse)


def hand_out_changes(msg: Any) -> None:
    """Take the changes to draws from what the bodies of a message's control flow returned, and put them in the sites that are handed out.

    A body returns, beside its own result, the value of each changed site by its name, and its distribution or None.
    """
    if is_scan(msg):
        state, (sites, (result, changes)) = msg["value"]
        msg["value"] = state, (sites, result)
    else:
        (result, changes), sites = msg["value"]
        msg["value"] = result, sites
    for name, (value, fn) in changes.items():
        site = sites.trace[name]
        site["value"] = jnp.reshape(value, jnp.shape(site["value"]))
        if fn is not None:
            site["fn"] = fn
        site["intermediates"] = []


def replay_branches(msg: Any) -> None:
    """Make the branches of a `cond` return the guide's values: NumPyro replays a scan's body, and not these."""
    # Handlers farther out add to the list after this call and before the branches run.
    substituted = msg["kwargs"]["substitute_stack"]

    def replayed(branch: Callable) -> Callable:
        def run(operand: Any) -> Any:
            function = branch
            for kind, values in substituted:
                if kind == "replay":
                    function = replay(function, trace=values)
            return function(operand)

        return run

    if msg["fn"] is cond_wrapper:
        replace_bodies(msg, replayed)


PREVIOUS = "_PREV_"
"""The prefix of a site in the steps that NumPyro's enumeration runs before those that it rolls up; once for each step of distance."""


def root(name: str) -> str:
    """Return a variable's or site's name without what says how many steps before it stands.

    >>> root("_PREV__PREV_x")
    'x'
    """
    while name.startswith(PREVIOUS):
        name = name[len(PREVIOUS) :]
    return name


def handlers_inside(handler: Any) -> list[Any]:
    """Return the handlers that stand between the running statement and `handler`, innermost first."""
    found: list[Any] = []
    for other in reversed(_PYRO_STACK):
        if other is handler:
            break
        found.append(other)
    return found


def scopes_inside(handler: Any) -> list[Any]:
    """Return the `scope` handlers that stand between the running statement and `handler`, innermost first."""
    return [other for other in handlers_inside(handler) if isinstance(other, scope)]


def renamed(name: str, scopes: list[Any]) -> str:
    """Return a sample site's name after `scope` handlers have renamed it."""
    msg: Any = {"type": "sample", "name": name}
    for handler in scopes:
        handler.process_message(msg)
    return msg["name"]


def host_checks(model_trace: dict, guide_trace: dict) -> None:
    """Make the checks, and give the warnings, that NumPyro's own ELBOs make of a model and a guide: shapes and plates."""
    try:
        check_model_guide_match(model_trace, guide_trace)
    except ValueError as error:
        raise ProgramError(f"{error}; give the site one shape in both.") from error
    # Names of dimensions, which the host's enumeration writes into dicts that the user's sites share, are of another run.
    plain = {
        name: {**site, "infer": {k: v for k, v in site["infer"].items() if k != "name_to_dim"}}
        if "infer" in site
        else site
        for name, site in model_trace.items()
    }
    _validate_model(plain, plate_warning="loose")
