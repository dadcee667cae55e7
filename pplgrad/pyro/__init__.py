"""pplgrad for Pyro.

`TraceGrad_ELBO` is the ELBO, and `config_estimators` wraps a guide with estimators. `black_box` calls a function of NumPy arrays
element by element. `check_gradients` certifies that a gradient is unbiased, `choose_estimators` selects estimators by
measurement, and `assess_fit` says whether a guide fits. `split_optimizer` gives learned baselines a learning rate of their own,
`is_baseline_param` recognises their parameters, and `joint_optimizer` updates many parameters in one call. `summed_posterior` gives the
posterior of sites that are summed out. `training_state` and `load_training_state` resume a training exactly. `Subset`, `PlackettLuce` and
`PermutationMatrix` are distributions over subsets and rankings.
"""

from pplgrad._extras import without as _without

try:
    from pplgrad.pyro._baselines import is_baseline_param
    from pplgrad.pyro._black_box import black_box
    from pplgrad.pyro._diagnostics.assess import assess_fit
    from pplgrad.pyro._diagnostics.check import check_gradients
    from pplgrad.pyro._diagnostics.choose import choose_estimators
    from pplgrad.pyro._elbo import TraceGrad_ELBO
    from pplgrad.pyro._guide import config_estimators
    from pplgrad.pyro._optim import joint_optimizer, split_optimizer
    from pplgrad.pyro._posterior import summed_posterior
    from pplgrad.pyro._structures import PermutationMatrix, PlackettLuce, Subset
    from pplgrad.pyro._training import load_training_state, training_state
except ModuleNotFoundError as error:
    raise _without(error, "pplgrad.pyro", "pyro", "pyro", "torch") from None

__all__ = [
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
    "joint_optimizer",
    "load_training_state",
    "split_optimizer",
    "summed_posterior",
    "training_state",
]
