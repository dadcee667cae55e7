"""What a user of NumPyro writes with type annotations; mypy and pyright read it from outside, and nothing runs it."""

from collections.abc import Mapping
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI
from numpyro.optim import Adam

from pplgrad import ELBO, IWAE, Assessment, DisARM, Estimator, LeaveOneOut, ScoreFunction, Watch, __version__
from pplgrad.numpyro import (
    OneHotCategorical,
    TraceGrad_ELBO,
    assess_fit,
    black_box,
    check_gradients,
    choose_estimators,
    config_estimators,
    is_baseline_param,
    split_optimizer,
    summed_posterior,
)


def model(x: jax.Array) -> None:
    z = numpyro.sample("z", dist.Bernoulli(0.3))
    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: jax.Array) -> None:
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", jnp.array(0.5))))


def reward(z: np.ndarray) -> np.ndarray:
    return z**2


x = jnp.array(1.0)
by_site: dict[str, Estimator] = {"z": DisARM(), "w*": ScoreFunction(LeaveOneOut())}
wrapped = config_estimators(guide, by_site, watch=Watch())
assert_type(wrapped(x), None)
elbo = TraceGrad_ELBO(2, estimators=by_site, objective=IWAE())
assert_type(elbo.with_estimators({"z": DisARM()}), TraceGrad_ELBO)
optimizer = split_optimizer(Adam(0.01), optax.adam(0.1), belongs=is_baseline_param)
svi = SVI(model, wrapped, optimizer, elbo)
params: dict[str, jax.Array] = {"a": jnp.array(0.5)}
status: str = check_gradients(model, guide, (x,), elbo=elbo, params=params, reference="score", objective=ELBO()).status
chosen: Mapping[str, Estimator] = choose_estimators(model, guide, (x,), params=params).estimators
assert_type(assess_fit(model, guide, (x,), params=params, samples=100), Assessment)
assert_type(summed_posterior(jax.random.key(0), params, model, guide, x), dict[str, jax.Array])
assert_type(black_box(reward, x), jax.Array)
law: dist.Distribution = OneHotCategorical(logits=x)
assert_type(__version__, str)
