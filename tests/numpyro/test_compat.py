"""One small test for each thing that pplgrad uses of JAX and NumPyro beyond their documented interface: it says what moved."""

import importlib

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax.ad_checkpoint import checkpoint_name
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.distributions import constraints

from pplgrad.errors import ProgramError
from pplgrad.numpyro import _compat as compat
from pplgrad.numpyro import _compat_jax as compat_jax
from pplgrad.numpyro._tracing.axis_rules import Axis, moved

NAMES = [
    ("numpyro.primitives", "_PYRO_STACK", "marked_mutable() and scopes_inside() in _compat.py read NumPyro's stack of handlers"),
    ("numpyro.primitives", "apply_stack", "marked_mutable() in _compat.py sends a message through NumPyro's handlers"),
    ("numpyro.util", "_validate_model", "host_checks() in _compat.py makes NumPyro's own checks of a model"),
    ("numpyro.util", "check_model_guide_match", "host_checks() in _compat.py makes NumPyro's own checks of a guide"),
    ("numpyro.contrib.control_flow.cond", "cond_wrapper", "control_flow_kind() in _compat.py knows a `cond` by it"),
    ("numpyro.contrib.control_flow.scan", "scan_wrapper", "control_flow_kind() in _compat.py takes for a `scan` what it is not of a `cond`"),
    ("numpyro.optim", "_NumPyroOptim", "_compat.py takes it for SplitOptimizer in _optim.py, which is one of NumPyro's optimizers by it"),
    ("jax.ad_checkpoint", "checkpoint_name", "tag() in _compat_jax.py marks the value of a site with it"),
    *(
        ("jax.extend.core", name, f"_compat_jax.py and _fusion/structural_equality.py read and build programs of JAX with its {name}")
        for name in ("Jaxpr", "ClosedJaxpr", "Literal", "Var", "Primitive", "DebugInfo", "jaxpr_as_fun", "primitives")
    ),
    ("jax.extend.core.primitives", "custom_jvp_call_p", "is_custom_jvp() in _compat_jax.py knows a derivative of the user's own by it"),
    ("jax.extend.core.primitives", "convert_element_type_p", "with_weakness() in _compat_jax.py restores a type that yields to others"),
    ("jax.extend.core.primitives", "rng_uniform_p", "host_primitives() in _compat_jax.py leaves it out: it gives another number each time"),
    ("jax.core", "Tracer", "is_tracing() in _compat_jax.py and _tracing/supports.py tell a traced value from a number by it"),
    ("jax.sharding", "get_abstract_mesh", "has_one_mesh() and manual_axes() in _compat_jax.py ask under which mesh this runs"),
    ("jax.dtypes", "float0", "derivative_of() in _compat_jax.py gives whole numbers a tangent of this type"),
    ("jax.stages", "Traced", "sub_jaxprs() in _compat_jax.py finds the body of an operation that is an object in it"),
    ("numpyro.distributions", "ExpandedDistribution", "unmasked() in _compat.py looks inside of it"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "used"), NAMES, ids=[f"{m}.{n}" for m, n, _ in NAMES])
def test_there_is(module, name, used):
    where = jex.primitives if module == "jax.extend.core.primitives" else importlib.import_module(module)
    assert hasattr(where, name), f"{module}.{name} has moved; {used}."


def only(function, *args, name=None):
    """Return the one equation of a function's program, or the one of that name."""
    equations = jax.make_jaxpr(function)(*args).eqns
    found = [e for e in equations if name is None or e.primitive.name == name]
    assert len(found) == 1, (
        f"JAX {jax.__version__} writes {name or 'this'} as {[e.primitive.name for e in equations]}; pplgrad's rules in "
        "_compat_jax.py, _tracing/axis_rules.py and _tracing/provenance.py go by the names of operations."
    )
    return found[0]


def has(equation, names, used):
    missing = set(names.split()) - set(equation.params)
    assert not missing, f"JAX {jax.__version__} no longer says {sorted(missing)} of {equation.primitive.name}; {used}."


