"""What a type checker has to refuse: each line with a mark, and no other."""

import jax
import torch

from pplgrad import IWAE, DisARM, Estimator
from pplgrad.lab import load_study
from pplgrad.numpyro import TraceGrad_ELBO as NumPyroELBO
from pplgrad.numpyro import assess_fit
from pplgrad.pyro import TraceGrad_ELBO, check_gradients, config_estimators, is_baseline_param, summed_posterior


def model(x: torch.Tensor) -> None: ...


def guide(x: torch.Tensor) -> None: ...


x = torch.tensor(1.0)
TraceGrad_ELBO(2, estimators={"z": IWAE()})  # wrong: an objective is no estimator
NumPyroELBO(2, objective=DisARM())  # wrong: an estimator is no objective
config_estimators(guide, {"z": DisARM()})(3)  # wrong: the wrapped guide takes what the guide takes
status: int = check_gradients(model, guide, (x,)).status  # wrong: it is a word
check_gradients(model)  # wrong: without a guide
known: str = is_baseline_param("a")  # wrong: it is a truth value
values: dict[str, int] = summed_posterior(model, guide, x)  # wrong: tensors
evidence: jax.Array = assess_fit(model, guide)  # wrong: an Assessment
load_study(3)  # wrong: no path
estimator: Estimator = DisARM(symmetric="yes")  # wrong: DisARM takes no such argument
