"""Scans taken apart: the same draws and gradients as step by step, loops with only what must wait, and faults that are caught."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan

from pplgrad import LeaveOneOut, LocalExpectation, Reparam, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.numpyro._compat_jax import scan_of, sub_jaxprs
from pplgrad.numpyro._fusion import scan_fission
from tests.numpyro.fusing import arguments, gap
from tests.numpyro.test_together import assert_same_second_derivatives, difference, operations, start

pytestmark = pytest.mark.filterwarnings("ignore:Currently, SVI", "ignore:Missing a plate statement")
DATA = jnp.array([0.2, -0.4, 0.9, 1.3, -0.7, 0.1])


def weights(name):
    """Return three parameters, the guide's others than the model's, so that no learning signal is zero."""
    return numpyro.param(name, jnp.array([0.3, -0.4, 0.7]) if name == "p" else jnp.array([-0.5, 0.9, 0.2]))


def matrix(name):
    return numpyro.param(name, jnp.linspace(-1.0, 1.0, 9).reshape(3, 3) * (1.0 if name == "p" else -0.6))


def both(run):
    return lambda: run("p", True), lambda: run("q", False)


def chain(length=6, reverse=False, init=0.0):
    """Return a chain of Bernoulli sites with an observation each, with a factor of the last one."""

    def run(name, model):
        p = weights(name)

        def step(z, x):
            z = numpyro.sample("z", dist.Bernoulli(logits=p[0] + p[1] * z))
            if model:
                numpyro.sample("x", dist.Normal(p[2] * z, 1.0), obs=x)
            return z.astype(x.dtype), p[2] * z

        last, means = scan(step, jnp.asarray(init), jnp.resize(DATA, length), reverse=reverse)
        numpyro.factor("f", p[0] * last + jnp.sin(means).sum()) if model else None

    return both(run)


def model_in_reverse():
    """Return a model that scans the other way than its guide."""
    return chain(reverse=True)[0], chain()[1]


def hidden_state():
    """Return a guide with a state that carries gradient and reads the draws; the model reads the number of the step."""

    def guide():
        w = matrix("q")

        def step(carry, x):
            h, t = carry
            z = numpyro.sample("z", dist.Bernoulli(logits=h.sum() + 0.1 * t))
            return (jnp.tanh(w @ h + z + x), t + 1), h

        scan(step, (jnp.ones(3), jnp.asarray(3)), DATA)

    def model():
        w = matrix("p")

        def step(carry, x):
            t, total = carry
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal((w @ (z * jnp.ones(3))).sum() + t * x, 1.0), obs=total)
            return (t + 2, total + z * w[0, 0]), None

        scan(step, (jnp.asarray(1), 0.0), DATA)

    return model, guide


def product():
    """Return draws that read a matrix product of the draws before, which a loop without gradient needs too."""

    def run(name, model):
        w = matrix(name)

        def step(z, x):
            with numpyro.plate("d", 3):
                z = numpyro.sample("z", dist.Bernoulli(logits=w @ z - 0.2))
            return z.astype(float), None

        scan(step, jnp.ones(3), DATA)

    return both(run)


def states():
    """Return a chain of reparameterized states, with regimes that read them."""

    def run(name, model):
        p = weights(name)

        def step(carry, x):
            h, before = carry
            z = numpyro.sample("z", dist.Bernoulli(logits=p[0] + p[1] * h))
            new = numpyro.sample("h", dist.Normal(p[2] * h + z + 0.1 * before, jnp.exp(p[1])))
            return (new, h), new * x

        _, found = scan(step, (jnp.asarray(0.1), p[0]), DATA)
        numpyro.factor("f", jnp.tanh(found).sum()) if model else None

    return both(run)


def interwoven():
    """Return two chains that read each other, and a carried value that nothing reads."""

    def run(name, model):
        p = weights(name)

        def step(carry, x):
            y, z, lost = carry
            y = numpyro.sample("y", dist.Bernoulli(logits=p[0] + p[1] * z)).astype(float)
            z = numpyro.sample("z", dist.Categorical(logits=p * y)).astype(float)
            return (y, z, jnp.logaddexp(lost, z)), None

        scan(step, (jnp.asarray(0.0), jnp.asarray(1.0), jnp.asarray(0.5)), DATA)

    return both(run)


def shifted():
    """Return a guide whose draws read data of the step before, and a model that carries the draw of two steps before."""

    def run(name, model):
        p = weights(name)

        def step(carry, x):
            one, two, data = carry
            z = numpyro.sample("z", dist.Bernoulli(logits=p[0] + p[1] * data + (p[2] * two if model else 0.0)))
            return (z.astype(float), one, x), None

        scan(step, (jnp.asarray(0.5), p[1], jnp.asarray(0.0)), DATA)

    return both(run)


def swapped():
    """Return draws that read two carried values which change places at every step, and one that is drawn beside them."""

    def run(name, model):
        p = weights(name)

        def step(carry, x):
            one, two, z = carry
            z = numpyro.sample("z", dist.Bernoulli(logits=one * x + p[2] * z)).astype(float)
            return (two, one, z), one

        (one, two, z), found = scan(step, (p[0], p[1], 0.0), DATA)
        numpyro.factor("f", (found * DATA).sum() + two * z) if model else None

    return both(run)


def network():
    """Return a model that decodes a draw by a recurrent network of the user's own `lax.scan`."""

    def run(name, model):
        p = weights(name)
        z = numpyro.sample("z", dist.Bernoulli(logits=p[0]))
        if model:

            def step(h, x):
                h = jnp.tanh(p[1] * h + p[2] * x + z)
                return h, (h, x * z)

            h, (hs, others) = jax.lax.scan(step, p[0], DATA, unroll=2)
            numpyro.sample("x", dist.Normal(hs + h, jnp.exp(others)).to_event(1), obs=DATA)

    return both(run)