def test_a_tag_is_read_back():
    marked = only(lambda x: compat_jax.tag("z", x), 1.0)
    assert compat_jax.tag_of(marked) == "z", (
        "JAX writes checkpoint_name down otherwise; tag_of() in _compat_jax.py reads it."
    )
    assert compat_jax.tag_of(only(lambda x: checkpoint_name(x, "user's"), 1.0)) is None


def test_a_callback_is_known_by_its_function():
    def function(x):
        return x

    called = only(lambda x: jax.pure_callback(function, jax.ShapeDtypeStruct((), np.float32), x), np.float32(1))
    assert called.primitive.name == "pure_callback" and compat_jax.called_back(called.params) is function, (
        "JAX writes jax.pure_callback down otherwise; called_back() in _compat_jax.py finds by it what black_box() declares."
    )
    assert compat_jax.called_back(only(jnp.sin, 1.0).params) is None


def test_a_tag_that_is_not_read_back_is_refused(monkeypatch):
    """The mutant: a JAX that marks values otherwise must not pass for a program without draws."""
    monkeypatch.setattr(compat_jax, "tag_of", lambda equation: None)
    compat_jax._check_tags.cache_clear()
    with pytest.raises(RuntimeError, match="marks a named value in a way"):
        compat_jax.tag("z", jnp.ones(()))
    compat_jax._check_tags.cache_clear()


def looped(c, xs, w):
    return jax.lax.scan(lambda c, x: (c + w * x, c), c, xs, reverse=True, unroll=2)


def test_a_scan_says_what_it_goes_through():
    found = compat_jax.scan_of(only(looped, 0.0, jnp.ones(6), 2.0, name="scan"))
    said = (found.length, found.consts, found.carry, found.reverse, found.unroll, len(found.body.jaxpr.invars))
    assert said == (6, 1, 1, True, 2, 3), (
        "JAX describes the operands of a scan otherwise; scan_of() in _compat_jax.py reads it."
    )


def test_a_scan_of_an_unknown_kind_is_refused():
    equation = only(looped, 0.0, jnp.ones(6), 2.0, name="scan")
    params = {k: v for k, v in equation.params.items() if k not in ("num_consts", "num_carry", "ft_in")}
    with pytest.raises(RuntimeError, match="describes a scan in a way"):
        compat_jax.scan_of(equation.replace(params=params))


def test_loops_and_branches_say_their_bodies():
    loop = only(lambda x: jax.lax.while_loop(lambda x: x < 3, lambda x: x + 1, x), 0.0, name="while")
    has(
        loop,
        "cond_nconsts body_nconsts cond_jaxpr body_jaxpr",
        "_tracing/provenance.py follows the loop's carry by them",
    )
    branch = only(lambda i, x: jax.lax.switch(i, [jnp.sin, jnp.cos], x), 0, 1.0, name="cond")
    has(branch, "branches", "_tracing/provenance.py follows each branch")
    assert len(list(compat_jax.sub_jaxprs(branch))) == 2, (
        "JAX holds branches otherwise; sub_jaxprs() in _compat_jax.py finds them."
    )
    solve = only(jnp.linalg.solve, jnp.eye(2), jnp.ones(2), name="jit").params["jaxpr"]
    (inner,) = (e for e in solve.jaxpr.eqns if e.primitive.name == "custom_linear_solve")
    has(inner, "const_lengths jaxprs", "_tracing/provenance.py follows the solver of a linear system by them")


def test_a_call_is_known_as_one():
    call = only(jax.jit(lambda x: x + 1), 1.0)
    body = compat_jax.call_body(call)
    assert body is not None and len(body.jaxpr.eqns) == 1, (
        "JAX writes jit otherwise; call_body() in _compat_jax.py opens it."
    )
    has(
        call,
        "in_shardings out_shardings in_layouts out_layouts",
        "call_body() in _compat_jax.py leaves a call alone that says something of devices",
    )


