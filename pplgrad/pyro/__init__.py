"""pplgrad for Pyro: the ELBO, the guide wrapper, functions of NumPy arrays that are called element by element, a certificate for gradients, a choice by measurement, and a learning rate of their own for learned baselines."""

from pplgrad.pyro._baselines import is_baseline_param
from pplgrad.pyro._black_box import black_box
from pplgrad.pyro._diagnostics.check import check_gradients
from pplgrad.pyro._diagnostics.choose import choose_estimators
from pplgrad.pyro._elbo import TraceGrad_ELBO
from pplgrad.pyro._guide import config_estimators
from pplgrad.pyro._optim import joint_optimizer, split_optimizer

__all__ = [
    "TraceGrad_ELBO",
    "black_box",
    "check_gradients",
    "choose_estimators",
    "config_estimators",
    "is_baseline_param",
    "joint_optimizer",
    "split_optimizer",
]
