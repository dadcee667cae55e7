"""What a user of Pyro writes with type annotations; mypy and pyright read it from outside, and nothing runs it."""

from collections.abc import Mapping
from typing import Any, assert_type

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.optim import PyroOptim

from pplgrad import ELBO, IWAE, Assessment, DisARM, Estimator, LeaveOneOut, ScoreFunction, Watch, __version__
from pplgrad.pyro import (
    PlackettLuce,
    TraceGrad_ELBO,
    assess_fit,
    black_box,
    check_gradients,
    choose_estimators,
    config_estimators,
    is_baseline_param,
    joint_optimizer,
    load_training_state,
    split_optimizer,
    summed_posterior,
    training_state,
)


def model(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
    pyro.sample("x", dist.Normal(z, torch.tensor(1.0)), obs=x)


def guide(x: torch.Tensor) -> None:
    pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.5))))


def reward(z: np.ndarray) -> np.ndarray:
    return z**2


x = torch.tensor(1.0)
by_site: dict[str, Estimator] = {"z": DisARM(), "w*": ScoreFunction(LeaveOneOut())}
wrapped = config_estimators(guide, by_site, watch=Watch())
assert_type(wrapped(x), None)
elbo = TraceGrad_ELBO(2, estimators=by_site, objective=IWAE())
assert_type(elbo.loss(model, wrapped, x), float)
assert_type(elbo.differentiable_loss(model, wrapped, x), torch.Tensor)
assert_type(elbo.with_estimators({"z": DisARM()}), TraceGrad_ELBO)
adam = PyroOptim(torch.optim.Adam, {"lr": 0.01})
optimizer: PyroOptim = split_optimizer(adam, joint_optimizer(adam), belongs=is_baseline_param)
svi = SVI(model, wrapped, optimizer, elbo)
state: dict[str, Any] = training_state(svi)
load_training_state(svi, state, x)
status: str = check_gradients(model, guide, (x,), elbo=elbo, reference="score", objective=ELBO()).status
chosen: Mapping[str, Estimator] = choose_estimators(model, guide, (x,)).estimators
assert_type(assess_fit(model, guide, (x,), samples=100), Assessment)
assert_type(summed_posterior(model, guide, x), dict[str, torch.Tensor])
assert_type(black_box(reward, x), torch.Tensor)
assert_type(PlackettLuce(x).sample(), torch.Tensor)
assert_type(__version__, str)
