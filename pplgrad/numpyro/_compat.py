"""What pplgrad uses of NumPyro and JAX beyond their documented interface, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.distributions import (
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
)
from numpyro.handlers import replay, scope
from numpyro.primitives import _PYRO_STACK, apply_stack
from numpyro.util import _validate_model, check_model_guide_match

from pplgrad.errors import ProgramError

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


def host_checks(model_trace: dict, guide_trace: dict) -> None:
    """Make the checks, and give the warnings, that NumPyro's own ELBOs make of a model and a guide: shapes and plates."""
    try:
        check_model_guide_match(model_trace, guide_trace)
    except ValueError as error:
        raise ProgramError(f"{error}; give the site one shape in both.") from error
    _validate_model(model_trace, plate_warning="loose")


def is_tracing(*values: Any) -> bool:
    """Return whether JAX traces what runs, under `jit` say, whatever the values at hand are; or one of these, under `vmap` say."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((jnp.zeros(()), values)))


def manual_axes() -> tuple[str, ...]:
    """Return the axes of a mesh whose devices run the code that is traced each on its own: those of `shard_map`."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


_CALLS = {"jit", "pjit", "closed_call", "core_call"}


def call_body(equation: Any) -> Any:
    """Return the closed jaxpr that an equation does nothing but call, or None."""
    if equation.primitive.name not in _CALLS:
        return None
    shardings = (*equation.params.get("in_shardings", ()), *equation.params.get("out_shardings", ()))
    if any(type(sharding).__name__ != "UnspecifiedValue" for sharding in shardings):
        return None
    if equation.params.get("compiler_options_kvs"):
        return None
    bodies = [v for v in equation.params.values() if isinstance(v, jex.ClosedJaxpr)]
    return bodies[0] if len(bodies) == 1 and len(bodies[0].jaxpr.invars) == len(equation.invars) else None


@dataclass(frozen=True)
class Scan:
    """What a scan's equation says: its body, and how many of its operands are constants, and carried."""

    body: Any
    length: int
    consts: int
    carry: int
    reverse: bool
    unroll: int


def scan_of(equation: Any) -> Scan | None:
    """Return what an equation says if it is a scan."""
    if equation.primitive.name != "scan":
        return None
    p = equation.params
    return Scan(p["jaxpr"], p["length"], p["num_consts"], p["num_carry"], p["reverse"], p["unroll"])


def context_of(equation: Any, known: dict[int, str]) -> str:
    """Return what an equation was traced under (the kind of random numbers, a mesh), as text that tells contexts apart.

    `known` keeps the texts, while the equations are there.
    """
    if id(equation.ctx) not in known:
        known[id(equation.ctx)] = repr(equation.ctx)
    return known[id(equation.ctx)]


def alone(equation: Any) -> Callable[..., list]:
    """Return the function of its operands, constants in place included, that an equation stands for."""
    operands = [jex.Var(atom.aval) for atom in equation.invars]
    outputs = [jex.Var(var.aval) for var in equation.outvars]
    one = equation.replace(invars=operands, outvars=outputs)
    names = jex.DebugInfo("alone", equation.primitive.name, None, None)
    jaxpr = jex.Jaxpr((), operands, outputs, [one], equation.effects, names)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))


def custom_rule(equation: Any, above: tuple[str, ...] = ()) -> Any:
    """Return what tells whether two calls of functions with derivatives of their own are of the same function, or None.

    The same are those with the same operations in their values and first derivatives, and in those of what these call in turn.
    """
    closed = equation.params.get("call_jaxpr")
    if equation.primitive.name != "custom_jvp_call" or not isinstance(closed, jex.ClosedJaxpr) or closed.consts:
        return None
    text = str(closed)
    if text in above:
        return above.index(text)  # A rule that calls its own function.
    points = [atom.aval for atom in equation.invars]  # With the mesh axes over which they vary, inside `shard_map`.
    smooth = [jnp.issubdtype(x.dtype, jnp.inexact) for x in points]

    def derivative(points: list, moves: list) -> Any:
        still = [np.zeros(x.shape, jax.dtypes.float0) for x in points]
        tangents = [move if yes else none for yes, move, none in zip(smooth, moves, still, strict=True)]
        return jax.jvp(alone(equation), points, tangents)

    try:
        derived = jax.make_jaxpr(derivative)(points, points)
    except TypeError:  # A rule that takes no part of what it is given.
        return None
    inner = [e for e in _every_equation(derived.jaxpr) if e.primitive.name.startswith("custom_")]
    rules = tuple(custom_rule(e, (*above, text)) for e in inner)
    return None if derived.consts or None in rules else (text, str(derived), rules)


def _every_equation(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for body in sub_jaxprs(equation):
            yield from _every_equation(body)


def is_threefry(aval: Any) -> bool:
    """Return whether an array of keys is of the default kind, whose numbers are the same one by one and mapped over keys."""
    return str(getattr(aval.dtype, "name", "")) == "key<fry>"
