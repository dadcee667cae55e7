"""What the tests of mathematics set for their own time is put back."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from pplgrad.testing.in_numpyro import isolated


def of_the_process():
    """Return the switch as a thread sees it that no context manager has reached."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: jax.config.jax_enable_x64).result()


@pytest.mark.parametrize("inside", [True, False])
def test_the_precision_of_the_process_is_put_back(inside):
    """Inside of `jax.enable_x64` too, whose switch is that of one thread."""
    before = of_the_process()
    with jax.enable_x64(inside):
        with isolated():
            assert of_the_process()
        assert jnp.zeros(()).dtype == ("float64" if inside else "float32")
    assert of_the_process() == before
