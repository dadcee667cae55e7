"""Small programs that do nearly the same twice, and what is broken in fusion when one of them is done for the other."""

from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.interpreters import batching, mlir

from pplgrad.numpyro._compat_jax import host_primitives
from pplgrad.numpyro._fusion import batched_evaluation, graph, grouping, structural_equality
from tests.numpyro.fusing import BACKWARD, CUSTOM, ELSE, NESTED, TABLE


def functions_that_print_alike(key, x, more):
    """Values that differ in an array inside an inner jit."""
    return [f(x + i) for f in (CUSTOM[0, True, 0], CUSTOM[1, True, 0]) for i in range(3)] + [CUSTOM[1, True, 0](x)]


def rules_that_print_alike(key, x, more):
    """One value, and derivatives that differ in an array inside an inner jit."""
    return [f(x + i) for f in (CUSTOM[0, True, 0], CUSTOM[0, True, 1]) for i in range(3)]


def rules_that_differ(key, x, more):
    """The same, with the arrays in the rules themselves."""
    return [f(x + i) for f in (CUSTOM[0, False, 0], CUSTOM[0, False, 1]) for i in range(3)]


def backward_rules(key, x, more):
    """Functions whose derivatives are known backwards alone."""
    return [f(x + i) for f in (BACKWARD[0, 0], BACKWARD[0, 1], BACKWARD[1, 0]) for i in range(2)]


def branches(key, x, more):
    """Sub-programs that differ in an element of an array."""
    found = []
    for own in (TABLE, ELSE):
        inner = jax.jit(lambda x, own=own: own * x)
        found.append(jax.lax.cond(x[0] > 0.3, inner, lambda x: x, x))
        found.append(jax.lax.scan(lambda c, _, inner=inner: (jnp.sin(inner(c)), None), x, None, length=3)[0])
        found.append(jax.lax.fori_loop(0, 3, lambda i, c, inner=inner: jnp.sin(inner(c)), x))
    return found


def directions(key, x, more):
    """One operation with other settings."""
    return [f(x * i) for i in range(1, 4) for f in (jax.lax.cumsum, lambda x: jax.lax.cumsum(x, reverse=True))]


def swapped(key, x, more):
    pairs = [(x * i, more["y"] * i) for i in range(1, 4)]
    return [a - b for a, b in pairs] + [b - a for a, b in pairs]


def signs_of_zero(key, x, more):
    return [jnp.arctan2(zero, -1.0 - x[0] ** 2 - i) for zero in (0.0, -0.0) for i in range(3)]


def numbers_of_other_types(key, x, more):
    """The same number in two types, whose bits are others."""
    one = [jax.lax.bitcast_convert_type(number, np.int32) for number in (np.float32(1.0), np.uint32(1))]
    return [x * jnp.cos(number * 1.0) for number in one]


def elements_that_differ(key, x, more):
    """ParticleOutputs of one shape, and of one shape and nearly the same contents."""
    return [jnp.tanh(x * own + i) for own in (TABLE, ELSE, np.array([-1.0, 0.0, 2.0])) for i in range(2)]


def ways_of_counting(key, x, more):
    """Random numbers of one key, counted in two ways."""
    found = []
    for way in (True, False):
        with jax.threefry_partitionable(way):
            found += [jax.random.bits(key, (n,)) for n in (3, 40)]
            found.append(jax.random.key_data(jax.random.split(key, 3)))
    return found


def keys_of_another_kind(key, x, more):
    """A function that draws, of keys whose numbers together are others than one by one."""

    @jax.custom_jvp
    def f(x, key):
        return x + jax.random.normal(key, (3,))

    f.defjvp(lambda points, moves: (f(*points), moves[0]))
    keys = [jax.random.fold_in(jax.random.key(3, impl="rbg"), i) for i in range(3)]
    return [f(x, k) for k in keys]


def weak_types(key, x, more):
    """Numbers whose type yields to others', which come out as they are."""
    return [jnp.sin(more["i"][i] * 0.5) for i in range(3)] + [jnp.sin(0.1 * i) for i in range(3)]


def _batched_otherwise(args, dims):
    return _named_like_a_sum.bind(*args) * 2, 0


# Another library's operation that has the name of one of JAX's.
_named_like_a_sum = jex.Primitive("add")
_named_like_a_sum.def_abstract_eval(lambda x, y: x)
_named_like_a_sum.def_impl(lambda x, y: x + y)
mlir.register_lowering(_named_like_a_sum, mlir.lower_fun(lambda x, y: x + y, multiple_results=False))
batching.primitive_batchers[_named_like_a_sum] = _batched_otherwise


