import jax
import pytest


@pytest.fixture(autouse=True)
def double_precision():
    """Run each test in float64, and put the switch back."""
    with jax.enable_x64(True):
        yield
