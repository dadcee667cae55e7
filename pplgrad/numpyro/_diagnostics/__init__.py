"""`check_gradients` and `choose_estimators` for NumPyro programs."""
