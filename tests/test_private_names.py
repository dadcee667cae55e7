"""No private name of a host is used without a test that names it and says what moved: most are beside each host's other tests."""

from pathlib import Path

import jax.numpy as jnp
import numpyro.distributions as numpyro_dist
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch as dispatch

from pplgrad.pyro._compat import swaps_noted, unwrapped
from tests import private_names

CANARIES = {"numpyro": "tests/numpyro/test_compat.py", "pyro": "tests/pyro/test_compat.py"}


def validates():
    assert all(
        numpyro_dist.Normal(jnp.zeros(2), 1.0, validate_args=flag)._validate_args is flag for flag in (True, False)
    )
    assert all(dist.Normal(torch.zeros(2), 1.0, validate_args=flag)._validate_args is flag for flag in (True, False))
    assert isinstance(torch.distributions.Distribution._validate_args, bool)


def registry():
    module, deep, _ = pyro.settings._REGISTRY["validate_poutine"]
    assert isinstance(module, str) and isinstance(deep, str)


def device():
    with torch.device("meta"):
        (mode,) = torch.overrides._get_current_function_mode_stack()
        assert type(mode) is torch.utils._device.DeviceContext and mode.device.type == "meta"


def function_modes():
    class Mode(TorchFunctionMode):
        pass

    with Mode() as mode:
        assert torch.overrides._get_current_function_mode_stack() == [mode]


def dispatch_mode():
    class Mode(dispatch.TorchDispatchMode):
        pass

    assert dispatch._get_current_dispatch_mode() is None
    with Mode() as mode:
        assert dispatch._get_current_dispatch_mode() is mode


def hooks():
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        assert len(getattr(torch.nn.modules.module, name)) == 0
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *args: None)
    assert len(torch.nn.modules.module._global_forward_hooks) == 1
    handle.remove()


def copies():
    seen = []

    class Mode(dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).to(torch.float64)
    assert torch.ops.aten._to_copy.default in seen


def swaps():
    first, second, seen = torch.zeros(2), torch.ones(2), []
    plain = torch._C._swap_tensor_impl
    with swaps_noted(seen.append):
        torch.utils.swap_tensors(first, second)
    assert [id(x) for x in seen] == [id(first), id(second)] and first.sum() == 2
    assert torch._C._swap_tensor_impl is plain


def functorch():
    x, seen = torch.ones(3), []
    torch.vmap(lambda row: seen.append(unwrapped(row) is x) or torch._C._functorch.get_unwrapped(row).sum())(x)
    assert seen == [True] and unwrapped(x) is x


MOVED = {
    "_validate_args": (validates, "Distributions no longer keep in `_validate_args` whether they validate."),
    "_REGISTRY": (
        registry,
        "pyro.settings no longer keeps (module, attribute, check) for each setting in `_REGISTRY`.",
    ),
    "_device": (device, "torch.utils._device.DeviceContext is no longer what `with torch.device(...)` enters."),
    "_get_current_function_mode_stack": (function_modes, "torch.overrides no longer tells the modes that are on."),
    "_get_current_dispatch_mode": (dispatch_mode, "torch.utils._python_dispatch no longer tells the mode that is on."),
    "_global_forward_hooks and _global_forward_pre_hooks": (hooks, "torch keeps the hooks of all modules elsewhere."),
    "_swap_tensor_impl": (swaps, "torch.utils.swap_tensors no longer calls torch._C._swap_tensor_impl."),
    "_functorch": (functorch, "torch._C._functorch no longer tells which tensor torch.vmap has wrapped."),
    "_to_copy": (copies, "torch moves a tensor by another operation than aten._to_copy."),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVED)
def test_nothing_moved(name):
    check, moved = MOVED[name]
    try:
        check()
    except Exception as error:
        raise AssertionError(moved) from error


@pytest.mark.slow
@pytest.mark.parametrize("folder", CANARIES)
def test_every_private_name_has_a_test(folder):
    text = (private_names.SOURCE.parent / CANARIES[folder]).read_text() + Path(__file__).read_text()
    found = private_names.names(folder)
    assert "_PYRO_STACK" in found
    assert not {name for name in found if name not in text}
