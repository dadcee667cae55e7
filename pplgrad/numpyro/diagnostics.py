"""Draws of a gradient at fixed parameters, for the comparison of estimators."""

from pplgrad.numpyro._diagnostics.gradient_draws import Gradients

__all__ = ["Gradients"]
