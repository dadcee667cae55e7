"""Deprecated: the contract of baselines is imported from `pplgrad.baselines`."""

from pplgrad._moved import moved

__getattr__ = moved(__name__, "pplgrad.baselines", "pplgrad.core.baseline")
