"""What is fused gives what is not: random programs, evaluated both ways, with their derivatives; and faults that these find."""

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.numpyro.fusing import FORWARD, REVERSE, arguments, function_of, gap, programs

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


@pytest.mark.parametrize("direction", [forwards, backwards])
def test_random_programs(direction, constants):
    direction(12)()


@pytest.mark.slow
@pytest.mark.parametrize("direction", [forwards, backwards])
def test_many_random_programs(direction, constants):
    direction(150)()
