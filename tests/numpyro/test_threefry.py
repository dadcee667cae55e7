"""Random numbers written out are JAX's own: these tests fail when JAX computes them in another way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pplgrad.numpyro._fusion.threefry import FEW, operation

SHAPES = [(), (1,), (2,), (5,), (2, 3)]


def equation_of(function, key):
    """Return the one equation of a function that splits a key or draws bits."""
    return next(e for e in jax.make_jaxpr(function)(key).jaxpr.eqns if e.primitive.name.startswith("random_"))


def split(shape):
    return lambda key: jax.random.split(key, shape)


def bits(shape, width):
    return lambda key: jax.random.bits(key, shape, f"uint{width}")


FUNCTIONS = [split(shape) for shape in SHAPES[1:]] + [bits(s, w) for s in SHAPES for w in (8, 16, 32, 64)]


def data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_numbers_are_those_of_jax(function):
    keys = jax.random.split(jax.random.key(7), 5)
    run = operation(equation_of(function, keys[0]))
    np.testing.assert_array_equal(data(run(keys[0])[0]), data(function(keys[0])))
    np.testing.assert_array_equal(data(jax.vmap(run)(keys)[0]), data(jax.vmap(function)(keys)))


@pytest.mark.parametrize("number", [0, 7, 2**32 - 1])
def test_a_number_folded_in_gives_the_key_of_jax(number):
    keys, number = jax.random.split(jax.random.key(7), 5), jnp.uint32(number)
    run = operation(next(e for e in jax.make_jaxpr(jax.random.fold_in)(keys[0], number).jaxpr.eqns))
    assert "random_fold_in" not in str(jax.make_jaxpr(run)(keys[0], number))
    np.testing.assert_array_equal(data(run(keys[0], number)[0]), data(jax.random.fold_in(keys[0], number)))
    steps = jnp.arange(5, dtype=jnp.uint32)
    wanted = jax.vmap(jax.random.fold_in, (None, 0))(keys[0], steps)
    np.testing.assert_array_equal(data(jax.vmap(run, (None, 0))(keys[0], steps)[0]), data(wanted))


def is_written_out(function, key):
    run = operation(equation_of(function, key))
    return "random_" not in str(jax.make_jaxpr(run)(key)).replace("random_wrap", "").replace("random_unwrap", "")


def test_what_is_written_out():
    key = jax.random.key(0)
    assert is_written_out(split(2), key) and is_written_out(bits((), 32), key) and is_written_out(bits((3,), 64), key)
    assert not is_written_out(bits((FEW + 1,), 32), key)
    assert not is_written_out(bits((), 8), key)
    assert not is_written_out(split(2), jax.random.key(0, impl="rbg"))


def test_the_other_way_of_counting_is_left_to_jax():
    with jax.threefry_partitionable(False):
        assert not is_written_out(split(2), jax.random.key(0))
