"""What pplgrad uses of JAX beyond its documented interface, in one place; what of NumPyro is in `_compat.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CellType, FunctionType
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.ad_checkpoint import checkpoint_name

_TAG = "pplgrad:"
_MARK = "pplgrad-model:"

TRACING_ERRORS: tuple[type[Exception], ...] = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def tag(name: str, value: Any) -> Any:
    """Return a site's value, recognisable as that site's in the program's jaxpr."""
    _check_tags()
    return jax.tree.map(lambda x: checkpoint_name(x, _TAG + name), value)


def mark(name: str, value: Any) -> Any:
    """Return the value of a site that only the model draws, recognisable in the program's jaxpr; what it was computed from stays known."""
    return jax.tree.map(lambda x: checkpoint_name(x, _MARK + name), value)


def mark_of(equation: Any) -> str | None:
    """Return the site's name if an equation of a jaxpr marks a site that only the model draws."""
    return _name_of(equation, _MARK)


def tag_of(equation: Any) -> str | None:
    """Return the site's name if an equation of a jaxpr is a tag."""
    return _name_of(equation, _TAG)


def _name_of(equation: Any, prefix: str) -> str | None:
    name = None
    if equation.primitive.name == "name":
        name = equation.params.get("name")
    elif type(_object_of(equation)).__name__ == "CheckpointName":
        name = _object_of(equation).params["name"]
    return name[len(prefix) :] if isinstance(name, str) and name.startswith(prefix) else None


@lru_cache
def _check_tags() -> None:
    """Raise if this JAX writes tags down in a way that is not known here: all costs would count as independent of all draws."""
    with jax.ensure_compile_time_eval():  # Whatever is traced around the first tag.
        equations = jax.make_jaxpr(lambda x: checkpoint_name(x, _TAG + "x"))(np.float32(0)).eqns
    if [tag_of(equation) for equation in equations] != ["x"]:
        raise _unknown("marks a named value")


def _unknown(what: str) -> Exception:
    """Return the error about a JAX that does something in a way not known here."""
    return RuntimeError(
        f"JAX {jax.__version__} {what} in a way that this version of pplgrad does not know; install a JAX that pplgrad's "
        "package metadata allows (pip install 'pplgrad[numpyro]'), or a newer pplgrad."
    )


def _object_of(equation: Any) -> Any:
    """Return the object that an operation is, where JAX (from 0.10 on by choice, from 0.11 on for some) keeps one; or None."""
    return equation.params.get("_prim")


def as_function(closed: Any, constants: list | None = None) -> Callable[..., list]:
    """Return the function of flat arguments that a closed jaxpr stands for, with others for its constants if they are given."""
    return jex.jaxpr_as_fun(closed if constants is None else jex.ClosedJaxpr(closed.jaxpr, constants))


def sub_jaxprs(equation: Any) -> Iterator[Any]:
    """Yield the jaxprs inside an equation's parameters."""
    inside = getattr(_object_of(equation), "params", {})
    for value in (*equation.params.values(), *inside.values()):
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, jax.stages.Traced):
                item = item.jaxpr
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


def touches_state(equation: Any) -> bool:
    """Return whether an operation reads or changes what is not in its operands alone: a mutable array, the host, the order of things."""
    return bool(equation.effects) or any("Ref" in type(x.aval).__name__ for x in (*equation.invars, *equation.outvars))


def is_literal(atom: Any) -> bool:
    """Return whether an atom of a jaxpr is a constant written in place."""
    return isinstance(atom, jex.Literal)


def is_tracing(*values: Any) -> bool:
    """Return whether JAX traces what runs, under `jit` say, whatever the values at hand are; or one of these, under `vmap` say."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((jnp.zeros(()), values)))


def manual_axes() -> tuple[str, ...]:
    """Return the axes of a mesh whose devices run the code that is traced each on its own: those of `shard_map`."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


_CALLS = {"jit", "pjit", "closed_call", "core_call"}


@lru_cache
def _unspecified() -> tuple[Any, ...]:
    """Return what JAX notes about the devices and layouts of a call that says nothing about them."""
    (equation,) = jax.make_jaxpr(jax.jit(lambda x: x))(jax.ShapeDtypeStruct((), np.float32)).eqns
    found = [equation.params.get(name, ()) for name in ("in_shardings", "out_shardings", "in_layouts", "out_layouts")]
    return tuple(value for values in found for value in values)


