"""Baselines: one file for each family. The mathematics only; nothing here knows Pyro or NumPyro."""

from pplgrad.baselines.average import DecayingAverage
from pplgrad.baselines.constant import Constant
from pplgrad.baselines.leave_one_out import LeaveOneOut
from pplgrad.baselines.neural import FunctionBaseline, NeuralBaseline
from pplgrad.baselines.optimal import OptimalConstant
from pplgrad.core.baseline import Baseline

__all__ = [
    "Baseline",
    "Constant",
    "DecayingAverage",
    "FunctionBaseline",
    "LeaveOneOut",
    "NeuralBaseline",
    "OptimalConstant",
]
