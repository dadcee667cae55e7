"""`check_gradients` and `choose_estimators` for Pyro programs."""