def call_body(equation: Any) -> Any:
    """Return the closed jaxpr that an equation does nothing but call, or None."""
    if equation.primitive.name not in _CALLS:
        return None
    unspecified = _unspecified()
    for name in ("in_shardings", "out_shardings", "in_layouts", "out_layouts"):
        if any(value is not None and value not in unspecified for value in equation.params.get(name, ())):
            return None
    if equation.params.get("compiler_options_kvs"):
        return None
    bodies = [v for v in equation.params.values() if isinstance(v, jex.ClosedJaxpr)]
    return bodies[0] if len(bodies) == 1 and len(bodies[0].jaxpr.invars) == len(equation.invars) else None


def as_slices(equation: Any) -> Any:
    """Return the closed jaxpr of slices that an equation stands for if it takes an array apart, as loops over keys do from JAX 0.11 on."""
    if equation.primitive.name != "unstack" or equation.primitive not in host_primitives():
        return None
    return _slices(equation.invars[0].aval, equation.params["axis"], equation.ctx)


@lru_cache(maxsize=256)
def _slices(whole: Any, axis: int, context: Any) -> Any:
    def pieces(x: jax.Array) -> list[jax.Array]:
        # Without strides, as `x[i]` is written: places along an axis are then done together.
        rows = (
            [slice(i, i + 1) if a == axis else slice(0, n) for a, n in enumerate(x.shape)] for i in range(x.shape[axis])
        )
        ones = (jax.lax.slice(x, [row.start for row in at], [row.stop for row in at]) for at in rows)
        return [jax.lax.squeeze(one, (axis,)) for one in ones]

    with context.manager:
        return jax.make_jaxpr(pieces)(whole)


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
    if "num_consts" in p:
        consts, carry = p["num_consts"], p["num_carry"]
    elif (
        "ft_in" in p
    ):  # From JAX 0.11 on the operands are described as a tree: constants, what is carried, what is scanned over.
        consts, carry, _ = map(len, p["ft_in"].unpack())
    else:
        raise _unknown("describes a scan")
    return Scan(p["jaxpr"], p["length"], consts, carry, p["reverse"], p["unroll"])


def _frames(equation: Any) -> list[Any]:
    """Return where an operation was called, innermost first; nothing where it is not known."""
    found = getattr(equation.source_info, "traceback", None)
    return [] if found is None else list(found.frames)


@dataclass(frozen=True)
class Origin:
    """Who asked JAX for an operation: "library" for NumPyro and pplgrad, "program", or "jax" inside of what JAX has compiled before.

    `functions` are the names of JAX's functions between, and `derives` says whether one of them takes a derivative.
    """

    caller: str
    functions: frozenset[str]
    derives: bool


def origin_of(equation: Any) -> Origin:
    """Return who asked JAX for an operation, and through which functions of its own."""
    functions: list[str] = []
    derives = False
    for frame in _frames(equation):
        if not frame.file_name.startswith(_JAX):
            caller = "library" if frame.file_name.startswith(_LIBRARIES) else "program"
            return Origin(caller, frozenset(functions), derives)
        functions.append(frame.function_name)
        derives = derives or frame.file_name.endswith(_DERIVATIVES)
    return Origin("jax", frozenset(functions), derives)


def jax_function_of(equation: Any) -> str | None:
    """Return the name of the function that an equation calls, if it has one body and is of a file of JAX's own."""
    body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    value = getattr(getattr(body, "jaxpr", body), "debug_info", None)
    if value is None or not str(value.func_filename).startswith(_JAX):
        return None
    return str(value.func_name)


def arguments_of(equation: Any) -> list[str]:
    """Return the names of a called function's arguments that are arrays, as they are in its body."""
    body = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    value = getattr(getattr(body, "jaxpr", body), "debug_info", None)
    return [str(name) for name in getattr(value, "arg_names", None) or ()]


