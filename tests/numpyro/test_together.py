"""What several sites have in common done together: the same draws and gradients as one by one, and a program that does not grow."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Trace_ELBO

from pplgrad import DisARM, LeaveOneOut, LocalExpectation, Reparam, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.numpyro._compat_jax import sub_jaxprs
from pplgrad.numpyro._fusion import batched_evaluation, graph, loop_rerolling, scheduling, structural_equality
from pplgrad.numpyro._fusion.batched_evaluation import BatchedProgram
from pplgrad.testing.in_numpyro import HOST, parameters
from pplgrad.testing.programs import CASES

NEVER = 10**9
KEYS = 12
QUICK = ("hierarchy", "mixed", "masked")
LARGE = ("five", "chain", "nested_plates", "categorical_index", "one_hot", "subsampled", "scaled")
"""The programs with most to do together; the others are run by `make test-all`."""


def alike(name):
    """Return the marks of a program with little to do together."""
    return () if name in LARGE else [pytest.mark.exhaustive]


pytestmark = pytest.mark.filterwarnings("ignore:Missing a plate statement", "ignore:Currently, SVI")


def loss_and_gradient(monkeypatch, rows, program, params, elbo, keys, args=()):
    """Return losses and gradients over keys, with at least so many rows done together."""
    monkeypatch.setattr(batched_evaluation, "BatchedProgram", partial(BatchedProgram, rows=rows))
    model, guide = program
    run = jax.value_and_grad(lambda params, key: elbo.loss(key, params, model, guide, *args))
    return jax.jit(jax.vmap(run, (None, 0)))(params, keys)


def difference(monkeypatch, program, params, elbo=None, rows=(2,), args=(), keys=None):
    """Return the largest difference between a program's losses and gradients done together, from so many rows, and one by one."""
    elbo = TraceGrad_ELBO() if elbo is None else elbo
    keys = jax.random.split(jax.random.key(1), KEYS) if keys is None else keys
    *together, alone = [loss_and_gradient(monkeypatch, n, program, params, elbo, keys, args) for n in (*rows, NEVER)]
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((together, alone)))

    def gap(a, b):
        return float(jnp.max(jnp.abs(a - b) / (1 + jnp.abs(b)), initial=0.0))

    return max(x for found in together for x in jax.tree.leaves(jax.tree.map(gap, found, alone)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else [pytest.mark.slow, *alike(n)]) for n in CASES]
)
def test_every_program_gives_the_same(name, monkeypatch):
    case = CASES[name]
    assert difference(monkeypatch, case.build(HOST), parameters(case)) < 1e-12


def alone(name, estimator, particles):
    """Return whether leave-one-out has no other particles."""
    return particles == 1 and estimator == ScoreFunction(LeaveOneOut())


@pytest.mark.grid(without=alone)
@pytest.mark.slow
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("estimator", [ScoreFunction(LeaveOneOut()), DisARM(), LocalExpectation()], ids=repr)
@pytest.mark.parametrize("name", ["hierarchy", "mixed", "subsampled", "event_in_plate"])
def test_every_estimator_gives_the_same(name, estimator, particles, monkeypatch):
    case = CASES[name]
    elbo = TraceGrad_ELBO(particles, estimators={site: estimator for site in case.latents})
    try:
        elbo.describe(jax.random.key(0), parameters(case), *case.build(HOST))
    except Exception as refused:  # noqa: BLE001  (what does not fit a program is tested elsewhere)
        pytest.skip(str(refused))
    assert difference(monkeypatch, case.build(HOST), parameters(case), elbo) < 1e-12


def chain(length, first=0.0):
    """Return a chain of Bernoulli sites with an observation each."""

    def run(name, model):
        p, z = numpyro.param(name, jnp.array([0.3, -0.4, 0.7])), jnp.asarray(first)
        for t in range(length):
            z = numpyro.sample(f"z{t}", dist.Bernoulli(logits=p[0] + p[1] * z))
            if model:
                numpyro.sample(f"x{t}", dist.Normal(p[2] * z, 1.0), obs=0.5)

    return lambda: run("p", True), lambda: run("q", False)


