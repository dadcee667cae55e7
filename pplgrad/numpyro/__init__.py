"""pplgrad for NumPyro.

`TraceGrad_ELBO` is the ELBO, and `config_estimators` wraps a guide with estimators. `black_box` calls a function of NumPy arrays
element by element. `check_gradients` certifies that a gradient is unbiased, `choose_estimators` selects estimators by
measurement, and `assess_fit` says whether a guide fits. `split_optimizer` gives learned baselines a learning rate of their own, and
`is_baseline_param` recognises their parameters. `summed_posterior` gives the posterior of sites that are summed out. `OneHotCategorical` is a categorical distribution over one-hot vectors.
`independent_keys` lets no draw wait for the key of another. `Subset`, `PlackettLuce` and `PermutationMatrix` are distributions over subsets and rankings.
"""

from pplgrad._extras import without as _without

try:
    from pplgrad.numpyro._baselines import is_baseline_param
    from pplgrad.numpyro._black_box import black_box
    from pplgrad.numpyro._diagnostics.assess import assess_fit
    from pplgrad.numpyro._diagnostics.check import check_gradients
    from pplgrad.numpyro._diagnostics.choose import choose_estimators
    from pplgrad.numpyro._elbo import TraceGrad_ELBO
    from pplgrad.numpyro._guide import config_estimators
    from pplgrad.numpyro._independent_keys import independent_keys
    from pplgrad.numpyro._optim import split_optimizer
    from pplgrad.numpyro._posterior import summed_posterior
    from pplgrad.numpyro._structures import PermutationMatrix, PlackettLuce, Subset
    from pplgrad.numpyro._tracing.relaxations import OneHotCategorical
except ModuleNotFoundError as error:
    raise _without(error, "pplgrad.numpyro", "numpyro", "numpyro", "jax", "jaxlib") from None

__all__ = [
    "OneHotCategorical",
    "PermutationMatrix",
    "PlackettLuce",
    "Subset",
    "TraceGrad_ELBO",
    "assess_fit",
    "black_box",
    "check_gradients",
    "choose_estimators",
    "config_estimators",
    "independent_keys",
    "is_baseline_param",
    "split_optimizer",
    "summed_posterior",
]