def forked():
    """Return a scan with a `cond` in it, which runs as it stands."""

    def run(name, model):
        p = weights(name)

        def step(z, x):
            odds = jax.lax.cond(z > 0, lambda: p[2] * x, lambda: jnp.tanh(p[2]))
            return numpyro.sample("z", dist.Bernoulli(logits=p[0] + p[1] * z + odds)).astype(float), None

        scan(step, jnp.asarray(0.0), DATA)

    return both(run)


PROGRAMS = {
    f.__name__: f
    for f in (chain, model_in_reverse, hidden_state, product, states, interwoven, shifted, swapped, network, forked)
}
PROGRAMS["from_a_parameter"] = lambda: chain(init=0.7)
PROGRAMS["in_reverse"] = partial(chain, reverse=True)
ELBO = TraceGrad_ELBO(estimators={"h": Reparam()})
QUICK = ("chain", "hidden_state")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PROGRAMS])
def test_every_scan_gives_the_same(name, monkeypatch):
    program = PROGRAMS[name]()
    elbo = ELBO if name == "states" else None
    assert difference(monkeypatch, program, start(program), elbo) < 1e-12


@pytest.mark.grid
@pytest.mark.parametrize("start", [3, lambda x: x.sum().astype(np.int8)], ids=["a number", "known when it runs"])
@pytest.mark.parametrize("reverse", [True, False])
def test_a_counter_begins_again_after_its_largest_number(start, reverse):
    def program(key, x, more):
        def step(carry, row):
            count, total = carry
            return (count + np.int8(3), jnp.tanh(total + row)), total * count

        first = start(x) if callable(start) else jnp.asarray(start, np.int8)
        return jax.lax.scan(step, (first, x), jnp.linspace(0.0, 1.0, 200), reverse=reverse)

    assert gap(program, arguments()) < 1e-12


@pytest.mark.grid
@pytest.mark.slow
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", ["chain", "hidden_state"])
def test_particles(name, vectorize, monkeypatch):
    program = PROGRAMS[name]()
    elbo = TraceGrad_ELBO(3, vectorize_particles=vectorize, estimators={"z": ScoreFunction(LeaveOneOut())})
    assert difference(monkeypatch, program, start(program), elbo) < 1e-12


@pytest.mark.slow
def test_higher_derivatives(monkeypatch):
    assert_same_second_derivatives(monkeypatch, chain())


def loops(program, implementation="threefry2x32"):
    """Return the operations in each loop of a program's loss and gradient."""
    params = start(program)
    run = jax.grad(lambda params, key: TraceGrad_ELBO().loss(key, params, *program))
    closed = jax.make_jaxpr(run)(params, jax.random.key(0, impl=implementation))
    return [operations(scan.body.jaxpr) for scan in scans(closed.jaxpr)]


