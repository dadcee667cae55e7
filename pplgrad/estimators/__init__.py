"""Estimators: one file for each family. The mathematics only; nothing here knows Pyro or NumPyro."""

from pplgrad.estimators.base import Declaration, Estimator
from pplgrad.estimators.reparam import Reparam
from pplgrad.estimators.score import ScoreFunction

__all__ = ["Declaration", "Estimator", "Reparam", "ScoreFunction"]
