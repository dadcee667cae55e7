"""What pplgrad uses of NumPyro and JAX beyond their documented interface, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex
from jax.ad_checkpoint import checkpoint_name
from numpyro.distributions import ExpandedDistribution, Independent, MaskedDistribution
from numpyro.primitives import _PYRO_STACK, apply_stack
from numpyro.util import _validate_model

_TAG = "pplgrad:"

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


def marked_mutable(name: str, value: dict, mark: Any) -> dict:
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


def is_scanned(site: Any) -> bool:
    """Return whether a site was drawn inside `scan`, so that its first dimension is time."""
    return bool(site.get("_control_flow_done"))


def replace_scan_body(msg: Any, wrap: Callable[[Callable], Callable]) -> bool:
    """Wrap the body function of a scan's message; return the direction: True if it runs in reverse."""
    body, init, xs, length, reverse, *rest = msg["args"]
    msg["args"] = (wrap(body), init, xs, length, reverse, *rest)
    return bool(reverse)


def warn_about_plates(model_trace: dict) -> None:
    """Give the warnings that NumPyro's own ELBOs give of a model whose batch dimensions no plate declares."""
    _validate_model(model_trace, plate_warning="loose")