def test_a_derivative_of_the_users_own_is_known_and_its_rule_found():
    @jax.custom_jvp
    def f(x):
        return 2 * x

    @f.defjvp
    def rule(points, moves):
        return f(*points), 2 * moves[0]

    equation = only(f, 1.0)
    assert compat_jax.is_custom_jvp(equation), (
        "JAX writes custom_jvp otherwise; is_custom_jvp() in _compat_jax.py knows it."
    )
    has(
        equation,
        "symbolic_zeros jvp_jaxpr_fun",
        "has_known_zeros() and rule_of() in _compat_jax.py read what the derivative is",
    )
    assert compat_jax.rule_of(equation) is rule, (
        "JAX wraps the rule otherwise; rule_of() in _compat_jax.py finds it, and fuses such operations."
    )
    assert compat_jax.derivative_of(equation) is not None and not compat_jax.has_known_zeros(equation)


def test_an_equation_stands_alone_under_what_it_was_traced():
    equation = only(lambda x: jax.random.bits(x, (2,)), jax.random.key(0), name="random_bits")
    found = compat_jax.alone(equation)(jax.random.key(3))
    assert np.array_equal(found[0], jax.random.bits(jax.random.key(3), (2,))), (
        "alone() in _compat_jax.py builds a program of one operation."
    )
    assert "cur_abstract_mesh" in compat_jax.context_of(equation) and "threefry_partitionable" in compat_jax.context_of(
        equation
    ), (
        "JAX notes otherwise what an operation was traced under; context_of() in _compat_jax.py compares it before operations are fused."
    )
    with compat_jax.under(equation):
        pass
    has(equation, "shape bit_width", "_fusion/threefry.py writes random numbers out by them")
    has(
        only(lambda k: jax.random.split(k), jax.random.key(0), name="random_split"),
        "shape",
        "_fusion/threefry.py writes keys out by it",
    )
    assert compat_jax.is_threefry(jax.random.key(0)), (
        "JAX's default keys have another type; is_threefry() in _compat_jax.py knows them."
    )


def test_an_array_taken_apart_is_slices():
    """From JAX 0.11 on, which has an operation of its own for it."""
    x = jnp.arange(12.0).reshape(3, 4)
    equations = jax.make_jaxpr(lambda x: list(x))(x).eqns
    apart = [e for e in equations if e.primitive.name == "unstack"]
    assert apart or {e.primitive.name for e in equations} <= {"slice", "squeeze", "split", "reshape"}, (
        f"JAX takes an array apart by {sorted({e.primitive.name for e in equations})}; as_slices() in _compat_jax.py writes it as slices."
    )
    for equation in apart:
        has(equation, "axis", "as_slices() in _compat_jax.py writes it as slices along this axis")
        slices = compat_jax.as_slices(equation)
        assert {e.primitive.name for e in slices.jaxpr.eqns} == {"slice", "squeeze"}
        assert np.array_equal(compat_jax.as_function(slices)(x), x)
    keys = jax.random.split(jax.random.key(0), 3)
    for equation in jax.make_jaxpr(lambda k: list(k))(keys).eqns:
        if equation.primitive.name == "unstack":
            assert all(map(jnp.array_equal, compat_jax.as_function(compat_jax.as_slices(equation))(keys), keys))


def test_its_own_operations_are_known():
    names = {p.name for p in compat_jax.host_primitives()}
    wanted = {
        "add",
        "mul",
        "exp",
        "dot_general",
        "scan",
        "while",
        "cond",
        "gather",
        "scatter-add",
        "random_bits",
        "random_wrap",
    }
    assert wanted <= names and "rng_uniform" not in names, (
        f"host_primitives() in _compat_jax.py finds {sorted(wanted - names)} no longer, and what is made of them is not fused."
    )


