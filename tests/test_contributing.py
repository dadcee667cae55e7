"""The contributing page, followed to the letter: its estimator is exact in both libraries, and broken it is not."""

import re
from pathlib import Path

import jax
import numpy as np
import pyro
import pytest
import torch

from pplgrad.numpyro import TraceGrad_ELBO as NumPyroELBO
from pplgrad.pyro import TraceGrad_ELBO as PyroELBO
from pplgrad.testing import in_numpyro, in_pyro
from pplgrad.testing.programs import CASES

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def estimator(change=lambda code: code):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope = {"__name__": "contributed"}
    exec(change(code), scope)
    return scope["HalfLeaveOneOut"]()


def error_in_pyro(chosen, name):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        case = CASES[name]
        make = lambda: PyroELBO(2, estimators=dict.fromkeys(case.latents, chosen))  # noqa: E731
        found, wanted = in_pyro.expected_gradient(case, make, 2), in_pyro.exact_gradient(case)
    finally:
        torch.set_default_dtype(before)
        pyro.clear_param_store()
    return max(np.abs(found[key] - wanted[key]).max() for key in wanted)


def error_in_numpyro(chosen, name):
    with jax.enable_x64(True):
        case = CASES[name]
        elbo = NumPyroELBO(2, estimators=dict.fromkeys(case.latents, chosen))
        found, wanted = in_numpyro.expected_gradient(case, elbo, 2), in_numpyro.exact_gradient(case)
    return max(np.abs(found[key] - wanted[key]).max() for key in wanted)


@pytest.mark.parametrize("error", [error_in_pyro, error_in_numpyro])
def test_the_page_works(error):
    assert error(estimator(), "single") < 1e-9
    assert error(estimator(), "both_kinds_in_one_plate") < 1e-9
    broken = estimator(lambda code: code.replace("- cost) / (cost.shape[0] - 1)", ") / cost.shape[0]"))
    assert error(broken, "single") > 1e-6


def test_the_page_names_real_folders():
    for folder in re.findall(r"`((?:pplgrad|models|examples|tests)[\w/]*/)`", PAGE):
        assert (Path(__file__).parents[1] / folder).is_dir(), folder