def own_parameters(length):
    """Return a chain whose every site has parameters of its own, and that reads the number of the step."""

    def run(side, model):
        z = 0.5
        for t in range(length):
            a = numpyro.param(f"{side}a{t}", jnp.asarray(0.1 * t))
            z = numpyro.sample(f"z{t}", dist.Bernoulli(logits=a - (0.3 + 0.1 * t) * z))
            if model:
                numpyro.sample(f"x{t}", dist.Normal(t * a * z, 1.0), obs=0.1 * t)

    return lambda: run("p", True), lambda: run("q", False)


def two_back(length):
    """Return categorical draws that read the two before."""

    def run(name, model):
        p, one, two = numpyro.param(name, jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)), 0, 1
        for t in range(length):
            one, two = numpyro.sample(f"z{t}", dist.Categorical(logits=p[0] * one - p[1] * two)), one
            if model:
                numpyro.sample(f"x{t}", dist.Poisson(jnp.exp(p[0, 1] * one)), obs=2.0)

    return lambda: run("p", True), lambda: run("q", False)


def switching(length):
    """Return a chain of regimes over a chain of reparameterized states."""

    def run(name, model):
        p, z, h = numpyro.param(name, jnp.array([0.3, -0.4, 0.7])), 0.0, 0.1
        for t in range(length):
            z = numpyro.sample(f"z{t}", dist.Bernoulli(logits=p[0] + p[1] * z + h))
            h = numpyro.sample(f"h{t}", dist.Normal(p[2] * h + z, 1.0 + z))
            if model:
                numpyro.sample(f"x{t}", dist.Normal(h, 1.0), obs=0.5)

    return lambda: run("p", True), lambda: run("q", False)


def recurrent(length):
    """Return a guide with a hidden state that carries gradient, which no draw may cut."""
    weights = jnp.linspace(-1.0, 1.0, 9).reshape(3, 3)

    def guide():
        w, h = numpyro.param("q", weights), jnp.ones(3)
        for t in range(length):
            z = numpyro.sample(f"z{t}", dist.Bernoulli(logits=h.sum()))
            h = jnp.tanh(w @ h + z)

    def model():
        w = numpyro.param("p", weights)
        for t in range(length):
            z = numpyro.sample(f"z{t}", dist.Bernoulli(0.4))
            numpyro.sample(f"x{t}", dist.Normal(w @ (z * jnp.ones(3)), 1.0).to_event(1), obs=jnp.ones(3))

    return model, guide


def of_many_kinds(length):
    """Return independent sites of many families, some of which split their key again, in a plate and under a mask and a scale."""

    def run(name, model):
        p = numpyro.param(name, jnp.array([0.3, 0.4, 0.7]))
        with numpyro.plate("data", 3):
            for t in range(length):
                a = numpyro.sample(f"a{t}", dist.Beta(1.0 + jnp.exp(p[0]), 2.0))
                b = numpyro.sample(f"b{t}", dist.Gamma(1.0 + t, jnp.exp(p[1])))
                n = numpyro.sample(f"n{t}", dist.Poisson(jnp.exp(p[2])))
                if model:
                    with numpyro.handlers.scale(scale=2.0), numpyro.handlers.mask(mask=jnp.arange(3) < t):
                        numpyro.sample(f"x{t}", dist.Normal(a + b * n, 1.0), obs=0.3 * t)

    return lambda: run("p", True), lambda: run("q", False)


def interwoven(length):
    """Return two chains that read each other, and a scan beside them."""

    def run(name, model):
        p, y, z = numpyro.param(name, jnp.array([0.3, -0.4, 0.7])), 0.0, 1.0
        for t in range(length):
            y = numpyro.sample(f"y{t}", dist.Bernoulli(logits=p[0] + p[1] * z))
            z = numpyro.sample(f"z{t}", dist.Bernoulli(logits=p[1] - p[2] * y))
        _, total = jax.lax.scan(lambda c, x: (c + x, jnp.logaddexp(c, x)), 0.0, p * y)
        numpyro.factor("f", jax.nn.softplus(total).sum() * z) if model else None

    return lambda: run("p", True), lambda: run("q", False)


