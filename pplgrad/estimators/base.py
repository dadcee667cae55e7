"""Deprecated: the contract of estimators is imported from `pplgrad.estimators`."""

from pplgrad._moved import moved

__getattr__ = moved(__name__, "pplgrad.estimators", "pplgrad.core.estimator")