def has_librarys_derivative(equation: Any) -> bool:
    """Return whether a derivative that is given beside a function was written in JAX, NumPyro or here, as was the function.

    The functions are found in what JAX's wrappers close over; a function of anyone else among them decides.
    """
    body = equation.params.get("call_jaxpr")
    value = getattr(getattr(body, "jaxpr", None), "debug_info", None)
    functions = list(_functions_in([x for x in equation.params.values() if x is not body]))
    files = [str(getattr(value, "func_filename", None)), *(function.__code__.co_filename for function in functions)]
    return bool(functions) and all(file.startswith((_JAX, *_LIBRARIES)) for file in files)


_HOLDING = ("f", "f_transformed", "transforms", "fun", "jvp", "fwd", "bwd", "__wrapped__", "__func__")
"""Where JAX's wrappers of functions hold what they wrap."""


def _functions_in(held: list[Any]) -> Iterator[FunctionType]:
    """Yield the Python functions that objects of JAX's hold, or functions among them do."""
    seen: set[int] = set()
    while held:
        x = held.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, FunctionType):
            yield x
            held.extend(cell.cell_contents for cell in x.__closure__ or () if cell != _EMPTY)
            held.append(x.__dict__.get("__wrapped__"))
        elif isinstance(x, (tuple, list)):
            held.extend(x)
        elif isinstance(x, partial):
            held.extend((x.func, *x.args, *x.keywords.values()))
        elif x is not None and not isinstance(x, type):
            held.extend(getattr(x, name, None) for name in _HOLDING)
            held.append(vars(type(x)).get("__call__"))


_EMPTY = CellType()


def reused(key: jax.Array) -> jax.Array:
    """Return a key that is used again on purpose, as one of which JAX's check for reuse (`jax_debug_key_reuse`) knows that."""
    return jax.random.clone(key) if jax.config.jax_debug_key_reuse else key


def has_own_derivative(equation: Any) -> bool:
    """Return whether an operation calls a function with a derivative of its own."""
    return equation.primitive.name in ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


_PACKAGES = (str(jax.__file__), str(numpyro.__file__), os.path.dirname(__file__))
_JAX, *_others = (os.path.dirname(file) + os.sep for file in _PACKAGES)
_LIBRARIES = tuple(_others)
_DERIVATIVES = os.sep + os.path.join("interpreters", "ad.py")


@dataclass(frozen=True)
class While:
    """What a while loop's equation says: what looks ahead whether it goes on, its body, and how many of its operands are constants of each."""

    ahead: Any
    ahead_consts: int
    body: Any
    body_consts: int


def while_of(equation: Any) -> While | None:
    """Return what an equation says if it is a while loop."""
    if equation.primitive.name != "while":
        return None
    p = equation.params
    try:
        return While(p["cond_jaxpr"], p["cond_nconsts"], p["body_jaxpr"], p["body_nconsts"])
    except KeyError:
        raise _unknown("describes a while loop") from None


def context_of(equation: Any) -> dict[str, Any]:
    """Return what an equation was traced under, by name: the way of counting random numbers, a mesh."""
    ctx = equation.ctx
    names = [name for kind in type(ctx).__mro__ for name in getattr(kind, "__slots__", ()) if name != "__weakref__"]
    return {name: getattr(ctx, name) for name in (*names, *getattr(ctx, "__dict__", ())) if hasattr(ctx, name)}


def has_one_mesh(jaxpr: Any) -> bool:
    """Return whether all equations were traced under the mesh under which this runs: arrays of two meshes do not meet."""
    found = {context_of(equation).get("cur_abstract_mesh") for equation in every_equation(jaxpr)}
    return len(found | {jax.sharding.get_abstract_mesh()}) == 1 or found <= {None}


