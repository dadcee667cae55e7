"""`TraceGrad_ELBO(fuse=...)`: the same losses and gradients with and without, and what it switches off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

from pplgrad import Reparam
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.numpyro._compat_jax import sub_jaxprs
from pplgrad.numpyro._fusion import batched_evaluation
from pplgrad.testing.in_numpyro import HOST, parameters
from pplgrad.testing.programs import CASES
from tests.numpyro import nasty
from tests.numpyro.test_steps import PROGRAMS as SCANS
from tests.numpyro.test_together import PROGRAMS, start

QUICK = ("functions that print alike", "rules that print alike", "counted otherwise", "references", "known zeros")
ALONE = ("references", "called outside", "counted otherwise", "keys of other kinds", "a function of keys", "given away")
"""These may keep a program from being fused, or their numbers from being drawn together."""
JOINED = [name for name in nasty.READS if name not in ALONE]
GROUPS = [JOINED[start::9] for start in range(9)]


def found(program, fuse, particles=1, compiled=True, **settings):
    """Return losses and gradients at a few keys."""
    elbo = TraceGrad_ELBO(particles, estimators={"h*": Reparam()}, fuse=fuse, **settings)
    run = jax.value_and_grad(lambda params, key: elbo.loss(key, params, *program))
    keys, params = jax.random.split(jax.random.key(2), 3), start(program)
    if not compiled:
        return run(params, keys[0])
    run = jax.jit(run)
    return [run(params, key) for key in keys]


def assert_close(first, second):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        assert a.dtype == b.dtype

    jax.tree.map(close, first, second)


@pytest.mark.slow
@pytest.mark.parametrize("names", [*GROUPS, *([name] for name in ALONE)], ids=", ".join)
def test_what_looks_alike_gives_the_same_fused_and_plain(names):
    """Several in one program, most of whose compilation is the same for all."""
    program = nasty.program(*(nasty.READS[name] for name in names))
    assert_close(found(program, True), found(program, False))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", JOINED)
def test_each_that_looks_alike_gives_the_same_fused_and_plain(name):
    program = nasty.program(nasty.READS[name])
    assert_close(found(program, True), found(program, False))


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_compiled_gives_what_eager_gives(name):
    program = nasty.program(nasty.READS[name])
    assert_close(found(program, True)[0], found(program, False, compiled=False))
    assert_close(found(program, True, compiled=False), found(program, False, compiled=False))


@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [True, False])
def test_particles(vectorize):
    program = nasty.program(nasty.READS["functions that print alike"])
    fused, plain = (found(program, fuse, 3, vectorize_particles=vectorize) for fuse in (True, False))
    assert_close(fused, plain)


@pytest.mark.slow
def test_in_a_scan():
    program = nasty.in_scan()
    assert_close(*(found_in_scan(program, fuse) for fuse in (True, False)))


def found_in_scan(program, fuse):
    run = jax.jit(jax.value_and_grad(lambda params, key: TraceGrad_ELBO(fuse=fuse).loss(key, params, *program)))
    params = start(program)
    return [run(params, key) for key in jax.random.split(jax.random.key(2), 3)]


@pytest.mark.slow
def test_under_a_mesh():
    program = nasty.program(nasty.READS["functions that print alike"])
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        assert_close(found(program, True), found(program, False))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [True, False])
def test_a_table_that_is_changed_in_place(changes):
    """An array of NumPy's is what it was when the program was traced, or what it is now: the same in both."""

    def read(i, x):
        nonlocal table
        if i == 0:
            table = np.array([0.3, -0.7, 1.1])
        if i == 3 and changes:
            table[1] = 5.0
        return table * x

    table = None
    program = nasty.program(read)
    assert_close(found(program, True), found(program, False))


def traced(program, params, elbo):
    run = jax.value_and_grad(lambda params, key: elbo.loss(key, params, *program))
    return outline(jax.make_jaxpr(run)(params, jax.random.key(0)).jaxpr)


def outline(jaxpr):
    """Return a program's operations, what they read, and of which types; without the functions that are made anew by each tracing."""
    numbers = {}

    def read(atom):
        return str(atom) if isinstance(atom, Literal) else numbers.setdefault(atom, len(numbers))

    lines = [tuple(map(read, (*jaxpr.constvars, *jaxpr.invars)))]
    for equation in jaxpr.eqns:
        settings = {k: str(v) for k, v in equation.params.items() if isinstance(v, (int, tuple, str, np.dtype))}
        atoms = (*equation.invars, *equation.outvars)
        bodies = [outline(body) for body in sub_jaxprs(equation)]
        settings = settings if not bodies else {}
        lines.append((equation.primitive.name, settings, *((read(a), a.aval) for a in atoms), bodies))
    return [*lines, tuple(map(read, jaxpr.outvars))]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single", "subsampled", "event"])
def test_a_program_without_anything_to_be_done_together_is_left_as_it_was_traced(name):
    case = CASES[name]
    plain, fused = (traced(case.build(HOST), parameters(case), TraceGrad_ELBO(fuse=fuse)) for fuse in (False, True))
    assert fused == plain


@pytest.mark.slow
@pytest.mark.parametrize("build", [lambda: PROGRAMS["chain"](6), lambda: SCANS["chain"]()], ids=["chain", "scan"])
def test_fuse_switches_all_of_it_off(build, monkeypatch):
    program = build()
    params = start(program)
    fused, plain = (traced(program, params, TraceGrad_ELBO(fuse=fuse)) for fuse in (True, False))
    assert fused != plain

    def refused(*args):
        raise AssertionError("rewritten")

    monkeypatch.setattr(batched_evaluation, "BatchedProgram", refused)
    for module, name in (
        ("stacked_views", "gathered"),
        ("stacked_views", "cut"),
        ("threefry", "operation"),
        ("scan_fission", "steps_of"),
    ):
        monkeypatch.setattr(f"pplgrad.numpyro._fusion.{module}.{name}", refused)
    assert traced(program, params, TraceGrad_ELBO(3, fuse=False)) is not None
    assert traced(program, params, TraceGrad_ELBO(fuse=False)) == plain
    assert TraceGrad_ELBO(fuse=False).with_estimators({}).fuse is False


@pytest.mark.slow
def test_the_default_is_fused():
    assert TraceGrad_ELBO().fuse is True
    assert jnp.isfinite(TraceGrad_ELBO(2).loss(jax.random.key(0), {}, *nasty.program(lambda i, x: x)))