def another_librarys(key, x, more):
    return [_named_like_a_sum.bind(x * i, more["y"]) for i in range(3)]


def guarded(key, x, more):
    """A function whose rule takes one of two branches, the other of which has no finite derivative."""

    @jax.custom_jvp
    def f(x):
        return jnp.sqrt(jnp.maximum(x, 0.0)).sum()

    @f.defjvp
    def _(points, moves):
        x = points[0][0]
        slope = jax.lax.cond(x > 0, lambda x, t: t / jnp.sqrt(x), lambda x, t: 0.0 * t, x, moves[0][0])
        return f(points[0]), slope

    return [f(x * s) for s in (1.0, -1.0, 0.0)]


def calling_each_other(key, x, more):
    """Functions whose rules call each other's."""
    return [NESTED(x), NESTED(x + 1), CUSTOM[0, True, 0](x), NESTED(CUSTOM[0, True, 0](x)), NESTED(NESTED(x))]


def pieces(key, x, more):
    """Places of one array, cut and stacked, some twice and not in order."""
    return [jnp.sin(x[i : i + 1]) * (j + 1) for j, i in enumerate((0, 2, 1, 2, 0))]


CASES: dict[str, Any] = {
    f.__name__: f
    for f in (
        functions_that_print_alike,
        rules_that_print_alike,
        rules_that_differ,
        backward_rules,
        branches,
        directions,
        swapped,
        signs_of_zero,
        numbers_of_other_types,
        elements_that_differ,
        ways_of_counting,
        keys_of_another_kind,
        weak_types,
        another_librarys,
        guarded,
        calling_each_other,
        pieces,
    )
}
# Evaluated forwards alone (False), backwards alone, or without a derivative (None).
WAYS = {"backward_rules": (True,), "branches": (False,), "ways_of_counting": (None,), "another_librarys": (None,)}


def _text(structure: Any, jaxpr: Any, constants: Any) -> Any:
    return str(jaxpr)


def _value_alone(structure: Any, equation: Any) -> Any:
    return structure.settings(equation.params["call_jaxpr"])


def _rule_as_text(structure: Any, equation: Any) -> Any:
    return _value_alone(structure, equation), str(structure.derivative(equation))


def _shape(x: Any) -> Any:
    return np.shape(x), np.result_type(x) if not isinstance(x, jax.Array) else x.dtype


def _number(x: Any) -> Any:
    return tuple(np.asarray(x).ravel().tolist())


def _mixed(operands: Any) -> Any:
    return frozenset(value.exactly for value in operands)


def _contents(value: Any) -> Any:
    return _number(value.constant) if value.is_constant else structural_equality.Itself(value)


def _names_alone() -> Any:
    return frozenset({*host_primitives(), _named_like_a_sum})


def _outside_alone(equation: Any) -> bool:
    return equation.primitive.name in grouping._ALIKE


STRUCTURE = structural_equality.Structure
# What is broken, the case that shows it, and what is put where. Twice where a name is used in two modules.
BROKEN: dict[str, tuple[str, list[tuple[Any, str, Any]]]] = {
    "constants by their shape": ("elements_that_differ", [(m, "array", _shape) for m in (graph, structural_equality)]),
    "constants of sub-programs by their shape": ("branches", [(structural_equality, "array", _shape)]),
    "numbers by their value, whatever type": (
        "numbers_of_other_types",
        [(graph.Value, "exactly", property(_contents))],
    ),
    "numbers that are equal": ("signs_of_zero", [(m, "array", _number) for m in (graph, structural_equality)]),
    "sub-programs by their text": ("branches", [(STRUCTURE, "program", _text)]),
    "functions by their text": ("functions_that_print_alike", [(STRUCTURE, "program", _text)]),
    "rules by their text": ("rules_that_print_alike", [(STRUCTURE, "_function", _rule_as_text)]),
    "rules are ignored": ("rules_that_differ", [(STRUCTURE, "_function", _value_alone)]),
    "settings are ignored": ("directions", [(STRUCTURE, "settings", lambda structure, value: ())]),
    "contexts are ignored": ("ways_of_counting", [(STRUCTURE, "context", lambda structure, equation: ())]),
    "operands in any order": ("swapped", [(graph, "_read", _mixed)]),
    "operations by their name": (
        "another_librarys",
        [(m, "host_primitives", _names_alone) for m in (structural_equality, grouping)],
    ),
    "what a function calls is ignored": ("keys_of_another_kind", [(grouping, "_is_alike", _outside_alone)]),
    "what a rule does is ignored": ("guarded", [(grouping, "is_custom_jvp", lambda equation: False)]),
    "types as they come": ("weak_types", [(batched_evaluation, "with_weakness", lambda x, weak: x)]),
}
