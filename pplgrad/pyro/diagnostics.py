"""For whoever compares estimators: draws of a gradient at fixed parameters."""

from pplgrad.pyro._diagnostics.gradient_draws import Gradients

__all__ = ["Gradients"]
