"""Deprecated: objectives are imported from `pplgrad`."""

from pplgrad._moved import moved

__getattr__ = moved(__name__, "pplgrad", "pplgrad.core.objectives")
