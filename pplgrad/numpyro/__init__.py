"""pplgrad for NumPyro: the ELBO, the guide wrapper, functions of NumPy arrays that are called element by element, a certificate for gradients, a choice by measurement, and a learning rate of their own for learned baselines."""

from pplgrad.numpyro._baselines import is_baseline_param
from pplgrad.numpyro._black_box import black_box
from pplgrad.numpyro._diagnostics.check import check_gradients
from pplgrad.numpyro._diagnostics.choose import choose_estimators
from pplgrad.numpyro._elbo import TraceGrad_ELBO
from pplgrad.numpyro._guide import config_estimators
from pplgrad.numpyro._optim import split_optimizer
from pplgrad.numpyro._tracing.relaxations import OneHotCategorical

__all__ = [
    "OneHotCategorical",
    "TraceGrad_ELBO",
    "black_box",
    "check_gradients",
    "choose_estimators",
    "config_estimators",
    "is_baseline_param",
    "split_optimizer",
]