PROGRAMS = {f.__name__: f for f in (chain, own_parameters, two_back, switching, recurrent, of_many_kinds, interwoven)}


def start(program):
    """Return a program's parameters at their initial values."""
    sites = {}
    for side in program:
        sites |= numpyro.handlers.trace(numpyro.handlers.seed(side, 0)).get_trace()
    return {name: site["value"] for name, site in sites.items() if site["type"] == "param"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_loop_gives_the_same(name, monkeypatch):
    # A gamma's or a beta's draw takes seconds to compile.
    length, rows = (3, (2,)) if name == "of_many_kinds" else (7, (2, 5))
    program = PROGRAMS[name](length)
    assert difference(monkeypatch, program, start(program), rows=rows) < 1e-12


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [True, False, lambda f, keys: jax.vmap(f)(keys)], ids=["vmap", "map", "own"])
@pytest.mark.parametrize("name", ["chain", "two_back", "switching"])
def test_particles(name, vectorize, monkeypatch):
    program = PROGRAMS[name](4)
    elbo = TraceGrad_ELBO(3, vectorize_particles=vectorize)
    assert difference(monkeypatch, program, start(program), elbo, rows=(3,)) < 1e-12


def assert_same_second_derivatives(monkeypatch, program):
    """Compare second derivatives done together and one by one."""
    elbo, found = TraceGrad_ELBO(higher_order=True), []
    for rows in (3, NEVER):
        monkeypatch.setattr(batched_evaluation, "BatchedProgram", partial(BatchedProgram, rows=rows))
        second = jax.jit(lambda key: jax.hessian(lambda params: elbo.loss(key, params, *program))(start(program)))
        found.append(second(jax.random.key(3)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), *found)


@pytest.mark.slow
def test_higher_derivatives(monkeypatch):
    assert_same_second_derivatives(monkeypatch, chain(6))


@pytest.mark.slow
def test_the_draws_are_those_of_trace_elbo(monkeypatch):
    """With all sites reparameterized the loss and its gradient are NumPyro's own, draw by draw."""

    def run(name, model):
        p, h = numpyro.param(name, jnp.array([0.3, -0.4, 0.7])), 0.1
        for t in range(8):
            h = numpyro.sample(f"h{t}", dist.Normal(p[0] + p[1] * h, jnp.exp(p[2])))
            if model:
                numpyro.sample(f"x{t}", dist.Normal(h, 1.0), obs=0.5)

    program = (lambda: run("p", True), lambda: run("q", False))
    keys = jax.random.split(jax.random.PRNGKey(1), KEYS)
    elbo = TraceGrad_ELBO(estimators={"h*": Reparam()})
    mine = loss_and_gradient(monkeypatch, 3, program, start(program), elbo, keys)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        mine,
        loss_and_gradient(monkeypatch, 3, program, start(program), Trace_ELBO(), keys),
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_kind(implementation, monkeypatch):
    """Of a generator whose numbers under vmap are others than one by one, no numbers are drawn together."""
    program = chain(6)
    found = []
    for rows in (2, NEVER):
        monkeypatch.setattr(batched_evaluation, "BatchedProgram", partial(BatchedProgram, rows=rows))
        key = jax.random.key(5, impl=implementation)
        found.append(
            jax.jit(jax.value_and_grad(lambda p, k: TraceGrad_ELBO().loss(k, p, *program)))(start(program), key)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *found)


@pytest.mark.slow
def test_a_program_with_side_effects_runs_as_it_stands(monkeypatch, capfd):
    model, guide = chain(6)

    def talking():
        guide()
        jax.debug.print("drawn")

    assert difference(monkeypatch, (model, talking), start((model, guide)), rows=(2,)) == 0
    jax.effects_barrier()
    assert capfd.readouterr().out.count("drawn") == 2  # Once for all keys, in each of the two.