ALONG = {
    "add": (lambda x: x + 1.0, 1),
    "reduce_sum": (lambda x: jnp.sum(x, 0), 0),
    "reduce_max": (lambda x: jnp.max(x, 2), 1),
    "argmax": (lambda x: jnp.argmax(x, 0), 0),
    "cumsum": (lambda x: jax.lax.cumsum(x, 0), 1),
    "transpose": (lambda x: jnp.transpose(x, (1, 2, 0)), 0),
    "broadcast_in_dim": (lambda x: jax.lax.broadcast(x, (5,)), 2),
    "squeeze": (lambda x: jax.lax.squeeze(x, (0,)), 0),
    "slice": (lambda x: x[:, :, 1:], 1),
    "rev": (lambda x: x[:, :, ::-1], 1),
    "concatenate": (lambda x: jnp.concatenate([x, x], 2), 1),
    "select_n": (lambda x: jax.lax.select(x > 0, x, x), 1),
    "reshape": (lambda x: x.reshape(3, 4), 0),
}


@pytest.mark.parametrize("name", ALONG)
def test_an_axis_is_followed(name):
    function, place = ALONG[name]
    equations = jax.make_jaxpr(function)(jnp.ones((1, 3, 4))).eqns
    equation = next((e for e in equations if e.primitive.name == name), None)
    assert equation is not None, (
        f"JAX has {name} no longer; its rule in _tracing/axis_rules.py is not used, and gradients have more variance."
    )
    operand = next(i for i, atom in enumerate(equation.invars) if len(atom.aval.shape) == 3 and atom.aval.dtype != bool)
    found = moved(equation, operand, Axis(1, 1, 3))
    assert found == Axis(place, 1, 3), (
        f"JAX says otherwise what {name} does ({sorted(equation.params)}); its rule in _tracing/axis_rules.py reads it."
    )


def test_control_flow_is_known_by_its_message():
    seen = []

    class Looking(handlers.trace):
        def process_message(self, msg):
            if msg["type"] == "control_flow":
                seen.append((*compat.control_flow_kind(msg), "substitute_stack" in msg["kwargs"]))
                compat.replace_bodies(msg, lambda body: body)

    with handlers.seed(rng_seed=0), Looking():
        scan(lambda c, x: (c, numpyro.sample("x", dist.Normal(c, 1.0))), 0.0, jnp.ones(2), reverse=True)
        cond(True, lambda _: None, lambda _: None, None)
    assert seen == [(True, True, True), (False, False, True)], (
        "NumPyro's messages of scan and cond are arranged otherwise; control_flow_kind(), replace_bodies() and replay_branches() in _compat.py read them."
    )


def test_a_site_handed_out_of_a_scan_is_known():
    with handlers.seed(rng_seed=0), handlers.trace() as found:
        scan(lambda c, x: (c, numpyro.sample("x", dist.Normal(c, 1.0))), 0.0, jnp.ones(2))
    assert compat.is_handed_out(found["x"]), (
        "NumPyro no longer marks a site of a scan with `_control_flow_done`; is_handed_out() reads it."
    )


def test_handlers_are_found_and_mutables_marked():
    with handlers.trace() as found, handlers.scope(prefix="in"):
        value = compat.marked_mutable("m", 3.0, "mark")
        scopes = compat.scopes_inside(found)
    assert value == 3.0 and any(s.get("pplgrad") == "mark" for s in found.values()), (
        "NumPyro's mutable sites are messages of another kind; marked_mutable() sends them."
    )
    assert [compat.renamed("z", scopes)] == ["in/z"], (
        "NumPyro's scope renames otherwise; renamed() in _compat.py asks it."
    )


def test_the_hosts_own_checks_are_made():
    def trace(shape):
        with handlers.seed(rng_seed=0), handlers.trace() as found:
            numpyro.sample("z", dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape)))
        return found

    with pytest.raises(ProgramError, match="give the site one shape in both"):
        compat.host_checks(trace((2,)), trace((3,)))


def test_masks_are_taken_off():
    mask = jnp.array([True, False])
    inside = dist.Normal(jnp.zeros(2), 1.0).mask(mask)
    assert np.array_equal(inside._mask, mask), (
        "A masked distribution holds its mask elsewhere; mask_of() in _compat.py and _tracing/relaxations.py read `_mask`."
    )
    assert type(compat.unmasked(inside.to_event(1)).base_dist) is dist.Normal


def test_weakness_is_restored():
    weak = compat_jax.with_weakness(jnp.asarray(1.0, jnp.float32), True)
    assert jax.typeof(weak).weak_type, (
        "convert_element_type takes other parameters; with_weakness() in _compat_jax.py gives them."
    )


def test_a_while_loop():
    def looped(x, y):
        return jax.lax.while_loop(lambda c: c < x, lambda c: c + y, 0.0)

    found = compat_jax.while_of(only(looped, 3.0, 1.0, name="while"))
    assert found is not None and (found.ahead_consts, found.body_consts) == (1, 1), (
        "JAX describes the operands of a while loop otherwise; while_of() in _compat_jax.py reads it."
    )


def walked(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in compat_jax.sub_jaxprs(equation):
            yield from walked(inner)


def origins(function, kind, x=None):
    jaxpr = jax.make_jaxpr(function)(jnp.ones(3) if x is None else x).jaxpr
    return [compat_jax.origin_of(equation) for equation in walked(jaxpr) if equation.primitive.name == kind]


def test_who_asks_for_an_operation():
    def program(x):
        return (x > 0.5) + jnp.round(x) + constraints.greater_than(0.1)(x)

    found = [origin.caller for kind in ("gt", "round") for origin in origins(program, kind)]
    assert sorted(found) == ["jax", "library", "program"], (
        "JAX says otherwise where an operation was called; origin_of() in _compat_jax.py reads it."
    )


def test_through_which_functions_an_operation_is_asked_for():
    def program(x):
        return jax.nn.logsumexp(x) + jax.lax.stop_gradient(x).sum()

    found = ["logsumexp" in origin.functions for origin in origins(program, "stop_gradient")]
    assert found == [True, False], (
        "JAX says otherwise through which functions an operation was called; origin_of() in _compat_jax.py reads it."
    )


def test_what_a_derivative_asks_for():
    (slope,) = origins(jax.grad(lambda x: jnp.abs(x)), "ge", 1.0) or origins(jax.grad(jnp.abs), "sign", 1.0)
    (value,) = origins(lambda x: jnp.abs(x), "abs", 1.0)
    assert (slope.derives, value.derives) == (True, False), (
        "JAX takes derivatives in another file; origin_of() in _compat_jax.py knows by it that an operation is of one."
    )


def test_a_function_of_jaxs_own_is_known_by_its_file():
    ours = only(lambda x: jax.jit(lambda y: 2 * y)(x), 1.0, name="jit")
    theirs = only(lambda x: jnp.clip(x, 0.0, 1.0), 1.0, name="jit")
    assert (compat_jax.jax_function_of(ours), compat_jax.jax_function_of(theirs)) == (None, "clip"), (
        "JAX says otherwise where a function is written; jax_function_of() in _compat_jax.py reads it."
    )


def test_whose_derivative_it_is():
    rule = jax.custom_jvp(lambda x: 2 * x)
    rule.defjvp(lambda x, t: (2 * x[0], 2 * t[0]))
    rules = jax.custom_jvp(jnp.sin)
    rules.defjvps(lambda t, answer, x: t)
    forward = jax.custom_vjp(jnp.sin)
    forward.defvjp(lambda x: (jnp.sin(x), x), jnp.multiply)
    backward = jax.custom_vjp(jnp.sin)
    backward.defvjp(jax.jit(lambda x: (jnp.sin(x), x)), jax.jit(lambda x, g: (g,)))
    ours = [compat_jax.has_librarys_derivative(only(f, 1.0)) for f in (rule, rules, forward, backward)]
    theirs = [
        compat_jax.has_librarys_derivative(only(lambda x, f=f: f(x, x), 1.0))
        for f in (lambda x, y: jax.nn.relu(x), jax.scipy.special.xlogy)
    ]
    assert (ours, theirs) == ([False] * 4, [True] * 2), (
        "JAX wraps a derivative that is given otherwise; has_librarys_derivative() in _compat_jax.py looks into it."
    )
