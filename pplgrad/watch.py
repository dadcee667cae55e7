"""Deprecated: `Watch` is imported from `pplgrad`."""

from pplgrad._moved import moved

__getattr__ = moved(__name__, "pplgrad", "pplgrad.monitoring.watch")