@pytest.mark.slow
def test_a_key_in_numbers_is_compiled_like_one_that_is_given():
    program = chain(12)
    params, key = start(program), jax.random.key(3)
    given = jax.value_and_grad(lambda params, key: TraceGrad_ELBO().loss(key, params, *program))
    fixed = partial(given, key=key)
    traced = [jax.make_jaxpr(given)(params, key), jax.make_jaxpr(fixed)(params)]
    first, second = (sum(operations(one.jaxpr).values()) for one in traced)
    assert second <= first
    together = jax.jit(fixed)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), together, jax.jit(given)(params, key))
    # Where nothing is compiled the program runs as it stands.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), together, fixed(params))


def operations(jaxpr):
    """Return how often each operation stands in a program, those of loop bodies and calls among them."""
    found = {}
    for equation in jaxpr.eqns:
        found[equation.primitive.name] = found.get(equation.primitive.name, 0) + 1
        for body in sub_jaxprs(equation):
            for name, count in operations(body).items():
                found[name] = found.get(name, 0) + count
    return found


def gradient_operations(program):
    params = start(program)
    run = jax.grad(lambda params, key: TraceGrad_ELBO().loss(key, params, *program))
    return operations(jax.make_jaxpr(run)(params, jax.random.key(0)).jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "own_parameters", "two_back"])
def test_a_program_does_not_grow(name):
    short, long = (gradient_operations(PROGRAMS[name](length)) for length in (12, 36))
    # Taking rows out of an array is no work for the machine, and parameters that are there for each site are added up for each.
    free = {"squeeze", "reshape", "slice", "pad", "split", "broadcast_in_dim", "name", "stop_gradient", "add_any"}
    assert {n: c for n, c in long.items() if n not in free} == {n: short.get(n, 0) for n in long if n not in free}


def test_what_is_dear_is_done_once():
    counts = gradient_operations(recurrent(9))
    # The hidden state: a product a step, and two for its derivative; the model's products are one, with its derivative.
    assert counts["dot_general"] <= 3 * 8 + 3
    assert counts["tanh"] == 8


# What is broken, and the program that shows it.
BROKEN = {
    "settings are ignored": ("two_back", structural_equality.Structure, "settings", lambda structure, value: ()),
    "constants are ignored": (
        "own_parameters",
        graph.Value,
        "exactly",
        property(lambda v: v.aval if v.is_constant else id(v)),
    ),
    "a draw that carries gradient is cut": ("switching", graph, "without_gradient", lambda value: True),
    "the turns of a loop are not compared": ("interwoven", loop_rerolling, "_follows", None),
    "levels are ignored": ("chain", scheduling, "levels", lambda nodes: dict.fromkeys(nodes, 0)),
}


def _never_compared(loop, nodes, turn, level, start):
    outside = [
        v
        for n, s in zip(nodes, loop.read, strict=False)
        for v, (k, _) in zip(n.operands, s, strict=False)
        if k == "outside"
    ]
    if turn == 0:
        reads = [
            (v, x)
            for n, s in zip(nodes, loop.read, strict=False)
            for v, (k, x) in zip(n.operands, s, strict=False)
            if k == "before"
        ]
        loop.before = [next(v for v, x in reads if x == i) for i in range(len(loop.carried))]
    loop.outside.append(outside)
    return len(nodes) == len(loop.read)


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_faults_are_caught(fault, monkeypatch):
    name, module, attribute, broken = BROKEN[fault]
    monkeypatch.setattr(module, attribute, _never_compared if broken is None else broken)
    if attribute == "without_gradient":
        monkeypatch.setattr(scheduling, attribute, broken)
    program = PROGRAMS[name](7)
    try:
        gap = difference(monkeypatch, program, start(program))
    except (TypeError, KeyError, StopIteration):
        return  # That it does not run shows the fault too.
    assert gap > 1e-3
