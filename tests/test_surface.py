"""What importing does, and what is public."""

import importlib
import inspect
import subprocess
import sys

import pytest

import pplgrad

WITHOUT_REFERENCES = {"is_baseline_param", "training_state", "load_training_state"}
MODULES = ["pplgrad", "pplgrad.pyro", "pplgrad.numpyro"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pplgrad", ["torch", "jax", "pandas", "xarray", "arviz_stats", "arviz_base", "click", "matplotlib"]),
        ("pplgrad.pyro", ["jax", "numpyro", "flax", "pandas", "xarray", "arviz_stats", "arviz_base"]),
        ("pplgrad.numpyro", ["torch", "pyro", "flax", "equinox", "pandas", "xarray", "arviz_stats", "arviz_base"]),
    ],
)
def test_importing_one_library_does_not_import_the_other(module, absent):
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    # Pyro itself may warn at import; what matters is what is loaded.
    if result.returncode:
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
def test_importing_changes_no_global_setting():
    code = (
        "import torch, pyro, jax; before = (torch.get_default_dtype(), torch.is_grad_enabled(), jax.config.jax_enable_x64,"
        " torch.distributions.Distribution._Distribution__validate_args if False else"
        " torch.distributions.Distribution._validate_args, len(pyro.get_param_store()));"
        "import pplgrad.pyro, pplgrad.numpyro;"
        "after = (torch.get_default_dtype(), torch.is_grad_enabled(), jax.config.jax_enable_x64,"
        " torch.distributions.Distribution._validate_args, len(pyro.get_param_store()));"
        "assert before == after"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", MODULES)
def test_the_public_surface_is_what_all_says(name):
    module = importlib.import_module(name)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for public in module.__all__:
        assert hasattr(module, public)
    visible = {n for n, value in vars(module).items() if not n.startswith("_") and not inspect.ismodule(value)}
    assert visible == set(module.__all__)


@pytest.mark.parametrize("name", ["pyro", "numpyro"])
def test_both_plugins_have_the_same_names(name):
    module = importlib.import_module(f"pplgrad.{name}")
    # Pyro has this distribution and NumPyro does not; NumPyro's optimizers update all parameters at once, and Pyro's do not; a
    # training's state is one tree of NumPyro's; and Pyro draws without keys.
    own = ("OneHotCategorical", "joint_optimizer", "training_state", "load_training_state", "independent_keys")
    shared = [name for name in module.__all__ if name not in own]
    assert shared == [
        "PermutationMatrix",
        "PlackettLuce",
        "Subset",
        "TraceGrad_ELBO",
        "assess_fit",
        "black_box",
        "check_gradients",
        "choose_estimators",
        "config_estimators",
        "is_baseline_param",
        "split_optimizer",
        "summed_posterior",
    ]


@pytest.mark.slow
def test_every_public_docstring_has_its_sections():
    for module in [*MODULES, "pplgrad.testing"]:
        for name in importlib.import_module(module).__all__:
            item = getattr(importlib.import_module(module), name)
            if not callable(item) or item is pplgrad.Estimator:
                continue
            abstract = item in (pplgrad.Baseline, pplgrad.Objective) or (
                inspect.isclass(item) and issubclass(item, Exception)
            )
            wanted = ["Example:\n", ">>>"]
            if not abstract:
                wanted += ["References:\n"] if name not in WITHOUT_REFERENCES else []
                wanted += ["Args:\n"] if inspect.signature(item).parameters else []
            missing = [section for section in wanted if section not in item.__doc__]
            assert not missing, (module, name, missing)