def every_equation(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a jaxpr and of those inside of it."""
    for equation in jaxpr.eqns:
        yield equation
        for body in sub_jaxprs(equation):
            yield from every_equation(body)


def under(equation: Any) -> AbstractContextManager:
    """Return the context that an equation was traced under, as what runs in its place must run."""
    return equation.ctx.manager


def counts_in_parts(equation: Any) -> bool:
    """Return whether an equation's random numbers are counted in the way that can be computed in parts (JAX's default)."""
    return bool(context_of(equation).get("threefry_partitionable", jax.config.jax_threefry_partitionable))


@lru_cache
def host_primitives() -> frozenset[Any]:
    """Return JAX's own operations that give the same whenever they get the same; one of another's is known by nothing."""

    def keys(words: Any) -> Any:
        return jax.random.key_data(jax.random.wrap_key_data(words))

    words = jax.ShapeDtypeStruct((2,), np.uint32)
    found = {equation.primitive for equation in jax.make_jaxpr(keys)(words).eqns}
    for module in (jex.primitives, jax.lax):
        found.update(x for x in vars(module).values() if isinstance(x, jex.Primitive))
    return frozenset(x for x in found if x is not jex.primitives.rng_uniform_p)


def alone(equation: Any) -> Callable[..., list]:
    """Return the function of its operands, constants in place included, that an equation stands for."""
    operands = [jex.Var(atom.aval) for atom in equation.invars]
    outputs = [jex.Var(var.aval) for var in equation.outvars]
    one = equation.replace(invars=operands, outvars=outputs)
    names = jex.DebugInfo("alone", equation.primitive.name, None, None)
    jaxpr = jex.Jaxpr((), operands, outputs, [one], equation.effects, names)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, ()))


def with_weakness(x: Any, weak: bool) -> Any:
    """Return a number or an array with a type that yields to others' (`weak`) or does not, as it was traced."""
    if jax.typeof(x).weak_type == weak:
        return x
    return jex.primitives.convert_element_type_p.bind(x, new_dtype=x.dtype, weak_type=weak, sharding=None)


def called_back(params: Any) -> Any:
    """Return the function of the host that an operation with these parameters calls back, as it was given to JAX; or None."""
    return getattr(params.get("callback"), "callback_func", None)


def is_custom_jvp(equation: Any) -> bool:
    """Return whether an equation calls a function with a derivative of its own, of the forward kind."""
    return equation.primitive is jex.primitives.custom_jvp_call_p


def has_known_zeros(equation: Any) -> bool:
    """Return whether a function's derivative may be another one where it is known to be asked for some arguments alone."""
    return bool(equation.params.get("symbolic_zeros", True))


def derivative_of(equation: Any) -> Any:
    """Return the program of an equation's value and derivative, with the constants of the rule; None if it has no derivative."""
    points = [atom.aval for atom in equation.invars]  # With the mesh axes over which they vary, inside `shard_map`.
    smooth = [jnp.issubdtype(x.dtype, jnp.inexact) for x in points]

    def derivative(points: list, moves: list) -> Any:
        still = [np.zeros(x.shape, jax.dtypes.float0) for x in points]
        tangents = [move if yes else none for yes, move, none in zip(smooth, moves, still, strict=True)]
        return jax.jvp(alone(equation), points, tangents)

    try:
        return jax.make_jaxpr(derivative)(points, points)
    except Exception:  # noqa: BLE001  (a user's rule may raise anything, a `NotImplementedError` of its own say)
        return None


def rule_of(equation: Any) -> Any:
    """Return the user's function that says what the derivative of an equation is, or None where it is not found.

    It is found in what JAX's wrappers of the rule close over; a rule with arguments of its own beside the point is not found.
    """
    wrapped = found = equation.params.get("jvp_jaxpr_fun")
    while found is not None:
        wrapped = found
        found = _closed_over(getattr(wrapped, "f", None), type(wrapped), 2)
    return wrapped.f if len(getattr(wrapped, "transforms", ())) == 1 else None


def _closed_over(function: Any, kind: type, deep: int) -> Any:
    """Return an object of a type that a function closes over, or a function does that this one closes over."""
    cells = getattr(function, "__closure__", None) if isinstance(function, FunctionType) else None
    held = [cell.cell_contents for cell in cells or ()]
    for x in held:
        if type(x) is kind:
            return x
    inside = (_closed_over(x, kind, deep - 1) for x in held if deep > 1)
    return next((x for x in inside if x is not None), None)


def is_threefry(aval: Any) -> bool:
    """Return whether an array of keys is of the default kind, whose numbers are the same one by one and mapped over keys."""
    return aval.dtype == _threefry_keys()


@lru_cache
def _threefry_keys() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype
