"""What is fused gives what is not: random programs, evaluated both ways, with their derivatives; and faults that these find."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from pplgrad.numpyro._fusion.graph import graph_of
from pplgrad.numpyro._fusion.structural_equality import BYTES, Itself, array
from tests.numpyro.fusing import FORWARD, REVERSE, arguments, function_of, fused, gap, programs
from tests.numpyro.fusion_cases import BROKEN, CASES, WAYS

FIXED = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def check(program, ways, rows=2):
    assert gap(function_of(*program), arguments(), ways=ways, rows=rows) < 1e-12


def forwards(examples, phases=(Phase.generate, Phase.shrink)):
    """Return a test of random programs with loops, and how they move with what they are given."""
    return settings(max_examples=examples, phases=phases, **FIXED)(
        given(programs(FORWARD))(lambda program: check(program, (False,)))
    )


def backwards(examples, phases=(Phase.generate, Phase.shrink)):
    """Return a test of random programs with derivatives of their own that are known backwards alone."""
    return settings(max_examples=examples, phases=phases, **FIXED)(
        given(programs(REVERSE))(lambda program: check(program, (True,)))
    )


@pytest.fixture(params=[True, False], ids=["constants in place", "constants apart"])
def constants(request):
    before = jax.config.jax_use_simplified_jaxpr_constants
    jax.config.update("jax_use_simplified_jaxpr_constants", request.param)
    yield
    jax.config.update("jax_use_simplified_jaxpr_constants", before)


@pytest.mark.slow
@pytest.mark.parametrize("direction", [forwards, backwards])
def test_random_programs(direction, constants):
    direction(12)()


@pytest.mark.slow
@pytest.mark.exhaustive  # Twice as many as above.
@pytest.mark.parametrize("direction", [forwards, backwards])
def test_many_random_programs(direction, constants):
    direction(24)()


@pytest.mark.parametrize("name", CASES)
def test_what_is_nearly_the_same_stays_apart(name, constants):
    assert gap(CASES[name], arguments(), ways=WAYS.get(name, (False, True))) < 1e-12


@pytest.mark.parametrize("fault", BROKEN)
def test_faults_are_caught(fault, monkeypatch):
    name, changes = BROKEN[fault]
    for owner, attribute, broken in changes:
        monkeypatch.setattr(owner, attribute, broken)
    try:
        found = gap(CASES[name], arguments(), ways=WAYS.get(name, (False, True)))
    except (AssertionError, NotImplementedError):
        return  # Other types, or a derivative that there is not.
    assert not found < 1e-3


# Faults that random programs find too.
def kinds(function):
    """Return the kinds of the functions with a derivative of their own that are called one after the other."""
    nodes = graph_of(jax.make_jaxpr(function)(1.0)).nodes
    found = [node.settings for node in nodes if node.name == "custom_jvp_call"]
    return [found.index(kind) for kind in found]


def wave(slope, other=None):
    """Return a function whose derivative is written with another one, or with its own."""
    f = jax.custom_jvp(jnp.sin)
    f.defjvp(lambda p, t: (f(*p), jnp.cos(p[0]) * t[0] * (other or f)(p[0]) * slope))
    return f


def test_functions_are_followed_into_the_functions_of_their_rules():
    """What differs in the second derivative alone is not the same; what calls itself is the same as what does so too."""
    one, two, alike = wave(1.0), wave(2.0), wave(1.0)
    through = wave(1.0, other=two)
    found = kinds(lambda x: one(x) + two(x + 1) + alike(x + 2) + through(x + 3) + one(x + 4))
    assert found == [0, 1, 0, 3, 0]


def test_functions_that_do_not_end_are_different():
    """A rule that goes on to ever other functions is followed a few times."""

    def deep(n):
        return wave(1.0, deep(n - 1)) if n else wave(1.0)

    assert kinds(lambda x: deep(9)(x) + deep(9)(x + 1)) == [0, 1]


def test_a_rule_that_raises_is_one_of_its_own():
    def refusing(text):
        f = jax.custom_jvp(jnp.sin)

        @f.defjvp
        def _(points, moves):
            raise NotImplementedError(text)

        return f

    f, g = refusing("first"), refusing("second")
    assert kinds(lambda x: f(x) + g(x + 1)) == [0, 1]


def test_jaxs_own_functions_are_one():
    found = kinds(lambda x: jnp.logaddexp(x, 1.0) + jnp.logaddexp(x + 1, 2.0) + jax.nn.relu(x) + jax.nn.relu(x + 1))
    assert found == [0, 0, 2, 2]


def test_what_may_change_from_time_to_time_is_done_each_time():
    draw = jax.jit(lambda: jax.lax.rng_uniform(0.0, 1.0, (2,)))
    call = jax.jit(lambda x: jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), float), x))
    run, _ = fused(lambda x: [draw(), draw(), call(x), call(x)], jnp.ones(()))
    names = [equation.primitive.name for equation in jax.make_jaxpr(run)(jnp.ones(())).jaxpr.eqns]
    assert names.count("rng_uniform") == 2 and names.count("pure_callback") == 2


def test_what_is_compared_is_kept():
    """No array gets the place in memory of one that was compared before."""
    places = set()
    for number in range(50):
        places.add(Itself(np.full(3, number)))
    assert len(places) == 50


def test_large_arrays_are_compared_by_their_place():
    large = np.zeros(BYTES)
    assert array(large[:]) == array(large[:])
    assert array(large) != array(large.copy()) and array(large) != array(large[::-1])
    assert array(np.zeros(3)) == array(np.zeros(3))
    assert array(np.zeros(3)) != array(np.zeros(3, np.float32)) and array(np.zeros(3)) != array(-np.zeros(3))
    assert array(0) != array(False) and array(1) != array(1.0) and array(np.nan) == array(np.nan)
