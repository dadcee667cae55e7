"""Sites, costs, dependencies and the surrogate, in array operations of either library.

Nothing here knows a particular estimator, Pyro or NumPyro.
"""
