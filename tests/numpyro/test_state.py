"""What passes through a mutable array is read by what reads the array, and such programs run as they are written."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from pplgrad import EstimatorError, GumbelSoftmax, ScoreFunction
from pplgrad.numpyro import TraceGrad_ELBO
from pplgrad.numpyro import _compat_jax as compat_jax
from pplgrad.numpyro._tracing.provenance import outputs_read
from pplgrad.testing.in_numpyro import array, assert_same, exact_gradient, expected_gradient
from pplgrad.testing.programs import Case

N = 5
PARAMS = {"a": np.array([0.3, -0.4, 0.1, 0.8, -0.2])}


def guide():
    a = numpyro.param("a", array(PARAMS["a"]))
    for i in range(N):
        numpyro.sample(f"z{i}", dist.Bernoulli(logits=a[i]))


def written(ref, z):
    ref[...] = ref[...] * 2 + z


def written_in_a_call(ref, z):
    jax.jit(written)(ref, z)


def written_in_a_loop(ref, z):
    def step(total, _):
        ref[...] = ref[...] + z
        return total, None

    ref[...] = 1.5 * ref[...]
    jax.lax.scan(step, 0.0, None, length=2)


WAYS = {f.__name__: f for f in (written, written_in_a_call, written_in_a_loop)}


def model_that(write):
    def model():
        ref = jax.new_ref(array(1.0))
        for i in range(N):
            write(ref, numpyro.sample(f"z{i}", dist.Bernoulli(0.4)))
            numpyro.sample(f"x{i}", dist.Normal(jnp.log(ref[...]), 1.0), obs=0.3)

    return model


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_exact(way):
    case = Case(way, PARAMS, {f"z{i}": ((), 2) for i in range(N)}, lambda _: (model_that(WAYS[way]), guide))
    elbo = TraceGrad_ELBO(estimators={"z*": ScoreFunction()})
    assert_same(expected_gradient(case, elbo, 1), exact_gradient(case))


def test_forgetting_what_an_array_was_given_is_caught(monkeypatch):
    monkeypatch.setattr("pplgrad.numpyro._tracing.provenance.touches_state", lambda equation: False)
    with pytest.raises(AssertionError):
        test_exact("written")


def test_a_relaxed_value_out_of_a_mutable_array_may_not_be_compared():
    def model():
        ref = jax.new_ref(jnp.zeros(()))
        ref[...] = 1.0 * numpyro.sample("z", dist.Bernoulli(0.4))
        held = jax.new_ref(numpyro.sample("y", dist.Bernoulli(0.4)))
        numpyro.factor("f", jnp.where(held[...] > 0.5, 1.0, ref[...]))

    def guide():
        for name in ("z", "y"):
            numpyro.sample(name, dist.Bernoulli(logits=0.3))

    with pytest.raises(EstimatorError, match="Site 'y' is relaxed, but the program compares"):
        TraceGrad_ELBO(estimators={"*": GumbelSoftmax()}).loss(jax.random.key(0), {}, model, guide)


def test_only_what_touches_state_is_said_to():
    def touching(f):
        return [compat_jax.touches_state(equation) for equation in jax.make_jaxpr(f)(1.0).eqns]

    assert touching(lambda x: jax.lax.scan(lambda c, _: (c * x, c), x, None, length=3)) == [False]
    assert touching(lambda x: jax.new_ref(x)[...]) == [True, True]
    assert touching(lambda x: jax.jit(lambda y: jax.new_ref(y)[...])(x)) == [True]
    assert touching(lambda x: jax.debug.print("{}", x)) == [True]


@pytest.mark.parametrize("flag", ["jax_remat3", "jax_custom_jvp3", "jax_scan3"])
def test_programs_are_read_as_versions_to_come_write_them(flag):
    """By choice JAX keeps marks, loops and derivatives as objects, or loops over mutable arrays: what is read is found all the same."""
    if not hasattr(jax.config, flag):
        pytest.skip(f"this JAX has no {flag}")

    @jax.custom_jvp
    def doubled(x):
        return 2 * x

    doubled.defjvp(lambda x, dx: (doubled(*x), 2 * dx[0]))

    def run(x, y):
        z = compat_jax.tag("z", x)
        last, _ = jax.lax.scan(lambda c, _: (c + doubled(jax.checkpoint(jnp.sin)(z)), None), y, None, length=2)
        return last, jax.checkpoint(lambda x: compat_jax.tag("w", x))(y), y

    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        reads = outputs_read(jax.make_jaxpr(run)(1.0, 2.0))
    finally:
        jax.config.update(flag, before)
    assert [set(found) for found in reads] == [{"z"}, {"w"}, set()]
