"""What pplgrad uses of NumPyro and JAX beyond their documented interface, in one place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.distributions import (
    BernoulliLogits,
    BinomialLogits,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
)
from numpyro.handlers import replay, scope
from numpyro.primitives import _PYRO_STACK, apply_stack
from numpyro.util import _validate_model

_TAG = "pplgrad:"
_LOG_ODDS = (BernoulliLogits, BinomialLogits)

TRACING_ERRORS: tuple[type[Exception], ...] = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def tag(name: str, value: Any) -> Any:
    """Return a site's value, recognisable as that site's in the program's jaxpr."""
    return jax.tree.map(lambda x: checkpoint_name(x, _TAG + name), value)


def tag_of(equation: Any) -> str | None:
    """Return the site's name if an equation of a jaxpr is a tag."""
    if equation.primitive.name == "name" and str(equation.params.get("name", "")).startswith(_TAG):
        return equation.params["name"][len(_TAG) :]
    return None


def as_function(closed: Any) -> Callable[..., list]:
    """Return the function of flat arguments that a closed jaxpr stands for."""
    return jex.jaxpr_as_fun(closed)


def sub_jaxprs(equation: Any) -> Iterator[Any]:
    """Yield the jaxprs inside an equation's parameters."""
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


def leaves_of(fn: Any) -> list[Any]:
    """Return the arrays that a distribution declares; none if a transform of the user's own declares nothing."""
    try:
        return jax.tree.leaves(fn)
    except NotImplementedError:
        return []


def is_literal(atom: Any) -> bool:
    """Return whether an atom of a jaxpr is a constant written in place."""
    return isinstance(atom, jex.Literal)


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


def off_zero(fn: Any) -> Any:
    """Return the distribution with log odds that are exactly zero moved to the smallest positive number.

    NumPyro 0.22 differentiates log p(1) of a Bernoulli or Binomial at log odds of zero to 1.0, where 0.5 is right; its
    value is the same to the last bit.
    """

    def moved(part: Any) -> Any:
        if not isinstance(part, _LOG_ODDS) or not isinstance(part.logits, jax.Array):
            return part
        if not jnp.issubdtype(part.logits.dtype, jnp.floating):
            return part  # Whole numbers have no gradient.
        part = copy.copy(part)
        tiny = jnp.finfo(part.logits.dtype).tiny
        part.logits = part.logits + jax.lax.stop_gradient(jnp.where(part.logits == 0, tiny, 0.0)).astype(
            part.logits.dtype
        )
        return part

    def wanted(part: Any) -> bool:
        return isinstance(part, _LOG_ODDS)

    try:
        inside = any(map(wanted, jax.tree.leaves(fn, is_leaf=wanted)))
    except NotImplementedError:  # A transform of the user's own declares nothing.
        return fn
    return jax.tree.map(moved, fn, is_leaf=wanted) if inside else fn


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


def control_flow_kind(msg: Any) -> tuple[bool, bool]:
    """Return whether a control-flow message is a scan's (else it is a `cond`), and whether it runs in reverse."""
    if msg["fn"] is cond_wrapper:
        return False, False
    return True, bool(msg["args"][4])


def replace_bodies(msg: Any, wrap: Callable[[Callable], Callable]) -> None:
    """Wrap the body of a scan's message, or the branches of a `cond`."""
    if msg["fn"] is cond_wrapper:
        predicate, true, false, operand = msg["args"]
        msg["args"] = (predicate, wrap(true), wrap(false), operand)
    else:
        body, *rest = msg["args"]
        msg["args"] = (wrap(body), *rest)


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


def scopes_inside(handler: Any) -> list[Any]:
    """Return the `scope` handlers that stand between the running statement and `handler`, innermost first."""
    found: list[Any] = []
    for other in reversed(_PYRO_STACK):
        if other is handler:
            break
        if isinstance(other, scope):
            found.append(other)
    return found


def renamed(name: str, scopes: list[Any]) -> str:
    """Return a sample site's name after `scope` handlers have renamed it."""
    msg: Any = {"type": "sample", "name": name}
    for handler in scopes:
        handler.process_message(msg)
    return msg["name"]


def warn_about_plates(model_trace: dict) -> None:
    """Give the warnings that NumPyro's own ELBOs give of a model whose batch dimensions no plate declares."""
    _validate_model(model_trace, plate_warning="loose")


def manual_axes() -> tuple[str, ...]:
    """Return the axes of a mesh whose devices run the code that is traced each on its own: those of `shard_map`."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