def scans(jaxpr):
    for equation in jaxpr.eqns:
        if (found := scan_of(equation)) is not None:
            yield found
        else:
            for body in sub_jaxprs(equation):
                yield from scans(body)


def test_only_what_must_wait_is_in_a_loop():
    """Of a chain: the keys, and the draws without densities or a derivative; of the model, which takes the guide's draws, nothing."""
    keys, draws = sorted(loops(chain()), key=lambda found: "logistic" in found)
    assert "xor" in keys and not {"random_bits", "mul"} & set(keys)
    assert draws["logistic"] == 1 and not {"xor", "log1p", "sin", "cos"} & set(draws)


def test_a_state_with_gradient_has_one_loop_and_one_for_its_derivative():
    with_products = [found["dot_general"] for found in loops(hidden_state()) if "dot_general" in found]
    assert with_products == [1, 2]  # The derivative has a product for the state, and one for the matrix.


@pytest.mark.parametrize(
    ("program", "implementation", "limit"),
    [(forked(), "threefry2x32", None), (chain(), "rbg", None), (chain(), "threefry2x32", 5)],
    ids=["control flow", "keys that differ in rows", "too large"],
)
def test_what_cannot_be_taken_apart_runs_as_it_stands(program, implementation, limit, monkeypatch):
    if limit is not None:
        monkeypatch.setattr(scan_fission, "ALL_STEPS", limit)
    guide = next(found for found in loops(program, implementation) if "random_bits" in found)
    assert {"random_split", "logistic"} <= set(guide)


def _unshifted(run, value):
    after = run._steps.after[run._place[value]]
    return scan_fission._All(run._as_rows(run._value(after), after))


# What is broken, and the program that shows it.
BROKEN = {
    "a loop's gradient is dropped": ("hidden_state", scan_fission, "flowing", lambda nodes, inputs: set()),
    "what carries gradient is kept of a loop without": ("product", scan_fission.Steps, "_kept", None),
    "a step starts from what it ends with": ("chain", scan_fission._Run, "_before", _unshifted),
    "each step counts one": ("hidden_state", scan_fission.Steps, "_counts", None),
    "any place is the step's own": ("model_in_reverse", scan_fission._Run, "_takes_turns", None),
    "the direction is ignored": ("in_reverse", scan_fission, "scan_of", None),
}


def _broken(owner, attribute):
    right = getattr(owner, attribute)
    return {
        "_kept": lambda steps, loop: [value for node in loop.nodes for value in node.outputs],
        "_counts": lambda steps, i: None if right(steps, i) is None else min(1, abs(right(steps, i))),
        "_takes_turns": lambda run, node, found: node.name == "dynamic_slice",
        "scan_of": lambda equation: (
            (s := right(equation)) and scan_fission.Scan(s.body, s.length, s.consts, s.carry, False, 1)
        ),
    }[attribute]


@pytest.mark.slow
@pytest.mark.parametrize("fault", BROKEN)
def test_faults_are_caught(fault, monkeypatch):
    name, owner, attribute, broken = BROKEN[fault]
    monkeypatch.setattr(owner, attribute, _broken(owner, attribute) if broken is None else broken)
    program = PROGRAMS[name]()
    assert difference(monkeypatch, program, start(program)) > 1e-3


@pytest.mark.slow
def test_numpys_arrays_are_parameters_too():
    """The host takes them; a model that looks into one by a draw is traced."""

    def model():
        z = numpyro.sample("z", dist.Categorical(logits=jnp.zeros(3)))
        numpyro.sample("x", dist.Normal(numpyro.param("w", jnp.zeros(3))[z], 1.0), obs=0.0)

    def guide():
        numpyro.sample("z", dist.Categorical(logits=numpyro.param("a", jnp.zeros(3))))

    params = {"a": np.zeros(3, np.float32), "w": np.ones(3, np.float32)}
    elbo = TraceGrad_ELBO(2, estimators={"z": LocalExpectation()})
    assert np.isfinite(elbo.loss(jax.random.key(0), params, model, guide))
    assert elbo.describe(jax.random.key(0), params, model, guide).rows[0]["site"] == "z"
